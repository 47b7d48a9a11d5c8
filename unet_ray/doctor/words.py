"""Formats names and numbers for findings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import yaml

from unet_ray.config import plain

SHOWN = 3


def some(names: Sequence[str]) -> str:
    """Formats the first names, and the number of the others."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def number(things: Sized, what: str) -> str:
    """Returns `1 mask`, `2 masks`."""
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


def few(values: Sequence[int]) -> str:
    """Formats ascending values; a range if they have no gap."""
    if len(values) > 4 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values[:8])) + (", …" if len(values) > 8 else "")


def counts(numbers: Mapping[str, int]) -> str:
    """Returns `20 JPEG, 3 PNG`, most frequent first; a single name without its number."""
    ordered = sorted(numbers.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{count} {name}" if len(ordered) > 1 else name for name, count in ordered[:4])
    return shown + (f" and {len(ordered) - 4} others" if len(ordered) > 4 else "")


def times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1 if share >= 0.01 else 2 if share >= 1e-4 else 4}f} %"


def yaml_text(value: Any) -> str:
    """Formats a setting as `--set` takes it, on one line."""
    text = yaml.safe_dump(plain(value), default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def setting(name: str, value: Any) -> str:
    """Formats an option to copy into a shell."""
    return f"--set {name}={shlex.quote(yaml_text(value))}"
