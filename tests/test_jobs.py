"""jobs/ as plain scripts and under `ray job submit`; the README's commands."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import TINY, make_discs
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
QUICK = [argument for name, value in TINY for argument in ("--set", f"{name}={value}")]

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled", **more}


@pytest.fixture(scope="module")
def head():
    """A head started as on one's own machine; its dashboard's address."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ur-", ignore_cleanup_errors=True) as temporary:
        process = subprocess.Popen(
            [
                str(BIN / "ray"),
                "start",
                "--head",
                "--block",
                "--num-cpus=2",
                "--node-ip-address=127.0.0.1",
                f"--port={free_port()}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={port}",
                f"--ray-client-server-port={free_port()}",
                f"--dashboard-agent-listen-port={free_port()}",
                f"--temp-dir={temporary}",
                '--system-config={"num_workers_soft_limit": 10}',
                "--disable-usage-stats",
            ],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 120
            while subprocess.run(
                [str(BIN / "ray"), "job", "list", "--address", address], env=environment(), capture_output=True
            ).returncode:
                assert process.poll() is None and time.monotonic() < deadline, "the head did not start"
                time.sleep(1)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)  # its own processes end one after the other
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def submit(address: str, *entrypoint: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            str(BIN / "ray"),
            "job",
            "submit",
            "--address",
            address,
            "--working-dir",
            ".",
            "--",
            "python",
            *map(str, entrypoint),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_jobs_submitted_to_a_cluster_succeed_or_fail_with_their_command(head, tmp_path):
    images, masks = make_discs(tmp_path / "discs", 12)
    run, out = tmp_path / "run", tmp_path / "out"
    trained = submit(head, "jobs/train.py", "--images", images, "--masks", masks, "--out", run, *QUICK)
    assert trained.returncode == 0, trained.stdout[-3000:] + trained.stderr[-3000:]
    assert "succeeded" in trained.stdout + trained.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    predicted = submit(head, "jobs/predict.py", run, images, "--out", out, "--format", "png,parquet")
    assert predicted.returncode == 0, predicted.stdout[-3000:] + predicted.stderr[-3000:]
    assert pq.read_table(out / "manifest.parquet").num_rows == len(list((out / "masks").iterdir())) == 12
    failed = submit(head, "jobs/predict.py", tmp_path / "no-model", images, "--out", out)
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
