"""The tables of names that a user can choose: networks, losses, optimizers, output formats.

To add one, write it in its file and add its name here. The settings check names against these tables and `--help`
lists them. Nothing is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

NETWORKS = {
    "unet": "unet_ray.models.unet:UNet",
    "attention_unet": "unet_ray.models.unet:UNet",
    "unet++": "unet_ray.models.unet:UNetPlusPlus",
    "fcn": "unet_ray.models.baselines:Torchvision",
    "deeplabv3": "unet_ray.models.baselines:Torchvision",
    "smp": "unet_ray.models.baselines:Smp",
    "otsu": "unet_ray.models.baselines:Otsu",
}
"""`model.name` -> subclass of `models.base.SegmentationModel`."""

LOSSES = {
    "bce": "unet_ray.training.losses:cross_entropy",
    "ce": "unet_ray.training.losses:cross_entropy",
    "dice": "unet_ray.training.losses:dice",
    "focal": "unet_ray.training.losses:focal",
    "tversky": "unet_ray.training.losses:tversky",
}
"""Terms of `train.loss` -> function (training.losses.Pixels, OptimizationConfig) -> loss of each image, float32 [N]."""

OPTIMIZERS = {
    "adamw": "unet_ray.training.optimizers:adamw",
    "adam": "unet_ray.training.optimizers:adam",
    "sgd": "unet_ray.training.optimizers:sgd",
    "rmsprop": "unet_ray.training.optimizers:rmsprop",
    "muon": "unet_ray.training.optimizers:muon",
}
"""`train.optimizer` -> function (OptimizationConfig, network) -> torch.optim.Optimizer."""

FORMATS = {
    "png": "unet_ray.inference.formats.png:Png",
    "parquet": "unet_ray.inference.formats.parquet:MaskParquet",
    "rle": "unet_ray.inference.formats.run_lengths:RunLengths",
    "kaggle": "unet_ray.inference.formats.kaggle:KaggleSubmission",
    "coco": "unet_ray.inference.formats.coco:Coco",
    "prob": "unet_ray.inference.formats.probabilities:Probabilities",
    "overlay": "unet_ray.inference.formats.overlays:Overlays",
}
"""`predict --format` -> subclass of `inference.formats.base.OutputFormat`."""


def load(choices: Mapping[str, str], name: str) -> Any:
    """Imports and returns the object behind `name` in one of the tables. Raises KeyError for an unknown name."""
    module, _, attribute = choices[name].partition(":")
    return getattr(import_module(module), attribute)
