"""jobs/ as plain scripts and under `ray job submit`; the README's commands."""

import json
import re
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from conftest import BIN, ROOT, SLOW, TINY, Machines, environment, epochs_done, make_discs
from PIL import Image

QUICK = [argument for name, value in TINY for argument in ("--set", f"{name}={value}")]

pytestmark = pytest.mark.slow


def test_submitted_jobs_are_stopped_go_on_succeed_and_fail_as_their_command(tmp_path):
    images, masks = make_discs(tmp_path / "discs", 21, size=128)
    run, out = tmp_path / "run", tmp_path / "out"
    settings = [argument for name, value in SLOW for argument in ("--set", f"{name}={value}")]
    train = ["python", "jobs/train.py", "--images", images, "--masks", masks, "--out", run, *settings]
    with Machines() as cluster:
        cluster.head(2)
        assert cluster.submit(*train, options=["--submission-id", "first", "--no-wait"]).returncode == 0

        def job(*arguments: str) -> str:
            command = [str(BIN / "ray"), "job", *arguments, "--address", cluster.dashboard, "first"]
            return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout

        deadline = time.monotonic() + 200
        while epochs_done(run) < 2:
            assert time.monotonic() < deadline, job("logs")
            time.sleep(0.1)
        job("stop")
        while "STOPPED" not in job("status").upper():
            assert time.monotonic() < deadline, job("status")
        assert "Stopped. What is finished is kept" in job("logs")
        before = epochs_done(run)
        assert 2 <= before < 24
        again = cluster.submit(*train, "--resume")
        assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
        assert "succeeded" in again.stdout + again.stderr
        assert f"epoch {before + 1:>3}/24" in again.stdout and f"epoch {before:>3}/24" not in again.stdout
        assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").open()] == [*range(1, 25)]
        predicted = cluster.submit("python", "jobs/predict.py", run, images, "--out", out, "--format", "png,parquet")
        assert predicted.returncode == 0, predicted.stdout[-3000:] + predicted.stderr[-3000:]
        assert pq.read_table(out / "manifest.parquet").num_rows == len(list((out / "masks").iterdir())) == 21
        failed = cluster.submit("python", "jobs/predict.py", tmp_path / "no-model", images, "--out", out)
        assert failed.returncode == 1
        assert "no such folder" in failed.stdout and "failed" in (failed.stdout + failed.stderr).lower()


def test_jobs_are_plain_scripts_with_the_commands_exit_codes(tmp_path):
    images, masks = make_discs(tmp_path / "discs", 6)

    def script(name, *arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments), "--local"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    assert script("train", "--images", images, "--masks", masks, "--out", "run", *QUICK).returncode == 0
    assert json.loads(script("evaluate", "run", "--json").stdout)["images"] == 1
    (images / "broken.png").write_bytes(b"")
    assert script("predict", "run", images, "--out", "out").returncode == 1
    assert script("predict", "run", "nowhere", "--out", "other").returncode == 2


def test_the_demo_of_the_readme_ends_with_dice_above_09(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "unet_ray", "demo"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    dice = float(re.search(r"Dice on 10 unseen scenes of unseen cars: (\d\.\d+)", result.stdout).group(1))
    assert dice > 0.9
    demo = tmp_path / "demo"
    assert all(Image.open(path).size == (480, 320) for path in (demo / "masks/masks").glob("*.png"))
    assert pq.read_table(demo / "masks/manifest.parquet").num_rows == 10
    assert result.stdout.count("\n  unet-ray ") == 3
    again = subprocess.run([sys.executable, "-m", "unet_ray", "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "is not empty" in again.stderr
