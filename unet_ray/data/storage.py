"""Reads and writes files on a disk or in a bucket; a file is whole or absent, never half written.

A location is a path, or a URI that pyarrow knows (`s3://`, `gs://`, `file://`), or an image on a web server.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar
from urllib.parse import parse_qsl

from unet_ray import keys
from unet_ray.config import UserError, first_line
from unet_ray.data import buckets, web
from unet_ray.data.buckets import is_uri, patient
from unet_ray.data.web import is_web

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem


log = logging.getLogger("unet_ray")

Answer = TypeVar("Answer")

USER_MUST_FIX = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of a full or read-only disk, which the user must fix."""
QUESTION_MARK = "%3F"
"""Replaces a `?` in an object's name in a URI, since a plain `?` begins the options."""


SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file", "http", "https")
"""Schemes of URIs that pyarrow opens, or `web`."""


def is_known_scheme(uri: str) -> bool:
    return uri.partition("://")[0] in SCHEMES


def absolute(location: str | os.PathLike[str]) -> str:
    """Returns the absolute path, or the URI as it is, so that workers in other folders of this machine find it."""
    location = os.fspath(location)
    if location.startswith("file://"):
        from pyarrow.fs import FileSystem

        return FileSystem.from_uri(location)[1]
    return keys.stripped(location) if is_uri(location) else str(Path(location).expanduser().absolute())


def real(location: str) -> str:
    """Returns the one name of a file on a disk that has several by links and `..`; a URI as it is."""
    return location if is_uri(location) else os.path.realpath(location)


@functools.cache
def _filesystem(scheme_and_host: str, user: str = "") -> FileSystem:
    from pyarrow.fs import LocalFileSystem

    if not scheme_and_host:
        return LocalFileSystem()
    if not user:
        buckets.check_credentials(scheme_and_host)
    try:
        return _opened(buckets.with_endpoint(scheme_and_host), user)
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many types here
        reason = str(error).replace(f"{user}@", "") if user else error
        raise UserError(f"{without_secrets(scheme_and_host)}: not a location that can be opened: {reason}") from None


@patient
def _opened(uri: str, user: str) -> FileSystem:
    """Opens a bucket's filesystem. For S3 pyarrow asks for the bucket's region here. It opens as many connections as it
    has threads for files, so it has as many of these as requests at once."""
    from pyarrow import io_thread_count, set_io_thread_count
    from pyarrow.fs import FileSystem

    threads = io_thread_count()
    set_io_thread_count(max(threads, buckets.REQUESTS_AT_ONCE))
    try:
        if user == keys.ANONYMOUS and uri.startswith("s3://"):
            return _without_signing(uri)
        return FileSystem.from_uri(uri.replace("://", f"://{user}@", 1) if user else uri)[0]
    finally:
        set_io_thread_count(threads)


def _without_signing(uri: str) -> FileSystem:
    """Opens a public bucket of S3. (pyarrow's URIs can't say `anonymous` for S3, only for Google's.)"""
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    base, options = split_options(uri)
    given = dict(parse_qsl(options[1:]))
    region = given.pop("region", None) or resolve_s3_region(base.partition("://")[2])
    return S3FileSystem(anonymous=True, region=region, **given)


def resolve(location: str) -> tuple[FileSystem, str]:
    """Returns the pyarrow filesystem of a location, and the location's path in it. Raises UserError."""
    if not is_uri(location):
        return _filesystem(""), location
    if is_web(location):
        raise UserError(f"{without_secrets(location)}: from a web server single images are read, nothing else")
    scheme, rest = keys.stripped(location).split("://", 1)
    bucket, _, query = rest.partition("?")
    # Bucket options such as ?region= or ?endpoint_override= belong to the filesystem, not to the path.
    host = f"{scheme}://{bucket.split('/')[0]}"
    filesystem = _filesystem(f"{host}{'?' + query if query else ''}", keys.of(host))
    return filesystem, bucket.replace(QUESTION_MARK, "?")


def split_options(location: str) -> tuple[str, str]:
    """Splits a URI into the part before its options, and `?options`. A path has none: its `?` is part of a name."""
    base, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
    return base, mark + options


def without_secrets(location: str) -> str:
    """Removes options and keys from a location, so that it may be written to a file.

    `s3://key:secret@bucket/a?region=x` becomes `s3://bucket/a`.
    """
    if not is_uri(location):
        return location
    if is_web(location):
        return web.without_secrets(location)
    scheme, rest = split_options(location)[0].split("://", 1)
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.replace(QUESTION_MARK, '?')}"


def join(location: str, *names: str) -> str:
    """Appends names to a location; a bucket's ?options stay at the end."""
    base, options = split_options(location)
    if is_uri(location):
        names = tuple(name.replace("?", QUESTION_MARK) for name in names)
    return "/".join([base.rstrip("/") or "/", *names]).replace("//", "/", int(base == "/")) + options


@patient
def read_bytes(location: str) -> bytes:
    """Reads a whole file. Raises OSError."""
    if not is_uri(location):
        return Path(location).read_bytes()
    if is_web(location):
        return web.read(location)
    filesystem, path = resolve(location)
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


@patient
def read_at_most(location: str, count: int) -> bytes:
    """Reads a file up to this number of bytes. Raises OSError."""
    if not is_uri(location):
        with Path(location).open("rb") as stream:
            # Not `count` at once: Python takes as much memory as it is asked for.
            return stream.read(min(count, os.fstat(stream.fileno()).st_size + 1))
    if is_web(location):
        return web.read(location, count)
    filesystem, path = resolve(location)
    parts: list[bytes] = []
    with filesystem.open_input_stream(path) as source:
        # In parts, because some of pyarrow's streams take memory for as much as they are asked for.
        while count > 0 and (part := source.read(min(count, 2**26))):
            parts.append(part)
            count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def reading(location: str) -> Iterator[IO[bytes]]:
    """Yields a stream to read a part of a file from. Raises OSError."""
    filesystem, path = resolve(location)
    with filesystem.open_input_file(path) as stream:
        yield stream


def write_bytes(location: str, data: bytes, *, durable: bool = False) -> None:
    """Writes a file that appears whole or not at all. Replaces an older file, and makes the folders it needs.

    On a disk it writes under a temporary name and renames the file; in a bucket it makes a single put. With `durable`
    it waits until the disk has stored the file, so that it survives a power cut and not only a killed process. (What a
    bucket has confirmed is stored.) To write many files, call `sync` once after them.
    """
    if is_uri(location):
        _put(location, io.BytesIO(data))
        return
    target = Path(location)
    with _replacing(target) as temporary:
        try:
            temporary.write_bytes(data)
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
        if durable:
            _sync_one(str(temporary))
    if durable:
        _sync_folders([location])


@patient
def _put(location: str, data: IO[bytes]) -> None:
    """Writes an object. Raises UserError if the bucket refuses it."""
    filesystem, path = resolve(location)
    data.seek(0)
    try:
        with filesystem.open_output_stream(path) as stream:
            shutil.copyfileobj(data, stream, 2**23)
    except OSError as error:
        raise _refused(location, "cannot be written", error) from None


def _refused(location: str, what: str, error: OSError) -> OSError | UserError:
    """Returns a bucket's error as it is if it may be over soon, so that it is tried again, or if something is not
    there; else as one line."""
    if buckets.is_passing(error) or isinstance(error, FileNotFoundError) or error.errno is not None:
        return error
    return UserError(f"{without_secrets(location)}: {what}: {first_line(error)}")


SYNC_THREADS = 8
"""Files that are synced at once: the disk stores them together. 128 masks took 31 ms, one after the other 86 ms."""
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EISDIR)
"""Errors of network file systems, and of FUSE, that have nothing to sync, or that do not let a folder be opened."""


def sync(locations: Iterable[str]) -> None:
    """Waits until the disk has stored these files, and their names in their folders. Raises OSError.

    A file that does not exist counts as deleted: it stays so. Objects in buckets need nothing. A network file system
    decides for itself what it stores, and when: most store a file when it is closed.
    """
    paths = [location for location in locations if not is_uri(location)]
    if not paths:
        return
    with ThreadPoolExecutor(min(SYNC_THREADS, len(paths))) as threads:
        for _ in threads.map(_sync_one, paths):
            pass
    _sync_folders(paths)


def _sync_one(path: str) -> None:
    """Syncs a file or a folder, if it exists."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


QUIET_SECONDS = 2
"""So long ago a folder must have changed last for its time to tell whether it changes again: a file system's clock
ticks every few hundredths of a second, on some once a second."""
MAX_SYNCED_FOLDERS = 4096
_synced_folders: dict[str, tuple[int, int]] = {}
"""Folders that this process has synced -> inode and time of the last change, if that was long enough ago."""


def _sync_folders(paths: list[str]) -> None:
    """Syncs the folders above some files, the deepest first, but for those that have not changed since this process
    synced them. (Some file systems take milliseconds for each, though nothing is to be stored.)"""
    folders = {str(folder) for path in paths for folder in Path(path).parents}
    for folder in sorted(folders, key=len, reverse=True):
        try:
            status = Path(folder).stat()
        except OSError:
            continue  # deleted: it stays so
        state = (status.st_ino, status.st_mtime_ns)
        if _synced_folders.get(folder) == state:
            continue
        _sync_one(folder)
        if time.time() - status.st_mtime > QUIET_SECONDS:
            if len(_synced_folders) >= MAX_SYNCED_FOLDERS:
                _synced_folders.clear()
            _synced_folders[folder] = state


TEMPORARY = ".tmp"
"""How names end under which files are written."""


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(TEMPORARY)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yields a temporary name beside a file; it replaces the file if the block ends without an error."""
    # Each writer has its own name, so that two writers of one file do not share the temporary one.
    temporary = target.with_name(f".{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(location: str) -> Iterator[IO[bytes]]:
    """Yields a stream to write a large file to; the file appears whole, and durable as by `write_bytes`, if the block
    ends without an error."""
    if is_uri(location):
        # The data go to a local file first, because pyarrow would complete an upload that an error interrupts.
        with tempfile.TemporaryFile() as stream:
            yield stream
            _put(location, stream)
        return
    target_path = Path(location)
    target_path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(target_path) as temporary:
        with temporary.open("wb") as stream:
            yield stream
        _sync_one(str(temporary))
    _sync_folders([location])


PATIENCE_SECONDS, AGAIN_SECONDS = 300.0, 5.0


def patiently(read: Callable[[], Answer], what: str) -> Answer:
    """Returns what `read` returns. While it raises OSError, or UserError for a location that can't be reached, it is
    called again every few seconds, for `PATIENCE_SECONDS`; then its error is raised. `what` is read, for the log.

    For results that are there for certain: a bucket or a file server may be out of reach for minutes.
    """
    begun = time.monotonic()
    while True:
        try:
            return read()
        except (OSError, UserError) as error:
            if time.monotonic() - begun > PATIENCE_SECONDS:
                raise
            log.warning("%s can't be read now, trying again: %s", what, first_line(error))
            time.sleep(AGAIN_SECONDS)


def exists(location: str) -> bool:
    """Returns whether a file or folder exists. Raises UserError if the location can't be reached."""
    return info(location) is not None


@patient
def info(location: str) -> FileInfo | None:
    """Returns pyarrow's information about a file or folder; None if it does not exist. Raises UserError."""
    from pyarrow.fs import FileType

    try:
        if is_web(location):
            return web.info(location)
        filesystem, path = resolve(location)
        found = filesystem.get_file_info(path)
    except OSError as error:
        raise _refused(location, "cannot be found out about", error) from None
    return None if found.type == FileType.NotFound else found


def is_folder(location: str) -> bool:
    """Returns whether a folder exists."""
    from pyarrow.fs import FileType

    found = info(location)
    return found is not None and found.type == FileType.Directory


@patient
def list_files(location: str) -> list[FileInfo]:
    """Lists all files below a folder and its subfolders, in no particular order."""
    from pyarrow.fs import FileSelector, FileType

    filesystem, path = resolve(location)
    try:
        found = filesystem.get_file_info(FileSelector(path, recursive=True))
    except OSError as error:
        raise _refused(location, "cannot be listed", error) from None
    return [entry for entry in found if entry.type == FileType.File]


@patient
def entries(location: str) -> list[FileInfo]:
    """Lists files and folders directly inside a folder, sorted by name. Raises UserError."""
    from pyarrow.fs import FileSelector

    filesystem, path = resolve(location)
    try:
        found = filesystem.get_file_info(FileSelector(path))
    except OSError as error:
        if not is_uri(location):
            raise UserError(f"{location}: cannot be listed: {error}") from None
        raise _refused(location, "cannot be listed", error) from None
    return sorted(found, key=lambda entry: entry.base_name)


def sizes_and_times(locations: Sequence[str]) -> list[tuple[int, int]]:
    """Returns (bytes, modification time in ns) of each file; (-1, 0) if it does not exist. Raises UserError."""
    if len(locations) > 1 and any(map(is_uri, locations)):
        return buckets.each(_size_and_time, locations)
    return [_size_and_time(location) for location in locations]


def _size_and_time(location: str) -> tuple[int, int]:
    if is_uri(location):
        try:
            entry = info(location)
        except UserError as error:
            if not is_web(location) or isinstance(error, buckets.OutOfReachError):
                raise
            entry = None  # one of many servers refuses: reading it fails its row, with the reason
        return (-1, 0) if entry is None else (entry.size, entry.mtime_ns or 0)
    try:
        status = os.stat(location)  # noqa: PTH116 - called for millions of files, and some names are not UTF-8
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def parent(location: str) -> str:
    """Returns the folder that a file is in."""
    base, options = split_options(location)
    return (base.rpartition("/")[0] or "/") + options


@patient
def names_in(location: str) -> list[str]:
    """Returns the names directly inside a folder, sorted; empty if the folder does not exist. A file that is being
    written, or was when its process was killed, does not count."""
    from pyarrow.fs import FileSelector

    filesystem, path = resolve(location)
    selector = FileSelector(path, allow_not_found=True)
    try:
        found = filesystem.get_file_info(selector)
    except FileNotFoundError:  # pyarrow raises it for a folder that another process makes during the call
        found = filesystem.get_file_info(selector)
    except OSError as error:
        raise _refused(location, "cannot be listed", error) from None
    return sorted(entry.base_name for entry in found if not _is_temporary(entry.base_name))


@patient
def delete_folder(location: str) -> None:
    """Removes a folder and everything in it, if it exists."""
    filesystem, path = resolve(location)
    if exists(location):
        try:
            filesystem.delete_dir(path)
        except OSError as error:
            raise _refused(location, "cannot be deleted", error) from None


@patient
def delete_file(location: str) -> None:
    """Removes a file, if it exists. Raises OSError."""
    if not is_uri(location):
        Path(location).unlink(missing_ok=True)
        return
    filesystem, path = resolve(location)
    if exists(location):
        try:
            filesystem.delete_file(path)
        except OSError as error:
            raise _refused(location, "cannot be deleted", error) from None
