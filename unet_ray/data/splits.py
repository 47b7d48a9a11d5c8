"""Splits pairs into training and validation; never divides a group."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from unet_ray.config import DataConfig, UserError
from unet_ray.data import storage
from unet_ray.data.inputs import listing

SPLIT = "split.csv"
"""File in a run directory that lists its training and validation images."""


def group_of(key: str, pattern: str | None) -> str:
    """Returns the first match of `pattern` (a regular expression) in `key`; without a pattern, the whole key.

    Raises UserError if nothing matches.
    """
    if pattern is None:
        return key
    match = re.search(pattern, key)
    if match is None:
        raise UserError(f"--group-by {pattern!r} finds nothing in {key!r}")
    return match.group()


def split_pairs(keys: Sequence[str], config: DataConfig, seed: int) -> tuple[list[int], list[int]]:
    """Returns indices into `keys` of the training and of the validation pairs, from `config.fraction` of all.

    Groups (single pairs without `group_by`) are sorted by a hash of seed and name, or by name (`split_order`).
    Validation takes the first `val_fraction` of them, rounded; with `folds` it takes fold number `fold`. The result is
    the same on every machine and for every order of `keys`. Raises UserError if either side is empty.
    """
    chosen = _lowest_hashes(keys, config.fraction, f"{seed}:fraction")
    group_by_key = {key: group_of(key, config.group_by) for key in sorted(chosen)}
    groups = set(group_by_key.values())
    unknown = set(config.val_groups) - groups
    if unknown:
        raise UserError(f"data.val_groups: {listing(sorted(unknown))}: no image of that group")
    held_out = set(config.val_groups)
    remaining = _by_hash(groups - held_out, f"{seed}:split")
    if config.split_order == "name":
        remaining.sort()
    if config.folds:
        if config.folds > len(groups):
            raise UserError(f"{config.folds} folds of {len(groups)} groups: use --folds {len(groups)} or fewer")
        bounds = [round(len(remaining) * number / config.folds) for number in (config.fold, config.fold + 1)]
        held_out.update(remaining[slice(*bounds)])
    else:
        wanted = max(round(len(groups) * config.val_fraction), int(config.val_fraction > 0 and len(groups) > 1))
        held_out.update(remaining[: max(0, wanted - len(held_out))])
    train = [i for i, key in enumerate(keys) if key in group_by_key and group_by_key[key] not in held_out]
    val = [i for i, key in enumerate(keys) if key in group_by_key and group_by_key[key] in held_out]
    if not train:
        raise UserError("nothing left to train on: lower data.val_fraction or shorten data.val_groups")
    if not val:
        raise UserError("nothing left to validate on: raise data.val_fraction or add images")
    return train, val


@dataclass(frozen=True, slots=True)
class LeakReport:
    """The groups of images, and how many of them are on both sides of a split."""

    pattern: str | None
    """Regular expression that finds an image's group in its key; None: no groups were named or recognised."""
    named: bool
    """The user named the pattern; otherwise it was recognised in the names."""
    groups: int
    """Number of groups."""
    shared: int
    """Number of groups with images on both sides."""


_LOOKS_LIKE = (r"^.+(?=/)", r"^[^_]+(?=_)", r"^[^-]+(?=-)", r"^.+(?=[_-])")
"""Patterns of groups: the folder; the text before the first `_`, before the first `-`, before the last of either."""


def leak_report(train_keys: Sequence[str], val_keys: Sequence[str], pattern: str | None) -> LeakReport:
    """Counts the groups that training and validation share: groups by `pattern`, or else by `likely_groups`."""
    keys = [*train_keys, *val_keys]
    found = pattern or likely_groups(keys)
    if found is None:
        return LeakReport(None, False, 0, 0)
    sides = [{group_of(key, found) for key in side} for side in (train_keys, val_keys)]
    return LeakReport(found, pattern is not None, len(sides[0] | sides[1]), len(sides[0] & sides[1]))


def likely_groups(keys: Sequence[str]) -> str | None:
    """Recognises groups in the names: the first pattern that puts 90 % of the images in groups of two or more.

    Returns None if no pattern does.
    """
    return next((pattern for pattern in _LOOKS_LIKE if _groups_them(keys, pattern)), None)


def _groups_them(keys: Sequence[str], pattern: str) -> bool:
    matches = [re.search(pattern, key) for key in keys]
    sizes = Counter(match.group() for match in matches if match)
    in_groups = sum(size for size in sizes.values() if size > 1)
    return len(sizes) > 1 and in_groups >= 0.9 * len(keys) and all(matches)


def write_split(location: str, sides: Mapping[str, str]) -> None:
    """Writes `key,part` with part `train` or `val`, sorted by key."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([("key", "part"), *sorted(sides.items())])
    storage.write_bytes(location, stream.getvalue().encode(), durable=True)


def read_split(location: str) -> dict[str, str]:
    """Returns key -> `train` or `val`; empty if the file does not exist."""
    if not storage.exists(location):
        return {}
    text = storage.read_bytes(location).decode()
    return {row["key"]: row["part"] for row in csv.DictReader(io.StringIO(text))}


def _by_hash(names: Iterable[str], salt: str) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}:{name}".encode()).digest())


def _lowest_hashes(keys: Sequence[str], fraction: float, salt: str) -> set[str]:
    if fraction == 1:
        return set(keys)
    return set(_by_hash(keys, salt)[: max(1, round(len(keys) * fraction))])
