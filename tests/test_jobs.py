"""jobs/ as plain scripts and under `ray job submit`; the README's demo."""

import json
import re
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from conftest import BIN, ROOT, SLOW, TINY, environment, epochs_done, flags, make_discs
from PIL import Image


@pytest.mark.cluster
def test_submitted_jobs_are_stopped_resumed_succeed_and_fail_as_their_commands_do(machines, tmp_path):
    machines.complete()
    images, masks = make_discs(tmp_path / "discs", 21, size=128)
    run, out = tmp_path / "run", tmp_path / "out"
    train = ["python", "jobs/train.py", "--images", images, "--masks", masks, "--out", run, "--no-report"]
    train += flags(SLOW)
    assert machines.submit(*train, options=["--submission-id", "first", "--no-wait"]).returncode == 0

    def job(*arguments: str) -> str:
        command = [str(BIN / "ray"), "job", *arguments, "--address", machines.dashboard, "first"]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout

    deadline = time.monotonic() + 200
    while epochs_done(run) < 2:
        assert time.monotonic() < deadline, job("logs")
        time.sleep(0.1)
    job("stop")
    while "STOPPED" not in job("status").upper():
        assert time.monotonic() < deadline, job("status")
    assert "Stopped. What is finished is kept" in job("logs")
    done = epochs_done(run)
    assert 2 <= done < 24
    resumed = machines.submit(*train, "--resume")
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert "succeeded" in resumed.stdout + resumed.stderr
    assert f"epoch {done + 1:>3}/24" in resumed.stdout and f"epoch {done:>3}/24" not in resumed.stdout
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").open()] == [*range(1, 25)]
    predict = ["python", "jobs/predict.py", "--no-report", "--out", out]
    predicted = machines.submit(*predict, run, images, "--format", "png,parquet")
    assert predicted.returncode == 0, predicted.stdout[-3000:] + predicted.stderr[-3000:]
    assert pq.read_table(out / "manifest.parquet").num_rows == len(list((out / "masks").iterdir())) == 21
    failed = machines.submit(*predict, tmp_path / "no-model", images)
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

    where = ["--images", images, "--masks", masks, "--out", "run"]
    assert script("train", *where, *flags(TINY), "--no-report").returncode == 0
    assert json.loads(script("evaluate", "run", "--json").stdout)["images"] == 1
    (images / "broken.png").write_bytes(b"")
    assert script("predict", "run", images, "--out", "out", "--no-report").returncode == 1
    assert script("predict", "run", "nowhere", "--out", "other").returncode == 2


def test_the_demo_of_the_readme_ends_with_dice_above_09(tmp_path):
    command = [sys.executable, "-m", "unet_ray", "demo", "--local"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    dice = float(re.search(r"Dice on 10 unseen scenes of unseen cars: (\d\.\d+)", result.stdout).group(1))
    assert dice > 0.9
    demo = tmp_path / "demo"
    assert all(Image.open(path).size == (480, 320) for path in (demo / "masks/masks").glob("*.png"))
    assert pq.read_table(demo / "masks/manifest.parquet").num_rows == 10
    assert (demo / "run/report.html").exists()
    assert result.stdout.count("\n  unet-ray ") == 3
    repeated = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert repeated.returncode == 2 and "is not empty" in repeated.stderr
