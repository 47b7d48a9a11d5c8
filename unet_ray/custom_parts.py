"""Imports networks, losses and augmentations of your own: settings name them as `module:name`.

    unet-ray train … --set model.name=mine:Net --set train.loss=mine:soft+dice --set augment.custom=mine:speckle

The module is a file `mine.py`, or a package, on Python's path. The commands also look in the current folder, and so do
the workers on Ray of the same machine. Machines of a cluster get the folder by `ray job submit --working-dir`.

A network is called with the settings of `model.` and takes normalised pixels, float32 [N,C,H,W]. It returns logits
[N,K,H,W]: K is `num_classes`, and one logit stands for one class beside the background. H and W are multiples of
`multiple_of`, 32 unless it says otherwise. Normalisation and padding are done outside.

    import torch
    from torch import nn

    class Net(nn.Module):
        multiple_of = 2

        def __init__(self, config):
            super().__init__()
            width = config.base_channels
            self.down = nn.Sequential(nn.Conv2d(config.in_channels, width, 3, 2, 1), nn.ReLU())
            self.up = nn.Upsample(scale_factor=2, mode="bilinear")
            self.head = nn.Conv2d(width, config.num_classes, 3, padding=1)

        def forward(self, x):
            return self.head(self.up(self.down(x)))

`head`, its last layer, is optional: `--init` makes it new for another number of classes. A subclass of
`models.base.SegmentationModel` is taken as it is.

A loss is a function as in `training/losses.py`. It gets `training.losses.Pixels` and the settings of `train.`, and
returns one number for each image, float32 [N], or one for the batch, which then counts for each of its images.

    def soft(pixels, config):
        return pixels.mean((pixels.logits[:, 0].sigmoid() - (pixels.mask == 1).float()) ** 2)

An augmentation gets one image, uint8 [H,W,C], its mask, class ids uint8 [H,W] with 255 where a pixel does not count,
and a numpy.random.Generator that depends on seed, epoch and image only. It returns both, in the same sizes and types.
It comes before all other augmentations.

    def speckle(image, mask, generator):
        noise = generator.normal(0, 8, image.shape)
        return (image + noise).clip(0, 255).astype("uint8"), mask

All are tried on small random data before the first epoch. A model whose network is yours needs its module wherever it
is used, and `--allow-code` (in Python `allow_code=True`), since a model directory may come from somebody else. So does
`train --config FILE` with names that are not repeated by `--set`.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from unet_ray import registry
from unet_ray.config import TrainConfig, UserError, first_line, nearest
from unet_ray.own_process import is_own

_permitted: set[str] = set()
"""Names that may be imported in this process: a user has typed them, or has typed --allow-code."""


def names_in(config: TrainConfig) -> list[str]:
    """Returns the names of custom parts in the settings."""
    names = [config.model.name, *config.train.loss.split("+"), config.augment.custom or ""]
    return [name for name in names if registry.is_custom(name)]


def permit(*names: str) -> None:
    """Lets custom parts be imported in this process."""
    _permitted.update(names)


def check_typed(config: TrainConfig, typed: Iterable[str], allow_code: bool) -> None:
    """Raises UserError for custom parts that the user has not typed, but that a file of settings names. `typed`: names,
    sums of them, or `setting=name`."""
    terms = {term.strip(" '\"") for text in typed for term in re.split("[=+]", text)}
    named = [name for name in names_in(config) if name not in terms]
    if named and not allow_code:
        raise UserError(
            f"the settings name code that is no part of unet_ray, {', '.join(named)}: if you trust it, add "
            "--allow-code (in Python allow_code=True)"
        )


def check_permission(model: str, name: str, allow_code: bool) -> bool:
    """Returns whether the network `name` of a model directory is a custom one. Raises UserError if it may not be
    imported; `allow_code` permits it."""
    if not registry.is_custom(name):
        return False
    if allow_code:
        permit(name)
    if name not in _permitted:
        raise UserError(
            f"{model} runs code that is no part of unet_ray, {name}: if you trust the model and that code, add "
            "--allow-code (in Python allow_code=True)"
        )
    return True


def load(choices: Mapping[str, str], name: str, *arguments: str) -> Any:
    """Returns what a name stands for: an entry of a table of `registry`, or a custom part.

    Raises UserError if a custom part can't be imported, or can't be called with arguments of these names.
    """
    if not registry.is_custom(name):
        return registry.load(choices, name)
    if name not in _permitted:
        raise UserError(f"{name} is no part of unet_ray, and was not allowed (--allow-code)")
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if is_own() and here not in sys.path:
        sys.path.append(here)  # last, so that nothing installed is hidden; it stays for imports that come later
    try:
        with explained(name):
            module = import_module(module_name)
    except ModuleNotFoundError as error:  # of no line of the user's
        if module_name.endswith(".py"):
            raise UserError(f"{name} is a file: write {module_name.removesuffix('.py')}:{attribute}") from None
        raise UserError(
            f"{name}: {first_line(error)}: give the command in the folder of {module_name.partition('.')[0]}.py, or "
            "name the folder in PYTHONPATH; on a cluster: ray job submit --working-dir"
        ) from None
    part = getattr(module, attribute, None)
    if not callable(part):
        known = [key for key, value in vars(module).items() if callable(value) and value.__module__ == module_name]
        raise UserError(f"{name}: {module.__file__} has no {attribute} to call{nearest(attribute, known)}")
    _check_signature(name, part, arguments)
    return part


def _check_signature(name: str, part: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    try:
        inspect.signature(part).bind(*arguments)
    except TypeError as error:
        raise UserError(f"{name} is called as {name.partition(':')[2]}({', '.join(arguments)}): {error}") from None
    except ValueError:  # it is not written in Python, so only a call can tell
        pass


@contextmanager
def explained(*names: str) -> Iterator[None]:
    """Turns an exception from the code of custom parts into a UserError that names file and line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        place = _place(error, {name.partition(":")[0].partition(".")[0] for name in names if registry.is_custom(name)})
        if place is None or type(error).__name__ == "OutOfMemoryError":  # of CUDA: another remedy
            raise
        raise UserError(f"{place}: {type(error).__name__}: {first_line(error)}") from error


def _place(error: Exception, packages: set[str]) -> str | None:
    """Returns `file, line N, in function` of the deepest line of these packages in an error's traceback."""
    if isinstance(error, SyntaxError) and packages:
        return f"{error.filename}, line {error.lineno}"
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if str(frame.f_globals.get("__name__")).partition(".")[0] in packages:
            return f"{frame.f_code.co_filename}, line {line}, in {frame.f_code.co_name}"
    return None


def is_permitted(name: str) -> bool:
    """Returns whether a custom part may be imported in this process."""
    return name in _permitted


def source_sha256(name: str) -> str:
    """Returns the SHA-256 of the file with the code of a custom part that has been loaded; an empty text for our own
    parts, and if there is no such file."""
    module, _, attribute = name.partition(":")
    part = getattr(sys.modules.get(module), attribute, None) if registry.is_custom(name) else None
    try:
        file = None if part is None else inspect.getsourcefile(part)
    except TypeError:  # it is not written in Python
        file = None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
