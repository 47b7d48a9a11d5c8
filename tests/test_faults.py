"""What can befall a training: processes and nodes killed, a full disk. It ends as one that was left alone.

The figures are compared to rounding where the number of workers changed on the way, and exactly where it did not.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray.train
import torch
from conftest import SLOW, epochs_done, make_discs

from unet_ray.config import UserError
from unet_ray.models import checkpoint
from unet_ray.ray_backend.session import LOCAL
from unet_ray.settings import load_train_config
from unet_ray.training.on_ray import _raise_what_repeats
from unet_ray.training.run import Callbacks, train
from unet_ray.training.setup import explain_shortages

pytestmark = pytest.mark.slow
TIMES = {"seconds", "train_seconds", "wait_seconds", "images_per_second"}
# Without dropout, whose draws are each rank's own: the number of workers differs. test_engine.py resumes with it.
SETTINGS = [
    *SLOW,
    ("augment.elastic", 2),
    ("train.schedule", "cosine"),
    ("train.ema", 0.9),
    ("compute.cpus_per_worker", 1),
]
EPOCHS = dict(SETTINGS)["train.epochs"]


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> tuple[Path, Path]:
    return make_discs(tmp_path_factory.mktemp("discs"), 21, size=128)


def settings(discs, *more):
    images, masks = discs
    return [("data.images", str(images)), ("data.masks", str(masks)), *SETTINGS, *more]


def config_for(discs, *more):
    return load_train_config(settings=settings(discs, *more))


def lines(run: Path) -> list[dict]:
    text = (run / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text.splitlines()]


def when_epoch_is_done(run: Path, epoch: int, act) -> threading.Thread:
    """Does `act` in the middle of the epoch after `epoch`."""

    def wait():
        deadline = time.monotonic() + 240
        while epochs_done(run) < epoch:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def assert_close(run: Path, other: Path) -> None:
    ours, theirs = lines(run), lines(other)
    assert [line["epoch"] for line in ours] == [line["epoch"] for line in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one["val_pixels"] == two["val_pixels"]
        for name in ("train_loss", "val_loss", "learning_rate"):
            assert one[name] == pytest.approx(two[name], rel=2e-3), (one["epoch"], name)


@pytest.fixture(scope="module")
def undisturbed(discs, tmp_path_factory) -> Path:
    """The same training in one process, left alone."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(config_for(discs), str(run), runtime=LOCAL)
    return run


def ray_workers() -> list[psutil.Process]:
    """The processes of the trainings that this one runs through Ray."""
    return [p for p in psutil.Process().children(recursive=True) if is_training(p)]


def test_a_killed_worker_costs_its_epoch_and_nothing_else(ray_cluster, discs, undisturbed, tmp_path):
    run, told, retried = tmp_path / "run", [], []
    killer = when_epoch_is_done(run, 3, lambda: ray_workers()[0].send_signal(signal.SIGKILL))
    callbacks = Callbacks(
        on_epoch=lambda line: told.append(line["epoch"]), on_retry=lambda why, epoch: retried.append((why, epoch))
    )
    train(config_for(discs, ("compute.workers", 2)), str(run), callbacks=callbacks)
    killer.join()
    assert len(retried) == 1 and 3 <= retried[0][1] < EPOCHS, retried
    assert told == list(range(1, EPOCHS + 1))
    assert_close(run, undisturbed)
    assert {line["workers"] for line in lines(run)} == {2}
    assert not (run / ".ray").exists()


def is_training(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_a_killed_driver_is_resumed(discs, undisturbed, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "unet_ray", "train", "--out", str(run)]
    command += [part for name, value in settings(discs) for part in ("--set", f"{name}={value}")]
    with tempfile.TemporaryDirectory(prefix="ur-", ignore_cleanup_errors=True) as temporary:
        # Short, for Ray's sockets; of its own, so that what the killed one leaves is cleaned up.
        process = subprocess.Popen(command, env={**os.environ, "TMPDIR": temporary}, stdout=subprocess.DEVNULL)
        started: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + 240
            while epochs_done(run) < 2 and process.poll() is None and time.monotonic() < deadline:
                if not started and epochs_done(run):
                    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
            # The workers see that the driver is gone and end; Ray's agents take up to a minute more, not waited for.
            deadline = time.monotonic() + 30
            while (training_on := [p for p in started if is_training(p)]) and time.monotonic() < deadline:
                time.sleep(0.2)
            for left in filter(psutil.Process.is_running, started):
                left.kill()
    assert started and not training_on
    done = epochs_done(run)
    assert 2 <= done < EPOCHS
    ran = []
    callbacks = Callbacks(on_epoch=lambda line: ran.append(line["epoch"]))
    train(config_for(discs), str(run), runtime=LOCAL, resume=True, callbacks=callbacks)
    assert ran == list(range(done + 1, EPOCHS + 1))
    assert_close(run, undisturbed)


FULL_DISK = """
import json, resource, sys
from unet_ray.config import UserError
from unet_ray.ray_backend.session import LOCAL
from unet_ray.settings import load_train_config
from unet_ray.training.run import Callbacks, train

settings, out = json.loads(sys.argv[1])

def on_epoch(line):
    if line["epoch"] == 3:  # from now on the system writes no file beyond 10,000 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

try:
    train(load_train_config(settings=settings), out, runtime=LOCAL, callbacks=Callbacks(on_epoch=on_epoch))
except UserError as error:
    print(error)
    sys.exit(2)
"""


def test_a_disk_that_is_full_leaves_the_last_checkpoint_whole(discs, undisturbed, tmp_path):
    run = tmp_path / "run"
    arguments = json.dumps([settings(discs), str(run)])
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, arguments], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 2, result.stderr[-3000:]
    assert f"{run}: File too large: free some space, then go on with --resume" in result.stdout
    assert epochs_done(run) == 3
    assert not list(run.rglob("*.tmp"))
    checkpoint.load_model(str(run / "model"))
    train(config_for(discs), str(run), runtime=LOCAL, resume=True)
    assert_close(run, undisturbed)


def test_a_full_gpu_is_one_line_with_the_remedy():
    with pytest.raises(UserError, match=r"raise train\.accumulate") as error, explain_shortages("run"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
    assert "\n" not in str(error.value)


def failed_workers(*failures: BaseException) -> ray.train.WorkerGroupError:
    return ray.train.WorkerGroupError("text", dict(enumerate(failures)))


def test_what_would_come_again_is_raised_and_what_was_lost_is_not():
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    died = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
    broken = UserExceptionWithTraceback(RuntimeError("Connection closed by peer"), "Traceback …")
    _raise_what_repeats(failed_workers(died))
    _raise_what_repeats(failed_workers(broken, died))
    mine = UserExceptionWithTraceback(UserError("a.png: mend or remove it"), "Traceback …")
    with pytest.raises(UserError, match="mend or remove it"):
        _raise_what_repeats(failed_workers(broken, mine))
    placement = ray.train.ControllerError(TimeoutError("The worker group startup timed out after 60 seconds"))
    with pytest.raises(UserError, match=r"did not start the workers .*timed out.*: use fewer --workers"):
        _raise_what_repeats(placement)
    bug = UserExceptionWithTraceback(TypeError("a bug"), "Traceback …")
    with pytest.raises(ray.train.WorkerGroupError):
        _raise_what_repeats(failed_workers(broken, bug))
