"""Holds the output formats of a prediction: one class per format, named in `registry.FORMATS`."""

from __future__ import annotations

from collections.abc import Sequence

from unet_ray import registry
from unet_ray.inference.formats.base import OutputFormat
from unet_ray.models.checkpoint import ModelCard


def formats_of(names: Sequence[str], card: ModelCard) -> tuple[OutputFormat, ...]:
    """Returns the formats with these names, in the registry's order. Raises UserError if one can't hold the model's
    masks."""
    chosen = tuple(name for name in registry.FORMATS if name in names)
    return tuple(registry.load(registry.FORMATS, name)(card, chosen) for name in chosen)


def all_owned_names() -> list[str]:
    """Returns the names of all files and folders below the output folder that formats write."""
    return [name for format in registry.FORMATS for name in registry.load(registry.FORMATS, format).owned_names]
