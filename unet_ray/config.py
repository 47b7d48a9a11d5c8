"""Defines all settings, as frozen dataclasses that check themselves; `settings.py` reads them from YAML.

It needs only the standard library and PyYAML, so that `unet-ray --help` and a wrong flag answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import string
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from unet_ray import keys
from unet_ray.registry import ENCODERS, FORMATS, LOSSES, NETWORKS, OPTIMIZERS, is_custom

IGNORE = 255
"""Class id, in every decoded mask, of a pixel that is left out of loss and scores."""

NO_ENCODER = "resnet34"
"""`model.encoder` of a `unet` without one: the default, which is that of `smp`."""
MAX_CLASSES = 255
"""The most classes: class ids are uint8, and 255 is `IGNORE`."""


class UserError(ValueError):
    """An error that the user can fix: one line that names the file or option and the remedy (exit code 2)."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's text that is not empty; its type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network (`model.` in YAML and `--set`)."""

    name: str = "unet"
    """One of `registry.NETWORKS`, which explains each; or one of your own, see `custom_parts`."""
    in_channels: int = 3
    """Every image is converted to this many channels when it is decoded: 1 gray, 2 gray + alpha, 3 RGB, 4 RGBA."""
    num_classes: int = 1
    """1: one foreground class, one logit, sigmoid. K >= 2: K exclusive classes, softmax."""
    base_channels: int = 64
    """Channels of the first level (Ronneberger et al. 2015, figure 1: 64)."""
    depth: int = 4
    """Number of times the image is halved (figure 1: 4)."""
    growth: float = 2.0
    """Level k has base_channels * growth**k channels (figure 1: 2), rounded to a multiple of 4 if growth is not 2."""
    norm: Literal["none", "batch", "group", "instance"] = "batch"
    """Normalisation after each convolution; the 2015 paper has none."""
    padding: Literal["same", "valid"] = "same"
    """`same`: images of any size, masks of the same size. `valid`: the 2015 paper's unpadded convolutions."""
    up: Literal["transpose", "bilinear"] = "transpose"
    """The expanding path doubles the size by a transposed convolution, or by a 1x1 convolution and interpolation."""
    dropout: float = 0.0
    """Probability of dropout at the end of the contracting path (section 3.1 of the paper)."""
    patch: int = 1
    """Side in pixels of a square that is folded into channels before the first convolution and unfolded after the last
    (sub-pixel convolution, Shi et al. 2016). 2 takes a quarter of the time of 1, at the same mask resolution."""
    deep_supervision: bool = False
    """Of `unet++`: a head for each node of the finest level. The loss is the mean of theirs, and the mask that of the
    mean of their logits (Zhou et al. 2018, section 3.2 and figure 1)."""
    encoder: str = NO_ENCODER
    """Encoder of `smp`: a name that segmentation_models_pytorch knows, for its U-Net, or architecture/encoder, such as
    `segformer/mit_b0`. Of `unet`: one of `registry.ENCODERS`, with a narrow expanding path of its own, for which the
    settings of the shape do not count; the default stands for none."""
    pretrained: bool = False
    """Start from ImageNet weights: `unet` with an encoder (the extra `pretrained` has them), or `fcn`, `deeplabv3` and
    `smp`, whose libraries download them."""
    pixel_mean: float | tuple[float, ...] = 0.5
    """See `pixel_std`."""
    pixel_std: float | tuple[float, ...] = 0.25
    """The model's forward normalises pixels: (value / 255 - pixel_mean) / pixel_std. One number for all channels, or
    one for each."""

    def __post_init__(self) -> None:
        _check_choices(self, "model", name=_with_custom(NETWORKS, self.name))
        _at_least(self, "model", in_channels=1, num_classes=1, base_channels=1, depth=1, growth=1, patch=1)
        if self.num_classes > MAX_CLASSES:
            raise UserError(f"model.num_classes is {self.num_classes}: at most {MAX_CLASSES}, class ids are 8-bit")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout is {self.dropout}: a probability from 0 to below 1")
        for name in ("pixel_mean", "pixel_std"):
            values = getattr(self, name)
            if isinstance(values, tuple) and len(values) != self.in_channels:
                raise UserError(f"model.{name} has {len(values)} entries: {self.in_channels} channels need as many")
        if min(self.pixel_std if isinstance(self.pixel_std, tuple) else (self.pixel_std,)) <= 0:
            raise UserError(f"model.pixel_std is {self.pixel_std}: must be above 0")
        if self.padding == "valid" and self.patch != 1:
            raise UserError("model.patch must be 1 with model.padding=valid")
        if self.padding == "valid" and self.name != "unet":
            raise UserError(f"model.padding must be same with model.name={self.name}")
        if self.padding == "valid" and self.up == "bilinear":
            # Interpolation reads beyond a tile's edge, so tiles would not equal the whole image.
            raise UserError("model.up must be transpose with model.padding=valid")
        if self.deep_supervision and self.name != "unet++":
            raise UserError(f"model.deep_supervision is for model.name=unet++, not {self.name}")
        self._check_encoder()

    def _check_encoder(self) -> None:
        encoders = ", ".join(ENCODERS)
        if self.name == "unet" and self.encoder not in (*ENCODERS, NO_ENCODER):
            raise UserError(
                f"model.encoder is {self.encoder!r}: of model.name=unet {encoders}, others with model.name=smp"
            )
        if self.pretrained and self.name not in ("fcn", "deeplabv3", "smp") and not self.has_own_encoder:
            raise UserError(
                f"model.pretrained is for fcn, deeplabv3, smp and unet with model.encoder={encoders}, not {self.name}"
            )
        if self.has_own_encoder and (self.patch != 1 or self.padding != "same"):
            raise UserError(f"model.encoder={self.encoder} needs model.patch=1 and model.padding=same")

    @property
    def has_own_encoder(self) -> bool:
        """Whether the network is a U-Net on one of `registry.ENCODERS`."""
        return self.name == "unet" and self.encoder in ENCODERS

    @property
    def channels(self) -> list[int]:
        """Channels of each level, the finest first: `depth + 1` numbers."""
        if self.growth == 2:
            return [self.base_channels * 2**level for level in range(self.depth + 1)]
        deeper = [max(4, round(self.base_channels * self.growth**level / 4) * 4) for level in range(1, self.depth + 1)]
        return [self.base_channels, *deeper]

    @property
    def margin(self) -> int:
        """Pixels that unpadded convolutions remove at each side: 92 at depth 4 (572 -> 388); 0 for `same`."""
        if self.padding == "same":
            return 0
        # Each level's two 3x3 convolutions remove 2 positions at each side, on the way down and again on the way up.
        # A position of level k is 2**k pixels wide. The deepest level is passed once.
        return sum(4 * 2**level for level in range(self.depth)) + 2 * 2**self.depth

    def check_size(self, size: int, option: str) -> None:
        """Raises UserError if a side of `size` pixels, extended by `margin`, can't be halved evenly `depth` times."""
        if self.padding == "same" or self.fits(size):
            return
        near = [
            next((s for s in range(size, bound, step) if self.fits(s)), None)
            for step, bound in ((-1, 0), (1, size + 2 ** (self.depth + 2)))
        ]
        offers = " or ".join(str(s) for s in near if s)
        raise UserError(
            f"{option} {size} can't be divided by 2 at each of {self.depth} levels with padding=valid: use {offers}"
        )

    def fits(self, size: int) -> bool:
        """Returns whether an unpadded network accepts images of this side, in pixels."""
        side = size + 2 * self.margin
        for _ in range(self.depth):
            side -= 4
            if side <= 0 or side % 2:
                return False
            side //= 2
        return side > 4


MAX_PIXELS = 200_000_000
"""Default of --max-pixels: Pillow takes 0.8 GB to decode an image of this many pixels."""
ValueRange = tuple[float, float] | Literal["percentiles"] | None
MaskValue = int | str | tuple[int | str, ...]
"""A stored value, a comparison such as `>0` or `>=128`, or several of them."""
Colour = tuple[int, int, int] | str
"""Red, green and blue from 0 to 255, or `#rrggbb`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Images, masks and their split (`data.`)."""

    images: str | tuple[str, ...] = ""
    """Folder, glob or URI of the images, or several; or a list of pairs (.csv, .tsv, .txt, .jsonl, .parquet), with a
    column of images and one of masks: paths, or, in a .parquet, encoded images."""
    masks: str | tuple[str, ...] = ""
    """Folder, glob or URI of the masks, or several; if they are as many as those of images, in the same order. A list
    of pairs holds them too. Or annotations, a file or a folder (`data.annotations`), which are drawn as masks."""
    unlabeled: str | tuple[str, ...] | None = None
    """Images without masks, as `predict` takes them, for training to learn from, too (`training.unlabeled`)."""
    match: str | None = None
    """Regular expression that finds, in the relative paths of an image and its mask, the text that both have: its first
    group, or all of it. None: a mask has its image's relative path and stem, with or without `_mask`."""
    image_size: int | tuple[int, int] = 512
    """Every image is resized to this for the network, in pixels: the side of a square, or [height, width]."""
    tile: int = 0
    """A training step sees a random square of the resized image with this side in pixels; 0: the whole image.
    Validation and prediction see the whole image. Unpadded networks see it in tiles of this size, with exactly the
    same result (the overlap-tile strategy of Ronneberger et al. 2015, figure 2)."""
    fraction: float = 1.0
    """Share of the pairs to use, chosen by a hash of seed and name."""
    val_fraction: float = 0.2
    """Share of the pairs, or of the groups, that is held out for validation. 0: none, unless folders or `split` name
    some; then no score is known, and the model is that of the last epoch."""
    folds: int = 0
    """2 or more: the groups are divided into this many folds of equal size, and number `fold` is held out."""
    fold: int = 0
    """Number of the fold that is held out, from 0."""
    split: str | None = None
    """Which images are to train on, to validate on and to test with: a CSV file of (key or path, part), or a folder
    with train.txt and val.txt. None: folders named train, val and test (training, valid, validation, testing) decide,
    if all images are in one; else it is random, as with `random`."""
    split_order: Literal["hash", "name"] = "hash"
    """Validation takes the first groups in this order. `hash`: of seed and name, which is random. `name`: neighbours
    stay together, as the slices of one volume must."""
    group_by: str | None = None
    """Regular expression that is searched in an image's relative path. Pairs with the same match stay on one side of
    the split (for Carvana `^[^_]+`: the car)."""
    val_groups: tuple[str, ...] = ()
    """Groups that are always held out. Others join them until `val_fraction` of the groups is reached."""
    mask_values: tuple[MaskValue, ...] | None = None
    """Stored mask value of each class, in the order of the class ids; `[[0, 2], [1, 3]]` gives a class several, `[0,
    '>0']` and `[0, '>=128']` compare, and values that no class names are then class 0. None: training reads them from a
    sample of the masks when it starts, and writes them to config.yaml and into the model."""
    mask_colors: tuple[Colour | tuple[Colour, ...], ...] = ()
    """Colour of each class, instead of `mask_values`: [r, g, b] or '#rrggbb', or several of them. Masks with a palette
    are read by their colours too."""
    mask_nearest: bool = False
    """With `mask_colors`: pixels of any other colour, as JPEG or smoothing makes them, are of the nearest class."""
    mask_resize: bool = False
    """Masks may be larger or smaller than their images, in the same proportions. They are scored at their own size."""
    mask_turn: bool = False
    """Masks were drawn on images as they are stored, without EXIF orientation: each is turned like its image."""
    several_masks: Literal["refuse", "union", "classes"] = "refuse"
    """What several masks of one image mean. `union`: a pixel is foreground if it is in one of them. `classes`: each is
    a class of its own, which the folder of the mask names (`classes`), and the later class wins."""
    overlap_order: Literal["later", "area"] = "later"
    """Of annotations that overlap, the later one is seen, or with `area` the smaller one."""
    rle_order: Literal["columns", "rows"] | None = None
    """Direction of the run lengths in a table: `columns` in most of Kaggle's challenges, `rows` in Carvana's. None: by
    the name of their column."""
    ignore_index: int | str | tuple[int | str, ...] | None = None
    """Stored mask value of pixels to leave out of loss and scores (255 in many sets, 11 in CamVid), or several. With
    `mask_colors`, '#rrggbb'. None: no value."""
    value_range: ValueRange = None
    """[lowest, highest] stored pixel value, which become 0 and 255. `percentiles`: the 0.5th and 99.5th of each image
    (fluorescence, CT). None: 8-bit values stay as they are, and 16-bit values keep their upper 8 bits."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their ids. Mean scores leave out a class 0 called `background`. Of
    annotations they pick and order the labels, after `background`; without them, all labels are the foreground."""

    def __post_init__(self) -> None:
        _without_keys(self)
        if not self.masks and is_list(self.images):
            object.__setattr__(self, "masks", self.images)
        for side in self.size_hw:
            if side < 1:
                raise UserError(f"data.image_size is {self.image_size}: must be 1 or more")
        _check_choices(self, "data")
        _at_least(self, "data", tile=0, folds=0, fold=0)
        if self.folds == 1 or (self.folds and self.fold >= self.folds) or (self.fold and not self.folds):
            raise UserError(f"data.fold {self.fold} of data.folds {self.folds}: 2 or more folds, numbered from 0")
        if self.folds and self.val_groups:
            raise UserError("data.val_groups and data.folds both say what is held out: give one of them")
        if not 0 < self.fraction <= 1:
            raise UserError(f"data.fraction is {self.fraction}: above 0, at most 1")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"data.val_fraction is {self.val_fraction}: from 0 to below 1")
        for option, pattern in (("--group-by", self.group_by), ("--match", self.match)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise UserError(f"{option} {pattern!r} is not a regular expression: {error}") from None
        if self.val_groups and self.group_by is None:
            raise UserError("data.val_groups needs data.group_by, which says what a group is")
        if isinstance(self.value_range, tuple) and not self.value_range[0] < self.value_range[1]:
            raise UserError(f"data.value_range is {[*self.value_range]}: [lowest, highest] stored value")
        _check_mask_values(self)

    @property
    def ignored(self) -> tuple[int | str, ...]:
        """The entries of `ignore_index`."""
        ignored = self.ignore_index
        return () if ignored is None else ignored if isinstance(ignored, tuple) else (ignored,)

    @property
    def size_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


CUSTOM = "module:name, as mine:Net for Net in mine.py"
"""How errors say what `registry.is_custom` takes."""
COMPARISON = re.compile(r"(>=|<=|>|<)\s*(\d+)")
"""What `MaskValue` takes as a text."""
COLOUR = re.compile(r"#?([0-9a-fA-F]{6})")


LISTS = frozenset({".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})
"""Ends of the names of lists."""


def is_list(value: str | tuple[str, ...] | None) -> bool:
    """Returns whether `DataConfig.images` or `masks` is a list, by its name."""
    return isinstance(value, str) and any(value.partition("?")[0].lower().endswith(suffix) for suffix in LISTS)


def locations(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Returns the folders of `DataConfig.images` or `masks`."""
    return value if isinstance(value, tuple) else (value,) if value else ()


def shown_locations(value: str | tuple[str, ...]) -> str:
    """Returns `DataConfig.images` or `masks` for a message."""
    return ", ".join(locations(value))


def selectors(value: MaskValue) -> tuple[int | str, ...]:
    """Returns the stored values and comparisons of one class."""
    return value if isinstance(value, tuple) else (value,)


def colour_code(colour: Colour | int) -> int:
    """Returns a colour as one number, 65536 red + 256 green + blue. Raises ValueError."""
    if isinstance(colour, str) and (found := COLOUR.fullmatch(colour)):
        return int(found[1], 16)
    if isinstance(colour, tuple) and len(colour) == 3 and all(0 <= part <= 255 for part in colour):
        return colour[0] << 16 | colour[1] << 8 | colour[2]
    raise ValueError(f"{colour!r} is no colour: [r, g, b] from 0 to 255, or '#rrggbb'")


def colours_of(entry: Colour | tuple[Colour, ...]) -> tuple[Colour, ...]:
    """Returns the colours of one class."""
    several = isinstance(entry, tuple) and not all(isinstance(part, int) for part in entry)
    return typing.cast("tuple[Colour, ...]", entry if several else (entry,))


def _check_mask_values(data: DataConfig) -> None:
    """Raises UserError for mask values or colours that can't be read, or that contradict each other."""
    if data.mask_colors:
        if data.mask_values is not None:
            raise UserError("data.mask_colors and data.mask_values both say what a mask means: give one of them")
        try:
            codes = [colour_code(colour) for entry in data.mask_colors for colour in colours_of(entry)]
            codes += [colour_code(typing.cast("Colour", value)) for value in data.ignored]
        except ValueError as error:
            raise UserError(f"data.mask_colors: {error}") from None
        if len(set(codes)) != len(codes):
            raise UserError(f"data.mask_colors names a colour twice: {data.mask_colors}, ignored {[*data.ignored]}")
        return
    named = [each for value in data.mask_values or () for each in selectors(value)]
    for each in named:
        if isinstance(each, str) and not COMPARISON.fullmatch(each.strip()):
            raise UserError(f"data.mask_values: {each!r} is no value and no comparison such as '>0' or '>=128'")
        if isinstance(each, int) and not 0 <= each < 2**16:
            raise UserError(f"data.mask_values: {each} can't be stored in a mask: 0 to 65535 (below 0: ignore_index)")
    if any(isinstance(value, str) for value in data.ignored):
        raise UserError(f"data.ignore_index is {data.ignore_index!r}: numbers are needed, or data.mask_colors")
    named += data.ignored
    if len(set(named)) != len(named):
        raise UserError(f"data.mask_values names a value twice: {named}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random changes to training images and their masks, drawn anew in every epoch (`augment.`)."""

    hflip: float = 0.5
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of a top-bottom flip."""
    quarter_turns: bool = False
    """Turn by 0, 90, 180 or 270 degrees, each equally likely; square images only."""
    shift: float = 0.0
    """Largest shift to each side, as a share of the image's side. Pixels beyond the edge are mirrored."""
    rotation: float = 0.0
    """Largest rotation either way, degrees."""
    scale: float = 0.0
    """Largest magnification either way: 0.1 draws factors from 1 / 1.1 to 1.1."""
    elastic: float = 0.0
    """Standard deviation, in pixels, of random displacements on a 3x3 grid, which is interpolated bicubically over the
    image (Ronneberger et al. 2015, section 3.1: 10)."""
    brightness: float = 0.0
    """Largest change of brightness either way, as a share of white."""
    contrast: float = 0.0
    """Largest change of contrast: 0.2 draws factors from 1 / 1.2 to 1.2, around middle gray."""
    gamma: float = 0.0
    """Largest change of gamma: 0.2 draws exponents from 1 / 1.2 to 1.2."""
    custom: str | None = None
    """An augmentation of your own, see `custom_parts`; it comes before the others."""

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} is {getattr(self, name)}: a probability from 0 to 1")
        if self.custom is not None and not is_custom(self.custom):
            raise UserError(f"augment.custom is {self.custom!r}: {CUSTOM}")
        _at_least(self, "augment", **{each.name: 0.0 for each in dataclasses.fields(self) if each.name != "custom"})


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizationConfig:
    """Optimizer, loss and schedule (`train.`)."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 8
    """Images per optimizer step, over all workers together: the same on one worker and on eight."""
    init: str | None = None
    """Run or model directory whose weights the network starts from (fine-tuning). Its `model.` settings must be the
    same, except dropout and num_classes. With another num_classes the last layer is initialised anew."""
    encoder_weights: str | None = None
    """A .safetensors file with the first weights of the encoder (`unet` with one, or `smp`), for machines that can't
    download any: those of a model, or of smp's encoder itself (`model.encoder.state_dict()`)."""
    learning_rate: float = 3e-4
    """The highest learning rate of the schedule."""
    weight_decay: float = 0.01
    """Weight decay of the weights; biases and norms have none."""
    optimizer: str = "adamw"
    """One of `registry.OPTIMIZERS`, which explains each."""
    momentum: float = 0.99
    """Momentum of `sgd` (Ronneberger et al. 2015, section 3: 0.99)."""
    schedule: Literal["constant", "plateau", "cosine", "poly", "one_cycle"] = "constant"
    """How the learning rate changes. `plateau`: times `plateau_factor` after `plateau_patience` epochs without a better
    validation Dice. `cosine`: falls to zero. `poly`: falls as (1 - progress) ** 0.9 (Chen et al. 2017, DeepLab).
    `one_cycle`: rises over the first 15 % of the steps, then falls along a cosine to zero (Smith & Topin 2018)."""
    warm_up: float = 0.0
    """Share of all steps over which the learning rate rises from 1/25 of its value; `one_cycle` has its own rise."""
    plateau_factor: float = 0.5
    """See `schedule`."""
    plateau_patience: int = 10
    """See `schedule`; epochs."""
    patience: int = 0
    """Stop after this many epochs in a row without a better validation Dice; 0: never."""
    clip_norm: float = 0.0
    """Largest norm of the gradients over all weights; larger ones are scaled down to it. 0: no limit."""
    accumulate: int = 1
    """Micro-batches per optimizer step: each batch is divided into this many, to save memory."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, e.g. 0.999; 0: none. The average is then validated and
    saved. The decay is at most (1 + steps) / (10 + steps), so that the first weights are soon forgotten."""
    loss: str = "auto"
    """One of `registry.LOSSES`, or a sum such as `bce+dice`. `auto`: bce+dice for one class, ce+dice for more. Terms
    may be your own, see `custom_parts`."""
    focal_gamma: float = 2.0
    """Exponent of the focal loss (Lin et al. 2017: 2)."""
    tversky_alpha: float = 0.3
    """Weight of false positives; false negatives have 1 minus it (Salehi et al. 2017: 0.3 and 0.7)."""
    class_weights: Literal["none", "inverse"] | tuple[float, ...] = "none"
    """Weight of each class (one class: of background and foreground). bce, ce and focal weigh pixels with them, dice
    and tversky the classes' losses. `inverse`: pixels / (classes * pixels of the class), counted in a sample of the
    masks and written to config.yaml."""
    border_weight: float = 0.0
    """w0 of the map that gives bce, ce and focal more weight in the gaps between neighbouring objects (Ronneberger et
    al. 2015, equation 2: 10); 0: none."""
    border_sigma: float = 5.0
    """Sigma of that map, in pixels of the resized image (the paper: about 5)."""
    unlabeled_weight: float = 1.0
    """Weight of the loss of images without masks at the end of the training, to which it rises (Sohn et al. 2020: 1). A
    step sees as many as images with masks."""
    unlabeled_confidence: float = 0.95
    """A pixel of theirs counts where the average of the weights gives a class this probability (Sohn et al.: 0.95)."""
    foreground: float = 0.0
    """Share of the tiles (`data.tile`) whose middle is a pixel of a class other than 0, each class equally often, so
    that rare ones are seen (nnU-Net, Isensee et al. 2021: 0.33)."""
    teacher: str | None = None
    """Run or model directory whose probabilities the network learns, too, of the images with masks and of those of
    `data.unlabeled` (`training.teacher`; `unet-ray distill` sets it)."""
    seed: int = 42
    """Seed of the split, the first weights, the order of the images and the augmentation."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 autocast if the device computes in it (CUDA from Ampere on, CPUs with AMX or AVX512-BF16), otherwise
    fp32. `fp16`: with a gradient scaler, on CUDA only. The weights are always fp32."""
    channels_last: bool = True
    """Memory format of the network: faster on CPUs and tensor cores; the same result to rounding."""
    checkpoint_activations: bool = False
    """Compute each level's activations again in the backward pass instead of storing them: less memory, more time."""

    def __post_init__(self) -> None:
        _without_keys(self)
        _check_choices(self, "train", optimizer=OPTIMIZERS)
        _at_least(self, "train", epochs=1, batch_size=1, weight_decay=0, clip_norm=0, accumulate=1, patience=0)
        _at_least(self, "train", focal_gamma=0, border_weight=0, plateau_patience=0, unlabeled_weight=0)
        if not 0 <= self.foreground <= 1:
            raise UserError(f"train.foreground is {self.foreground}: from 0 to 1")
        if not 0.5 <= self.unlabeled_confidence <= 1:
            raise UserError(f"train.unlabeled_confidence is {self.unlabeled_confidence}: from 0.5 to 1")
        if self.learning_rate <= 0:
            raise UserError(f"train.learning_rate is {self.learning_rate}: must be above 0")
        if self.border_sigma <= 0:
            raise UserError(f"train.border_sigma is {self.border_sigma}: must be above 0")
        for name in ("momentum", "ema", "warm_up", "tversky_alpha"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}: from 0 to below 1")
        if not 0 < self.plateau_factor < 1:
            raise UserError(f"train.plateau_factor is {self.plateau_factor}: between 0 and 1")
        if self.accumulate > self.batch_size:
            raise UserError(f"train.accumulate {self.accumulate}: a batch of {self.batch_size} has fewer images")
        if isinstance(self.class_weights, tuple) and min(self.class_weights, default=0) <= 0:
            raise UserError(f"train.class_weights {[*self.class_weights]}: one number above 0 for each class")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """Where training runs (`compute.`)."""

    workers: int | tuple[int, int] = 1
    """Training processes, each with a GPU or with `cpus_per_worker` CPUs. [fewest, most]: as many as fit on the
    cluster; their number changes when nodes join or leave."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if the cluster (with --local: this machine) has it."""
    cpus_per_worker: int = 0
    """CPUs and torch threads per worker; 0: the cluster's CPUs divided by the workers."""
    memory_fraction: float = 0.5
    """Resized images stay in memory if they take at most this share of it; otherwise each epoch streams them."""
    cache: str | None = None
    """Folder or URI that stores resized images and masks for later epochs and runs (`unet_ray.data.cache`)."""
    compile: bool | None = None
    """Compile the network (torch.compile) for training. null: do it if that saves twice the time it takes,
    estimated from the network's operations, the images and the epochs (`unet_ray.models.compiling`)."""
    retries: int = 3
    """Times in a row that training restarts from the last finished epoch after Ray lost a worker or a node. A finished
    epoch starts the count again."""
    mlflow: str | None = None
    """Tracking URI, such as `http://127.0.0.1:5000`, to which the metrics are also written (extra `mlflow`)."""

    def __post_init__(self) -> None:
        _without_keys(self)
        _check_choices(self, "compute")
        _at_least(self, "compute", cpus_per_worker=0, memory_fraction=0, retries=0)
        if not 1 <= self.fewest_workers <= self.most_workers:
            raise UserError(f"compute.workers is {self.workers}: 1 or more, or [fewest, most]")

    @property
    def fewest_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All settings of a training: the contents of a run's `config.yaml`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: OptimizationConfig = field(default_factory=OptimizationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        height, width = self.data.size_hw
        if self.data.tile:
            self.model.check_size(self.data.tile, "data.tile")
            if self.data.tile < 2**self.model.depth:
                raise UserError(f"data.tile {self.data.tile}: at least {2**self.model.depth} with model.depth")
            if self.data.tile > min(height, width):
                raise UserError(f"data.tile {self.data.tile} is larger than --image-size {self.data.image_size}")
        else:
            for side in (height, width):
                self.model.check_size(side, "--image-size")
        if self.augment.quarter_turns and height != width:
            raise UserError(f"augment.quarter_turns needs square images, not {height}x{width}")
        if self.train.encoder_weights and self.train.init:
            raise UserError("--init and train.encoder_weights both give the first weights: leave one out")
        if self.train.foreground and not self.data.tile:
            raise UserError(f"train.foreground={self.train.foreground:g} places tiles: it needs data.tile")
        if (self.data.unlabeled or self.train.teacher) and self.model.padding == "valid":
            raise UserError("--unlabeled and train.teacher need model.padding=same")
        terms = set(self.train.loss.split("+"))
        for term in {term for term in terms if not is_custom(term)} - {"auto", *LOSSES}:
            raise UserError(f"train.loss {self.train.loss!r}: {term!r} is not a loss{nearest(term, ['auto', *LOSSES])}")
        if "auto" in terms and len(terms) > 1:
            raise UserError(f"train.loss {self.train.loss!r}: auto stands alone")
        if "bce" in terms and self.model.num_classes > 1:
            raise UserError(f"train.loss {self.train.loss!r} is for one class: use ce with model.num_classes > 1")
        if "ce" in terms and self.model.num_classes == 1:
            raise UserError(f"train.loss {self.train.loss!r} needs model.num_classes of 2 or more: use bce")
        ids = max(2, self.model.num_classes)
        of_one_file = self.data.several_masks == "classes"
        for name, given in (
            ("data.mask_values", None if of_one_file else self.data.mask_values),
            ("data.mask_colors", self.data.mask_colors),
            ("data.classes", self.data.classes),
            ("train.class_weights", self.train.class_weights),
        ):
            if given and not isinstance(given, str) and len(given) != ids:
                raise UserError(
                    f"{name} has {len(given)} entries: {ids} are needed with model.num_classes="
                    f"{self.model.num_classes}" + (" (background and foreground)" if ids == 2 else "")
                )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns section -> setting -> value, in YAML's own types."""
        return plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, slots=True)
class Cleanup:
    """Clean-up of a predicted mask at the image's own size. Removed pixels become class 0, the background."""

    min_area: float = 0.0
    """Remove connected regions (by edges, not corners) with fewer pixels than this."""
    min_share: float = 0.0
    """The same, as a share of the image's pixels."""
    largest: bool = False
    """Keep only the largest region of each class."""
    holes: bool = False
    """Background that a class encloses becomes that class."""

    @classmethod
    def parse(cls, text: str) -> Cleanup:
        """Reads `area=64`, `area=0.1%`, `largest`, `holes`, several joined by `+`, or `none`. Raises UserError."""
        values: dict[str, Any] = {}
        for part in (part.strip() for part in text.split("+")):
            name, _, amount = part.partition("=")
            if part in ("largest", "holes"):
                values[part] = True
            elif name == "area" and re.fullmatch(r"\d*\.?\d+%?", amount):
                share = amount.endswith("%")
                values["min_share" if share else "min_area"] = float(amount.rstrip("%")) / (100 if share else 1)
            elif part != "none" or "+" in text:
                raise UserError(f"--cleanup {text!r}: area=PIXELS, area=SHARE%, largest, holes, joined by +, or none")
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskOptions:
    """Settings for making masks, which prediction and evaluation share."""

    tile: int = 0
    """Segment an image at its own size, in squares of this side in pixels. 0: resize it whole, as in training."""
    overlap: float = 0.5
    """Share of a tile's side by which neighbouring tiles overlap. Gaussian weights blend their scores there."""
    tta: bool = False
    """Average over the flips that the network was trained with (test-time augmentation)."""
    ensemble: tuple[str, ...] = ()
    """Further models, whose probabilities are averaged with those of the first."""
    cleanup: str | None = None
    """See `Cleanup.parse`. None: the one that `evaluate --choose-cleanup` chose for this model, or none."""
    threshold: float | None = None
    """A pixel is foreground where its probability is above this (one class). None: what `evaluate --choose-threshold`
    chose for this model, or 0.5."""
    adapt: bool = False
    """First adapt the model to these images if they look unlike those of its training: blend the statistics of a sample
    of them into its batch norms (`inference.adapt`)."""
    allow_code: bool = False
    """Let a model import its network's code, where that is no part of unet_ray (`custom_parts`)."""
    max_pixels: int = MAX_PIXELS
    """Larger images are not decoded, because a file of a few kilobytes can claim gigabytes."""
    workers: int = 0
    """Replicas of the model; 0: one per GPU, or one for every 8 CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if the cluster (with --local: this machine) has it."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    """`auto`: on CPUs int8 if `unet-ray quantize` has made it for this model; otherwise bf16 if the device computes in
    it, or fp32."""
    backend: Literal["auto", "torch", "compiled", "openvino"] = "auto"
    """The library that runs the network. `auto`: OpenVINO on a CPU if it is installed, else torch, compiled if that
    pays for the number of images. It is chosen once, for all machines."""

    def __post_init__(self) -> None:
        _without_keys(self)
        _check_choices(self, "predict")
        _at_least(self, "predict", workers=0, tile=0, max_pixels=1)
        if not 0 <= self.overlap <= 0.9:
            raise UserError(f"--overlap {self.overlap}: from 0 to 0.9")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise UserError(f"--threshold {self.threshold}: between 0 and 1")
        if self.cleanup is not None:
            Cleanup.parse(self.cleanup)
        if self.adapt and self.ensemble:
            raise UserError("--adapt is for one model: leave --ensemble out")
        if self.adapt and self.precision == "int8":
            raise UserError("--adapt makes other weights, and int8 is for those of `unet-ray quantize`: leave one out")


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig(MaskOptions):
    """All settings of a prediction."""

    model: str
    """Model directory, or run directory (then its best model)."""
    inputs: tuple[str, ...]
    """Folders, files, globs, lists (.txt, .csv, .tsv, .jsonl, .parquet) or URIs."""
    out: str
    """Folder or URI for the results."""
    column: str | None = None
    """Column of a list or of Parquet files that names the images, or holds them; None: the first one with a known name
    (`lists.PATH_COLUMNS`, `parquet_images.BYTES_COLUMNS`)."""
    formats: tuple[str, ...] = ("png",)
    """Some of `registry.FORMATS`, which explains each; none: only the manifest is written."""
    name: str = "{relpath}/{stem}.png"
    """Path of a mask below OUT/masks, from {relpath} (the folder below the input), {stem}, {name} and {ext}."""
    overwrite: bool = False
    """Remove an earlier prediction in `out` first."""
    retry_failed: bool = False
    """Try images again that failed in an earlier run."""
    allow_mixed: bool = False
    """Go on with another arithmetic than the one recorded in `out`, if this machine can't do that one."""
    strict: bool = False
    """Make rows that fail of the files in folders that are no images; they are passed over otherwise, and counted."""
    moved: tuple[str, ...] = ()
    """`OLD=NEW`: an input, or a folder with inputs, that has another name than in the earlier run."""
    same_content: bool = False
    """Keep the masks of images whose modification time has changed, and whose bytes have not."""
    part: str | None = None
    """Do one part of several, such as `2/3`; each is a run of its own into the same `out`."""

    def __post_init__(self) -> None:
        MaskOptions.__post_init__(self)
        for name in self.formats:
            if name not in FORMATS:
                raise UserError(f"--format {name!r} is not one{nearest(name, FORMATS)}")
        if self.part is not None and self.adapt:
            raise UserError(
                "--adapt with --part: parts would adapt on their own. Adapt once, `unet-ray predict MODEL SOME_IMAGES "
                "--out OTHER --adapt`, then name OTHER/adapted as the model of all parts, or MODEL if that says that "
                "it stays as it is"
            )
        if self.part is not None and self.overwrite:
            raise UserError("--part and --overwrite: it would remove the other parts, too: choose another --out")
        fields = {"relpath", "stem", "name", "ext"}
        try:
            used = {field for _, field, _, _ in string.Formatter().parse(self.name) if field is not None}
        except ValueError:
            used = {""}
        if not used <= fields or not used & {"stem", "name"} or ".." in self.name.split("/"):
            raise UserError(
                f"--name {self.name!r}: a path of {{relpath}}, {{stem}}, {{name}}, {{ext}}, with stem or name"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(MaskOptions):
    """All settings of an evaluation."""

    model: str
    """Model directory, or run directory (then its best model)."""
    images: str | tuple[str, ...] | None = None
    """Folder, glob or URI of the images, or several; None: the validation pairs that the run held out."""
    masks: str | tuple[str, ...] | None = None
    """The same of the ground-truth masks; given together with `images`."""
    match: str | None = None
    """See `DataConfig.match`; None: as in training."""
    rle_order: Literal["columns", "rows"] | None = None
    """See `DataConfig.rle_order`; None: as in training."""
    part: Literal["train", "val", "test"] = "val"
    """Without `images`: which part of the run's own images."""
    mask_values: tuple[MaskValue, ...] | None = None
    """Stored value of each class in these masks; None: as in training."""
    tolerance: float = 2.0
    """Two edges agree in the surface Dice if they lie at most this many pixels apart."""

    def __post_init__(self) -> None:
        MaskOptions.__post_init__(self)
        _at_least(self, "evaluate", tolerance=0)
        _check_choices(self, "evaluate")
        if self.masks is None and is_list(self.images):
            object.__setattr__(self, "masks", self.images)
        if (self.images is None) != (self.masks is None):
            raise UserError("--images and --masks go together: give both, or neither for the run's own validation set")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown name: the nearest known name, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close and "." in name:  # a right key under a wrong section
        close = [k for k in known if k.split(".")[-1] == name.split(".")[-1]][:1]
    return f": did you mean {close[0]!r}?" if close else f": one of {', '.join(sorted(known))}"


def _with_custom(table: Iterable[str], name: str) -> list[str]:
    """Returns the names of a table, for `_check_choices`, with `name` if it is one of the user's own."""
    return [*table, name if is_custom(name) else f"your own ({CUSTOM})"]


def _without_keys(section: Any) -> None:
    """Takes the keys out of the URIs among the fields: settings are written into files."""
    for each in dataclasses.fields(section):
        value = getattr(section, each.name)
        clean = keys.stripped_all(value)
        if clean != value:
            object.__setattr__(section, each.name, clean)


def _check_choices(section: Any, prefix: str, **tables: Iterable[str]) -> None:
    """Raises UserError for a value that is not in its field's Literal, or in the table given for the field."""
    hints = typing.get_type_hints(type(section)).items()
    literals = {name: typing.get_args(hint) for name, hint in hints if typing.get_origin(hint) is Literal}
    for name, choices in {**literals, **tables}.items():
        if getattr(section, name) not in choices:
            raise UserError(f"{prefix}.{name} is {getattr(section, name)!r}: one of {', '.join(map(str, choices))}")


def _at_least(section: Any, prefix: str, **bounds: float) -> None:
    """Raises UserError for a field that is below its bound."""
    for name, bound in bounds.items():
        if getattr(section, name) < bound:
            raise UserError(f"{prefix}.{name} is {getattr(section, name)}: must be {bound} or more")


def plain(value: Any) -> Any:
    """Turns tuples into lists, since YAML has no tuples."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
