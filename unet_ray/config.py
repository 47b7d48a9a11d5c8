"""Every setting: frozen dataclasses, checked when they are built, to and from YAML; the recipes.

Standard library and PyYAML only, so that `unet-ray --help` and a wrong flag answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, TypeVar

import yaml

IGNORE = 255
"""The class id, in every mask this package hands around, of a pixel that neither trains nor scores."""

MAX_CLASSES = 255
"""Class ids are uint8 and 255 is `IGNORE`."""


class UserError(ValueError):
    """What a user can cause and mend: one line that names the file or option and the remedy (exit code 2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What is trained (`model.` in YAML and `--set`)."""

    name: Literal["unet"] = "unet"
    in_channels: int = 3
    """1 gray, 2 gray + alpha, 3 RGB, 4 RGBA: what every image is converted to when it is decoded."""
    num_classes: int = 1
    """1: one foreground class, one logit, sigmoid. K >= 2: K classes that exclude each other, softmax."""
    base_channels: int = 64
    """Channels of the first level (Ronneberger et al. 2015, figure 1: 64)."""
    depth: int = 4
    """How often the image is halved (figure 1: 4)."""
    growth: float = 2.0
    """Level k has base_channels * growth**k channels (figure 1: 2), rounded to a multiple of 4 if growth is not 2."""
    norm: Literal["none", "batch", "group", "instance"] = "batch"
    padding: Literal["same", "valid"] = "same"
    """`same`: any input size, the mask as large as the image. `valid`: the 2015 paper's unpadded convolutions."""
    up: Literal["transpose", "bilinear"] = "transpose"
    dropout: float = 0.0
    """Probability at the end of the contracting path (section 3.1 of the paper)."""
    patch: int = 1
    """Side in pixels of the square that the first convolution sees as one position, its pixels as channels; the last
    layer gives it back (sub-pixel convolution, Shi et al. 2016). 2 costs a quarter of the time of 1, at the same
    mask resolution."""
    pixel_mean: float = 0.5
    pixel_std: float = 0.25
    """Pixels are (value / 255 - pixel_mean) / pixel_std, inside the model's forward and nowhere else."""

    def __post_init__(self) -> None:
        _check_choices(self, "model")
        _at_least(self, "model", in_channels=1, num_classes=1, base_channels=1, depth=1, growth=1, patch=1)
        if self.in_channels > 4:
            raise UserError(f"model.in_channels is {self.in_channels}: 1 (gray) to 4 (RGBA) can be decoded")
        if self.num_classes > MAX_CLASSES:
            raise UserError(f"model.num_classes is {self.num_classes}: at most {MAX_CLASSES}, class ids are 8-bit")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout is {self.dropout}: a probability from 0 to below 1")
        if self.pixel_std <= 0:
            raise UserError(f"model.pixel_std is {self.pixel_std}: must be above 0")
        if self.padding == "valid" and self.patch != 1:
            raise UserError("model.patch must be 1 with model.padding=valid")

    @property
    def channels(self) -> list[int]:
        """Channels of each level, the first and finest first: `depth + 1` numbers."""
        if self.growth == 2:
            return [self.base_channels * 2**level for level in range(self.depth + 1)]
        deeper = [max(4, round(self.base_channels * self.growth**level / 4) * 4) for level in range(1, self.depth + 1)]
        return [self.base_channels, *deeper]

    @property
    def margin(self) -> int:
        """Pixels that unpadded convolutions take from each side: 92 at depth 4 (572 -> 388); 0 for `same`."""
        if self.padding == "same":
            return 0
        # Each level's two 3x3 convolutions take 2 positions from each side, on the way down and again on the
        # way up; a position of level k is 2**k pixels wide. The deepest level is passed once.
        return sum(4 * 2**level for level in range(self.depth)) + 2 * 2**self.depth

    def check_size(self, size: int, option: str) -> None:
        """Raises UserError if a side of `size` pixels, mirrored by `margin`, can't be halved `depth` times evenly."""
        if self.padding == "same" or self._valid_fits(size):
            return
        near = [
            next((s for s in range(size, bound, step) if self._valid_fits(s)), None)
            for step, bound in ((-1, 0), (1, size + 2 ** (self.depth + 2)))
        ]
        offers = " or ".join(str(s) for s in near if s)
        raise UserError(
            f"{option} {size} can't be divided by 2 at each of {self.depth} levels with padding=valid: use {offers}"
        )

    def _valid_fits(self, size: int) -> bool:
        side = size + 2 * self.margin
        for _ in range(self.depth):
            side -= 4
            if side <= 0 or side % 2:
                return False
            side //= 2
        return side > 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What it is trained on (`data.`)."""

    images: str = ""
    masks: str = ""
    image_size: int | tuple[int, int] = 512
    """Pixels, one side of a square or [height, width]: what every image is resized to for the network."""
    fraction: float = 1.0
    """Share of the pairs to use, chosen by a hash of seed and name."""
    val_fraction: float = 0.2
    """Share of the pairs, or of the groups, held out for validation."""
    group_by: str | None = None
    """Regular expression searched in an image's relative path; pairs with the same match stay on one side of the
    split (for Carvana `^[^_]+`: the car)."""
    val_groups: tuple[str, ...] = ()
    """Groups that are always held out for validation, before `val_fraction` of the groups is filled up."""
    mask_values: tuple[int, ...] | None = None
    """Stored value of each class, in the order of the class ids; None: read from a sample of the masks when training
    starts, and from then on part of config.yaml and of the model."""
    ignore_index: int | None = None
    """Stored mask value of pixels that neither train nor score (255 in many sets, CamVid's 11); or None."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in order. A class 0 called `background` is left out of mean scores."""

    def __post_init__(self) -> None:
        for side in self.size_hw:
            if side < 1:
                raise UserError(f"data.image_size is {self.image_size}: must be 1 or more")
        if not 0 < self.fraction <= 1:
            raise UserError(f"data.fraction is {self.fraction}: above 0, at most 1")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"data.val_fraction is {self.val_fraction}: from 0 to below 1")
        if self.group_by is not None:
            try:
                re.compile(self.group_by)
            except re.error as error:
                raise UserError(f"--group-by {self.group_by!r} is not a regular expression: {error}") from None
        if self.val_groups and self.group_by is None:
            raise UserError("data.val_groups needs data.group_by, which says what a group is")
        if self.mask_values is not None and len(set(self.mask_values)) != len(self.mask_values):
            raise UserError(f"data.mask_values names a value twice: {list(self.mask_values)}")

    @property
    def size_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """What is done to training images, anew in every epoch (`augment.`)."""

    hflip: float = 0.5
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of a top-bottom flip."""

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} is {getattr(self, name)}: a probability from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How it is trained (`train.`)."""

    epochs: int = 10
    batch_size: int = 8
    """Images an optimizer step, over all workers together: the same on one worker and on eight."""
    learning_rate: float = 3e-4
    """Step size, at its highest where the schedule changes it."""
    weight_decay: float = 0.01
    """Not applied to biases and norms."""
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop", "muon"] = "adamw"
    """`muon`: AdamW for biases, norms and the last layer, orthogonal steps for all other weights (muon.py)."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    """`one_cycle`: up over the first 15 % of the steps, then down a cosine to zero (Smith & Topin 2018); `cosine`:
    down only."""
    loss: str = "auto"
    """`bce`, `ce`, `dice` or a sum such as `bce+dice`; `auto`: bce+dice for one class, ce+dice for more."""
    seed: int = 42
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast where the device multiplies in it (CUDA of Ampere and later, CPUs with AMX or AVX512-BF16),
    fp32 elsewhere. Weights are fp32 in either."""
    channels_last: bool = True
    """Memory format of the network: faster on CPUs and on tensor cores; the same result to rounding."""

    def __post_init__(self) -> None:
        _check_choices(self, "train")
        _at_least(self, "train", epochs=1, batch_size=1, weight_decay=0)
        if self.learning_rate <= 0:
            raise UserError(f"train.learning_rate is {self.learning_rate}: must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """Where it is trained (`compute.`)."""

    workers: int = 1
    """Training processes, each with a GPU or with `cpus_per_worker` CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if the cluster (with --local: this machine) has it."""
    cpus_per_worker: int = 0
    """CPUs and torch threads a worker; 0: the cluster's CPUs divided by the workers."""
    memory_fraction: float = 0.5
    """Resized images stay in memory when they take at most this share of it; otherwise each epoch streams them."""

    def __post_init__(self) -> None:
        _check_choices(self, "compute")
        _at_least(self, "compute", workers=1, cpus_per_worker=0, memory_fraction=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole training: `config.yaml` of a run holds exactly this."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: FitConfig = field(default_factory=FitConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        for side in self.data.size_hw:
            self.model.check_size(side, "--image-size")
        terms = set(self.train.loss.split("+"))
        known = {"auto", "bce", "ce", "dice"}
        for term in terms - known:
            raise UserError(f"train.loss {self.train.loss!r}: {term!r} is not a loss{_nearest(term, known)}")
        if "bce" in terms and self.model.num_classes > 1:
            raise UserError(f"train.loss {self.train.loss!r} is for one class: use ce with model.num_classes > 1")
        if "ce" in terms and self.model.num_classes == 1:
            raise UserError(f"train.loss {self.train.loss!r} needs model.num_classes of 2 or more: use bce")
        ids = max(2, self.model.num_classes)
        for name in ("mask_values", "classes"):
            given = getattr(self.data, name)
            if given and len(given) != ids:
                raise UserError(
                    f"data.{name} has {len(given)} entries: {ids} are needed with model.num_classes="
                    f"{self.model.num_classes}" + (" (background and foreground)" if ids == 2 else "")
                )

    def to_yaml(self) -> str:
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    """A whole prediction."""

    model: str
    """Model directory, or run directory (then its best model)."""
    inputs: tuple[str, ...]
    """Folders, files, globs or URIs."""
    out: str
    formats: tuple[str, ...] = ("png",)
    """`png`: masks/<path below the input>.png; `parquet`: masks.parquet/ with the PNG bytes of each mask."""
    workers: int = 0
    """Copies of the model; 0: one a GPU, or one for every 8 CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        _check_choices(self, "predict")
        _at_least(self, "predict", workers=0)
        known = ("png", "parquet")
        for name in self.formats:
            if name not in known:
                raise UserError(f"--format {name!r} is not one{_nearest(name, known)}")
        if not self.formats:
            raise UserError(f"--format is empty: one or more of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """A whole evaluation."""

    model: str
    images: str | None = None
    masks: str | None = None
    """Folders of images and true masks; None for both: the validation pairs that the run held out."""
    mask_values: tuple[int, ...] | None = None
    """Stored value of each class in these masks; None: as in training."""
    workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        _check_choices(self, "evaluate")
        _at_least(self, "evaluate", workers=0)
        if (self.images is None) != (self.masks is None):
            raise UserError("--images and --masks go together: give both, or neither for the run's own validation set")


T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Builds dataclass `cls` from nested mappings, as YAML gives them; unknown keys and wrong types are UserErrors."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise UserError(f"unknown setting {name!r}{_nearest(name, setting_names())}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise UserError(f"setting {name!r} is a section: it needs keys of its own")
            arguments[key] = from_mapping(typing.cast("type[Any]", hint), value, f"{name}.")
        else:
            arguments[key] = _coerce(value, hint, name)
    return cls(**arguments)


def setting_names() -> list[str]:
    """All dotted names that YAML and `--set` take, such as `train.batch_size`."""
    sections = typing.get_type_hints(TrainConfig)
    return [f"{section}.{f.name}" for section, cls in sections.items() for f in dataclasses.fields(cls)]


def load_train_config(
    *, recipe: str | None = None, config_file: str | None = None, settings: Iterable[tuple[str, Any]] = ()
) -> TrainConfig:
    """Defaults, then the recipe or the YAML text of a config file, then dotted `settings`, later ones winning.

    Values of `settings` that are strings are read as YAML ("0.1", "[0, 255]", "null").
    """
    values: dict[str, dict[str, Any]] = {}
    if recipe is not None:
        values = yaml.safe_load(recipe_text(recipe))
    elif config_file is not None:
        try:
            values = yaml.safe_load(config_file) or {}
        except yaml.YAMLError as error:
            raise UserError(f"--config is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise UserError("--config must hold sections such as `train:`, see `unet-ray recipes carvana`")
    for name, value in settings:
        if name not in setting_names():
            raise UserError(f"unknown setting {name!r}{_nearest(name, setting_names())}")
        section, key = name.split(".")
        if isinstance(value, str):
            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError:
                raise UserError(f"--set {name}: {value!r} is not a YAML value") from None
        values.setdefault(section, {})[key] = value
    return from_mapping(TrainConfig, values)


def recipe_names() -> list[str]:
    """Names of the recipes that the package carries."""
    files = resources.files("unet_ray.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """A recipe as YAML. Its first comment line is its summary; saved to a file it runs as `--config`."""
    if name not in recipe_names():
        raise UserError(f"unknown recipe {name!r}{_nearest(name, recipe_names())}; `unet-ray recipes` lists them")
    return (resources.files("unet_ray.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close and "." in name:  # a right key under a wrong section
        close = [k for k in known if k.split(".")[-1] == name.split(".")[-1]][:1]
    return f": did you mean {close[0]!r}?" if close else f": one of {', '.join(sorted(known))}"


def _check_choices(section: Any, prefix: str) -> None:
    for name, hint in typing.get_type_hints(type(section)).items():
        if typing.get_origin(hint) is Literal and getattr(section, name) not in typing.get_args(hint):
            options = ", ".join(map(str, typing.get_args(hint)))
            raise UserError(f"{prefix}.{name} is {getattr(section, name)!r}: one of {options}")


def _at_least(section: Any, prefix: str, **bounds: float) -> None:
    for name, bound in bounds.items():
        if getattr(section, name) < bound:
            raise UserError(f"{prefix}.{name} is {getattr(section, name)}: must be {bound} or more")


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """`value`, as YAML gave it, as the type `hint` asks for."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        # YAML 1.1 reads a bare `none` as text but `no`, `off` and `null` as something else.
        return "none" if value is None and "none" in options else value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        for option in (o for o in options if o is not type(None)):
            try:
                return _coerce(value, option, name)
            except UserError:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        if options[-1] is Ellipsis:
            return tuple(_coerce(v, options[0], name) for v in value)
        if len(value) == len(options):
            return tuple(_coerce(v, o, name) for v, o in zip(value, options, strict=True))
    elif hint in (bool, int) and type(value) is hint:  # a bool is an int, but no number
        return value
    elif hint is float and not isinstance(value, bool):
        try:
            return float(value)  # also "3e-4", which YAML 1.1 reads as text
        except (TypeError, ValueError):
            pass
    elif hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise UserError(f"setting {name} is {value!r}: {wanted} is needed")


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML knows."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
