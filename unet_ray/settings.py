"""Reads YAML, `--set` and recipes into the settings of `config.py`; an error names the nearest setting.

It needs only the standard library and PyYAML, so that a wrong flag is reported at once. pydantic's TypeAdapter would
replace `_coerce` (30 lines), but it takes 0.1 s to import and build, as long as `unet-ray --help`. It also reads `true`
as 1, ignores unknown keys unless configured, and its messages have several lines and no nearest name.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, Literal, TypeVar

import yaml

from unet_ray.config import TrainConfig, UserError, nearest

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Builds dataclass `cls` from nested mappings, as YAML gives them.

    `prefix` comes before the names in messages. Raises UserError for an unknown key or a wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = setting_names() if prefix or cls is TrainConfig else list(hints)
    arguments = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise UserError(f"unknown setting {name!r}{nearest(name, known)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise UserError(f"setting {name!r} is a section: it needs keys of its own")
            arguments[key] = from_mapping(typing.cast("type[Any]", hint), value, f"{name}.")
        else:
            arguments[key] = _coerce(value, hint, name)
    return cls(**arguments)


def setting_names() -> list[str]:
    """Returns all dotted names that YAML and `--set` accept, such as `train.batch_size`."""
    sections = typing.get_type_hints(TrainConfig)
    return [f"{section}.{f.name}" for section, cls in sections.items() for f in dataclasses.fields(cls)]


def quoted(value: Any) -> Any:
    """Returns a value for `settings` of `load_train_config`. A text in it is read as YAML, which would change `data #1`
    or `[a-z]+`; quotes keep it as it is."""
    return json.dumps(value) if isinstance(value, str) else value


def load_train_config(
    *, recipe: str | None = None, config_file: str | None = None, settings: Iterable[tuple[str, Any]] = ()
) -> TrainConfig:
    """Combines the defaults, a recipe or the YAML text of a config file, and dotted `settings`; later ones win.

    Values of `settings` that are strings are read as YAML ("0.1", "[0, 255]", "null"). Raises UserError.
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
            raise UserError(f"unknown setting {name!r}{nearest(name, setting_names())}")
        section, key = name.split(".")
        if isinstance(value, str):
            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError:
                raise UserError(f"--set {name}: {value!r} is not a YAML value") from None
        values.setdefault(section, {})[key] = value
    return from_mapping(TrainConfig, values)


def recipe_names() -> list[str]:
    """Returns the names of the recipes in this package, sorted."""
    files = resources.files("unet_ray.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """Returns a recipe's YAML. Its first comment line is its summary. Saved to a file, it runs as `--config`.

    Raises UserError for an unknown name.
    """
    if name not in recipe_names():
        raise UserError(f"unknown recipe {name!r}{nearest(name, recipe_names())}; `unet-ray recipes` lists them")
    return (resources.files("unet_ray.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """Converts `value`, as YAML gave it, to the type `hint`. Raises UserError that names the setting."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        # YAML reads `null` and `~` as None; these settings call it `none`.
        return "none" if value is None and "none" in options else value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        for option in (o for o in options if o is not type(None)):
            if typing.get_origin(option) is Literal and value not in typing.get_args(option):
                continue
            try:
                return _coerce(value, option, name)
            except UserError:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        if options[-1] is Ellipsis:
            return tuple(_coerce(v, options[0], name) for v in value)
        if len(value) == len(options):
            return tuple(_coerce(v, o, name) for v, o in zip(value, options, strict=True))
    elif hint in (bool, int) and type(value) is hint:  # Python's bool is an int; here it is not a number
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
