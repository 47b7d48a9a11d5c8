"""Prepares a training before its first epoch: the split, the settings that depend on the data, the run directory."""

from __future__ import annotations

import dataclasses
import errno
import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from unet_ray import custom_parts
from unet_ray.config import IGNORE, DataConfig, TrainConfig, UserError, first_line, locations, shown_locations
from unet_ray.data import cache, masks, storage
from unet_ray.data.annotations import drawing, sources
from unet_ray.data.inputs import find_images
from unet_ray.data.pairs import Pair
from unet_ray.data.rows import Decoder, Decodes, Rows, Subset
from unet_ray.data.splits import SPLIT, divided, read_split, write_split
from unet_ray.models import run_files, training_state
from unet_ray.models.training_state import TrainingState
from unet_ray.settings import load_train_config
from unet_ray.training import teacher
from unet_ray.training.results import read_metrics
from unet_ray.training.schedules import learning_rate_at, stops_early

log = logging.getLogger("unet_ray")

EMA_OF_TEACHER = 0.99
"""`train.ema` of a training with images without masks, whose teacher is the average, unless it is set."""
MARK = ".seen"
"""Suffix of a file that a training on a cluster puts into the run directory for a moment."""


class Split(NamedTuple):
    """The pairs of a training, divided into those to train on and those to validate on."""

    pairs: list[Pair]
    train: list[int]
    """Indices into `pairs`."""
    val: list[int]
    test: tuple[str, ...] = ()
    """Keys of pairs that are neither: `evaluate --part test` scores them."""
    unlabeled: int = 0
    """The last of `pairs`, so many, are images without masks."""

    @classmethod
    def of(cls, pairs: list[Pair], config: DataConfig, seed: int) -> Split:
        """Splits the pairs as the settings or the names say, and keeps only those that are used, in their order."""
        keys = [pair.key for pair in pairs]
        train, val, test = divided(keys, config, seed)
        used = sorted([*train, *val])
        number = {index: row for row, index in enumerate(used)}
        test_keys = tuple(keys[index] for index in test)
        return cls([pairs[i] for i in used], [number[i] for i in train], [number[i] for i in val], test_keys)

    def with_unlabeled(self, config: DataConfig, left_out: Collection[str]) -> Split:
        """Adds the images of `data.unlabeled`, without those that have masks or are in `left_out` (locations), be it
        under another name of the folder."""
        known = set(map(storage.real, {pair.image for pair in self.pairs} | set(left_out)))
        found = [
            Pair(image.name, image.path, "")
            for location in locations(config.unlabeled or ())
            for image in find_images(location)
            if storage.real(image.path) not in known
        ]
        if not found:
            raise UserError(f"{shown_locations(config.unlabeled or ())}: no image there but those that have masks")
        return self._replace(pairs=[*self.pairs, *found], unlabeled=len(found))

    @property
    def train_masks(self) -> list[str]:
        """Locations of the masks to train on."""
        return [self.pairs[index].mask for index in self.train]

    @property
    def train_keys(self) -> list[str]:
        return [self.pairs[index].key for index in self.train]

    @property
    def val_keys(self) -> list[str]:
        return [self.pairs[index].key for index in self.val]

    def unlabeled_names(self) -> bytes:
        """Returns the names of the images without masks, a line each."""
        return "".join(f"{pair.key}\n" for pair in self.pairs[len(self.pairs) - self.unlabeled :]).encode(
            errors="surrogateescape"
        )

    def subset_by_key(self) -> dict[str, str]:
        """Returns key -> `train`, `val` or `test`."""
        known = dict.fromkeys(self.train_keys, "train") | dict.fromkeys(self.val_keys, "val")
        return known | dict.fromkeys(self.test, "test")

    def rows(self, decoded: Rows) -> tuple[Subset, Subset]:
        """Divides the rows of `pairs` into those to train on, with those without masks at the end, and those to
        validate on."""
        without_masks = range(len(self.pairs) - self.unlabeled, len(self.pairs))
        return Subset(decoded, [*self.train, *without_masks]), Subset(decoded, self.val)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Returns the settings with the full names of folders, which a run keeps for later."""

    def absolute(several: str | tuple[str, ...]) -> str | tuple[str, ...]:
        full = tuple(map(storage.absolute, locations(several)))
        return full if isinstance(several, tuple) else full[0]

    def full(path: str | None) -> str | None:
        return None if path is None else storage.absolute(path)

    unlabeled = absolute(config.data.unlabeled) if config.data.unlabeled else None
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            images=absolute(config.data.images),
            masks=absolute(config.data.masks),
            unlabeled=unlabeled,
        ),
        train=dataclasses.replace(
            config.train,
            init=full(config.train.init),
            teacher=full(config.train.teacher),
            encoder_weights=full(config.train.encoder_weights),
        ),
    )


def resolved(config: TrainConfig, train_masks: list[str]) -> TrainConfig:
    """Fills in the settings that depend on the data: mask values, class weights, and the average that is a teacher.

    It looks at the masks to train on only: validation must not tell a training anything.
    """
    data, optimization = config.data, config.train
    if data.unlabeled and not optimization.ema and optimization.teacher is None:
        optimization = dataclasses.replace(optimization, ema=EMA_OF_TEACHER)
    if any(drawing.split_drawn(mask) for mask in train_masks[:1]):
        check_classes(data, config.model.num_classes)
        ids = tuple(range(max(2, config.model.num_classes)))
        classes = data.classes or sources.only_class(data)
        data = dataclasses.replace(data, mask_values=ids, mask_colors=(), ignore_index=IGNORE, classes=classes)
    elif data.mask_values is None and not data.mask_colors:
        data = dataclasses.replace(data, mask_values=masks.infer_values(train_masks, config.model.num_classes, data))
    masks.check_comparisons(train_masks, data)
    if optimization.class_weights == "inverse":
        optimization = dataclasses.replace(
            optimization, class_weights=masks.inverse_frequencies(train_masks, max(2, config.model.num_classes), data)
        )
    return dataclasses.replace(config, data=data, train=optimization)


def check_classes(data: DataConfig, num_classes: int) -> None:
    """Raises UserError unless the classes of annotations fit the network's."""
    wanted = max(2, num_classes)
    if len(data.classes) == wanted or (num_classes == 1 and not data.classes):
        return
    source = sources.recognised(locations(data.masks)[0])
    names = [] if source is None else sources.class_names(source)[0]
    names = [name for name in names if name.lower() not in sources.BACKGROUND]
    raise UserError(
        f"{shown_locations(data.masks)}: {num_classes} class(es) of the network and {len(data.classes)} names: pick "
        f"classes with --classes {','.join(names)}"
    )


def check_out(config: TrainConfig, split: Split, out: str, resume: bool) -> None:
    """Raises UserError if `out` holds files that this training would overwrite, or a run that it can't go on from."""
    names = [name for name in storage.names_in(out) if not name.endswith(MARK) and name != run_files.LOCK]
    if not names:
        return
    if not resume:
        is_run = run_files.CONFIG in names
        what, remedy = ("another run", ", or --resume") if is_run else ("other files", "")
        raise UserError(f"{out} holds {what}: choose another --out{remedy}")
    state = training_state.read_state(storage.join(out, run_files.LAST))
    if state is not None:
        _check_resumable(config, split, out, state)


def _check_resumable(config: TrainConfig, split: Split, out: str, state: TrainingState) -> None:
    """Raises UserError if the run in `out` has other settings or another split, or is finished."""
    if _settings_that_must_match(load_train_config(config_file=state.settings)) != _settings_that_must_match(config):
        raise UserError(
            f"{out} was trained with other settings, so --resume can't go on: "
            f"`--config {storage.join(out, run_files.CONFIG)}` has the old ones, or choose another --out"
        )
    _check_unlabeled(split, out)
    _check_teacher(config, out)
    now, written = split.subset_by_key(), read_split(storage.join(out, SPLIT))
    changed = {key for key in now.keys() | written.keys() if now.get(key) != written.get(key)}
    if written and changed:
        raise UserError(
            f"{shown_locations(config.data.images)}: {len(changed)} images have come, gone or changed sides since {out}"
            " was begun, so --resume can't go on: put them back, or choose another --out"
        )
    if state.epoch >= config.train.epochs:
        raise UserError(f"{out} is finished ({state.epoch} epochs): raise --epochs, or choose another --out")
    patience = config.train.patience
    if stops_early(config.train, [line["val_dice"] for line in _history(out, state.epoch) if "val_dice" in line]):
        raise UserError(
            f"{out} stopped early after epoch {state.epoch}, since {patience} epochs were no better than the best: "
            f"--set train.patience={2 * patience} goes on, and 0 never stops early"
        )


def is_done(config: TrainConfig, out: str) -> bool:
    """Returns whether `out` holds a training of these settings whose last epoch is done. Raises UserError if the
    teacher has been trained again since then."""
    state = training_state.read_state(storage.join(out, run_files.LAST))
    if state is None:
        return False
    begun = _settings_that_must_match(load_train_config(config_file=state.settings))
    if begun != _settings_that_must_match(with_absolute_paths(config)):
        return False
    _check_teacher(config, out)
    dices = [line["val_dice"] for line in _history(out, state.epoch) if "val_dice" in line]
    return state.epoch >= config.train.epochs or stops_early(config.train, dices)


def _check_unlabeled(split: Split, out: str) -> None:
    """Raises UserError if the images without masks are others than before."""
    place = storage.join(out, run_files.UNLABELED)
    before = storage.read_bytes(place) if storage.exists(place) else b""
    if before != split.unlabeled_names():
        raise UserError(
            f"the images of --unlabeled have changed since {out} was begun, so --resume can't go on: put them back, or "
            "choose another --out"
        )


def _check_teacher(config: TrainConfig, out: str) -> None:
    """Raises UserError if the teacher is another than before: it was trained again."""
    location, place = config.train.teacher, storage.join(out, run_files.TEACHER)
    if location is None or not storage.exists(place):  # of a run without one, or of an older version
        return
    if storage.read_bytes(place).decode().strip() != teacher.digest(location):
        raise UserError(
            f"the weights of {location} have changed since {out} was begun, so --resume can't go on: "
            "choose another --out"
        )


def _history(out: str, epoch: int) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl up to an epoch."""
    return [line for line in read_metrics(out) if line["epoch"] <= epoch]


def say_if_rate_rises(config: TrainConfig, out: str) -> None:
    """Says if the learning rate of a run that goes on will rise again: its schedule is longer now."""
    train, state = config.train, training_state.read_state(storage.join(out, run_files.LAST))
    if state is None or train.schedule == "plateau":
        return
    history = _history(out, state.epoch)
    before = history[-1]["learning_rate"] if history else math.inf
    now = learning_rate_at(train, state.epoch / train.epochs)
    if now > 1.01 * before:
        text = "the learning rate rises again, from %.3g to %.3g (schedule %s, to epoch %d)"
        log.warning(text, before, now, train.schedule, train.epochs)


def has_weights(out: str) -> bool:
    """Returns whether the run has weights of its own already, and needs no first ones."""
    return training_state.has_state(storage.join(out, run_files.LAST))


def _settings_that_must_match(config: TrainConfig) -> TrainConfig:
    """Returns the settings with fixed values for those that may change on --resume: `compute`, and of `train` the
    epochs, the learning rate, the precision and the patience."""
    train = dataclasses.replace(config.train, epochs=1, learning_rate=1.0, precision="auto", patience=0)
    return dataclasses.replace(config, compute=type(config.compute)(), train=train)


def write_start(config: TrainConfig, split: Split, out: str) -> None:
    """Writes the files that a run has before its first epoch: what it learns from, and config.yaml."""
    write_split(storage.join(out, SPLIT), split.subset_by_key())
    if split.unlabeled:
        storage.write_bytes(storage.join(out, run_files.UNLABELED), split.unlabeled_names(), durable=True)
    if config.train.teacher is not None:
        digest = teacher.digest(config.train.teacher)
        storage.write_bytes(storage.join(out, run_files.TEACHER), f"{digest}\n".encode(), durable=True)
    storage.write_bytes(storage.join(out, run_files.CONFIG), config.to_yaml().encode(), durable=True)


def decoder_with_filled_cache(config: TrainConfig, pairs: list[Pair], run: cache.Run) -> Decodes:
    """Returns the decoder of pairs into rows. With `compute.cache`, first adds all missing pairs to the cache, through
    `run`, and returns a decoder that reads the cache."""
    decoder, location = Decoder.of(config), config.compute.cache
    return cache.filled([pair for pair in pairs if pair.mask], decoder, location, run) if location else decoder


@contextmanager
def explained_errors(out: str, config: TrainConfig) -> Iterator[None]:
    """Turns the errors of a full disk, of a full GPU, of norms that have one value to norm, and of the user's own code
    into UserError."""
    import torch

    try:
        with custom_parts.explained(*custom_parts.names_in(config)):
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{out}: {error.strerror}: free some space, then go on with --resume from the last finished epoch"
        ) from None
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory ({first_line(error)[:120]}): raise train.accumulate, set "
            "train.checkpoint_activations=true, or lower --batch-size or --image-size"
        ) from None
    except ValueError as error:
        # torch: `Expected more than 1 value per channel`, `Expected more than 1 spatial element`
        if not str(error).startswith("Expected more than 1"):
            raise
        norm, batch, size = config.model.norm, config.train.batch_size, config.data.tile or config.data.image_size
        raise UserError(
            f"{config.model.name} has a single value to norm in its deepest layer (norm {norm}, batch size {batch}, "
            f"image size {size}, {config.model.depth} levels): raise --batch-size or --image-size, or --set "
            "model.norm=group"
        ) from None
