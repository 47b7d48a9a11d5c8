"""`unet-ray masks`: annotations as files, once each, also after kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_annotations import INNER, SIZE, SQUARE, coco_file, masks_of, photos

from unet_ray.cli import main
from unet_ray.config import UserError
from unet_ray.inference.drawn_masks import write_masks
from unet_ray.ray_backend.session import LOCAL, Runtime


@pytest.fixture
def annotated(tmp_path) -> tuple[Path, Path]:
    photos(tmp_path / "images", [f"{'ab'[n % 2]}/{n:03d}.jpg" for n in range(120)])
    shapes = {f"{'ab'[n % 2]}/{n:03d}.jpg": [(1, [SQUARE], 0), (3, [INNER], 0)] for n in range(110)}
    coco_file(tmp_path / "c.json", shapes)
    return tmp_path / "images", tmp_path / "c.json"


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_masks_hold_the_class_ids_that_a_training_reads(annotated, tmp_path):
    images, annotations = annotated
    found = write_masks(str(images), str(annotations), str(tmp_path / "out"), overlay=True, runtime=LOCAL)
    assert found == (110, ("background", "car", "tree"))
    assert json.loads((tmp_path / "out/classes.json").read_text())["classes"] == ["background", "car", "tree"]
    drawn = masks_of(images, annotations, classes=("background", "car", "tree"))
    assert len(drawn) == 110
    for key, mask in drawn.items():
        with Image.open(tmp_path / f"out/masks/{key}.png") as stored:
            assert (np.asarray(stored) == mask).all()
        with Image.open(tmp_path / f"out/overlays/{key}.jpg") as picture:
            assert picture.size == SIZE[::-1]


def test_ray_and_one_process_write_the_same_files(annotated, tmp_path, ray_cluster):
    images, annotations = annotated
    for name, runtime in (("ray", Runtime()), ("local", LOCAL)):
        write_masks(str(images), str(annotations), str(tmp_path / name), classes=("tree",), runtime=runtime)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert len(contents(tmp_path / "ray")) == 111


def test_masks_that_are_there_are_kept_and_missing_ones_are_written(annotated, tmp_path):
    images, annotations = annotated
    out = tmp_path / "out"
    write_masks(str(images), str(annotations), str(out), runtime=LOCAL)
    before = contents(out)
    first, *others = sorted((out / "masks").rglob("*.png"))
    first.unlink()
    times = [path.stat().st_mtime_ns for path in others]
    write_masks(str(images), str(annotations), str(out), runtime=LOCAL)
    assert contents(out) == before and [path.stat().st_mtime_ns for path in others] == times
    with pytest.raises(UserError, match="masks of other annotations or classes"):
        write_masks(str(images), str(annotations), str(out), classes=("car",), runtime=LOCAL)
    coco_file(annotations, {"a/000.jpg": [(1, [INNER], 0)]})
    with pytest.raises(UserError, match="masks of other annotations or classes"):
        write_masks(str(images), str(annotations), str(out), runtime=LOCAL)


def test_killed_three_times_it_ends_with_the_same_bytes(annotated, tmp_path):
    images, annotations = annotated
    command = [
        sys.executable,
        "-m",
        "unet_ray",
        "masks",
        annotations,
        "--images",
        images,
        "--local",
        "--overlay",
        "--out",
    ]
    subprocess.run([*map(str, command), str(tmp_path / "whole")], check=True, capture_output=True)
    out = tmp_path / "killed"
    for number in (5, 30, 70):
        process = subprocess.Popen([*map(str, command), str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(list(out.glob("masks/*/*.png"))) < number and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*map(str, command), str(out)], check=True, capture_output=True)
    whole = contents(tmp_path / "whole")
    assert {name: data for name, data in contents(out).items() if not name.endswith(".tmp")} == whole


def test_wrong_things_are_one_line(annotated, tmp_path):
    images, annotations = annotated
    for arguments, message in (
        ([images, "--images", images], "no annotations that can be read"),
        ([annotations, "--images", tmp_path / "nothing"], "no such folder or file"),
        ([annotations, "--images", images, "--classes", "bus"], "no class 'bus': there are car, tree"),
        ([annotations, "--images", images, "--classes", ","], "--classes is empty"),
    ):
        ran = CliRunner().invoke(main, ["masks", *map(str, arguments), "--local", "--out", str(tmp_path / "o")])
        assert ran.exit_code == 2 and message in ran.output and "\n" not in ran.output.strip(), ran.output
        assert not (tmp_path / "o").exists()
