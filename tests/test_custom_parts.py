"""Networks, losses and augmentations of the user's own: trained, predicted, exported, and what each failure says."""

import contextlib
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import TINY, environment, flags, make_discs
from PIL import Image

import unet_ray
from unet_ray import custom_parts
from unet_ray.cli import main
from unet_ray.config import ModelConfig, OptimizationConfig, TrainConfig, UserError
from unet_ray.data.masks import border_map
from unet_ray.models import build, checkpoint
from unet_ray.settings import load_train_config
from unet_ray.training import custom, losses

NET, LOSS, CUSTOM = "model.name=mine:Net", "train.loss=mine:soft+dice", "augment.custom=mine:speckle"


def examples() -> str:
    """Returns the code in the module's docstring."""
    text = inspect.getdoc(custom_parts)
    blocks = ["\n".join(lines) for lines in _indented(text.splitlines())]
    return "\n\n\n".join(textwrap.dedent(block) for block in blocks if "unet-ray train" not in block)


def _indented(lines: list[str]) -> list[list[str]]:
    blocks, block = [], []
    for line in [*lines, "end"]:
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line)
        elif block:
            blocks.append(block)
            block = []
    return blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images, masks, and the docstring's examples in mine.py."""
    folder = tmp_path_factory.mktemp("custom parts")
    make_discs(folder / "discs", 12)
    (folder / "mine.py").write_text(examples())
    return folder


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Begins each test like a new process: nothing of the user's is imported or permitted."""
    monkeypatch.setattr(custom_parts, "_permitted", set())
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("mine", "bad"):
        sys.modules.pop(name, None)


def command(folder: Path, *arguments: object) -> Result:
    """Runs `unet-ray` in the folder, in this process."""
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else _chdir(folder):
        result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert "Traceback" not in result.output
    return result


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:  # Python 3.10 has no contextlib.chdir
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def training(out: str, *more: object) -> list[object]:
    data = ["--images", "discs/images", "--masks", "discs/masks", "--out", out, "--no-report"]
    return ["train", *data, *flags(TINY), *more]


def as_user(folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """Runs `unet-ray` as its script does: in a process of its own, with the folder not on Python's path."""
    code = "import sys; sys.path[:] = [p for p in sys.path if p]; from unet_ray.cli import main; main()"
    words = [sys.executable, "-c", code, *map(str, arguments)]
    env = environment(**variables)
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(folder):
    """A run with the three examples, trained in one process."""
    done = as_user(folder, *training("RUN", "--local", "--set", NET, "--set", LOSS, "--set", CUSTOM))
    assert done.returncode == 0, done.stderr
    assert "unet-ray predict RUN FOLDER --out MASKS --allow-code" in done.stdout
    return folder / "RUN"


def test_on_ray_an_exception_names_its_line_and_two_workers_end_with_the_same_network(run, folder, ray_cluster):
    here = {"RAY_ADDRESS": ray_cluster.get_runtime_context().gcs_address}
    command = training("RAY", "--workers", 2, "--set", NET, "--set", f"{LOSS}+bad:third", "--set", CUSTOM)
    (folder / "bad.py").write_text(MODULE)
    done = as_user(folder, *command, **here)
    assert done.returncode == 2, done.stderr
    assert f"bad.py, line {AT_STEP_3}, in third: ValueError: at step 3" in done.stderr.splitlines()[-1]
    (folder / "bad.py").write_text(MODULE.replace("calls > 3", "calls > 9999"))
    done = as_user(folder, *command, "--resume", **here)
    assert done.returncode == 0, done.stderr
    losses = [
        [json.loads(line)["train_loss"] for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (run, folder / "RAY")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    done = as_user(folder, "predict", "RAY", "discs/images", "--out", "RAY_MASKS", "--allow-code", "--json", **here)
    assert done.returncode == 0 and json.loads(done.stdout)["ok"] == 12, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "RUN", "discs/images", "--out", "MASKS", "--local"],
        ["evaluate", "RUN", "--local"],
        ["export", "RUN", "--out", "net.pt"],
        ["select", "RUN", "more", "--count", 1, "--out", "PICKS", "--local"],
    ],
)
def test_each_command_asks_for_permission_and_works_with_it(run, folder, arguments):
    (folder / "more").mkdir(exist_ok=True)
    shutil.copy(folder / "discs/images/a_000.png", folder / "more/new.png")
    done = command(folder, *arguments)
    assert done.exit_code == 2 and "runs code that is no part of unet_ray, mine:Net" in done.output
    assert "mine" not in sys.modules
    done = command(folder, *arguments, "--allow-code")
    assert done.exit_code == 0, done.output


def test_the_report_needs_permission_for_its_scores_only(run, folder):
    assert command(folder, "report", "RUN").exit_code == 0
    assert "runs code that is no part of unet_ray" in (run / "report.html").read_text()
    assert "mine" not in sys.modules
    assert command(folder, "report", "RUN", "--allow-code").exit_code == 0
    assert "runs code that is no part of unet_ray" not in (run / "report.html").read_text()


def test_what_it_gives_is_the_own_network(run, folder, monkeypatch):
    with pytest.raises(UserError, match="--allow-code"):
        unet_ray.load_network(run)
    monkeypatch.syspath_prepend(folder)
    network = unet_ray.load_network(run, allow_code=True)
    image = np.asarray(Image.open(folder / "discs/images/a_000.png"))
    logits = network(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
    found = unet_ray.Segmenter(run, allow_code=True, precision="fp32")(image, probabilities=True)
    expected = logits.sigmoid()[0, 0].detach().numpy()
    assert np.abs(found.probabilities[0] / 255 - expected).max() < 0.01
    assert network.head is network.network.head
    assert network.embedding(torch.zeros(1, 3, 7, 9, dtype=torch.uint8)).shape == (1, 4)


def test_a_file_of_settings_needs_permission_or_the_names_again(run, folder):
    words = training("AGAIN", "--local", "--config", "RUN/config.yaml")
    done = command(folder, *words)
    assert done.exit_code == 2 and "the settings name code that is no part of unet_ray, mine:Net" in done.output
    assert "mine" not in sys.modules
    with pytest.raises(UserError, match="allow_code=True"):
        unet_ray.train(config=run / "config.yaml", out=folder / "AGAIN", local=True)
    assert command(folder, *words, "--set", NET, "--set", LOSS, "--set", CUSTOM).exit_code == 0
    shutil.rmtree(folder / "AGAIN")
    assert command(folder, *words, "--allow-code").exit_code == 0


def test_a_name_is_typed_only_if_all_of_it_is():
    for name in ("ine:Net", "mine:Net"):
        config = load_train_config(settings=[("model.name", name)])
        custom_parts.check_typed(config, [f"model.name={name}"], allow_code=False)
        with pytest.raises(UserError, match=f"{name}: if you trust it"):
            custom_parts.check_typed(config, ["model.name=mine:Net2", f"train.loss=m{name}+dice"], allow_code=False)


def test_a_network_of_ones_own_is_not_folded_and_its_kept_form_is_of_its_code(folder, tmp_path):
    pytest.importorskip("openvino")
    source = """
import torch
from torch import nn

class Odd(nn.Sequential):
    def forward(self, x):
        return self[2](self[1](self[0](x) + x))

class Net(nn.Module):
    multiple_of = 1

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.block = Odd(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))
        self.block[1].running_mean += 0.5
        self.block[1].running_var *= 3

    def forward(self, x):
        return self.block(x)
"""
    (tmp_path / "odd.py").write_text(source)
    sys.path.append(str(tmp_path))
    custom_parts.permit("odd:Net")
    network = build(ModelConfig(name="odd:Net"))
    config = load_train_config(settings=[("model.name", "odd:Net"), ("data.image_size", 32)])
    checkpoint.save_model(str(tmp_path / "model"), network, config, {})
    image = np.asarray(Image.open(folder / "discs/images/a_000.png"))
    expected = network.eval()(torch.from_numpy(image.copy()).permute(2, 0, 1)[None]).sigmoid()[0, 0].detach().numpy()
    given = {"allow_code": True, "precision": "fp32"}
    for backend in ("torch", "openvino", "openvino"):  # kept, then read
        found = unet_ray.Segmenter(tmp_path / "model", backend=backend, **given)(image, probabilities=True)
        assert np.abs(found.probabilities[0] / 255 - expected).max() < 0.01
    (tmp_path / "odd.py").write_text(source.replace("return self.block(x)", "return -self.block(x)"))
    del sys.modules["odd"]
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    importlib.invalidate_caches()
    found = unet_ray.Segmenter(tmp_path / "model", backend="openvino", **given)(image, probabilities=True)
    assert np.abs(found.probabilities[0] / 255 - (1 - expected)).max() < 0.01


def test_weights_go_on_with_the_network_named(run, folder):
    done = command(folder, *training("NEXT", "--local", "--init", "RUN"))
    assert done.exit_code == 2 and "set model.name to mine:Net" in done.output
    done = command(folder, *training("NEXT", "--local", "--init", "RUN", "--set", NET, "--set", "model.num_classes=2"))
    assert done.exit_code == 0, done.output


def test_a_module_that_is_missing_or_changed_is_said(run, folder, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "RUN")
    source = (folder / "mine.py").read_text()

    def predict(out: str, code: str | None) -> Result:
        sys.modules.pop("mine", None)
        importlib.invalidate_caches()
        if code is not None:
            (tmp_path / "mine.py").write_text(code)
            shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        words = ["predict", "RUN", folder / "discs/images", "--local", "--allow-code", "--backend", "torch"]
        return command(tmp_path, *words, "--out", out)

    done = predict("A", None)
    assert done.exit_code == 2
    assert "mine:Net: No module named 'mine': give the command in the folder of mine.py" in done.output
    assert predict("A", source + "\n# changed\n").exit_code == 0
    assert "the code of mine:Net has changed since it was trained" in caplog.text
    done = predict("A", source)
    assert done.exit_code == 2 and "holds another run (other code)" in done.output
    done = predict("B", source.replace("nn.ReLU()", "nn.PReLU()"))
    assert done.exit_code == 2 and "the weights don't fit mine:Net; its code may have changed" in done.output
    done = predict("C", source.replace("return self.head(", "x.boom\n        return self.head("))
    assert done.exit_code == 2 and "mine.py, line" in done.output and "'boom'" in done.output


BAD = {
    "model.name=gone:Net": "gone:Net: No module named 'gone': give the command in the folder of gone.py",
    "model.name=bad:Gone": "bad.py has no Gone to call: one of Half, Raises",
    "model.name=bad.py:Net": "bad.py:Net is a file: write bad:Net",
    "model.name=broken:Net": "broken.py, line 2: SyntaxError",
    "model.name=needs:Net": "needs.py, line 1, in <module>: ModuleNotFoundError: No module named 'no_such_thing'",
    "model.name=bad:TwoArguments": "bad:TwoArguments is called as TwoArguments(config)",
    "model.name=bad:Half": "bad:Half returns [2, 1, 32, 64] for images of [2, 3, 64, 128]: [2, 1, 64, 128] is needed",
    "model.name=bad:Raises": "in forward: RuntimeError: my own fault",
    "model.name=bad:nothing": "bad:nothing returns NoneType: a torch.nn.Module is needed",
    "train.loss=bad:one_argument": "bad:one_argument is called as one_argument(pixels, config)",
    "train.loss=bad:of_pixels": "bad:of_pixels returns [2, 16, 24] for 2 images: one number for each, or for all, is",
    "train.loss=bad:without_gradient": "train.loss=bad:without_gradient has no gradient",
    "augment.custom=bad:floats": "bad:floats returns as image float64 [32, 32, 3]: uint8 [32, 32, 3] is needed",
    "augment.custom=bad:smaller": "bad:smaller returns as mask uint8 [16, 32]: uint8 [32, 32] is needed",
    "augment.custom=bad:stored": "bad:stored returns a mask with 254: class ids below 2, or 255, are needed",
    "augment.custom=bad:image_only": "bad:image_only returns ndarray: a tuple of image and mask is needed",
    "augment.custom=speckle": "module:name, as mine:Net for Net in mine.py",
    "model.name=Net": "your own (module:name, as mine:Net for Net in mine.py)",
}
MODULE = """
from torch import nn

class TwoArguments(nn.Conv2d):
    def __init__(self, channels, classes):
        super().__init__(channels, classes, 1)

class Half(nn.Conv2d):
    def __init__(self, config):
        super().__init__(config.in_channels, config.num_classes, 3, (2, 2), 1)

class Raises(nn.Conv2d):
    def __init__(self, config):
        super().__init__(config.in_channels, 1, 1)
    def forward(self, x):
        raise RuntimeError("my own fault")

def nothing(config):
    return None

def one_argument(pixels):
    return 0

def of_pixels(pixels, config):
    return pixels.cross_entropy

def without_gradient(pixels, config):
    return pixels.logits.detach().mean(dim=(1, 2, 3))

def floats(image, mask, generator):
    return image / 255, mask

def smaller(image, mask, generator):
    return image, mask[:16]

def stored(image, mask, generator):
    return image, mask * 254

def image_only(image, mask, generator):
    return image

calls = 0

def third(pixels, config):
    global calls
    calls += 1
    if calls > 3:  # one of them is the try before the training
        raise ValueError("at step 3")
    return 0 * pixels.logits.mean(dim=(1, 2, 3))
"""
AT_STEP_3 = MODULE.splitlines().index('        raise ValueError("at step 3")') + 1


@pytest.mark.parametrize("setting", BAD)
def test_what_is_wrong_is_one_line_before_the_first_epoch(setting, discs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bad.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("x = 1\ndef :\n")
    (tmp_path / "needs.py").write_text("import no_such_thing\n")
    name, _, value = setting.partition("=")
    settings = {"data.image_size": 32, "train.precision": "fp32", name: value}
    with pytest.raises(UserError) as caught:
        unet_ray.train(*discs, tmp_path / "RUN", settings=settings, local=True)
    assert BAD[setting] in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "RUN").exists()


def test_an_exception_at_step_3_names_its_line_and_resume_goes_on(folder):
    (folder / "bad.py").write_text(MODULE)
    words = training("STEP", "--local", "--set", "train.loss=bce+bad:third")
    done = command(folder, *words)
    assert done.exit_code == 2 and f"bad.py, line {AT_STEP_3}, in third: ValueError: at step 3" in done.output
    (folder / "bad.py").write_text(MODULE.replace("calls > 3", "calls > 9999"))
    sys.modules.pop("bad")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    done = command(folder, *words, "--resume")
    assert done.exit_code == 0, done.output


def test_a_weight_that_nothing_uses_is_refused_for_several_workers_only(folder, monkeypatch):
    (folder / "unused.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Conv2d):\n    def __init__(self, config):\n"
        "        super().__init__(3, 1, 1)\n        self.spare = nn.Linear(2, 2)\n"
    )
    monkeypatch.syspath_prepend(folder)
    one = load_train_config(settings=[("model.name", "unused:Net")])
    custom.check(one)
    with pytest.raises(UserError, match=r"no output depends on network\.spare\.weight"):
        custom.check(load_train_config(settings=[("model.name", "unused:Net"), ("compute.workers", 2)]))


def test_an_augmentation_draws_by_seed_epoch_and_image_and_the_border_follows_the_mask(tmp_path, monkeypatch):
    (tmp_path / "moving.py").write_text(
        "import numpy as np\n\n\ndef roll(image, mask, generator):\n    by = int(generator.integers(1, 30))\n"
        "    return np.roll(image, by, 1), np.roll(mask, by, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = load_train_config(settings=[("augment.custom", "moving:roll"), ("train.border_weight", 10)])
    custom_parts.permit("moving:roll")
    generator = np.random.default_rng(0)
    image = torch.from_numpy(generator.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8))
    mask = (image[..., 0] > 250).to(torch.uint8)
    arrays = {"image": image, "mask": mask, "border": torch.zeros_like(mask)}
    whole = custom.augmented(arrays, [5, 6, 7, 8], config, 1)
    part = custom.augmented({name: values[2:] for name, values in arrays.items()}, [7, 8], config, 1)
    for name in arrays:
        assert torch.equal(whole[name][2:], part[name]), "whatever the batch"
    assert not torch.equal(whole["image"], custom.augmented(arrays, [5, 6, 7, 8], config, 2)["image"])
    expected = border_map(whole["mask"][0].numpy(), config.train.border_sigma)
    assert expected.any() and np.array_equal(whole["border"][0].numpy(), expected)


def test_a_loss_may_be_one_number_for_the_batch(tmp_path, monkeypatch):
    (tmp_path / "whole.py").write_text("def mean(pixels, config):\n    return pixels.cross_entropy.mean()\n")
    monkeypatch.syspath_prepend(tmp_path)
    custom_parts.permit("whole:mean")
    logits, mask = torch.randn(3, 1, 8, 8), torch.ones(3, 8, 8, dtype=torch.uint8)
    own, ours = (losses.build(OptimizationConfig(loss=name), 1)(logits, mask) for name in ("whole:mean", "bce"))
    assert own.shape == (3,) and own.mean() == pytest.approx(float(ours.mean()))


def test_a_subclass_of_ours_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "ours.py").write_text("from unet_ray.models.unet import UNet\n\n\nclass Mine(UNet):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    custom_parts.permit("ours:Mine")
    network = build(ModelConfig(name="ours:Mine", base_channels=4, depth=2, patch=2))
    assert type(network).__name__ == "Mine" and network.step == 8
    checkpoint.save_model(str(tmp_path / "model"), network, TrainConfig(model=network.config), {})
    assert checkpoint.read_card(str(tmp_path / "model")).code_sha256 == custom_parts.source_sha256("ours:Mine")
