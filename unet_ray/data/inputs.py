"""Finds images in folders, globs, lists, Parquet files and buckets.

An image's *key* is its path below the folder it was found in, without the extension. It names the mask and determines
the split, so neither depends on the machine, on where the folder is, or on the order of a listing.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray.config import UserError
from unet_ray.data import storage

T = TypeVar("T")

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".gif", ".tif", ".tiff", ".bmp", ".webp", ".npy"})
BYTES_COLUMNS = ("image", "bytes", "image_bytes", "data", "content")
"""Columns of a Parquet file that may hold encoded images; the first one present is used."""
NAME_COLUMNS = ("path", "file_name", "name", "id")
"""Columns that may name those images; the first one present is used."""
NAMES_AT_ONCE = 2**16
LISTED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image to segment."""

    key: str
    """Relative path without extension, with `/` between folders."""
    path: str
    """Absolute path or URI. For an image inside a Parquet file: that file's path, `#` and the row."""
    name: str
    """Relative path with extension."""
    size: int
    """Size of the file in bytes; -1: it does not exist."""
    mtime_ns: int
    """Modification time of the file in ns."""
    source: str = ""
    """Parquet file that contains the image; empty: the image is a file itself."""
    row: int = -1
    """Row in that Parquet file."""


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Returns `count` of the items, evenly spaced; all of them if they are fewer."""
    return [items[number * len(items) // count] for number in range(count)] if len(items) > count else list(items)


def find_images(location: str) -> list[ImageFile]:
    """Returns all images that `iter_images` finds, sorted by relative path. Raises UserError."""
    return sorted(iter_images(location), key=lambda image: image.name)


def iter_images(location: str) -> Iterator[ImageFile]:
    """Yields the images of a folder and its subfolders, of a local glob, of a list, or a single file.

    The order depends only on the names; a list keeps its own order. A list is a `.txt` with a path or URI on each line
    (relative paths are below the list's folder), or a `.parquet` file or folder with a column `path` or with encoded
    images in a binary column (`image`, `bytes`, …, or Hugging Face's struct of bytes and path). In folders and globs,
    hidden files and extensions that are not in `EXTENSIONS` are skipped. A broken link, or a file in a list that does
    not exist, has size -1. Only the names of one folder at a time are in memory. Raises UserError if there is no such
    folder or no image in it.
    """
    location = storage.absolute(location)
    count = 0
    for image in _found(location):
        count += 1
        yield image
    if not count:
        raise UserError(f"{location}: no image in it ({', '.join(sorted(EXTENSIONS))})")


def root_name(location: str) -> str:
    """Returns a name for the folder that an input's relative paths begin at: the folder's name, or a list's stem."""
    location = storage.absolute(location)
    path = PurePosixPath(storage.split_options(location)[0])
    if path.suffix in (".txt", ".parquet"):
        return path.stem
    while glob.has_magic(path.name) or _wanted(path.name):
        path = path.parent
    return path.name or "input"


def _found(location: str) -> Iterator[ImageFile]:
    if not storage.is_uri(location) and not storage.exists(location) and glob.has_magic(location):
        yield from _of_glob(location)
        return
    found = storage.info(location)
    path = PurePosixPath(storage.split_options(location)[0])
    if found is None and not os.path.islink(location):  # noqa: PTH114 - keeps the surrogates of names that aren't UTF-8
        raise UserError(f"{location}: no such folder or file")
    if path.suffix == ".parquet":
        yield from _of_parquet(location)
    elif found is not None and storage.is_folder(location):
        yield from _walk(location, "", ())
    elif path.suffix == ".txt":
        base = storage.parent(location)
        lines = storage.read_bytes(location).decode("utf-8", "surrogateescape").splitlines()
        yield from _listed((line.strip() for line in lines if line.strip()), base)
    else:
        yield from _listed([location], storage.parent(location))


def _image(path: str, name: str, size: int, mtime_ns: int) -> ImageFile:
    stem, dot, _ = name.rpartition(".")
    return ImageFile(stem if dot and not stem.endswith("/") and stem else name, path, name, size, mtime_ns)


def _wanted(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122 - called often


def _of_glob(pattern: str) -> Iterator[ImageFile]:
    fixed = pattern[: re.search(r"[*?\[]", pattern).start()]  # type: ignore[union-attr]
    root = fixed.rpartition("/")[0] or "/"
    for path in sorted(glob.iglob(pattern, recursive=True)):  # noqa: PTH207
        if _wanted(path.rpartition("/")[2]) and not Path(path).is_dir():
            yield _image(path, path[len(root) :].lstrip("/"), *storage.sizes_and_times([path])[0])


def _walk(folder: str, below: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[ImageFile]:
    """Yields the images of a folder by name, then those of its subfolders by name.

    `ancestors`: (device, inode) of the folders above, so that a link to one of them is not followed.
    """
    subfolders: list[str] = []
    if storage.is_uri(folder):
        yield from _in_bucket(folder, below, subfolders)
    else:
        status = os.stat(folder)  # noqa: PTH116
        here = (status.st_dev, status.st_ino)
        if here in ancestors:
            return
        ancestors = (*ancestors, here)
        try:
            files = _names_here(folder, subfolders)
        except OSError as error:
            if not below:
                raise UserError(f"{folder}: cannot be listed: {error.strerror}") from None
            # The folder becomes an entry, so that it is reported among the failed images.
            yield ImageFile(below.rstrip("/"), folder, below.rstrip("/"), -1, 0)
            return
        for base_name in files:
            path = f"{folder.rstrip('/')}/{base_name}"
            yield _image(path, below + base_name, *storage.sizes_and_times([path])[0])
    for name in sorted(subfolders):
        yield from _walk(storage.join(folder, name), f"{below}{name}/", ancestors)


def _in_bucket(folder: str, below: str, subfolders: list[str]) -> Iterator[ImageFile]:
    """Yields the images directly in a bucket's folder, and appends the names of its folders to `subfolders`."""
    for entry in storage.entries(folder):
        if entry.is_file and _wanted(entry.base_name):
            path = storage.join(folder, entry.base_name)
            yield _image(path, below + entry.base_name, entry.size, entry.mtime_ns or 0)
        elif not entry.is_file and not entry.base_name.startswith("."):
            subfolders.append(entry.base_name)


def _names_here(folder: str, subfolders: list[str]) -> Iterator[str]:
    """Returns the sorted names of the images in a local folder, and appends the names of its folders to `subfolders`.

    The names are kept as Arrow bytes until they are needed: ten million take 0.3 GB instead of 0.8.
    """
    kept: list[pa.Array] = []
    batch: list[bytes] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    subfolders.append(entry.name)
            elif _wanted(entry.name):
                batch.append(os.fsencode(entry.name))
                if len(batch) == NAMES_AT_ONCE:
                    kept.append(pa.array(batch, pa.large_binary()))
                    batch = []
    kept.append(pa.array(batch, pa.large_binary()))
    names = pa.concat_arrays(kept)
    del kept, batch
    return _in_order(names)


def _in_order(names: pa.Array) -> Iterator[str]:
    order = pc.sort_indices(names)
    for start in range(0, len(names), NAMES_AT_ONCE):
        for name in names.take(order[start : start + NAMES_AT_ONCE]).to_pylist():
            yield os.fsdecode(name)


def _listed(paths: Iterable[str], base: str) -> Iterator[ImageFile]:
    """Yields the images of a list of paths; relative paths are below `base`."""
    paths, folder = iter(paths), storage.split_options(base)[0].rstrip("/") + "/"
    while batch := list(islice(paths, LISTED_AT_ONCE)):
        full = [p if storage.is_uri(p) or p.startswith("/") else storage.join(base, *p.split("/")) for p in batch]
        for path, found in zip(full, storage.sizes_and_times(full), strict=True):
            shown = storage.split_options(path)[0]
            if shown.startswith(folder):
                name = shown[len(folder) :]
            else:
                name = shown.partition("://")[2] or shown.lstrip("/")
            yield _image(path, name, *found)


def _of_parquet(location: str) -> Iterator[ImageFile]:
    if storage.is_folder(location):
        names = [name for name in storage.names_in(location) if name.endswith(".parquet") and name[0] not in "._"]
        files = [(storage.join(location, name), name.removesuffix(".parquet") + "/") for name in names]
    else:
        files = [(location, "")]
    for path, prefix in files:
        try:
            yield from _of_parquet_file(path, prefix)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a Parquet file that can be read: {error}") from None


def _of_parquet_file(location: str, prefix: str) -> Iterator[ImageFile]:
    filesystem, inner = storage.resolve(location)
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        schema = file.schema_arrow
        images = image_column(schema)
        names = next((n for n in NAME_COLUMNS if n in schema.names and _is_text(schema, n)), None)
        if images is None and names != "path":
            raise UserError(
                f"{location}: neither a column `path` nor encoded images in a binary one ({', '.join(BYTES_COLUMNS)})"
            )
        if images is None:
            for batch in file.iter_batches(LISTED_AT_ONCE, columns=["path"]):
                yield from _listed(batch.column(0).to_pylist(), storage.parent(location))
            return
        size, mtime_ns = storage.sizes_and_times([location])[0]
        base, options = storage.split_options(location)
        row = 0
        for batch in file.iter_batches(LISTED_AT_ONCE, columns=[names] if names else [schema.names[0]]):
            for value in batch.column(0).to_pylist() if names else [None] * batch.num_rows:
                name = prefix + (value.lstrip("/") if value else f"{row:09d}")
                image = _image(f"{base}#{row}{options}", name, size, mtime_ns)
                yield dataclasses.replace(image, source=location, row=row)
                row += 1


def image_column(schema: pa.Schema) -> str | None:
    """Returns the column with encoded images (binary, or a struct with `bytes`) of a Parquet schema; None if none."""
    for name in BYTES_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return name
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name
    return None


def encoded_images(location: str, rows: Sequence[int]) -> dict[int, bytes]:
    """Reads some rows (ascending) of a Parquet file. Returns row -> encoded image.

    Reads only their row groups, a batch at a time. Raises OSError, or ValueError if the file no longer has images.
    """
    filesystem, inner = storage.resolve(location)
    found: dict[int, bytes] = {}
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        column = image_column(file.schema_arrow)
        if column is None:
            raise ValueError("no longer a Parquet file with images")
        start = 0
        for number in range(file.metadata.num_row_groups):
            stop = start + file.metadata.row_group(number).num_rows
            wanted = [row for row in rows if start <= row < stop]
            if wanted:
                found.update(_of_row_group(file, number, column, start, wanted))
            start = stop
    return found


def _of_row_group(
    file: pq.ParquetFile, number: int, column: str, start: int, wanted: Sequence[int]
) -> Iterator[tuple[int, bytes]]:
    """Yields (row, encoded image) for the wanted rows of a row group whose first row is `start`."""
    for batch in file.iter_batches(64, row_groups=[number], columns=[column]):
        inside = [row - start for row in wanted if start <= row < start + batch.num_rows]
        if inside:
            for offset, value in zip(inside, batch.column(0).take(inside).to_pylist(), strict=True):
                yield start + offset, (value["bytes"] if isinstance(value, dict) else value) or b""
        start += batch.num_rows
        if start > wanted[-1]:
            return


def _is_text(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def listing(names: Sequence[str], limit: int = 5) -> str:
    """Formats the first names, and the number of the others, for an error message."""
    more = len(names) - limit
    return ", ".join(map(repr, names[:limit])) + (f" and {more} more" if more > 0 else "")
