"""Trainings with killed processes and full disks end as an undisturbed training does.

Figures are compared to rounding, because the number of workers changes on the way.
"""

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import ray.exceptions
import ray.train
import torch
from conftest import SLOW, epochs_done, flags, make_discs, until
from runs import lines

from unet_ray.config import TrainConfig, UserError
from unet_ray.data import storage
from unet_ray.models import checkpoint
from unet_ray.ray_backend.session import LOCAL
from unet_ray.ray_backend.training import WorkersLostError, raise_failure, run_workers
from unet_ray.ray_backend.worker_errors import WorkerError, read_errors, writing_errors
from unet_ray.settings import load_train_config
from unet_ray.training.run import Callbacks, train
from unet_ray.training.setup import explained_errors

# Without dropout, whose draws are each rank's own: the number of workers differs. test_loop.py resumes with it.
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


def assert_close(run: Path, other: Path) -> None:
    ours, theirs = lines(run), lines(other)
    assert [line["epoch"] for line in ours] == [line["epoch"] for line in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one["val_pixels"] == two["val_pixels"]
        for name in ("train_loss", "val_loss", "learning_rate"):
            assert one[name] == pytest.approx(two[name], rel=2e-3), (one["epoch"], name)


@pytest.fixture(scope="module")
def undisturbed(discs, tmp_path_factory) -> Path:
    """Runs the same training in one process, undisturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(config_for(discs), str(run), runtime=LOCAL)
    return run


@pytest.mark.cluster
def test_a_killed_worker_and_a_killed_node_cost_their_epochs_and_nothing_else(machines, discs, undisturbed, tmp_path):
    machines.complete()
    run = tmp_path / "run"
    two_to_one = [("compute.cpus_per_worker", 2), ("compute.workers", [1, 2])]  # one on each node
    process = machines.command("train", "--out", run, "--no-report", *flags(settings(discs, *two_to_one)))
    until(lambda: epochs_done(run) >= 3, process)
    [worker, *_] = next(iter(machines.working("RayTrainWorker").values()))
    killed_after = epochs_done(run)
    worker.kill()
    until(lambda: epochs_done(run) >= killed_after + 3 and len(machines.working("RayTrainWorker")) == 2, process)
    machines.kill(next(iter(machines.working("RayTrainWorker"))))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    first, second = map(int, re.findall(r"lost a worker .*: going on after epoch (\d+)", output))
    assert killed_after <= first < second < EPOCHS
    assert [int(epoch) for epoch in re.findall(r"^epoch +(\d+)/24  loss", output, re.MULTILINE)] == [*range(1, 25)]
    assert [line["workers"] for line in lines(run)] == [2] * second + [1] * (EPOCHS - second)
    assert_close(run, undisturbed)
    assert not (run / ".ray").exists()


def is_training(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.mark.cluster
def test_a_killed_driver_is_resumed(discs, undisturbed, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "unet_ray", "train", "--out", str(run)]
    command += flags(settings(discs))
    with tempfile.TemporaryDirectory(prefix="ur-", ignore_cleanup_errors=True) as temporary:
        # The path is short, for Ray's sockets. The folder is separate, so that a killed driver's files go with it.
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
            # The workers see that the driver is gone, and end. Ray's agents take up to a minute more, too long to wait.
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
from unet_ray.config import TrainConfig, UserError
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
    with pytest.raises(UserError, match=r"raise train\.accumulate") as error, explained_errors("run", TrainConfig()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
    assert "\n" not in str(error.value)


# --- what a failure of workers comes to ---


def failed_fit(**failures: BaseException) -> ray.train.WorkerGroupError:
    """Returns the error that Ray Train raises when these ranks have failed."""
    return ray.train.WorkerGroupError("text", {int(rank[-1]): failure for rank, failure in failures.items()})


def raised_by_workers(folder: Path, *errors: BaseException) -> dict[int, WorkerError]:
    """Returns the errors that the driver reads after each rank has raised its error."""
    for rank, error in enumerate(errors):
        with pytest.raises(type(error)), writing_errors(str(folder), rank):
            raise error
    return read_errors(str(folder))


PEER_IS_GONE = RuntimeError("Connection closed by peer")


def test_lost_workers_may_be_retried(tmp_path):
    died = ray.exceptions.ActorDiedError()
    for reported in ({}, raised_by_workers(tmp_path, PEER_IS_GONE)):
        with pytest.raises(WorkersLostError, match="actor died unexpectedly") as error:
            raise_failure(failed_fit(rank0=PEER_IS_GONE, rank1=died) if reported else failed_fit(rank1=died), reported)
        assert "\n" not in str(error.value)
    with pytest.raises(WorkersLostError, match="RuntimeError: Connection closed by peer"):
        raise_failure(failed_fit(rank0=PEER_IS_GONE), reported)


def test_what_a_worker_says_that_the_user_must_fix_is_one_line(tmp_path):
    reported = raised_by_workers(tmp_path, PEER_IS_GONE, UserError("a.png: fix or remove it"))
    with pytest.raises(UserError) as error:
        raise_failure(failed_fit(rank0=PEER_IS_GONE), reported)
    assert str(error.value) == "a.png: fix or remove it"
    # The error of a Ray task is a UserError too, whose text is a traceback.
    in_task = ray.exceptions.RayTaskError("task", "Traceback …", UserError("b.png: fix it")).as_instanceof_cause()
    assert WorkerError.of(in_task).message == "b.png: fix it"


def test_an_error_that_comes_again_is_raised_as_it_is(tmp_path):
    reported = raised_by_workers(tmp_path, PEER_IS_GONE, TypeError("a bug"))
    failure = failed_fit(rank0=PEER_IS_GONE)
    with pytest.raises(ray.train.WorkerGroupError) as error:
        raise_failure(failure, reported)
    assert error.value is failure
    assert (reported[1].kind, reported[1].message) == ("program", "TypeError: a bug")
    assert "in raised_by_workers" in reported[1].traceback


def test_a_worker_that_cannot_write_its_error_is_heard_too(tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_bytes", full)
    assert raised_by_workers(tmp_path, UserError("run: No space left on device: free some space")) == {}
    text = "Traceback …\n  raise UserError(\nunet_ray.config.UserError: run: No space left on device: free some space\n"
    with pytest.raises(UserError) as error:
        raise_failure(failed_fit(rank0=Exception(text)), {})
    assert str(error.value) == "run: No space left on device: free some space"


def test_workers_that_did_not_start_are_an_error_with_the_remedy():
    placement = ray.train.ControllerError(TimeoutError("The worker group startup timed out after 60 seconds"))
    with pytest.raises(UserError, match=r"did not start the workers .*timed out.*: use fewer --workers"):
        raise_failure(placement, {})
    gpu = ray.exceptions.RayTaskError("execute", "Traceback …", UserError("torch can't use the GPU"))
    with pytest.raises(UserError, match=r"^torch can't use the GPU$"):
        raise_failure(ray.train.ControllerError(gpu.as_instanceof_cause()), {})


def failing_on_rank_1(error: Exception):
    """Fails on rank 1 while rank 0 waits for it; a worker for `run_workers`."""

    def worker(_device):
        if torch.distributed.get_rank() == 1:
            raise error
        torch.distributed.all_reduce(torch.zeros(1))

    return worker


def test_the_error_of_one_worker_decides_although_the_others_lose_their_connection(ray_cluster, tmp_path):
    def run(worker):
        options = {"workers": 2, "device": "cpu", "cpus_per_worker": 1, "while_running": lambda: None}
        run_workers(worker, str(tmp_path), ".ray", **options)

    stale = tmp_path / ".ray/errors-old/error-0.json"
    stale.parent.mkdir(parents=True)
    stale.write_text(json.dumps({"kind": "program", "message": "TypeError: of an earlier attempt", "traceback": ""}))
    with pytest.raises(UserError, match=r"^a\.png: fix or remove it$"):
        run(failing_on_rank_1(UserError("a.png: fix or remove it")))
