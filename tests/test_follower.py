"""The driver of a training on other machines reads the run directory."""

import json
import logging

import pytest

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.training import follower as module
from unet_ray.training.follower import Follower
from unet_ray.training.progress import EpochProgress, progress_writer, read_progress


def test_each_epoch_is_reported_once_and_progress_only_of_the_epoch_that_runs(tmp_path):
    epochs, steps = [], []
    follower = Follower(str(tmp_path), lambda line: epochs.append(line["epoch"]), lambda p: steps.append(p.epoch))

    def wrote(*, lines, progress=None):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"epoch": n + 1}) + "\n" for n in range(lines)))
        if progress is not None:
            with progress_writer(str(tmp_path)) as write:
                write(EpochProgress(progress, 1, 10, 0.5, 20.0))
            assert read_progress(str(tmp_path)) == EpochProgress(progress, 1, 10, 0.5, 20.0)
        follower.look()

    wrote(lines=0)
    assert (epochs, steps) == ([], [])
    wrote(lines=0, progress=1)
    wrote(lines=0)  # the same progress
    assert (epochs, steps) == ([], [1])
    wrote(lines=2)
    wrote(lines=2, progress=2)  # progress of an epoch that is already reported
    wrote(lines=3, progress=4)
    assert (epochs, steps) == ([1, 2, 3], [1, 4])


def test_a_bucket_that_does_not_answer_for_minutes_ends_no_training(tmp_path, monkeypatch, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    epochs: list[int] = []
    follower = Follower(str(tmp_path), lambda line: epochs.append(line["epoch"]), lambda _progress: None)
    read, clock = storage.read_bytes, [0.0]

    def unreachable(_location: str) -> bytes:
        raise OSError(5, "AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(storage, "read_bytes", unreachable)
    for seconds in range(0, 600, 2):
        clock[0] = float(seconds)
        follower.look()
    [line] = caplog.messages
    assert "NETWORK_CONNECTION" in line and "the workers train on" in line
    monkeypatch.setattr(storage, "read_bytes", read)
    follower.look()
    assert epochs == [1]

    def lost() -> None:
        raise UserError("another run has taken over")

    follower.check = lost
    with pytest.raises(UserError, match="taken over"):
        follower.look()


def test_results_that_are_there_are_read_patiently(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    clock, failures = [0.0], [OSError(5, "no answer"), UserError("s3://b: no answer")]
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def read() -> int:
        if failures:
            raise failures.pop()
        return 7

    assert storage.patiently(read, "RUN") == 7 and len(caplog.messages) == 2
    failures[:] = [OSError(5, "no answer")] * 1000
    with pytest.raises(OSError, match="no answer"):
        storage.patiently(read, "RUN")
    assert storage.PATIENCE_SECONDS <= clock[0] < storage.PATIENCE_SECONDS + 30
