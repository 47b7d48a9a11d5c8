"""Finds images in folders, globs, lists, Parquet files and buckets.

An image's *key* is its path below the folder it was found in, without the extension. It names the mask and determines
the split, so neither depends on the machine, on where the folder is, or on the order of a listing.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import itertools
import logging
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray.config import UserError
from unet_ray.data import lists, storage, video
from unet_ray.data.lists import Column, Entry
from unet_ray.data.pages import count as count_pages
from unet_ray.data.parquet_images import BYTES_COLUMNS, image_column, is_text, names_in

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo

log = logging.getLogger("unet_ray")

T = TypeVar("T")

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .tif .tiff .bmp .webp .npy .jp2 .j2k .ppm .pgm .pbm .pnm .avif .heic .heif".split()  # noqa: SIM905
)
OTHER_EXTENSIONS = frozenset(
    ".txt .json .jsonl .xml .csv .tsv .md .yaml .yml .html .htm .pdf .py .ipynb .db .ini .cfg .log .mat .npz .zip .gz"  # noqa: SIM905
    " .tar .nii .h5 .hdf5 .parquet .pth .pt .svg .ps .doc .docx .xls .xlsx".split()
)
"""Files of these kinds are no images, whatever they begin with; of any other unknown kind they may be."""
BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|II[*+]\0|MM\0[*+]|RIFF....WEBP|\x93NUMPY|\0\0\0\x0cjP  |....ftyp(avif|hei|mif1|hev)|"
    rb"P[1-6]\s",
    re.DOTALL,
)
"""What images begin with."""
PREDICTION = ("settings.json", "manifest.parquet", ".work")
"""Names by which the output folder of a prediction is known: the first, and one of the others."""
PAGED = frozenset({".tif", "tiff", ".gif", *(suffix[-4:] for suffix in video.SUFFIXES)})
"""Ends of the names of files that may hold several images."""
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


@dataclass(frozen=True, slots=True)
class Choice:
    """Says which files of a folder are images, and counts the others."""

    strict: bool = False
    """Take all files: those that are no images become rows that fail."""
    videos: bool = False
    """Take videos on a disk, too."""
    passed: Counter[str] = field(default_factory=Counter)
    """Extension -> files that were passed over, hidden ones left out."""

    def takes(self, name: str, path: str | None) -> bool:
        """`path`: of a file on a disk, whose beginning counts if its extension says nothing."""
        if name.startswith("."):
            return False
        kind = os.path.splitext(name)[1].lower()  # noqa: PTH122 - called often
        if kind in EXTENSIONS or self.strict:
            return True
        if path is not None and self._takes_other(kind, path):
            return True
        self.passed[kind] += 1
        return False

    def _takes_other(self, kind: str, path: str) -> bool:
        """Returns whether a file on a disk is an image although its extension is not one's, or a video to take."""
        if kind in video.SUFFIXES:
            return self.videos
        return kind not in OTHER_EXTENSIONS and _begins_like_an_image(path)


def _begins_like_an_image(path: str) -> bool:
    try:
        with open(path, "rb") as stream:  # noqa: PTH123
            return stat.S_ISREG(os.fstat(stream.fileno()).st_mode) and BEGINNINGS.match(stream.read(16)) is not None
    except OSError:
        return False


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Returns `count` of the items, evenly spaced; all of them if they are fewer."""
    return [items[number * len(items) // count] for number in range(count)] if len(items) > count else list(items)


def find_images(location: str, *, pages: bool = True) -> list[ImageFile]:
    """Returns all images that `iter_images` finds, sorted by relative path. Raises UserError."""
    return sorted(iter_images(location, pages=pages), key=lambda image: image.name)


def iter_images(
    location: str,
    column: Column = None,
    *,
    pages: bool = True,
    frames: bool = False,
    choice: Choice | None = None,
) -> Iterator[ImageFile]:
    """Yields the images of a folder and its subfolders, of a glob of files or folders, of a list, or a single file.

    The order depends only on the names; a list keeps its own order. A list has one of `lists.SUFFIXES`, or is a
    `.parquet` file or folder that names images, or holds them encoded (`image`, `bytes`, …, or Hugging Face's struct of
    bytes and path). A folder without any image may hold such Parquet files. `column`: the column of a table to use, or
    its place in a table that doesn't name its columns.
    Relative paths are below the list's folder. In folders and globs, hidden files, extensions that are not in
    `EXTENSIONS` (unless the file begins as an image does, see `Choice`), and folders that `predict` has written are
    skipped. A broken link, or a file in a list that does not exist, has size -1, and so has a line of a list that names
    no image. With `pages` each page of a TIFF on a disk is an image, and with `frames` each frame of a GIF, and of a
    video if PyAV is installed. Only the names of one folder at a time are in memory. Raises UserError if there is no
    such folder or no image in it.
    """
    location = storage.absolute(location)
    count = 0
    choice = dataclasses.replace(choice or Choice(), videos=frames and video.is_installed())
    for image in _found(location, column, choice):
        count += 1
        if pages and image.name[-4:].lower() in PAGED:
            yield from _pages(image, frames=frames)
        else:
            yield image
    if not count:
        raise UserError(f"{location}: no image in it ({', '.join(sorted(EXTENSIONS))})")


def _pages(image: ImageFile, *, frames: bool) -> Iterator[ImageFile]:
    """Yields the pages of an image, or the image itself if it has one."""
    kind = image.name.rpartition(".")[2]
    digits = 6 if video.is_video(image.name) else 4
    number = 1 if image.source or image.size <= 0 else count_pages(image.path, frames=frames)
    if number == 1:
        yield image
        return
    for page in range(number):
        key = f"{image.key}/{page:0{digits}d}"
        yield dataclasses.replace(image, key=key, path=f"{image.path}#{page}", name=f"{key}.{kind}")


def iter_files(paths: Sequence[str], *, pages: bool = True, frames: bool = False) -> Iterator[ImageFile]:
    """Yields images that are named one by one; their relative paths begin at their common folder. Raises UserError."""
    paths = [storage.absolute(path) for path in paths]
    for image in _listed([Entry(0, path) for path in paths], common_folder(paths), ""):
        if image.size < 0 and not os.path.islink(image.path):  # noqa: PTH114 - a name need not be UTF-8
            raise UserError(f"{image.path}: no such folder or file")
        yield from _pages(image, frames=frames) if pages else (image,)


def is_one_file(location: str) -> bool:
    """Returns whether an input names one image, and no folder, list or glob."""
    path = PurePosixPath(storage.split_options(location)[0])
    wanted = _wanted(path.name) or video.is_video(path.name)
    return wanted and not (_is_glob(location) or storage.is_folder(location))


def common_folder(paths: Sequence[str]) -> str:
    """Returns the deepest folder, with its bucket's options, that holds all of some files. Raises UserError."""
    parents = [storage.split_options(storage.parent(storage.absolute(path))) for path in paths]
    levels = zip(*(base.split("/") for base, _ in parents), strict=False)
    same = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels)]
    if not same or same[1:] == [""] or len({options for _, options in parents}) > 1:
        raise UserError(f"{paths[0]} … {paths[-1]}: files named one by one must be on one disk or in one bucket")
    return ("/".join(same) or "/") + parents[0][1]


def root_name(location: str) -> str:
    """Returns a name for the folder that an input's relative paths begin at: the folder's name, or a list's stem."""
    location = storage.absolute(location)
    path = PurePosixPath(storage.split_options(location)[0])
    if path.suffix in (*lists.SUFFIXES, ".parquet"):
        return path.stem
    while glob.has_magic(path.name) or _wanted(path.name) or video.is_video(path.name):
        path = path.parent
    return path.name or "input"


def _found(location: str, column: Column, choice: Choice) -> Iterator[ImageFile]:
    if _is_glob(location):
        yield from _of_glob(location, choice)
        return
    found = storage.info(location)
    path = PurePosixPath(storage.split_options(location)[0])
    if found is None and not os.path.islink(location):  # noqa: PTH114 - keeps the surrogates of names that aren't UTF-8
        raise UserError(f"{location}: no such folder or file")
    if path.suffix == ".parquet":
        yield from _of_parquet(location, column)
    elif found is not None and storage.is_folder(location):
        yield from _of_folder(location, column, choice)
    elif path.suffix in lists.SUFFIXES:
        entries = lists.read_list(storage.read_bytes(location), path.suffix, column, location)
        yield from _listed(entries, storage.parent(location), location)
    else:
        yield from _listed([Entry(1, location)], storage.parent(location), location)


def _is_glob(location: str) -> bool:
    pattern = storage.split_options(location)[0]
    return glob.has_magic(pattern) and (storage.is_uri(location) or not os.path.lexists(location))


def _of_folder(folder: str, column: Column, choice: Choice) -> Iterator[ImageFile]:
    """Yields the images below a folder; if it has none, those in its Parquet files, as Hugging Face stores them."""
    empty = True
    for image in _walk(folder, "", (), choice):
        empty = False
        yield image
    if empty and any(entry.path.endswith(".parquet") for entry in storage.list_files(folder)):
        yield from _of_parquet(folder, column)


def _image(path: str, name: str, size: int, mtime_ns: int) -> ImageFile:
    stem, dot, _ = name.rpartition(".")
    return ImageFile(stem if dot and not stem.endswith("/") and stem else name, path, name, size, mtime_ns)


def _wanted(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122 - called often


def _of_glob(pattern: str, choice: Choice) -> Iterator[ImageFile]:
    """Yields the files that match, and everything in the folders that do. With `**`, which matches folders at all
    depths, only files count. Relative paths begin at the last folder without a `*`, `?` or `[`."""
    base = storage.split_options(pattern)[0]
    fixed = base[: re.search(r"[*?\[]", base).start()]  # type: ignore[union-attr]
    root = fixed.rpartition("/")[0] or "/"
    for path in _matching(pattern) if storage.is_uri(pattern) else sorted(glob.iglob(pattern, recursive=True)):  # noqa: PTH207
        name = storage.split_options(path)[0][len(root) :].lstrip("/")
        base_name = name.rpartition("/")[2]
        takes_video = choice.videos and not storage.is_uri(path) and video.is_video(base_name)
        if (_wanted(base_name) or takes_video) and not storage.is_folder(path):
            yield _image(path, name, *storage.sizes_and_times([path])[0])
        elif "**" not in base and storage.is_folder(path):
            yield from _walk(path, f"{name}/", (), choice)


def without_pattern(location: str, name: str) -> str:
    """Returns a relative path of `iter_images` without what a glob says word for word: what its stars stand for, and
    what is below. Of any other location it is the path itself.

    `days/*/left_*.png` and `1/left_03` give `1/03`.
    """
    if not _is_glob(location):
        return name
    pattern = storage.split_options(location)[0]
    rest = pattern[pattern[: re.search(r"[*?\[]", pattern).start()].rfind("/") + 1 :]  # type: ignore[union-attr]
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", rest)
    regex = "".join(
        re.escape(part) if number % 2 == 0 else {"**/": "((?:.*/)?)", "**": "(.*)", "*": "([^/]*)"}.get(part, "([^/])")
        for number, part in enumerate(parts)
    )
    found = re.fullmatch(regex + r"(?:/(.*))?", name) or re.fullmatch(_stem_of(regex) + r"(?:/(.*))?", name)
    if found is None:
        return name
    return "/".join(group.strip("/") for group in found.groups() if group)


def _stem_of(regex: str) -> str:
    """Returns a glob's expression without the extension at its end, as it matches keys."""
    return re.sub(r"\\\.[A-Za-z0-9]+$", "", regex)


def _matching(pattern: str) -> Iterator[str]:
    """Yields what matches a glob in a bucket: `*` and `[…]` within a name, `**` for any number of folders."""
    base, options = storage.split_options(pattern)
    scheme, rest = base.split("://", 1)
    bucket, *names = rest.rstrip("/").split("/")
    found = [f"{scheme}://{bucket}{options}"]
    for place, name in enumerate(names):
        if name == "**":
            yield from (path for folder in found for path in _below(folder, names[place + 1 :] or ["*"]))
            return
        if glob.has_magic(name):
            inside = ((folder, entry.base_name) for folder in found for entry in storage.entries(folder))
            found = [storage.join(folder, each) for folder, each in inside if fnmatch.fnmatchcase(each, name)]
        else:
            found = [storage.join(folder, name) for folder in found]
    yield from filter(storage.exists, found)


def _below(folder: str, pattern: Sequence[str]) -> Iterator[str]:
    """Yields the files at any depth whose last names match the names of a pattern."""
    for path in _files_below(folder):
        names = path.split("/")
        if len(names) >= len(pattern) and all(map(fnmatch.fnmatchcase, names[-len(pattern) :], pattern)):
            yield storage.join(folder, *names)


def _files_below(folder: str) -> list[str]:
    """Returns the relative paths of all files below a folder, sorted."""
    base = storage.resolve(folder)[1].rstrip("/")
    return sorted(entry.path.removeprefix(base).lstrip("/") for entry in storage.list_files(folder))


def _walk(folder: str, below: str, ancestors: tuple[tuple[int, int], ...], choice: Choice) -> Iterator[ImageFile]:
    """Yields the images of a folder by name, then those of its subfolders by name.

    `ancestors`: (device, inode) of the folders above, so that a link to one of them is not followed.
    """
    subfolders: list[str] = []
    if storage.is_uri(folder):
        here = storage.entries(folder)
        if below and _is_prediction(entry.base_name for entry in here):
            log.warning("%s was written by `predict`: it is left out", below)
            return
        yield from _in_bucket(folder, here, below, subfolders, choice)
    else:
        status = os.stat(folder)  # noqa: PTH116
        place = (status.st_dev, status.st_ino)
        if place in ancestors:
            return
        ancestors = (*ancestors, place)
        try:
            files = _names_here(folder, subfolders, choice)
            if below and _is_prediction(name for name in PREDICTION if os.path.lexists(f"{folder}/{name}")):
                log.warning("%s was written by `predict`: it is left out", folder)
                return
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
        yield from _walk(storage.join(folder, name), f"{below}{name}/", ancestors, choice)


def _is_prediction(names: Iterable[str]) -> bool:
    """Returns whether these names in a folder tell that `predict` has written it, or is writing it: its masks are no
    images, and a second run would take them for such."""
    found = set(names)
    return "settings.json" in found and bool(found & set(PREDICTION[1:]))


def _in_bucket(
    folder: str, here: Iterable[FileInfo], below: str, subfolders: list[str], choice: Choice
) -> Iterator[ImageFile]:
    """Yields the images directly in a bucket's folder, and appends the names of its folders to `subfolders`."""
    for entry in here:
        if entry.is_file and choice.takes(entry.base_name, None):
            path = storage.join(folder, entry.base_name)
            yield _image(path, below + entry.base_name, entry.size, entry.mtime_ns or 0)
        elif not entry.is_file and not entry.base_name.startswith("."):
            subfolders.append(entry.base_name)


def _names_here(folder: str, subfolders: list[str], choice: Choice) -> Iterator[str]:
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
            elif _wanted(entry.name) or choice.takes(entry.name, entry.path):  # the first is called by the million
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


def _listed(entries: Iterable[Entry], base: str, source: str) -> Iterator[ImageFile]:
    """Yields the images of a list; relative paths are below `base`. `source`: the list.

    A line that names no image becomes an image of size -1 in the list itself, so that it is a row that fails.
    """
    entries, folder = iter(entries), storage.split_options(base)[0].rstrip("/") + "/"
    while batch := list(islice(entries, LISTED_AT_ONCE)):
        paths = [None if entry.path is None else _full(entry.path, base) for entry in batch]
        asked = [
            path for path, entry in zip(paths, batch, strict=True) if path is not None and _must_be_asked(path, entry)
        ]
        found = dict(zip(asked, storage.sizes_and_times(asked), strict=True))
        for path, entry in zip(paths, batch, strict=True):
            if path is None:
                here, options = storage.split_options(source)
                name = f"{PurePosixPath(here).name}#{entry.number}"
                yield ImageFile(name, f"{here}#{entry.number}{options}", name, -1, 0, source, entry.number)
                continue
            shown = storage.split_options(path)[0]
            if shown.startswith(folder):
                name = shown[len(folder) :]
            else:
                name = shown.partition("://")[2] or shown.lstrip("/")
            yield _image(path, name, *found.get(path, (-1 if entry.size is None else entry.size, entry.mtime_ns or 0)))


def _full(path: str, base: str) -> str:
    """Returns a list's path or URI in full; `./a`, `a` and `b/../a` are the same."""
    if storage.is_uri(path):
        return storage.absolute(path)
    if storage.is_uri(base) and not path.startswith("/"):
        return storage.join(base, *posixpath.normpath(path).split("/"))
    # An absolute path beside a list in a bucket is a path on this machine.
    return posixpath.normpath(path if path.startswith("/") else storage.join(base, *path.split("/")))


def _must_be_asked(path: str, entry: Entry) -> bool:
    """Returns whether size and time of a file are unknown. A list may say those of an object in a bucket. A URI that
    can't be opened is a row that fails."""
    if not storage.is_uri(path):
        return True
    return storage.is_known_scheme(path) and (entry.size is None or entry.mtime_ns is None)


def _of_parquet(location: str, column: Column) -> Iterator[ImageFile]:
    if storage.is_folder(location):
        names = [name for name in _files_below(location) if name.endswith(".parquet")]
        names = [name for name in names if not any(part[0] in "._" for part in name.split("/"))]
        files = [(storage.join(location, *name.split("/")), name.removesuffix(".parquet") + "/") for name in names]
    else:
        files = [(location, "")]
    for path, prefix in files:
        try:
            yield from _of_parquet_file(path, prefix, column)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a Parquet file that can be read: {error}") from None


def _of_parquet_file(location: str, prefix: str, column: Column) -> Iterator[ImageFile]:
    filesystem, inner = storage.resolve(location)
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        schema = file.schema_arrow
        column = schema.names[column] if isinstance(column, int) else column
        images = image_column(schema, column)
        if images is None:
            yield from _listed(_paths_in(file, column, location), storage.parent(location), location)
            return
        size, mtime_ns = storage.sizes_and_times([location])[0]
        base, options = storage.split_options(location)
        for row, value in enumerate(names_in(file, images)):
            name = prefix + (value.lstrip("/") if value else f"{row:09d}")
            image = _image(f"{base}#{row}{options}", name, size, mtime_ns)
            yield dataclasses.replace(image, source=location, row=row)


def _paths_in(file: pq.ParquetFile, column: str | None, location: str) -> Iterator[Entry]:
    """Yields the rows of a Parquet file that names images in a column. Raises UserError if none does."""
    schema = file.schema_arrow
    texts = [name for name in schema.names if is_text(schema, name)]
    wanted = column or next((name for name in lists.PATH_COLUMNS if name in texts), None)
    if wanted not in texts:
        raise UserError(
            f"{location}: no column with paths ({column or ', '.join(lists.PATH_COLUMNS)}), nor encoded images in a"
            f" binary one ({', '.join(BYTES_COLUMNS)}): name the right one of {', '.join(schema.names)} with --column"
        )
    others = [name for name in (lists.SIZE_COLUMN, *lists.TIME_COLUMNS) if name in schema.names]
    number = 0
    for batch in file.iter_batches(LISTED_AT_ONCE, columns=[wanted, *others]):
        for row in batch.to_pylist():
            number += 1
            yield Entry(number, row[wanted] or None, *lists.size_and_time(row))


def listing(names: Sequence[str], limit: int = 5) -> str:
    """Formats the first names, and the number of the others, for an error message."""
    more = len(names) - limit
    return ", ".join(map(repr, names[:limit])) + (f" and {more} more" if more > 0 else "")
