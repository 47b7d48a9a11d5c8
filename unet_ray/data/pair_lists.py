"""Reads lists of pairs: tables with a column of images and a column of masks, as paths or as encoded images."""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from unet_ray.config import UserError, is_list
from unet_ray.data import lists, storage
from unet_ray.data.inputs import ImageFile, iter_images, listing
from unet_ray.data.lists import Column
from unet_ray.data.parquet_images import cell, holds_images, is_text

SHARD = re.compile(r"(?:.*/)?(?P<part>\w+)-(?P<number>\d+)-of-\d+\.parquet")
"""Name of a file of a Hugging Face data set; the part may be `train`, `validation` or `test`."""


class Listed(NamedTuple):
    """A row of a list of pairs."""

    image: ImageFile
    mask: ImageFile | None
    """None: the row names no mask."""


def is_pair_list(location: str) -> bool:
    """Returns whether a location is a list, or a folder that holds Parquet files and no images."""
    if is_list(location):
        return True
    if not storage.is_folder(location):
        return False
    try:
        return next(iter_images(location, pages=False)).source.endswith(".parquet")
    except UserError:
        return False


def read(location: str) -> list[Listed]:
    """Returns the rows of a list of pairs, or of all Parquet files in a folder, in their order. Raises UserError if it
    has no two such columns, or names files that don't exist."""
    location = storage.absolute(location)
    if not storage.is_folder(location):
        return list(_of_file(location, ""))
    files = sorted(entry.path for entry in storage.list_files(location) if entry.path.endswith(".parquet"))
    base = storage.resolve(location)[1].rstrip("/") + "/"
    found: list[Listed] = []
    for file in files:
        name = file.removeprefix(base)
        shard = SHARD.fullmatch(name)
        prefix = f"{shard['part']}/{shard['number']}/" if shard else name.removesuffix(".parquet") + "/"
        found += _of_file(storage.join(location, *name.split("/")), prefix)
    return found


def _of_file(location: str, prefix: str) -> Iterator[Listed]:
    """Yields the rows of one list. `prefix`: of the keys of images that are inside it."""
    columns = _columns(location)
    images, masks = (list(iter_images(location, column, pages=False)) for column in columns)
    rows = [Listed(image, None if _is_empty(mask) else mask) for image, mask in zip(images, masks, strict=True)]
    gone = [file.path for row in rows for file in row if file is not None and file.size < 0]
    if gone:
        raise UserError(
            f"{location}: {len(gone)} of the files that it names are not there: {listing(gone, 2)}; paths are relative "
            "to the folder of the list: correct them, or remove these rows"
        )
    names = {row.image.key for row in rows}
    # The keys begin below the folder of all images, which may be anywhere.
    start = len(posixpath.commonpath([posixpath.dirname(name) for name in names])) if names else 0
    for number, row in enumerate(rows):
        if row.image.source == location:
            # Names inside a file may be all the same.
            key = prefix + (row.image.key if len(names) == len(rows) else f"{number:09d}")
            yield Listed(_in_cell(row.image, key, columns[0]), row.mask and _in_cell(row.mask, key, columns[1]))
        else:
            yield Listed(dataclasses.replace(row.image, key=row.image.key[start:].lstrip("/")), row.mask)


def _is_empty(file: ImageFile) -> bool:
    """Returns whether a cell names no file."""
    return file.size < 0 and bool(file.source)


def _in_cell(image: ImageFile, key: str, column: Column) -> ImageFile:
    """Returns an image in a Parquet file, with the location of its cell."""
    path = cell(image.source, image.row, str(column))
    return dataclasses.replace(image, key=key, name=key, path=path, source="", row=-1)


def _columns(location: str) -> tuple[Column, Column]:
    """Returns the columns of the images and of the masks. Raises UserError if the list has no two such columns."""
    suffix = PurePosixPath(storage.split_options(location)[0]).suffix
    image: Column
    mask: Column
    names: list[str] = []
    try:
        if suffix == ".parquet":
            image, mask, names = _of_schema(location)
        else:
            image, mask = lists.pair_columns(storage.read_bytes(location), suffix)
    except FileNotFoundError:
        raise UserError(f"{location}: no such file") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{location}: not a Parquet file that can be read: {error}") from None
    if image is None or mask is None:
        has = f", and it has {', '.join(names)}" if names else ""
        raise UserError(
            f"{location}: a list of pairs has a column of images, such as {lists.PATH_COLUMNS[0]} or image, and one of "
            f"masks, such as mask or label{has}: name them so, or give --masks a folder"
        )
    return image, mask


def _of_schema(location: str) -> tuple[str | None, str | None, list[str]]:
    """Returns the columns of images and of masks of a Parquet file, and the names of all."""
    filesystem, inner = storage.resolve(location)
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        schema = file.schema_arrow
    encoded = [name for name in schema.names if holds_images(schema, name)]
    texts = [name for name in schema.names if is_text(schema, name)]
    for names in (encoded, texts):
        image, mask = lists.known_columns(names)
        if image is not None and mask is not None:
            return image, mask, schema.names
    return None, None, schema.names
