"""`unet-ray export`: files that other programs run without unet_ray, the same to rounding at every size."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY, environment, flags, make_discs, make_model
from PIL import Image

from unet_ray.cli import export as command
from unet_ray.cli import main
from unet_ray.config import UserError
from unet_ray.evaluation import export as exporting
from unet_ray.models import checkpoint
from unet_ray.models.tiles import mirror_margin

NETWORKS = {
    "unet": [],
    "patches": [("model.patch", 4)],
    "attention": [("model.name", "attention_unet"), ("model.num_classes", 3), ("data.mask_values", [0, 1, 2])],
    "encoder": [("model.encoder", "efficientnet_lite0")],
    "unet++": [("model.name", "unet++"), ("model.norm", "group")],
    "valid": [("model.padding", "valid"), ("data.image_size", 36), ("model.num_classes", 2)],
    "channels": [("model.in_channels", 5), ("model.up", "transpose")],
}


def trained(folder: Path, *settings: tuple[str, object]) -> Path:
    images, masks = make_discs(folder / "discs", 12)
    words = ["train", "--images", images, "--masks", masks, "--out", folder / "RUN", "--local", "--no-report"]
    words += flags([*TINY, ("train.epochs", 8), ("data.val_fraction", 0.5), *settings])
    assert CliRunner().invoke(main, [str(each) for each in words]).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Returns a folder with a RUN of one class, its images and masks."""
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """The same, with a network whose weights are most of its file."""
    return trained(tmp_path_factory.mktemp("wide"), ("model.base_channels", 32))


FORMS_AND_WEIGHTS = {"onnx": (".onnx", ".onnx"), "openvino": (".xml", ".bin")}


def needs(form: str) -> None:
    for name in exporting.FORMS[form].needs:
        pytest.importorskip(name)


def test_the_command_knows_every_form():
    assert tuple(exporting.FORMS) == command.FORMS


@pytest.mark.parametrize("form", exporting.FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_the_same_in_every_form_at_every_size(tmp_path, monkeypatch, form, name):
    needs(form)
    model = make_model(tmp_path / "model", *NETWORKS[name])
    runs = []
    real = exporting.FORMS[form].write

    def write(*arguments):
        runs.append(real(*arguments))
        return runs[-1]

    monkeypatch.setitem(exporting.FORMS, form, dataclasses.replace(exporting.FORMS[form], write=write))
    out = tmp_path / f"m{exporting.FORMS[form].suffix}"
    written = exporting.export(str(model), str(out), form)
    assert written.difference <= 1e-4 and not written.real and out.exists()
    network, card = checkpoint.load_model(str(model))
    network.eval()
    least = 65 if form == "torch-export" and name in ("patches", "encoder") else 1  # longer than the step
    for sides in ((32, 48), (37, 51), (64, 33), (68, 100)):
        height, width = (max(least, side) for side in sides)
        if card.model.padding == "valid":
            height, width = (next(n for n in range(side, side + 9) if card.model.fits(n)) for side in (height, width))
        image = torch.randint(0, 256, (1, height, width, card.model.in_channels), dtype=torch.uint8)
        with torch.inference_mode():
            logits = network(mirror_margin(image.permute(0, 3, 1, 2), card.model.margin))
            expected = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)
        actual = runs[0](image.numpy())
        assert actual.shape == tuple(expected.shape)
        assert np.abs(actual - expected.numpy()).max() < 1e-4


@pytest.mark.parametrize("decide", [False, True])
@pytest.mark.parametrize("form", exporting.FORMS)
def test_the_printed_lines_run_without_unet_ray_and_give_its_mask(run, tmp_path, form, decide):
    needs(form)
    name = f"model{exporting.FORMS[form].suffix}"
    arguments = ["export", str(run / "RUN"), "--out", str(tmp_path / name), *(["--decide"] if decide else [])]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "compared with torch on 6 validation images" in result.output
    picture = Image.open(run / "discs/images/a_000.png").resize((90, 60), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "photo.jpg", quality=98)
    lines = result.output.partition("to use it:\n")[2]
    program = lines + "\nimport sys; assert not {'unet_ray', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, env=environment(), timeout=200)
    command = ["predict", str(run / "RUN"), str(tmp_path / "photo.jpg"), "--out", str(tmp_path / "O"), "--local"]
    assert CliRunner().invoke(main, command).exit_code == 0
    ours, theirs = (np.asarray(Image.open(tmp_path / each)) > 0 for each in ("O/masks/photo.png", "mask.png"))
    assert ours.any() and (ours == theirs).mean() > (0.97 if decide else 0.99), "resizing and JPEG's decoding differ"


def test_the_file_beside_it_says_what_a_program_must_know(run, tmp_path):
    exporting.export(str(run / "RUN"), str(tmp_path / "m.pt"), "torchscript")
    about = json.loads((tmp_path / "m.pt.json").read_text())
    assert about["image_size"] == [32, 32] and about["threshold"] == 0.5 and about["mask_values"] == [0, 255]
    assert "any height and width" in about["input"] and "[1, 1, height, width]" in about["output"]
    assert 0 < about["validation"]["val_dice"] <= 1 and about["largest_difference_from_torch"] <= 1e-4


def test_the_chosen_threshold_is_told_and_used(run, tmp_path):
    card = checkpoint.read_card(str(run / "RUN/model"))
    checkpoint.save_choice(str(run / "RUN/model"), checkpoint.THRESHOLD, card, {"threshold": 0.2})
    exporting.export(run / "RUN", tmp_path / "m.pt", decide=True)
    about = json.loads((tmp_path / "m.pt.json").read_text())
    (run / "RUN/model/threshold.json").unlink()
    assert about["threshold"] == 0.2 and about["largest_share_of_differing_pixels"] <= 1e-4


def test_a_file_that_differs_is_refused_and_not_written(run, tmp_path, monkeypatch):
    wrong = dataclasses.replace(
        exporting.FORMS["torchscript"],
        write=lambda work: lambda image: work.portable(torch.from_numpy(image)).detach().numpy() + 1e-3,
    )
    monkeypatch.setitem(exporting.FORMS, "torchscript", wrong)
    with pytest.raises(UserError, match=r"refused: torchscript differs from torch by 0\.001"):
        exporting.export(str(run / "RUN"), str(tmp_path / "m.pt"), "torchscript")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "m.onx"], "ends with one of .onnx (onnx)"),
        (["--out", "m.pt", "--to", "onnx"], "ends with .onnx"),
        (["--out", "m.pt", "--precision", "fp16"], "fp16 is for --to onnx or openvino"),
        (["--out", "m.xml", "--precision", "int8"], "int8 is for --to onnx, and `unet-ray quantize` makes one for"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["export", str(run / "RUN"), *arguments])
    assert result.exit_code == 2 and words in result.output and "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxruntime: pip install 'unet_ray\[export\]'"):
        exporting.export(str(run / "RUN"), str(tmp_path / "m.onnx"), "onnx")


@pytest.mark.parametrize(
    ("form", "precision", "at_most"), [("onnx", "fp16", 0.55), ("onnx", "int8", 0.35), ("openvino", "fp16", 0.55)]
)
def test_fewer_bytes_and_the_same_masks(wide, tmp_path, form, precision, at_most):
    needs(form)
    suffix, weights = FORMS_AND_WEIGHTS[form]
    sizes = []
    for each in ("fp32", precision):
        written = exporting.export(str(wide / "RUN"), str(tmp_path / f"{each}{suffix}"), form, precision=each)
        bound = exporting.MAY_DIFFER_IN_CLASS if each == "int8" else exporting.MAY_DIFFER
        assert written.real and written.difference <= bound[each]
        sizes.append((tmp_path / f"{each}{weights}").stat().st_size)
    assert sizes[1] < at_most * sizes[0]


def test_int8_needs_training_images(tmp_path):
    needs("onnx")
    model = make_model(tmp_path / "model")
    with pytest.raises(UserError, match="needs the training images of a run"):
        exporting.export(str(model), str(tmp_path / "m.onnx"), "onnx", precision="int8")
