"""The stages in one process: in order, and decoded by more threads where the model waits."""

import threading
import time

import numpy as np
import pytest

from unet_ray.inference import local
from unet_ray.inference.local import run_here


def chunk(number: int) -> dict[str, np.ndarray]:
    return {"path": np.array([b"x"]), "number": np.array([number])}


def numbers_of(chunks) -> list[int]:
    return [int(each["number"][0]) for each in chunks]


def test_more_threads_decode_where_the_model_waits():
    both = threading.Barrier(2)

    def slow(number):
        if number in (10, 11):
            both.wait(60)  # neither goes on before the other has come
        time.sleep(0.01)
        return chunk(number)

    assert numbers_of(run_here(range(16), slow, lambda: lambda given: given, lambda given: given)) == [*range(16)]


def test_one_thread_decodes_where_the_model_is_slower():
    inside, most, lock = 0, 0, threading.Lock()

    def fast(number):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.001)
        with lock:
            inside -= 1
        return chunk(number)

    def model():
        def wait(given):
            time.sleep(0.2)
            return given

        return wait

    assert numbers_of(run_here(range(6), fast, model, lambda given: given)) == [*range(6)]
    assert most == 1


def test_chunks_without_rows_are_left_out_and_errors_arrive():
    def preprocess(number):
        if number == 5:
            raise OSError("gone")
        return chunk(number) if number % 2 else {"path": np.zeros(0, object)}

    chunks = run_here(range(9), preprocess, lambda: lambda given: given, lambda given: given)
    assert int(next(chunks)["number"][0]) == 1
    with pytest.raises(OSError, match="gone"):
        numbers_of(chunks)
    assert local._most_decoders() >= 2
