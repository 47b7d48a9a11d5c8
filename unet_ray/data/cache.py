"""Keeps decoded training rows in Parquet files, for the next epoch, run, fold or recipe.

CACHE/<hash of the settings that affect a row>/<hash>.parquet has a row group for each pair: `stat` (hash of paths,
sizes and times of its two files), `content` (hash of their bytes), `image`, `mask` and perhaps `border`. A
copied or touched file is recognised by its content; its row has the flag `same` and no data. Cache files never change,
and any of them may be deleted.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unet_ray.config import DataConfig
from unet_ray.data import mask_files, pages, storage
from unet_ray.data.pairs import Pair
from unet_ray.data.rows import Batch, Decoder, Row

FORMAT = 1
"""Version of the rows. Raise it when the same settings give different rows."""
FILE_BYTES = 64 * 2**20
"""Size of a cache file: large enough for a bucket, small enough that a stopped run loses only seconds."""

Pairs = Sequence[tuple[Pair, bytes]]
"""Pairs, each with its `stat`."""


class Place(NamedTuple):
    """The place of a row in the cache."""

    file: str
    """Name of a file in the cache."""
    row: int
    """Number of its row group."""


@dataclass(frozen=True, slots=True)
class CachedDecoder:
    """Reads rows from the cache, and decodes the pairs that have no row in it."""

    decoder: Decoder
    folder: str
    places: dict[str, Place]
    """Path of the image -> its row."""

    def __call__(self, image_path: str, mask_path: str) -> Row:
        place = self.places.get(image_path)
        if place is not None:
            try:
                return self._read(*place)
            except (OSError, ValueError):  # the file is deleted or damaged, which must not stop a training
                pass
        return self.decoder(image_path, mask_path)

    def _read(self, name: str, row: int) -> Row:
        filesystem, path = storage.resolve(storage.join(self.folder, name))
        height, width = self.decoder.data.size_hw
        names = [*self.decoder.empty(0)]
        with pq.ParquetFile(path, filesystem=filesystem, memory_map=not storage.is_uri(self.folder)) as file:
            table = file.read_row_group(row, columns=names)
        return {
            name: np.frombuffer(table[name][0].as_buffer(), np.uint8).reshape(
                (height, width, -1) if name == "image" else (height, width)
            )
            for name in names
        }

    def empty(self, count: int) -> Batch:
        return self.decoder.empty(count)

    def row_bytes(self) -> int:
        return self.decoder.row_bytes()


Write = Callable[[Pairs], None]
"""Decodes pairs and writes them as one cache file, in any process."""
Run = Callable[[Write, list[Pairs]], Iterable[None]]
"""Calls the function with each list of pairs, in any order, thread or process; yields once for each finished list."""


def filled(pairs: Sequence[Pair], decoder: Decoder, location: str, run: Run) -> CachedDecoder:
    """Adds the missing pairs to the cache at `location`, and returns a decoder that reads from it.

    Raises UserError that names a file that can't be decoded.
    """
    folder = storage.join(storage.absolute(location), _key(decoder))
    stats = _stats(pairs)
    by_stat, by_content = _index(folder)
    missing = [(pair, stat) for pair, stat in zip(pairs, stats, strict=True) if stat not in by_stat]
    size = max(1, FILE_BYTES // decoder.row_bytes())
    files: list[Pairs] = [missing[start : start + size] for start in range(0, len(missing), size)]
    if files:
        for _ in run(_WriteFile(decoder, folder, by_content), files):
            pass
        by_stat, _ = _index(folder)
    places = {pair.image: by_stat[stat] for pair, stat in zip(pairs, stats, strict=True) if stat in by_stat}
    return CachedDecoder(decoder, folder, places)


def _key(decoder: Decoder) -> str:
    """Hashes everything that a row depends on, except its files."""
    data = decoder.data
    settings = {
        "format": FORMAT,
        "size": data.size_hw,
        "channels": decoder.in_channels,
        "mask_values": data.mask_values,
        "ignore_index": data.ignore_index,
        **_more_of_masks(data),
        "value_range": data.value_range,
        "border_sigma": decoder.border_sigma,
    }
    return _hash(json.dumps(settings).encode()).hex()


def _more_of_masks(data: DataConfig) -> dict[str, Any]:
    """Returns the settings that newer versions have, if they are used: caches of older versions stay valid."""
    names = ("mask_colors", "mask_nearest", "mask_resize", "mask_turn", "several_masks")
    return {name: getattr(data, name) for name in names if getattr(data, name) != getattr(DataConfig(), name)}


def _hash(*values: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(len(value).to_bytes(8, "little"))
        digest.update(value)
    return digest.digest()


def _stats(pairs: Sequence[Pair]) -> list[bytes]:
    images, masks = ([getattr(pair, name) for pair in pairs] for name in ("image", "mask"))
    of_masks = [each[0] if len(each) == 1 else each for each in mask_files.sizes_and_times(masks)]
    files = [pages.file_of(image) for image in images]
    stats = zip(images, storage.sizes_and_times(files), masks, of_masks, strict=True)
    return [_hash(repr(stat).encode("utf-8", "surrogateescape")) for stat in stats]


def _index(folder: str) -> tuple[dict[bytes, Place], dict[bytes, Place]]:
    """Lists the rows in the cache by `stat` and by `content`."""
    by_stat: dict[bytes, Place] = {}
    by_content: dict[bytes, Place] = {}
    same: list[tuple[bytes, bytes]] = []
    for name in storage.names_in(folder):
        if not name.endswith(".parquet"):
            continue
        filesystem, path = storage.resolve(storage.join(folder, name))
        try:
            table = pq.read_table(path, columns=["stat", "content", "same"], filesystem=filesystem)
        except (OSError, pa.ArrowInvalid):  # the file is damaged, for example copied only in part
            continue
        for row, entry in enumerate(table.to_pylist()):
            if entry["same"]:
                same.append((entry["stat"], entry["content"]))
            else:
                by_stat[entry["stat"]] = by_content[entry["content"]] = Place(name, row)
    by_stat |= {stat: by_content[content] for stat, content in same if content in by_content}
    return by_stat, by_content


@dataclass(frozen=True, slots=True)
class _WriteFile:
    """Implements `Write`."""

    decoder: Decoder
    folder: str
    known: dict[bytes, Place]
    """Rows by content."""

    def __call__(self, pairs: Pairs) -> None:
        entries = [self._entry(pair, stat) for pair, stat in pairs]
        names = [*self.decoder.empty(0)]
        fields = [("stat", pa.binary()), ("content", pa.binary()), ("same", pa.bool_())]
        schema = pa.schema([*fields, *((name, pa.large_binary()) for name in names)])
        stream = io.BytesIO()
        # Photographs hardly compress, and reading them must be fast.
        compression = {name: "NONE" if name == "image" else "ZSTD" for name in schema.names}
        pq.write_table(
            pa.Table.from_pylist(entries, schema),
            stream,
            row_group_size=1,
            compression=compression,
            use_dictionary=False,
            write_statistics=False,
        )
        name = _hash(*(stat for _, stat in pairs)).hex()
        storage.write_bytes(storage.join(self.folder, f"{name}.parquet"), stream.getvalue(), durable=True)

    def _entry(self, pair: Pair, stat: bytes) -> dict[str, bytes | bool | None]:
        image, mask = self.decoder.read(pair.image), self.decoder.read_mask(pair.mask)
        content = _hash(image, *([mask] if isinstance(mask, bytes) else (part or b"" for part in mask)))
        entry: dict[str, bytes | bool | None] = {"stat": stat, "content": content, "same": content in self.known}
        if not entry["same"]:
            row = self.decoder.row(image, mask, pair.image, pair.mask)
            entry |= {name: values.tobytes() for name, values in row.items()}
        return entry


def in_threads(threads: int) -> Run:
    """Returns a `Run` for `filled` that works in threads of this process."""

    def run(write: Write, files: list[Pairs]) -> Iterator[None]:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(write, files)

    return run
