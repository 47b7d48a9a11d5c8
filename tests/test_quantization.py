"""An int8 network is as good as the original or refused; prediction uses one that was kept."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY, make_discs

pytest.importorskip("openvino")
pytest.importorskip("nncf")

from unet_ray.cli import main
from unet_ray.config import EvaluateConfig, MaskOptions, UserError
from unet_ray.evaluation import quantization
from unet_ray.evaluation.quantization import MAY_FALL, quantize
from unet_ray.inference import backends
from unet_ray.inference.resolve import pipeline_of
from unet_ray.inference.segmenter import BatchSegmenter
from unet_ray.models import checkpoint
from unet_ray.ray_backend.session import LOCAL
from unet_ray.settings import load_train_config
from unet_ray.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """Trains a network that finds the discs."""
    folder = tmp_path_factory.mktemp("int8")
    images, masks = make_discs(folder / "discs", 24)
    settings = [("data.images", str(images)), ("data.masks", str(masks)), ("data.val_fraction", 0.33)]
    config = load_train_config(settings=[*TINY, *settings, ("train.epochs", 12)])
    assert train(config, str(folder / "run"), runtime=LOCAL).best["val_dice"] > 0.8
    return str(folder / "run")


def test_int8_is_kept_used_and_close(run):
    plain = BatchSegmenter(run + "/model", precision="fp32", backend="openvino")
    answer = CliRunner().invoke(main, ["quantize", run, "--calibration", "8", "--json"])
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    assert result["kept"]
    assert result["images"] == 8
    assert result["calibrated_on"] == 8
    assert result["dice"] - result["dice_int8"] <= MAY_FALL

    pipeline = pipeline_of(run, MaskOptions())
    card = pipeline.card
    assert pipeline.quantized is not None
    for others in ({"precision": "bf16"}, {"ensemble": (run,)}):
        assert pipeline_of(run, MaskOptions(**others)).quantized is None
    network, _ = backends.load(pipeline.model, backends.RuntimeOptions(torch.device("cpu")), pipeline.quantized)
    assert any(op.get_type_name() == "FakeQuantize" for op in network.network.get_ops())
    image = np.random.default_rng(0).integers(0, 255, (1, 40, 32, 3)).astype(np.uint8)  # not the size of calibration
    segmenter = BatchSegmenter(pipeline.model, quantized=pipeline.quantized)
    both = [each(image).logits.astype(np.float32) for each in (plain, segmenter)]
    assert np.corrcoef(both[0].ravel(), both[1].ravel())[0, 1] > 0.99
    assert not np.array_equal(*both)

    other = dataclasses.replace(card, weights_sha256="")
    assert checkpoint.read_choice(pipeline.model, checkpoint.INT8, other) is None


def test_int8_that_costs_too_much_is_refused_and_removed(run, monkeypatch):
    monkeypatch.setattr(quantization, "MAY_FALL", -1.0)
    answer = CliRunner().invoke(main, ["quantize", run, "--calibration", "2"])
    assert answer.exit_code == 1
    assert "refused" in answer.stderr
    assert pipeline_of(run, MaskOptions()).quantized is None
    assert not list(Path(run, "model").glob("int8*"))
    with pytest.raises(UserError, match="unet-ray quantize"):
        pipeline_of(run, MaskOptions(precision="int8"))


def test_a_model_folder_without_its_run_cannot_be_calibrated(run):
    with pytest.raises(UserError, match="not a run directory"):
        quantize(EvaluateConfig(model=run + "/model"), calibration=1)
