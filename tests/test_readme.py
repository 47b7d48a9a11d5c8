"""The README's Python and the examples in every command's --help, run."""

import re
import shlex
import shutil

import nibabel
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, TINY, flags, make_discs, make_model
from test_milesial import StandIn

from unet_ray.cli import main

README = (ROOT / "README.md").read_text()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    images, masks = make_discs(tmp_path / "discs", 12, size=64)
    for name in ("train", "photos"):
        shutil.copytree(images, tmp_path / name)
    for name in ("train_masks", "photo_masks"):
        shutil.copytree(masks, tmp_path / name)
    return tmp_path


def test_the_python_of_the_readme_runs(here, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
    assert "(300, 400)" in capsys.readouterr().out
    assert (here / "mask.png").exists() and (here / "RUN/report.html").exists()
    assert len(list((here / "MASKS/masks").iterdir())) == 12


def examples(command: str) -> list[str]:
    """Returns the commands below `Example:` in a command's help."""
    text = main.commands[command].help.partition("Example:\n")[2]
    return [line.strip() for line in text.split("\n\n")[0].splitlines() if line.strip()]


SMALL = ["--local", "--no-report", *flags(TINY)]
MORE = {
    "train": SMALL,
    "predict": ["--local", "--no-report"],
    "evaluate": ["--local"],
    "doctor": ["--no-timing"],
    "slices": [],
    "recipes": [],
    "import": [],
    "report": [],
}
"""Flags that the tests add to each example, so that it is quick and needs no Ray."""


def test_every_command_has_an_example():
    assert {name for name in main.commands if not examples(name)} == set()
    # The demo's is run by test_jobs.py, that of quantize by test_quantization.py.
    assert set(MORE) | {"demo", "quantize"} == set(main.commands)


@pytest.mark.parametrize("command", MORE)
def test_the_examples_of_the_help_run(command, here):
    if command in ("predict", "evaluate"):
        for name in ("RUN", "OTHER_RUN"):
            make_model(here / name)
    if command == "report":
        run("train", ["--images", "train", "--masks", "train_masks", "--out", "RUN", *SMALL])
    if command == "import":
        torch.save(StandIn(3, 2).state_dict(), "checkpoint_epoch5.pth")
    if command == "slices":
        patient = here / "BraTS2020_TrainingData/BraTS20_001"
        for number in (1, 2):
            folder = patient.with_name(f"BraTS20_{number:03d}")
            folder.mkdir(parents=True)
            volume = np.random.default_rng(number).integers(0, 900, (32, 32, 4)).astype(np.int16)
            for name in ("flair", "t1", "t1ce", "t2"):
                nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / f"{folder.name}_{name}.nii.gz")
            labels = np.array([0, 1, 2, 4], np.uint8)[volume // 225 % 4]  # as BraTS numbers its classes
            nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / f"{folder.name}_seg.nii.gz")
    for example in examples(command):
        program, name, *arguments = shlex.split(example.partition(" > ")[0])
        assert program == "unet-ray"
        more = MORE[name] if name != "train" or command == "train" else [*SMALL, *MULTI]
        run(name, [*arguments, *more])


MULTI = ["--set", "model.in_channels=4", "--set", "model.num_classes=4"]


def run(name: str, arguments: list[str]) -> None:
    result = CliRunner().invoke(main, [name, *map(str, arguments)])
    assert result.exit_code == 0, result.output
