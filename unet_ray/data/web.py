"""Reads images from web servers (`http://`, `https://`), which can neither be listed nor written to."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from unet_ray import __version__

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo

SECONDS = 30.0
"""How long a server may be silent. `storage` asks again after errors that may be over soon."""
SECRET = re.compile(r"[?&]([^=&]*(sig|token|key|credential|secret|policy|password|auth)[^=&]*)=", re.IGNORECASE)
"""Names of parameters that give access, as in presigned URLs."""


def is_web(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def without_secrets(url: str) -> str:
    """Returns a URL that may be written to a file: without its parameters if one of them gives access, and without a
    user. Other parameters tell images apart."""
    base, mark, parameters = url.partition("?")
    base = re.sub(r"^(https?://)[^/@]*@", r"\1", base)
    return base if SECRET.search(f"?{parameters}") else base + mark + parameters


def read(url: str, count: int = -1) -> bytes:
    """Reads a file, at most `count` bytes if it is not negative. Raises FileNotFoundError or another OSError."""
    with _network_errors(), _opened(url, "GET") as answer:
        data = answer.read() if count < 0 else answer.read(count)
        expected = answer.headers.get("Content-Length")
    if count < 0 and expected is not None and len(data) < int(expected):
        raise OSError(f"connection closed after {len(data)} of {expected} bytes")
    return data


def info(url: str) -> FileInfo | None:
    """Returns size and time of a file, as far as the server tells; None if there is no such file. Raises OSError."""
    from pyarrow.fs import FileInfo, FileType

    try:
        with _network_errors():
            headers = _headers(url)
    except FileNotFoundError:
        return None
    size, changed = headers.get("Content-Length"), headers.get("Last-Modified")
    return FileInfo(url, FileType.File, size=int(size or 0), mtime=_time(changed))


@contextmanager
def _network_errors() -> Iterator[None]:
    """Gives errors of a connection the form in which pyarrow raises them: `buckets.is_passing` knows them then."""
    try:
        yield
    except (http.client.HTTPException, ConnectionError) as error:
        raise OSError(f"connection closed: {error or type(error).__name__}") from None


def _headers(url: str) -> http.client.HTTPMessage:
    try:
        with _opened(url, "HEAD") as answer:
            return answer.headers
    except HTTPError as error:
        if error.code not in (403, 405, 501):  # presigned URLs are for GET alone, and some servers know no HEAD
            raise
    with _opened(url, "GET") as answer:
        return answer.headers


def _opened(url: str, method: str) -> http.client.HTTPResponse:
    request = Request(url, method=method, headers={"User-Agent": f"unet-ray/{__version__}"})
    try:
        return urlopen(request, timeout=SECONDS)
    except HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(2, "No such file", without_secrets(url)) from None
        raise


def _time(text: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(text or "")
    except (TypeError, ValueError):
        return None
