"""One training step: the gradients of its micro-batches, then the update of the weights.

Legend: N images, C channels, H, W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from unet_ray import custom_parts
from unet_ray.config import IGNORE, TrainConfig
from unet_ray.data.rows import Batch
from unet_ray.models import SegmentationModel, build, checkpoint, encoder_weights
from unet_ray.models.device import autocast, check_precision
from unet_ray.models.tiles import mirror_margin
from unet_ray.training import custom, losses, teacher, unlabeled
from unet_ray.training.augment import augment
from unet_ray.training.crops import random_tiles
from unet_ray.training.optimizers import average_of, build_optimizer


@dataclass(slots=True)
class Training:
    """A network in training, with its optimizer and loss.

    `network` holds the weights. `ddp_network` wraps it if there are several ranks, and `forward` is `ddp_network`,
    perhaps compiled: both train the same weights. `ema`, if any, averages these weights in a second network.
    `networks` lists both, and `saved_network` is the one that is validated and saved.
    """

    network: SegmentationModel
    ddp_network: nn.Module
    """DistributedDataParallel around `network`, or `network` itself if there is one process."""
    forward: Callable[[Tensor], Tensor]
    """Images to logits, perhaps of several heads: `ddp_network`, or the same compiled."""
    optimizer: torch.optim.Optimizer
    loss: losses.Loss
    scaler: torch.amp.GradScaler
    """Has no effect except with fp16."""
    ema: AveragedModel | None
    teacher: nn.Module | None
    """The network of `train.teacher`."""
    config: TrainConfig
    device: torch.device

    @property
    def networks(self) -> list[nn.Module]:
        """The network and its average, if there is one. The order is the same on every rank."""
        return [self.network] if self.ema is None else [self.network, self.ema.module]

    @property
    def saved_network(self) -> nn.Module:
        """The network that is validated and saved: the average if there is one."""
        return self.networks[-1]

    def inputs(self, arrays: Batch, epoch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Moves a batch to the device and augments it. Returns the image uint8 [N,C,H,W] as the network takes it, and
        mask and border [N,H,W]."""
        data, model, seed = self.config.data, self.config.model, self.config.train.seed
        tensors = {
            name: torch.from_numpy(values).to(self.device, non_blocking=True)
            for name, values in arrays.items()
            if name != "index"
        }
        tensors = custom.augmented(tensors, arrays["index"], self.config, epoch)
        tensors = augment(tensors, arrays["index"], config=self.config.augment, seed=seed, epoch=epoch)
        if data.tile:
            tensors = random_tiles(
                tensors,
                arrays["index"],
                data.tile,
                margin=model.margin,
                seed=seed,
                epoch=epoch,
                foreground=self.config.train.foreground,
            )
        image = tensors["image"].permute(0, 3, 1, 2)
        return image if data.tile else mirror_margin(image, model.margin), tensors["mask"], tensors.get("border")

    def backward(
        self, arrays: Batch, weight: float, *, epoch: int, labeled: int | None = None, ends_step: bool = True
    ) -> Tensor:
        """Adds the gradients of a micro-batch to those of the step; returns its mean loss times `weight`.

        `labeled`: the first rows, so many, have masks; None: all have.
        """
        image, mask, border = self.inputs(arrays, epoch)
        labeled = len(image) if labeled is None else labeled
        theirs = None if self.teacher is None else self._logits(self.teacher, image)
        if self.teacher is None and labeled < len(image):
            image, mask = self._with_pseudo_masks(image, mask, labeled, arrays["index"], epoch)
        # Ranks exchange gradients once per step, with those of its last micro-batch.
        local = isinstance(self.ddp_network, DistributedDataParallel) and not ends_step
        with self.ddp_network.no_sync() if local else contextlib.nullcontext():  # type: ignore[operator]
            with autocast(self.device, self.config.train.precision):
                found = self.forward(image)
            heads = [*found] if found.ndim == 5 else [found]
            losses_of_heads = [self._loss(logits, theirs, mask, border, labeled, epoch) for logits in heads]
            loss = torch.stack(losses_of_heads).mean() * weight
            self.scaler.scale(loss).backward()
        return loss.detach()

    def _loss(
        self, logits: Tensor, theirs: Tensor | None, mask: Tensor, border: Tensor | None, labeled: int, epoch: int
    ) -> Tensor:
        """Returns the mean loss of a micro-batch. `theirs`: the teacher's logits, if there is one. The first `labeled`
        rows have masks."""
        loss = self.loss(logits[:labeled], mask[:labeled], border if border is None else border[:labeled]).mean()
        if theirs is not None:
            valid = torch.ones(len(logits), device=self.device)
            valid[labeled:] = unlabeled.can_be_read(mask[labeled:]).float()
            return loss + teacher.WEIGHT * teacher.distance(logits, theirs, valid).mean()
        if labeled < len(logits):
            of_others = unlabeled.consistency(logits[labeled:], mask[labeled:]).mean()
            ramp = unlabeled.ramp(epoch / self.config.train.epochs)
            return loss + ramp * self.config.train.unlabeled_weight * of_others
        return loss

    @torch.no_grad()
    def _logits(self, network: nn.Module, image: Tensor) -> Tensor:
        """Returns what another network finds."""
        with autocast(self.device, self.config.train.precision):
            return network(image)

    def _with_pseudo_masks(
        self, image: Tensor, mask: Tensor, labeled: int, indices: np.ndarray, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the images, those without masks strongly changed, and masks, with the teacher's where none are."""
        assert self.ema is not None, "`setup.resolved` sets it"
        logits = self._logits(self.ema.module.eval(), image[labeled:])
        found = unlabeled.pseudo_masks(logits, self.config.train.unlabeled_confidence)
        found[~unlabeled.can_be_read(mask[labeled:])] = IGNORE
        seed = self.config.train.seed
        strong, found = unlabeled.changed(image[labeled:], found, indices[labeled:], seed, epoch)
        return torch.cat([image[:labeled], strong]), torch.cat([mask[:labeled], found])

    def update(self) -> None:
        """Changes the weights by the step's gradients, and clears the gradients."""
        if self.config.train.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.network)


def prepare(config: TrainConfig, device: torch.device, *, resumes: bool = False) -> Training:
    """Builds a new training in this process: network, optimizer, loss and average.

    `resumes`: weights are loaded later, so neither `train.init` nor weights that libraries download are needed.
    """
    settings = config.train
    custom_parts.permit(*custom_parts.names_in(config))  # who trains has typed them
    check_precision(settings.precision, device.type)
    torch.manual_seed(settings.seed)
    weights_follow = resumes or settings.init is not None or settings.encoder_weights is not None
    network = build(dataclasses.replace(config.model, pretrained=False) if weights_follow else config.model)
    if settings.init is not None and not resumes:
        checkpoint.start_from(settings.init, network)
    elif settings.encoder_weights is not None and not resumes:
        encoder_weights.load(network, settings.encoder_weights)
    network = network.to(device)
    network.checkpoint_activations = settings.checkpoint_activations
    if settings.channels_last:
        network = network.to(memory_format=torch.channels_last)
    return Training(
        network=network,
        ddp_network=network,
        forward=network,
        optimizer=build_optimizer(settings, network),
        loss=losses.build(settings, config.model.num_classes),
        scaler=torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16"),
        ema=average_of(network, settings.ema) if settings.ema else None,
        teacher=teacher.load(config, device),
        config=config,
        device=device,
    )
