"""One run at a time writes into a folder: a lock that is not renewed stops its run before another takes over."""

import contextlib
import dataclasses
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, make_discs, make_model

from unet_ray.config import PredictConfig, UserError
from unet_ray.data import output_lock as module
from unet_ray.data import storage
from unet_ray.data.inputs import ImageFile
from unet_ray.data.output_lock import Holder, Process, output_lock
from unet_ray.inference.chunk_size import RowCost
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.naming import Naming
from unet_ray.inference.predict import predict
from unet_ray.inference.stages import Prediction
from unet_ray.inference.survey import Survey
from unet_ray.inference.write import Write
from unet_ray.models.run_files import LOCK
from unet_ray.ray_backend.session import LOCAL
from unet_ray.settings import load_train_config
from unet_ray.training.run import Callbacks, train

NAME = ".work/lock.json"


@pytest.fixture
def no_file_locks(monkeypatch):
    """As in a bucket, with a hundredth of the times."""
    import fcntl

    def unsupported(_file: object, _operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    _shorten(monkeypatch)


def _shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.05), ("STOP", 0.4), ("DEAD", 1.0), ("LOOK", 0.05)):
        monkeypatch.setattr(module, f"{name}_SECONDS", seconds)


def wait_until(condition: Callable[[], object], seconds: float = 20) -> float:
    """Returns after how many seconds the condition held."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, "it took too long"
        time.sleep(0.01)
    return time.monotonic() - begun


def fails(function: Callable[[], object]) -> bool:
    try:
        function()
    except UserError:
        return True
    return False


def error_of(function: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        function()
    return str(error.value)


def test_a_second_run_is_refused_and_a_file_lock_ends_with_its_process(tmp_path, monkeypatch):
    _shorten(monkeypatch)
    code = (
        "from unet_ray.data.output_lock import output_lock\n"
        f"with output_lock({str(tmp_path)!r}, {NAME!r}):\n  print('locked', flush=True)\n  input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    here = socket.gethostname()
    remedy = (
        rf"another run \(process {other.pid} on {here}, since 2.*stop it \(`kill {other.pid}` on {here}\), or choose"
    )
    refused = pytest.raises(UserError, match=remedy)
    with refused, output_lock(str(tmp_path), NAME):
        pass
    other.kill()
    other.wait()
    with output_lock(str(tmp_path), NAME) as lock:
        lock.check()
        lock.holder.check()
    assert not (tmp_path / NAME).exists()
    assert fails(lock.holder.check), "a process that outlives its run must not record"


@pytest.mark.parametrize("file_locks", [True, False])
def test_of_many_runs_at_once_only_one_is_inside(tmp_path, monkeypatch, request, file_locks):
    if not file_locks:
        request.getfixturevalue("no_file_locks")
    inside, most, entered = [], [], []

    def run(rounds: int) -> None:
        for _ in range(rounds):
            with contextlib.suppress(UserError), output_lock(str(tmp_path), NAME) as lock:
                inside.append(lock)
                most.append(len(inside))
                time.sleep(0.003)
                lock.check()
                lock.holder.check()
                entered.append(lock)
                inside.remove(lock)

    threads = [threading.Thread(target=run, args=(25 if file_locks else 3,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and entered


@pytest.mark.parametrize(("seconds", "survives"), [(0.1, True), (0.25, True), (1.2, False)])
def test_beats_that_fail_for_a_while_are_tried_again_and_then_the_run_stops(
    tmp_path, no_file_locks, monkeypatch, seconds, survives
):
    write, until = storage.write_bytes, []

    def unreliable(location: str, data: bytes, **options: bool) -> None:
        if until and time.monotonic() < until[0]:
            raise OSError(5, "the bucket does not answer")
        write(location, data, **options)

    monkeypatch.setattr(storage, "write_bytes", unreliable)
    with output_lock(str(tmp_path), NAME) as lock:
        until.append(time.monotonic() + seconds)
        if survives:
            time.sleep(seconds + 0.5)
            lock.check()
            beat = (tmp_path / NAME).read_text()
            wait_until(lambda: (tmp_path / NAME).read_text() != beat)
            return
        assert wait_until(lambda: fails(lock.check)) < module.DEAD_SECONDS - 0.2, "before another may begin"
        with pytest.raises(
            UserError, match=r"not renewed for \d+ s \(.*does not answer\).*: this run stops.*the same command"
        ):
            lock.check()
        assert "does not answer" in error_of(lock.holder.check), "though nobody has taken the file yet"
        with output_lock(str(tmp_path), NAME) as other:  # waits DEAD_SECONDS
            assert fails(lock.holder.check)
            other.check()
            other.holder.check()
    assert not (tmp_path / NAME).exists()


def test_a_lock_whose_thread_died_is_no_lock(tmp_path, no_file_locks):
    with output_lock(str(tmp_path), NAME) as lock:
        lock.stop.set()
        lock.thread.join()
        lock.check()
        wait_until(lambda: fails(lock.check))


def test_a_run_that_slept_does_not_renew_what_another_may_have_taken(tmp_path, no_file_locks, monkeypatch):
    with output_lock(str(tmp_path), NAME) as lock:
        now = module._now
        monkeypatch.setattr(module, "_now", lambda: now() + 3600)
        lock.thread.join(5)
        content = (tmp_path / NAME).read_text()
        assert not lock.thread.is_alive() and fails(lock.check)
        lock.write(99)
        assert (tmp_path / NAME).read_text() == content
        # Nobody has taken over, but somebody may at any moment.
        assert "not renewed for 36" in error_of(lock.holder.check)
        pickle.loads(pickle.dumps(lock.holder)).check()  # a worker sees the file alone


def test_a_process_that_was_stopped_after_its_look_looks_again(tmp_path, monkeypatch):
    _shorten(monkeypatch)
    read, stops = storage.read_bytes, [True]

    def stopped_after(location: str) -> bytes:
        data = read(location)
        if stops.pop() if stops else False:
            now = module._now
            monkeypatch.setattr(module, "_now", lambda: now() + 3600)
            (tmp_path / NAME).write_text('{"id": "other", "host": "b", "pid": 7, "since": "later"}')
        return data

    with output_lock(str(tmp_path), NAME) as lock:
        monkeypatch.setattr(storage, "read_bytes", stopped_after)
        assert "another run (process 7 on b, since later) has taken over" in error_of(lock.holder.check)
    assert json.loads((tmp_path / NAME).read_text())["id"] == "other", "the other keeps its lock"


def test_a_write_that_never_returns_does_not_keep_the_run_from_ending(tmp_path, no_file_locks, monkeypatch):
    write, answer = storage.write_bytes, threading.Event()

    def hangs(location: str, data: bytes, **options: bool) -> None:
        answer.wait(20)
        write(location, data, **options)

    with output_lock(str(tmp_path), NAME) as lock:
        monkeypatch.setattr(storage, "write_bytes", hangs)
        wait_until(lambda: fails(lock.check))
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    answer.set()
    lock.thread.join()


def test_the_clock_on_the_wall_may_jump(tmp_path, no_file_locks, monkeypatch):
    real = time.time
    with output_lock(str(tmp_path), NAME) as lock:
        for hours in (1, -1):
            monkeypatch.setattr(time, "time", lambda hours=hours: real() + 3600 * hours)
            time.sleep(0.6)
            lock.check()
            with pytest.raises(UserError, match="another run"), output_lock(str(tmp_path), NAME):
                pass


def test_a_process_has_ended_only_if_that_is_certain():
    here = Process.here()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    number = ended.pid
    ended.wait()
    assert not here.has_ended()
    assert dataclasses.replace(here, pid=number).has_ended()
    assert dataclasses.replace(here, begun="1").has_ended(), "another process has its number now"
    for change in ({"boot": "another"}, {"pids": "a container"}, {"host": "elsewhere"}, {"boot": "", "pids": ""}):
        assert not dataclasses.replace(here, pid=number, **change).has_ended()


def test_a_dead_holder_is_followed_at_once_on_its_machine_and_later_elsewhere(tmp_path, no_file_locks):
    (tmp_path / NAME).parent.mkdir()
    for change, least in (({"begun": "1"}, 0.0), ({"boot": "another"}, 0.9)):
        dead = {"id": "dead", **dataclasses.asdict(dataclasses.replace(Process.here(), **change)), "since": "then"}
        (tmp_path / NAME).write_text(json.dumps(dead))
        begun = time.monotonic()
        with output_lock(str(tmp_path), NAME):
            assert least <= time.monotonic() - begun < least + 2
    (tmp_path / NAME).write_text('{"id": "of an earlier version", "host": "gone", "pid": 1, "since": "then"}')
    with output_lock(str(tmp_path), NAME) as lock:
        lock.holder.check()


def test_a_lock_that_cannot_be_read_for_a_moment_is_read_again(tmp_path, monkeypatch):
    _shorten(monkeypatch)
    with output_lock(str(tmp_path), NAME) as lock:
        read, failures = storage.read_bytes, [OSError(5, "no answer"), FileNotFoundError(2, "not yet here")]

        def unreliable(location: str) -> bytes:
            if failures:
                raise failures.pop()
            return read(location)

        monkeypatch.setattr(storage, "read_bytes", unreliable)
        lock.holder.check()
        assert not failures


# --- fencing ---


def test_a_first_run_that_lost_its_lock_while_it_listed_takes_nothing_back(tmp_path, discs):
    model, out = make_model(tmp_path / "model"), tmp_path / "out"
    theirs = out / "manifest.parquet" / "part-000000.parquet"

    def images():
        yield ImageFile("a", str(discs[0] / "a_000.png"), "a.png", 1, 1)
        lock = out / NAME
        lock.write_text(json.dumps({**json.loads(lock.read_text()), "id": "another"}))
        theirs.parent.mkdir()
        theirs.write_bytes(b"of the other run")

    config = PredictConfig(model=str(model), inputs=(str(discs[0]),), out=str(out))
    with pytest.raises(UserError, match="has taken over"):
        predict(config, images=images(), runtime=LOCAL)
    assert theirs.read_bytes() == b"of the other run" and (out / "settings.json").exists()


def test_a_run_that_lost_its_lock_records_nothing(tmp_path, monkeypatch):
    _shorten(monkeypatch)
    (tmp_path / "a.jpg").write_bytes(b"x")
    found = [ImageFile("a", str(tmp_path / "a.jpg"), "a.jpg", 1, 1)]
    (tmp_path / ".work").mkdir()
    (tmp_path / NAME).write_text('{"id": "me", "host": "a", "pid": 1, "since": "now"}')
    ledger = Ledger(str(tmp_path), (), holder=Holder(str(tmp_path), str(tmp_path / NAME), "me"))

    def list_inputs() -> None:
        survey = Survey(ledger, RowCost(1, 1.0))
        survey.add_all(found, Naming("{stem}.png"))
        survey.close()

    list_inputs()
    chunk = {**ledger.load(0), "redone": np.array([True])}
    (tmp_path / "a.png").write_bytes(b"a mask")
    result = {"path": ["a.jpg"], "status": ["ok"], "error": [""], "height": [1], "width": [1], "output": ["a.png"]}
    result |= {
        "pixels": [[1]],
        "confidence": [1.0],
        "uncertainty": [0.0],
        "milliseconds": [1.0],
        "size": [1],
        "mtime_ns": [1],
    }
    result["checksum"] = ["c0ffee"]
    ledger.record(0, np.array([0]), result)
    other = '{"id": "other", "host": "b", "pid": 7, "since": "later"}'
    (tmp_path / NAME).write_text(other)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    lost = r"another run \(process 7 on b, since later\) has taken over .*: this run stops"
    found = [dataclasses.replace(found[0], mtime_ns=2)]
    masks = Write(ledger, (SimpleNamespace(files=lambda output: [output]),), None, None)
    writes = [
        list_inputs,
        lambda: masks(chunk, iter([Prediction(None, "broken", {})])),
        lambda: ledger.record(0, np.array([0]), result),
        lambda: ledger.merge_shard(0),
    ]
    for write in writes:
        with pytest.raises(UserError, match=lost):
            write()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / NAME).write_text('{"id": "me"}')
    ledger.merge_shard(0)
    assert (tmp_path / "manifest.parquet").exists()


def test_a_prediction_beside_one_that_just_begins_is_told_so(tmp_path):
    out = tmp_path / "out"
    config = PredictConfig(model=str(make_model(tmp_path / "model")), inputs=(str(tmp_path),), out=str(out))
    with output_lock(str(out), NAME):
        (out / "settings").touch()  # as if half written
        assert "another run" in error_of(lambda: predict(config, runtime=LOCAL))
    assert "other files" in error_of(lambda: predict(config, runtime=LOCAL))


def test_two_trainings_never_write_into_one_run(tmp_path, monkeypatch):
    _shorten(monkeypatch)
    images, masks = make_discs(tmp_path / "discs", 6)
    out = tmp_path / "run"
    settings = [*TINY, ("data.images", str(images)), ("data.masks", str(masks)), ("train.epochs", 3)]
    config = load_train_config(settings=settings)
    refused: list[str] = []

    def another(_line: dict) -> None:
        """While the first trains, a second is refused; then the first loses its lock."""
        for resume in (False, True):
            with pytest.raises(UserError) as error:
                train(config, str(out), runtime=LOCAL, resume=resume)
            refused.append(str(error.value))
        (out / LOCK).write_text('{"id": "other", "host": "b", "pid": 7, "since": "later"}')

    with pytest.raises(UserError, match=r"another run \(process 7 on b, since later\) has taken over.*with --resume"):
        train(config, str(out), runtime=LOCAL, callbacks=Callbacks(on_epoch=another))
    assert [f"another run (process {os.getpid()} on " in text for text in refused] == [True, True]
    assert [f"`kill {os.getpid()}`" in text for text in refused] == [True, True]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1, "nothing was written after it was lost"
    Path(out / LOCK).unlink(missing_ok=True)
    assert train(config, str(out), runtime=LOCAL, resume=True).epochs == 3
    assert not (out / LOCK).exists()


def test_a_folder_that_ray_deletes_after_the_job_is_refused(tmp_path):
    folder = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    folder.mkdir(parents=True)
    refused = pytest.raises(UserError, match=r"which Ray deletes .* such as /shared/masks, or a bucket")
    with refused, output_lock(str(folder / "masks"), "lock.json"):
        raise AssertionError("it is locked")
