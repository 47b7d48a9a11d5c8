"""Find images, pair them with their masks, split them into training and validation.

A record's *key* is its path below the folder it was found in, without the extension: it names the mask and decides
the split, so neither depends on the machine, on where the folder lies, or on the order of a listing.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unet_ray import storage
from unet_ray.config import DataConfig, UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".gif", ".tif", ".tiff", ".bmp", ".webp"})
MASK_SUFFIX = "_mask"
SPLIT = "split.csv"
"""In a run directory: which images it was trained and validated on."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image to segment."""

    key: str
    """Relative path without extension, `/` between folders."""
    path: str
    """Where to read it: absolute path or URI."""
    name: str
    """Relative path with extension."""
    size: int
    """Bytes."""
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its mask."""

    key: str
    image: str
    mask: str


def find_images(location: str) -> list[ImageFile]:
    """Every image file below a folder (or the one file, or the files of a local glob), sorted by relative path.

    Hidden files and other extensions than `EXTENSIONS` are passed over. Raises UserError if there is no such folder or
    no image in it.
    """
    location = storage.absolute(location)
    if not storage.is_uri(location) and not storage.exists(location) and glob.has_magic(location):
        paths = sorted(p for p in glob.glob(location, recursive=True) if Path(p).is_file())  # noqa: PTH207
        fixed = location[: re.search(r"[*?\[]", location).start()]  # type: ignore[union-attr]
        root = fixed.rpartition("/")[0] or "/"
        stats = [(p, Path(p).stat()) for p in paths]
        listing = [(p, p[len(root) :].lstrip("/"), s.st_size, s.st_mtime_ns) for p, s in stats]
    elif storage.is_folder(location):
        _, root = storage.resolve(location)
        skip = len(root.rstrip("/")) + 1
        listing = [
            (storage.join(location, f.path[skip:]), f.path[skip:], f.size, f.mtime_ns or 0)
            for f in storage.list_files(location)
        ]
    elif (found := storage.info(location)) is not None:
        listing = [(location, found.base_name, found.size, found.mtime_ns or 0)]
    else:
        raise UserError(f"{location}: no such folder or file")
    images = []
    for path, name, size, mtime_ns in sorted(listing, key=lambda entry: entry[1]):
        relative = PurePosixPath(name)
        if relative.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in relative.parts):
            images.append(ImageFile(str(relative.with_suffix("")), path, name, size, mtime_ns))
    if not images:
        raise UserError(f"{location}: no image in it ({', '.join(sorted(EXTENSIONS))})")
    return images


def find_pairs(images_folder: str, masks_folder: str) -> list[Pair]:
    """Each image of one folder with the mask of the same relative path and stem (`car.jpg`: `car.png` or
    `car_mask.gif`) in the other, sorted by key. The two folders may be one.

    Names match exactly: `train1` is never `train10`. Raises UserError that lists images without a mask, masks without
    an image, and images with two masks.
    """
    images, masks = find_images(images_folder), find_images(masks_folder)
    if images_folder == masks_folder:
        images = [image for image in images if not image.key.endswith(MASK_SUFFIX)]
        masks = [mask for mask in masks if mask.key.endswith(MASK_SUFFIX)]
    twice = [key for key, count in Counter(image.key for image in images).items() if count > 1]
    if twice:
        raise UserError(
            f"{images_folder}: {_listing(twice)}: two images of the same name but for the extension, "
            "so their masks can't be told apart; rename one"
        )
    keys = {image.key for image in images}
    masks_of: dict[str, list[str]] = {}
    orphans = []
    for mask in masks:
        # The whole name first: x_mask.png belongs to an image x_mask.jpg, if there is one, rather than to x.jpg.
        key = next((key for key in (mask.key, mask.key.removesuffix(MASK_SUFFIX)) if key in keys), None)
        if key is None:
            orphans.append(mask.name)
        else:
            masks_of.setdefault(key, []).append(mask.path)
    ambiguous = [key for key, found in masks_of.items() if len(found) > 1]
    if ambiguous:
        names = "; ".join(f"{key}: {', '.join(PurePosixPath(p).name for p in masks_of[key])}" for key in ambiguous[:3])
        raise UserError(f"{masks_folder}: {len(ambiguous)} image(s) with two masks ({names}): keep one each")
    missing = [image.name for image in images if image.key not in masks_of]
    if missing:
        raise UserError(
            f"{masks_folder}: no mask for {_listing(missing)}: a mask has its image's relative path and stem, "
            f"with or without {MASK_SUFFIX}"
        )
    if orphans:
        raise UserError(
            f"{images_folder}: no image for the mask(s) {_listing(orphans)}: add the images or move the masks"
        )
    return [Pair(image.key, image.path, masks_of[image.key][0]) for image in images]


def group_of(key: str, pattern: str | None) -> str:
    """The part of `key` that `pattern` (a regular expression) finds first; the whole key without a pattern."""
    if pattern is None:
        return key
    match = re.search(pattern, key)
    if match is None:
        raise UserError(f"--group-by {pattern!r} finds nothing in {key!r}")
    return match.group()


def split(keys: Sequence[str], config: DataConfig, seed: int) -> tuple[list[int], list[int]]:
    """Indices into `keys` of the training and of the validation pairs, after taking `config.fraction` of them.

    Groups (single pairs without `group_by`) are put in the order of a hash of seed and name, or in that of the names
    (`split_order`). The first `val_fraction` of them, rounded, are validation, or with `folds` the part that `fold`
    names: the same on every machine and for every order of `keys`.
    """
    chosen = _lowest_hashes(keys, config.fraction, f"{seed}:fraction")
    group_by_key = {key: group_of(key, config.group_by) for key in sorted(chosen)}
    groups = set(group_by_key.values())
    unknown = set(config.val_groups) - groups
    if unknown:
        raise UserError(f"data.val_groups: {_listing(sorted(unknown))}: no image of that group")
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
    """Whether images that belong together are on both sides of a split."""

    pattern: str | None
    """What finds an image's group in its key; None: no group was named, and none can be seen in the names."""
    named: bool
    """The user named it; otherwise it is what the names look like."""
    groups: int
    shared: int
    """Groups with images on both sides."""


_LOOKS_LIKE = (r"^.+(?=/)", r"^[^_]+(?=_)", r"^[^-]+(?=-)", r"^.+(?=[_-])")
"""The folder; what stands before the first `_`, the first `-`, the last of either."""


def leak_report(train_keys: Sequence[str], val_keys: Sequence[str], pattern: str | None) -> LeakReport:
    """How many groups are shared by training and validation: groups as `pattern` finds them, or else as the names look,
    which is the first pattern that puts nearly all images in groups of two and more."""
    keys = [*train_keys, *val_keys]
    found = pattern or next((p for p in _LOOKS_LIKE if _groups_them(keys, p)), None)
    if found is None:
        return LeakReport(None, False, 0, 0)
    sides = [{group_of(key, found) for key in side} for side in (train_keys, val_keys)]
    return LeakReport(found, pattern is not None, len(sides[0] | sides[1]), len(sides[0] & sides[1]))


def _groups_them(keys: Sequence[str], pattern: str) -> bool:
    matches = [re.search(pattern, key) for key in keys]
    sizes = Counter(match.group() for match in matches if match)
    in_groups = sum(size for size in sizes.values() if size > 1)
    return len(sizes) > 1 and in_groups >= 0.9 * len(keys) and all(matches)


def write_split(location: str, sides: Mapping[str, str]) -> None:
    """Writes `key,part` with part `train` or `val`, sorted by key."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([("key", "part"), *sorted(sides.items())])
    storage.write_bytes(location, stream.getvalue().encode())


def read_split(location: str) -> dict[str, str]:
    """Key -> part; empty if there is no such file."""
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


def _listing(names: Sequence[str], limit: int = 5) -> str:
    more = len(names) - limit
    return ", ".join(map(repr, names[:limit])) + (f" and {more} more" if more > 0 else "")
