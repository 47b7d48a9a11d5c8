"""Reads our own tables of masks: `rle.parquet` and `masks.parquet`, files or folders."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.parquet as pq

from unet_ray.data import storage
from unet_ray.data.annotations.drawing import Annotated, Shape

SUFFIX = ".parquet"


def columns(location: str) -> list[str]:
    """Returns the columns of a table."""
    filesystem, inner = storage.resolve(files(location)[0])
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        return list(file.schema_arrow.names)


def files(location: str) -> list[str]:
    """Returns the Parquet files of a table, which may be a folder."""
    if not storage.is_folder(location):
        return [location]
    names = sorted(name for name in storage.names_in(location) if name.endswith(".parquet"))
    return [storage.join(location, name) for name in names]


def classes(location: str) -> list[str]:
    """Returns the class ids that occur, as text."""
    found: set[int] = set()
    for file in files(location):
        filesystem, inner = storage.resolve(file)
        found.update(pq.read_table(inner, columns=["class_id"], filesystem=filesystem)["class_id"].to_pylist())
    return [str(class_id) for class_id in sorted(found)]


def read(location: str) -> Iterator[Annotated]:
    """Yields the images of `rle.parquet`. An image without any class has no row there, so it has no mask."""
    images: dict[str, Annotated] = {}
    wanted = ["path", "height", "width", "class_id", "counts"]
    for file in files(location):
        filesystem, inner = storage.resolve(file)
        with pq.ParquetFile(inner, filesystem=filesystem) as opened:
            for batch in opened.iter_batches(4096, columns=wanted):
                for row in batch.to_pylist():
                    size = (row["height"], row["width"])
                    image = images.setdefault(row["path"], Annotated(row["path"], size, []))
                    rle = {"size": [*size], "counts": row["counts"]}
                    image.shapes.append(Shape(str(row["class_id"]), "rle", rle))
    yield from images.values()


def paths(file: str) -> list[str]:
    """Returns the images of one file of `masks.parquet`, row by row."""
    filesystem, inner = storage.resolve(file)
    return pq.read_table(inner, columns=["path"], filesystem=filesystem)["path"].to_pylist()
