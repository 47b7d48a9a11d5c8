"""What is settled before the first epoch: the split, what the data decides of the settings, the run directory."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from unet_ray.config import TrainConfig, UserError
from unet_ray.data import cache, masks, storage
from unet_ray.data.pairs import Pair
from unet_ray.data.rows import Decoder, Decodes, Rows, Subset
from unet_ray.data.splits import SPLIT, read_split, write_split
from unet_ray.models import checkpoint
from unet_ray.settings import load_train_config
from unet_ray.training.loop import EpochProgress

if TYPE_CHECKING:
    pass


OnEpoch = Callable[[dict[str, Any]], None]
OnStep = Callable[[EpochProgress], None]
MARK = ".seen"


class Split(NamedTuple):
    """The pairs a training uses, and which of them it trains and validates on."""

    pairs: list[Pair]
    train: list[int]
    val: list[int]

    @property
    def train_keys(self) -> list[str]:
        return [self.pairs[index].key for index in self.train]

    @property
    def val_keys(self) -> list[str]:
        return [self.pairs[index].key for index in self.val]

    def sides(self) -> dict[str, str]:
        """Key -> `train` or `val`."""
        return dict.fromkeys(self.train_keys, "train") | dict.fromkeys(self.val_keys, "val")

    def rows(self, decoded: Rows) -> tuple[Subset, Subset]:
        """Rows to train on and rows to validate on, of rows decoded from `pairs`."""
        return Subset(decoded, self.train), Subset(decoded, self.val)


def resolved(config: TrainConfig, images: str, masks_folder: str, mask_paths: list[str]) -> TrainConfig:
    """The settings with what the data decides filled in."""
    data, fit = dataclasses.replace(config.data, images=images, masks=masks_folder), config.train
    if fit.init is not None:
        fit = dataclasses.replace(fit, init=storage.absolute(fit.init))
    if data.mask_values is None:
        data = dataclasses.replace(data, mask_values=masks.infer_values(mask_paths, config.model.num_classes, data))
    if fit.class_weights == "inverse":
        fit = dataclasses.replace(fit, class_weights=masks.inverse_frequencies(mask_paths, data))
    return dataclasses.replace(config, data=data, train=fit)


def check_out(config: TrainConfig, parts: Split, out: str, resume: bool) -> None:
    """Raises UserError if `out` holds something that this training would overwrite, or can't go on from."""
    there = [name for name in storage.names_in(out) if not name.endswith(MARK)]
    if not there:
        return
    if not resume:
        what = "another run" if checkpoint.CONFIG in there else "other files"
        raise UserError(
            f"{out} holds {what}: choose another --out" + (", or --resume" if checkpoint.CONFIG in there else "")
        )
    state = checkpoint.read_state(storage.join(out, checkpoint.LAST))
    if state is None:
        return
    before = load_train_config(config_file=state.settings)
    if _resumable(before) != _resumable(config):
        raise UserError(
            f"{out} was trained with other settings, so --resume can't go on: "
            f"`--config {storage.join(out, checkpoint.CONFIG)}` has the old ones, or choose another --out"
        )
    sides, sides_before = parts.sides(), read_split(storage.join(out, SPLIT))
    changed = {key for key in sides.keys() | sides_before.keys() if sides.get(key) != sides_before.get(key)}
    if sides_before and changed:
        raise UserError(
            f"{config.data.images}: {len(changed)} images have come, gone or changed sides since {out} was begun, so "
            "--resume can't go on: put them back, or choose another --out"
        )
    if state.epoch >= config.train.epochs:
        raise UserError(f"{out} is finished ({state.epoch} epochs): raise --epochs, or choose another --out")


def first_weights(config: TrainConfig, out: str) -> str | None:
    """Where the first weights come from, until a run has its own."""
    return None if checkpoint.has_state(storage.join(out, checkpoint.LAST)) else config.train.init


def _resumable(config: TrainConfig) -> TrainConfig:
    """What must be the same for a run to go on: all but where it runs and for how long."""
    return dataclasses.replace(
        config, compute=type(config.compute)(), train=dataclasses.replace(config.train, epochs=1)
    )


def write_start(config: TrainConfig, parts: Split, out: str) -> None:
    """What stands before the first epoch: the settings, and which images are trained and validated on."""
    write_split(storage.join(out, SPLIT), parts.sides())
    storage.write_bytes(storage.join(out, checkpoint.CONFIG), config.to_yaml().encode())


def row_decoder(config: TrainConfig, pairs: list[Pair], run: cache.Run) -> Decodes:
    """What makes rows of pairs; with a cache, once all of them lie in it."""
    decoder, location = Decoder.of(config), config.compute.cache
    return cache.filled(pairs, decoder, location, run) if location else decoder


@contextmanager
def explain_shortages(out: str) -> Iterator[None]:
    """A full disk and a full GPU as UserError."""
    import torch

    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{out}: {error.strerror}: free some space, then go on with --resume from the last finished epoch"
        ) from None
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory ({str(error).splitlines()[0][:120]}): raise train.accumulate, set "
            "train.checkpoint_activations=true, or lower --batch-size or --image-size"
        ) from None
