"""Learns what another network finds: knowledge distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

Teacher and network see the same augmented image, over many epochs (Beyer et al. 2022, https://arxiv.org/abs/2106.05237).

Legend: N images, C channels, K classes (1: a single logit), H, W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_ray.config import DataConfig, TrainConfig, UserError
from unet_ray.models import SegmentationModel, checkpoint
from unet_ray.models.checkpoint import ModelCard
from unet_ray.registry import is_custom

WEIGHT = 1.0
"""Weight of what the teacher finds, beside the loss of the masks."""


def check(config: TrainConfig) -> None:
    """Raises UserError if there is no model at `train.teacher`, or none that can teach a network of these settings."""
    if config.train.teacher is None:
        return
    card = _card_of(config.train.teacher)
    for name, theirs, ours in (
        ("model.in_channels", card.model.in_channels, config.model.in_channels),
        ("model.num_classes", card.model.num_classes, config.model.num_classes),
        ("data.image_size", card.image_size, config.data.size_hw),
        ("data.value_range", card.value_range, config.data.value_range),
    ):
        if theirs != ours:
            raise UserError(f"the teacher's {name} is {theirs}, not {ours}: they must be the same")
    _check_meaning(card, config.data)
    if card.model.padding == "valid":
        raise UserError(f"{config.train.teacher}: a network with padding=valid can't be a teacher")
    if is_custom(card.model.name):
        raise UserError(f"{config.train.teacher}: a network of your own, {card.model.name}, can't be a teacher")


def _check_meaning(card: ModelCard, data: DataConfig) -> None:
    """Raises UserError if the same stored values, or the same number of classes, mean something else to the teacher."""
    theirs, ours = card.of_masks.get("mask_values"), data.mask_values
    if theirs and ours and theirs != ours and set(theirs) == set(ours):
        raise UserError(f"the teacher's data.mask_values are {[*theirs]}, in another order than {[*ours]}")
    if card.classes and data.classes and card.classes != data.classes:
        raise UserError(f"the teacher's data.classes are {[*card.classes]}, not {[*data.classes]}")


def digest(location: str) -> str:
    """Returns the SHA-256 of a teacher's weights."""
    return _card_of(location).weights_sha256


def _card_of(location: str) -> ModelCard:
    return checkpoint.read_card(checkpoint.model_directory(location))


def load(config: TrainConfig, device: torch.device) -> SegmentationModel | None:
    """Returns the teacher, if there is one."""
    if config.train.teacher is None:
        return None
    network, _ = checkpoint.load_model(checkpoint.model_directory(config.train.teacher))
    network.requires_grad_(requires_grad=False)
    return network.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def distance(logits_NKHW: Tensor, theirs_NKHW: Tensor, valid_N: Tensor) -> Tensor:
    """Returns the mean over the pixels of the Kullback-Leibler divergence from the teacher's probabilities to the
    network's, float32 [N]; 0 for images that are not `valid`."""
    ours, theirs = logits_NKHW.float(), theirs_NKHW.float()
    if ours.shape[1] == 1:  # two classes, of which the background's logit is 0
        ours, theirs = (torch.cat([torch.zeros_like(logits), logits], dim=1) for logits in (ours, theirs))
    divergence = F.kl_div(ours.log_softmax(dim=1), theirs.log_softmax(dim=1), reduction="none", log_target=True)
    return divergence.sum(dim=1).mean(dim=(1, 2)) * valid_N
