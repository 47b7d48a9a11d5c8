"""Prediction under kill -9 of the command, of the model's actor and of Ray's node: the result is that of a run which
was left alone."""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import environment, make_bad, make_model, make_photos, recorded

pytestmark = pytest.mark.cluster
FORMATS = "png,parquet,rle,kaggle,coco"


def command(model: Path, folder: Path, out: Path, *more: str) -> list[str]:
    arguments = [str(model), str(folder), "--out", str(out), "--format", FORMATS, "--precision", "fp32"]
    return [sys.executable, "-m", "unet_ray", "predict", *arguments, "--json", *more]


def predict(model: Path, folder: Path, out: Path, *more: str, **variables: str) -> dict:
    arguments = command(model, folder, out, *more)
    done = subprocess.run(arguments, env=environment(**variables), capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return json.loads(done.stdout)


def contents(out: Path) -> dict[str, bytes]:
    """Returns all that must be the same: the files, and the manifest's rows without the time that each image took.

    A kill between a file's writing and its renaming leaves a hidden file, which nothing reads.
    """
    found = {
        str(p.relative_to(out)): p.read_bytes()
        for p in out.rglob("*")
        if p.is_file()
        and p.name not in ("summary.json", "report.html", "lock.json")
        and p.parent.name != "manifest.parquet"
        and not (p.name.startswith(".") and p.name.endswith(".tmp"))
    }
    for file in (out / "manifest.parquet").iterdir():
        found[file.name] = pq.read_table(file).drop_columns("milliseconds").to_pylist()
    return found


def victims(driver: psutil.Process) -> dict[str, list[psutil.Process]]:
    below = driver.children(recursive=True)
    return {
        "driver": [driver],
        "actor": [p for p in below if any("_ModelActor" in word for word in p.cmdline()[:1])],
        "raylet": [p for p in below if p.name() == "raylet"],
    }


def kill_in_the_middle(arguments: list[str], out: Path, kinds: list[str], wait: float) -> dict[Path, int] | None:
    """Starts the command and kills the processes of each kind in turn, `wait` seconds after new images were done.

    Returns what was recorded as done just before the last kill; None if the command ended sooner.
    """
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    driver = psutil.Process(process.pid)
    before = None
    try:
        for kind in kinds:
            known = len(recorded(out))
            deadline = time.monotonic() + 200
            while process.poll() is None and len(recorded(out)) == known:
                assert time.monotonic() < deadline, "no image was done"
                time.sleep(0.02)
            time.sleep(wait)
            if process.poll() is not None:
                return None
            workers = [p for p in driver.children(recursive=True) if "ray::" in "".join(p.cmdline()[:1])]
            targets = victims(driver)[kind]
            assert targets, kind
            before = recorded(out)
            for target in targets:
                target.kill()
        process.wait(300)
        psutil.wait_procs(workers, timeout=10)
        return before
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Slow enough to be killed at work."""
    settings = [("model.base_channels", 16), ("model.depth", 4), ("data.image_size", 128)]
    return make_model(tmp_path_factory.mktemp("model"), *settings)


def test_killed_twice_it_ends_with_the_same_bytes_and_does_no_image_twice(model, tmp_path):
    folder, out = make_photos(tmp_path / "images", 400), tmp_path / "killed"
    make_bad(folder / "bad")
    with tempfile.TemporaryDirectory(prefix="ur-") as temporary:  # a short path, for Ray's sockets
        whole = predict(model, folder, tmp_path / "whole", TMPDIR=temporary)
        assert not list(Path(temporary).glob("unet-ray-*")), "a command ends its own Ray and removes its folder"
    assert (whole["images"], whole["ok"], whole["failed"]) == (410, 400, 10)
    generator, done = random.Random(0), {}
    for kinds, local in ((["driver"], True), (["actor", "raylet"], False)):
        arguments = command(model, folder, out, *["--local"] * local)
        before = kill_in_the_middle(arguments, out, kinds, generator.uniform(0, 0.5))
        assert before is not None, "it ended before it could be killed"
        assert done.items() <= before.items(), "what was done stays as it was"
        done = before
    assert len(done) > 50
    last = predict(model, folder, out, "--local")
    assert (last["images"], last["ok"], last["failed"]) == (410, 400, 10)
    assert last["already_done"] >= len(done)
    assert done.items() <= recorded(out).items()
    assert contents(out) == contents(tmp_path / "whole")
    assert not any((out / ".work/done").iterdir())
