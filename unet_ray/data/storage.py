"""Files on a disk or in a bucket, one way for both: whole or absent, never half written.

A location is a path, or a URI that pyarrow knows (`s3://`, `gs://`, `file://`).
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from unet_ray.config import UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem


TO_MEND = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Numbers of the OSErrors of a full or read-only disk, which is the user's to mend."""
QUESTION_MARK = "%3F"
"""What stands in a URI for a `?` of an object's name, as a plain one begins the options."""


def is_uri(location: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", location) is not None


def absolute(location: str | os.PathLike[str]) -> str:
    """The location as workers on this machine understand it, whatever folder they run in."""
    location = os.fspath(location)
    if location.startswith("file://"):
        from pyarrow.fs import FileSystem

        return FileSystem.from_uri(location)[1]
    return location if is_uri(location) else str(Path(location).expanduser().absolute())


@functools.cache
def _filesystem(scheme_and_host: str) -> FileSystem:
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not scheme_and_host:
        return LocalFileSystem()
    try:
        return FileSystem.from_uri(scheme_and_host)[0]
    except Exception as error:  # pyarrow raises many kinds here
        raise UserError(f"{scheme_and_host}: not a location that can be opened: {error}") from None


def resolve(location: str) -> tuple[FileSystem, str]:
    """The pyarrow filesystem of a location, and the location's path in it."""
    if not is_uri(location):
        return _filesystem(""), location
    scheme, rest = location.split("://", 1)
    bucket, _, query = rest.partition("?")
    # Bucket options such as ?region= or ?endpoint_override= belong to the filesystem, not to the path.
    filesystem = _filesystem(f"{scheme}://{bucket.split('/')[0]}{'?' + query if query else ''}")
    return filesystem, bucket.replace(QUESTION_MARK, "?")


def split_options(location: str) -> tuple[str, str]:
    """A URI without its `?options`, and these with their `?`; of a path, where `?` is a letter, itself and ``."""
    base, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
    return base, mark + options


def without_secrets(location: str) -> str:
    """The location without options and keys, as it may stand in a file: `s3://key:secret@bucket/a?region=x` is
    `s3://bucket/a`."""
    if not is_uri(location):
        return location
    scheme, rest = split_options(location)[0].split("://", 1)
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.replace(QUESTION_MARK, '?')}"


def join(location: str, *names: str) -> str:
    """A location below `location`; a bucket's ?options stay at the end."""
    base, options = split_options(location)
    if is_uri(location):
        names = tuple(name.replace("?", QUESTION_MARK) for name in names)
    return "/".join([base.rstrip("/") or "/", *names]).replace("//", "/", int(base == "/")) + options


def read_bytes(location: str) -> bytes:
    """The whole file. Raises OSError."""
    if not is_uri(location):
        return Path(location).read_bytes()
    filesystem, path = resolve(location)
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(location: str, data: bytes, *, durable: bool = False) -> None:
    """Writes a file that appears whole or not at all, replacing what is there; makes the folders it needs.

    On a disk: a temporary name, then a rename; in a bucket: a single put. `durable` waits until a disk has it,
    which outlives a power cut and not only a killed process.
    """
    if is_uri(location):
        filesystem, path = resolve(location)
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    target = Path(location)
    with _replacing(target) as temporary:
        try:
            temporary.write_bytes(data)
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
        if durable:
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary name beside a file, which takes the file's place when the block ends without an error."""
    # A name of its own per writer: two writers of one file must not meet in the temporary one either.
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(location: str) -> Iterator[IO[bytes]]:
    """A stream for a file too large to hold in memory, which appears whole when the block ends without an error."""
    if is_uri(location):
        # By way of a local file: pyarrow completes an upload that is dropped half-way.
        with tempfile.TemporaryFile() as stream:
            yield stream
            stream.seek(0)
            filesystem, path = resolve(location)
            with filesystem.open_output_stream(path) as target:
                shutil.copyfileobj(stream, target, 2**23)
        return
    target_path = Path(location)
    target_path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(target_path) as temporary, temporary.open("wb") as stream:
        yield stream


def exists(location: str) -> bool:
    return info(location) is not None


def info(location: str) -> FileInfo | None:
    """What is known of the file or folder; None if there is none."""
    from pyarrow.fs import FileType

    filesystem, path = resolve(location)
    try:
        found = filesystem.get_file_info(path)
    except OSError as error:
        raise UserError(f"{location}: {error}") from None
    return None if found.type == FileType.NotFound else found


def is_folder(location: str) -> bool:
    from pyarrow.fs import FileType

    found = info(location)
    return found is not None and found.type == FileType.Directory


def list_files(location: str) -> list[FileInfo]:
    """All files below a folder, however deep, in no particular order."""
    from pyarrow.fs import FileSelector, FileType

    filesystem, path = resolve(location)
    found = filesystem.get_file_info(FileSelector(path, recursive=True))
    return [entry for entry in found if entry.type == FileType.File]


def entries(location: str) -> list[FileInfo]:
    """What is directly inside a folder, sorted by name. Raises UserError."""
    from pyarrow.fs import FileSelector

    filesystem, path = resolve(location)
    try:
        found = filesystem.get_file_info(FileSelector(path))
    except OSError as error:
        raise UserError(f"{location}: cannot be listed: {error}") from None
    return sorted(found, key=lambda entry: entry.base_name)


def sizes_and_times(locations: Sequence[str]) -> list[tuple[int, int]]:
    """(bytes, modification time in ns) of each file; (-1, 0) of what is not there. Raises UserError."""
    found: list[tuple[int, int]] = []
    for location in locations:
        if is_uri(location):
            entry = info(location)
            found.append((-1, 0) if entry is None else (entry.size, entry.mtime_ns or 0))
        else:
            try:
                status = os.stat(location)  # noqa: PTH116 - by the million, and of names that are no UTF-8
            except OSError:
                found.append((-1, 0))
            else:
                found.append((status.st_size, status.st_mtime_ns))
    return found


def parent(location: str) -> str:
    """The folder that a file is in."""
    base, options = split_options(location)
    return (base.rpartition("/")[0] or "/") + options


def names_in(location: str) -> list[str]:
    """Names of what is directly inside a folder, sorted; empty if there is no such folder."""
    from pyarrow.fs import FileSelector

    filesystem, path = resolve(location)
    return sorted(e.base_name for e in filesystem.get_file_info(FileSelector(path, allow_not_found=True)))


def delete_folder(location: str) -> None:
    """Removes a folder with all that is in it, if it is there."""
    filesystem, path = resolve(location)
    if exists(location):
        filesystem.delete_dir(path)


def delete_file(location: str) -> None:
    """Removes a file, if it is there."""
    filesystem, path = resolve(location)
    if exists(location):
        filesystem.delete_file(path)
