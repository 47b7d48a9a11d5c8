"""Runs the stages of prediction and evaluation in this process; `ray_backend.inference` runs them on Ray."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch

from unet_ray.data.chunks import Chunk, Stage

CORES_PER_DECODER, MOST_DECODERS = 4, 8
"""At most one thread decodes for so many cores, but two on fewer, and never more than so many: each holds a chunk."""
WAITING = 0.1
"""Share of its time that the network's thread may wait for images before one more thread decodes."""


def run_here(
    numbers: Sequence[int], preprocess: Callable[[int], Chunk], model: Callable[[], Stage], postprocess: Stage
) -> Iterator[Chunk]:
    """Runs the model on this thread, and on others preprocesses the next chunks and postprocesses the previous one.

    One thread preprocesses; more do so as long as the model waits for them. Yields what `postprocess` returns, in the
    order of `numbers`. Skips chunks without rows.
    """
    segment = model()
    threads = torch.get_num_threads()
    most = _most_decoders()
    with _one_thread_each(most) as preprocessing, _one_thread_each(1) as postprocessing:
        decoded = _decoded(numbers, preprocess, preprocessing, most)
        pending = None
        try:
            for chunk in decoded:
                if not len(chunk["path"]):
                    continue
                segmented = segment(chunk)
                if pending is not None:
                    yield pending.result()
                pending = postprocessing.submit(postprocess, segmented)
            if pending is not None:
                yield pending.result()
        finally:
            preprocessing.shutdown(wait=False, cancel_futures=True)
            torch.set_num_threads(threads)


def _most_decoders() -> int:
    return min(MOST_DECODERS, max(2, (os.cpu_count() or 1) // CORES_PER_DECODER))


def _one_thread_each(workers: int) -> ThreadPoolExecutor:
    """Returns threads with one torch thread each: more would compete with the network's for the same cores.
    `set_num_threads` sets the thread's own number, and the default of threads that start later."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


def _decoded(
    numbers: Sequence[int], preprocess: Callable[[int], Chunk], threads: ThreadPoolExecutor, most: int
) -> Iterator[Chunk]:
    """Yields the chunks in order. Preprocesses one ahead, and one more each time that the caller had to wait for long,
    up to `most`, the number of threads."""
    upcoming: deque[Future[Chunk]] = deque()
    left, ahead = iter(numbers), 1

    def top_up() -> None:
        upcoming.extend(threads.submit(preprocess, number) for number in islice(left, ahead - len(upcoming)))

    returned = None
    top_up()
    while upcoming:
        asked = time.perf_counter()
        chunk = upcoming.popleft().result()
        now = time.perf_counter()
        # The first chunk has to be waited for.
        if returned is not None and now - asked > WAITING * (now - returned):
            ahead = min(ahead + 1, most)
        returned = now
        top_up()
        yield chunk
