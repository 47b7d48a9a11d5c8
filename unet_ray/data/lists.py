"""Reads lists of images as people and their tools write them: text, CSV, TSV and JSON lines."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

from unet_ray.config import LISTS, UserError, nearest

SUFFIXES = LISTS - {".parquet"}
PATH_COLUMNS = ("path", "uri", "url", "filepath", "file_path", "image_path", "file_name", "filename", "file", "image")
"""Columns that may name images, the first one present is used; `--column` names another."""
MASK_COLUMNS = (
    "mask",
    "mask_path",
    "masks",
    "label",
    "label_path",
    "labels",
    "annotation",
    "annotation_path",
    "segmentation",
    "segmentation_mask",
    "ground_truth",
    "groundtruth",
    "gt",
    "gt_path",
    "target",
    "seg",
)
"""Columns that may name the masks of the images in another column; the first one present is used."""
Column = str | int | None
"""Name of a column, or its place in a table without names; None: one that is known."""
SIZE_COLUMN, TIME_COLUMNS = "size", ("mtime_ns", "mtime")
"""Columns with a file's bytes and its modification time, in ns or in seconds since 1970 or as ISO 8601."""


class Entry(NamedTuple):
    """A line of a list, or a row of a table."""

    number: int
    """Counted from 1; the first line of a table that names its columns is 1, too."""
    path: str | None
    """Path or URI; None: the line names no image."""
    size: int | None = None
    """Bytes; None: the list doesn't say."""
    mtime_ns: int | None = None
    """Modification time in ns; None: the list doesn't say."""


def read_list(data: bytes, suffix: str, column: Column, name: str) -> Iterator[Entry]:
    """Yields the entries of a list with one of `SUFFIXES`.

    `column`: the column that names the images; None: one of `PATH_COLUMNS`; in a .txt, each line is a path, or with 0
    or 1 one of two. `name`: the list, for errors. Empty lines and lines that begin with `#` are comments. Raises
    UserError if a table has no column that names images.
    """
    text = decoded(data)
    if suffix == ".txt":
        yield from _of_lines(text) if column is None else _halves(text, int(column))
    elif suffix in (".csv", ".tsv"):
        yield from _of_table(text, suffix, column, name)
    else:
        yield from _of_json(text, None if column is None else str(column), name)


def pair_columns(data: bytes, suffix: str) -> tuple[Column, Column]:
    """Returns the columns of a list that hold an image and its mask; None for one that the list doesn't have.

    Names decide (`PATH_COLUMNS`, `MASK_COLUMNS`), else the first two columns that hold file names.
    """
    text = decoded(data)
    if suffix == ".txt":
        first = next(_of_lines(text), None)
        return 0, 1 if first is not None and len(_two(str(first.path))) == 2 else None
    if suffix in (".csv", ".tsv"):
        cells = [cell.strip() for cell in next((row for _, row in _rows(text, suffix) if row), [])]
        places = [place for place, cell in enumerate(cells) if _has_extension(cell)]
        if places:
            return places[0], places[1] if len(places) > 1 else None
        return known_columns(cells)
    lines = (line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#"))
    try:
        value = json.loads(next(lines, "{}"))
    except ValueError:
        return None, None
    return known_columns([*value] if isinstance(value, dict) else [])


def known_columns(names: Sequence[str]) -> tuple[str | None, str | None]:
    """Returns the columns of images and of masks: those with known names, or the only two."""
    by_lower = {each.lower(): each for each in reversed(names)}
    image, mask = (
        next((by_lower[each] for each in known if each in by_lower), None) for known in (PATH_COLUMNS, MASK_COLUMNS)
    )
    if len(names) == 2 and (image is None or mask is None):
        return names[0], names[1]
    return image, mask


def _halves(text: str, number: int) -> Iterator[Entry]:
    """Yields the first or the second path of each line."""
    for entry in _of_lines(text):
        parts = _two(str(entry.path))
        yield Entry(entry.number, parts[number] if number < len(parts) else None)


def _two(line: str) -> list[str]:
    """Returns the two paths of a line, or the one; they may hold spaces."""
    for separator in ("\t", ";", ","):
        if line.count(separator) == 1:
            return [part.strip() for part in line.split(separator)]
    found = re.fullmatch(r"(.+?\.\w{2,4})\s+(.*\S\.\w{2,4})", line)
    return [found[1], found[2]] if found else [line]


def decoded(data: bytes) -> str:
    """Decodes UTF-8 and UTF-16, with or without a byte order mark. Bytes that are neither stay as file names have them
    (surrogate escapes)."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").removeprefix("\ufeff")  # some tools write a second mark
    if b"\0" in data[:4]:  # the first letters of a path are ASCII
        return data.decode("utf-16-le" if data[1:2] == b"\0" else "utf-16-be", "replace")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def _of_lines(text: str) -> Iterator[Entry]:
    # Not `splitlines`, which also splits at characters that file names may have.
    for number, raw in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        line = raw.strip()
        if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'":
            line = line[1:-1]
        if line and not raw.lstrip().startswith("#"):
            yield Entry(number, line)


def _of_table(text: str, suffix: str, column: Column, name: str) -> Iterator[Entry]:
    rows = _rows(text, suffix)
    first = next(((number, row) for number, row in rows if row), None)
    if first is None:
        return
    header = [cell.strip() for cell in first[1]]
    if isinstance(column, int):
        for number, row in itertools.chain([first], rows):
            yield Entry(number, _cell(row, column))
        return
    if column is None and not {cell.lower() for cell in header} & set(PATH_COLUMNS):
        place = _place_of_a_path(header, name)
        for number, row in itertools.chain([first], rows):
            yield Entry(number, _cell(row, place))
        return
    wanted = _column(header, column, name)
    for number, row in rows:
        if row is None:
            yield Entry(number, None)
        else:
            yield _of_fields(number, dict(zip(header, row, strict=False)), wanted)


def _rows(text: str, suffix: str) -> Iterator[tuple[int, list[str] | None]]:
    """Yields (line, cells) of each row that is no comment; None instead of cells that can't be read."""
    start = next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), "")
    # Spreadsheets of many countries separate by semicolons.
    delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=start.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield reader.line_num, None
            continue
        if any(cell.strip() for cell in row) and not row[0].lstrip().startswith("#"):
            yield reader.line_num, row


def _place_of_a_path(first: Sequence[str], name: str) -> int:
    """Returns which cell of a table without column names is a path: the only one, or the first with an extension."""
    if len(first) == 1:
        return 0
    place = next((place for place, cell in enumerate(first) if _has_extension(cell)), None)
    if place is None:
        raise UserError(f"{name}: no column {', '.join(PATH_COLUMNS)}: name the right one with --column")
    return place


def _has_extension(cell: str) -> bool:
    stem, dot, extension = cell.rpartition("/")[2].rpartition(".")
    return bool(stem and dot) and 2 < len(extension) < 5 and extension.isalnum() and not extension.isdigit()


def _column(names: Sequence[str], column: str | None, name: str) -> str:
    if column is not None:
        if column not in names:
            raise UserError(f"{name}: no column {column!r}{nearest(column, names)}: it has {', '.join(names)}")
        return column
    by_lower = {each.lower(): each for each in reversed(names)}
    found = next((by_lower[each] for each in PATH_COLUMNS if each in by_lower), None)
    if found is None:
        raise UserError(f"{name}: no column {', '.join(PATH_COLUMNS)}: name the right one with --column")
    return found


def _of_json(text: str, column: str | None, name: str) -> Iterator[Entry]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            value = json.loads(line)
        except ValueError:
            yield Entry(number, None)
            continue
        if isinstance(value, str):
            yield Entry(number, value or None)
        elif isinstance(value, dict) and value:
            yield _of_fields(number, value, _column([*value], column, f"{name}, line {number}"))
        else:
            yield Entry(number, None)


def _of_fields(number: int, fields: Mapping[str, Any], column: str) -> Entry:
    path = fields.get(column)
    path = path.strip() if isinstance(path, str) else None
    return Entry(number, path or None, *size_and_time(fields))


def size_and_time(fields: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Returns (bytes, modification time in ns) that a row says; None for what it doesn't."""
    size = _number(fields.get(SIZE_COLUMN))
    exact, rough = (fields.get(name) for name in TIME_COLUMNS)
    return size, _number(exact) if exact else _nanoseconds(rough)


def _number(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _nanoseconds(value: Any) -> int | None:
    if isinstance(value, datetime):
        when = value
    else:
        try:
            return int(float(value) * 1e9)
        except (TypeError, ValueError):
            pass
        try:
            when = datetime.fromisoformat(value.replace("Z", "+00:00"))  # Python 3.10 knows no Z
        except (AttributeError, ValueError):
            return None
    return int((when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp() * 1e9)


def _cell(row: Sequence[str] | None, place: int) -> str | None:
    cell = row[place].strip() if row and place < len(row) else ""
    return cell or None
