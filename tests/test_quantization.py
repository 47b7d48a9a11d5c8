"""An int8 network is as good as the original or refused; prediction uses one that was kept."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import TINY, make_discs

pytest.importorskip("openvino")
pytest.importorskip("nncf")

from unet_ray.cli import main
from unet_ray.config import EvaluateConfig, MaskOptions, UserError
from unet_ray.evaluation import quantization
from unet_ray.evaluation.quantization import MAY_FALL, quantize
from unet_ray.inference import arithmetic, backends, pipeline
from unet_ray.inference.arithmetic import Arithmetic
from unet_ray.inference.resolve import pipeline_of
from unet_ray.inference.segmenter import BatchSegmenter
from unet_ray.models import checkpoint
from unet_ray.models.device import instruction_set
from unet_ray.ray_backend.session import LOCAL
from unet_ray.settings import load_train_config
from unet_ray.training.run import train


class Timed:
    """Times the networks, and then says that they took these seconds."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.time = seconds, pipeline.shortest_times

    def __call__(self, *arguments) -> list[float]:
        self.really = self.time(*arguments)
        return self.seconds


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """Trains a network that finds the discs."""
    folder = tmp_path_factory.mktemp("int8")
    images, masks = make_discs(folder / "discs", 24)
    settings = [("data.images", str(images)), ("data.masks", str(masks)), ("data.val_fraction", 0.33)]
    config = load_train_config(settings=[*TINY, *settings, ("train.epochs", 12)])
    assert train(config, str(folder / "run"), runtime=LOCAL).best["val_dice"] > 0.8
    return str(folder / "run")


@pytest.fixture(scope="module")
def result(run) -> dict:
    """Quantizes the network. Returns what the command prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "shortest_times", timed := Timed([2.0, 1.0]))
        answer = CliRunner().invoke(main, ["quantize", run, "--calibration", "8", "--json"])
    assert answer.exit_code == 0, answer.output
    assert min(timed.really) > 0
    return json.loads(answer.stdout)


def test_int8_is_kept_used_and_close(run, result):
    plain = BatchSegmenter(run + "/model", Arithmetic("cpu", "openvino", "fp32"))
    assert result["kept"]
    assert result["images"] == 8 and result["speedup"] == 2
    assert result["calibrated_on"] == 8
    assert result["dice"] - result["dice_int8"] <= MAY_FALL

    kept = pipeline_of(run, MaskOptions(device="cpu")).chosen_here()
    card, chosen = kept.card, kept.arithmetic
    assert chosen is not None and chosen.int8 and chosen.instructions == instruction_set()
    for others in ({"precision": "fp32"}, {"ensemble": (run,)}, {"backend": "torch"}):
        assert not pipeline_of(run, MaskOptions(device="cpu", **others)).chosen_here().arithmetic.int8
    network, _ = backends.load(kept.model, chosen)
    assert any(op.get_type_name() == "FakeQuantize" for op in network.network.get_ops())
    image = np.random.default_rng(0).integers(0, 255, (1, 40, 32, 3)).astype(np.uint8)  # not the size of calibration
    both = [each(image).logits.astype(np.float32) for each in (plain, kept.segmenter())]
    assert np.corrcoef(both[0].ravel(), both[1].ravel())[0, 1] > 0.99
    assert not np.array_equal(*both)

    other = dataclasses.replace(card, weights_sha256="")
    assert checkpoint.read_choice(kept.model, checkpoint.INT8, other) is None


def test_int8_is_not_used_on_another_instruction_set_or_damaged(run, result, monkeypatch, caplog):
    assert result["kept"]
    model = Path(run, "model")
    accepted = json.loads((model / "int8.json").read_text())
    monkeypatch.setattr(arithmetic, "instruction_set", lambda: "AVX9000")
    chosen = pipeline_of(run, MaskOptions(device="cpu")).chosen_here().arithmetic
    assert chosen is not None and not chosen.int8
    assert f"int8 was accepted on {instruction_set()}, " in caplog.text and "unet-ray quantize" in caplog.text
    with pytest.raises(UserError, match="has AVX9000: measure it there with `unet-ray quantize`"):
        pipeline_of(run, MaskOptions(device="cpu", precision="int8")).chosen_here()
    monkeypatch.undo()

    weights = model / f"{accepted['network']}.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="damaged: make it again with `unet-ray quantize`"):
        pipeline_of(run, MaskOptions(device="cpu")).chosen_here().segmenter()
    weights.write_bytes(whole)


@pytest.mark.parametrize(
    ("module", "name", "value", "reason"),
    [
        (quantization, "MAY_FALL", -1.0, "Dice falls by"),
        (pipeline, "shortest_times", Timed([1.0, 1.5]), "int8 takes 1.50 times as long on this CPU"),
    ],
)
def test_int8_that_costs_too_much_or_is_slow_is_refused_and_removed(
    run, result, tmp_path, monkeypatch, module, name, value, reason
):
    run = str(shutil.copytree(run, tmp_path / "run"))
    assert list(Path(run, "model").glob("int8*"))
    monkeypatch.setattr(module, name, value)
    answer = CliRunner().invoke(main, ["quantize", run, "--calibration", "2"])
    assert answer.exit_code == 2
    assert f"refused: {reason}" in answer.stderr
    assert not pipeline_of(run, MaskOptions(device="cpu")).chosen_here().arithmetic.int8
    assert not list(Path(run, "model").glob("int8*"))
    with pytest.raises(UserError, match="unet-ray quantize"):
        pipeline_of(run, MaskOptions(precision="int8"))


def test_what_was_kept_on_another_processor_stays_where_it_is_refused_on_this_one(run, result, tmp_path, monkeypatch):
    model = shutil.copytree(run, tmp_path / "run") / "model"
    record = json.loads((model / "int8.json").read_text()) | {"instructions": "AVX9000"}
    (model / "int8.json").write_text(json.dumps(record))
    before = {file.name: file.read_bytes() for file in model.glob("int8*")}
    monkeypatch.setattr(pipeline, "shortest_times", Timed([1.0, 1.5]))
    assert quantize(EvaluateConfig(model=str(model.parent), device="cpu"), calibration=3).problem
    assert {file.name: file.read_bytes() for file in model.glob("int8*")} == before
    monkeypatch.setattr(pipeline, "shortest_times", Timed([1.5, 1.0]))
    assert not quantize(EvaluateConfig(model=str(model.parent), device="cpu"), calibration=3).problem
    now = json.loads((model / "int8.json").read_text())
    assert now["instructions"] == instruction_set() and now["network"] != record["network"]
    assert {file.name.partition(".")[0] for file in model.glob("int8-*")} == {now["network"]}


def test_a_model_folder_without_its_run_cannot_be_calibrated(run, tmp_path):
    alone = shutil.copytree(f"{run}/model", tmp_path / "model")
    with pytest.raises(UserError, match="not a run directory"):
        quantize(EvaluateConfig(model=str(alone)), calibration=1)
