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
from unet_ray.data import lists, storage
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


PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Name of a folder, a file or a part -> `train`, `val` or `test`."""
RANDOM = "random"
KEY_COLUMNS, PART_COLUMNS = ("key", "path", "image", "file", "name", "id"), ("part", "split", "subset", "set")


def parts_of_folders(keys: Iterable[str]) -> dict[str, str]:
    """Returns key -> part, by folders that are named so; empty unless all keys are in one, and some are to train on."""
    found = {}
    for key in keys:
        part = next((PARTS[name.lower()] for name in key.split("/")[:-1] if name.lower() in PARTS), None)
        if part is None:
            return {}
        found[key] = part
    return found if {"train"} < set(found.values()) else {}


def given_parts(keys: Sequence[str], config: DataConfig) -> dict[str, str]:
    """Returns key -> `train`, `val` or `test`, if the names or a file (`config.split`) say so; else nothing.

    Keys that a file does not name are left out. Raises UserError if the file can't be used.
    """
    if config.split == RANDOM:
        return {}
    if config.split is None:
        return parts_of_folders(keys)
    location = storage.absolute(config.split)
    listed = _of_lists(location) if storage.is_folder(location) else _of_csv(location)
    by_name: dict[str, list[str]] = {}
    for key in keys:
        by_name.setdefault(key, []).append(key)
        by_name.setdefault(key.rpartition("/")[2], []).append(key)
    known = set(keys)
    found: dict[str, str] = {}
    unknown = []
    for name, part in listed:
        match = name if name in known else _key_of(name, by_name)
        if match is None:
            unknown.append(name)
        elif found.setdefault(match, part) != part:
            raise UserError(f"{location}: {name!r} is in {found[match]} and in {part}: it can be in one of them")
    if unknown:
        raise UserError(
            f"{location}: {len(unknown)} of {len(listed)} names are no image: {listing(unknown, 3)}; the images are "
            f"named like {listing(list(keys), 2)}"
        )
    return found


def _key_of(name: str, by_name: Mapping[str, Sequence[str]]) -> str | None:
    """Returns the only key that a name of a split file can mean: a key or a path, with or without an extension."""
    stem = re.sub(r"\.[A-Za-z0-9]{2,5}$", "", name.strip().replace("\\", "/"))
    for tried in (name, stem, *("/".join(stem.split("/")[start:]) for start in range(1, stem.count("/") + 1))):
        keys = set(by_name.get(tried, ()))
        if len(keys) == 1:
            return keys.pop()
    return None


def _of_lists(folder: str) -> list[tuple[str, str]]:
    """Returns (name, part) of the lists in a folder, such as train.txt."""
    found = []
    for name in storage.names_in(folder):
        stem, _, extension = name.rpartition(".")
        if extension == "txt" and stem.lower() in PARTS:
            lines = lists.decoded(storage.read_bytes(storage.join(folder, name))).splitlines()
            found += [(line.split()[0], PARTS[stem.lower()]) for line in lines if line.strip()]
    if not any(part == "train" for _, part in found):
        raise UserError(f"{folder}: no train.txt in it (and val.txt, test.txt), with the name of an image in each line")
    return found


def _of_csv(location: str) -> list[tuple[str, str]]:
    """Returns (name, part) of each row of a CSV file."""
    try:
        text = lists.decoded(storage.read_bytes(location))
    except FileNotFoundError:
        raise UserError(f"--split {location}: no such file") from None
    rows = [row for row in csv.reader(io.StringIO(text)) if any(row)]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    key = next((header.index(name) for name in KEY_COLUMNS if name in header), None)
    part = next((header.index(name) for name in PART_COLUMNS if name in header), None)
    if key is None or part is None:
        raise UserError(f"{location}: its first line must name the columns key (or path) and part, such as `key,part`")
    found = []
    for row in rows[1:]:
        name = row[part].strip().lower() if part < len(row) else ""
        if name not in PARTS or key >= len(row):
            raise UserError(f"{location}: {','.join(row)!r}: the part is train, val or test")
        found.append((row[key].strip(), PARTS[name]))
    return found


def split_pairs(keys: Sequence[str], config: DataConfig, seed: int) -> tuple[list[int], list[int]]:
    """Returns indices into `keys` of the training and of the validation pairs, from `config.fraction` of all.

    Groups (single pairs without `group_by`) are sorted by a hash of seed and name, or by name (`split_order`).
    Validation takes the first `val_fraction` of them, rounded; with `folds` it takes fold number `fold`. The result is
    the same on every machine and for every order of `keys`. Raises UserError if nothing is left to train on, or nothing
    to validate on although `val_fraction` is not 0.
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
    if not val and (config.val_fraction or config.folds):
        raise UserError(
            f"nothing is left to validate on, because there is 1 {'group' if config.group_by else 'image'}: add more, "
            "or --set data.val_fraction=0 to train on everything and validate on nothing"
        )
    return train, val


def divided(keys: Sequence[str], config: DataConfig, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Returns indices into `keys` of the pairs to train on, to validate on and to test with.

    If a file or the names of folders say which is which (`given_parts`), that counts; what is to validate on is drawn
    from what is to train on only if they say nothing of it, or with `folds` or `val_groups`. Raises UserError.
    """
    parts = given_parts(keys, config)
    of = {name: [i for i, key in enumerate(keys) if parts.get(key) == name] for name in ("train", "val", "test")}
    if not parts:
        return *split_pairs(keys, config, seed), []
    if of["val"] and not config.folds and not config.val_groups:
        kept = _lowest_hashes(keys, config.fraction, f"{seed}:fraction")
        train, val = ([i for i in of[name] if keys[i] in kept] for name in ("train", "val"))
        return train, val, of["test"]
    rest = sorted([*of["train"], *of["val"]])
    train, val = split_pairs([keys[i] for i in rest], config, seed)
    return [rest[i] for i in train], [rest[i] for i in val], of["test"]


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


CLASS_FOLDERS = re.compile(
    r"good|bad|defect.*|n?ok|ng|(ab)?normal|anomal.*|pos(itive)?|neg(ative)?|healthy|sick|intact"
)
"""Folders that say what is to be seen, and not where an image comes from."""


def likely_groups(keys: Sequence[str]) -> str | None:
    """Recognises groups in the names: the first pattern that puts 90 % of the images in groups of two or more.

    Returns None if no pattern does. Folders of a split, and of classes, are no groups.
    """
    folders = {name.lower() for key in keys for name in key.split("/")[:-1]}
    no_groups = folders and all(name in PARTS or CLASS_FOLDERS.fullmatch(name) for name in folders)
    patterns = _LOOKS_LIKE[1:] if no_groups else _LOOKS_LIKE
    return next((pattern for pattern in patterns if _groups_them(keys, pattern)), None)


def _groups_them(keys: Sequence[str], pattern: str) -> bool:
    matches = [re.search(pattern, key) for key in keys]
    sizes = Counter(match.group() for match in matches if match)
    in_groups = sum(size for size in sizes.values() if size > 1)
    return len(sizes) > 1 and in_groups >= 0.9 * len(keys) and all(matches)


def write_split(location: str, sides: Mapping[str, str]) -> None:
    """Writes `key,part` with part `train`, `val` or `test`, sorted by key."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([("key", "part"), *sorted(sides.items())])
    storage.write_bytes(location, stream.getvalue().encode(), durable=True)


def read_split(location: str) -> dict[str, str]:
    """Returns key -> `train`, `val` or `test`; empty if the file does not exist."""
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
