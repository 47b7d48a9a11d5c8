"""Keeps the user part of buckets' URIs, such as `s3://KEY:SECRET@bucket`, apart from everything that is written.

A URI loses its user part where it comes in: a command's arguments, a setting, a line of a list. From then on only this
module knows it, in this process and in the workers that get `Keys`. So no file, message or report can hold a secret.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote

WITH_USER = re.compile(r"\b(s3|gs|gcs)://([^/@\s]*|[A-Za-z0-9]{16,128}:[^@\s]{16,})@([^/?\s]+)")
"""Scheme, user part and bucket. A secret that is not percent-encoded may hold `/`; AWS's have 40 characters."""
ANONYMOUS = "anonymous"
_known: dict[str, str] = {}
"""Scheme and bucket -> user part."""


def stripped(text: str) -> str:
    """Returns a text without the user parts of its URIs, and remembers them for their buckets."""

    def remember_one(match: re.Match[str]) -> str:
        scheme, user, bucket = match.groups()
        if user:
            _known[f"{scheme}://{bucket}"] = user
        return f"{scheme}://{bucket}"

    return WITH_USER.sub(remember_one, text) if "@" in text else text


def stripped_all(value: Any) -> Any:
    """Does the same in a setting: a text, or a tuple of texts. Other values are returned as they are."""
    if isinstance(value, str):
        return stripped(value)
    if isinstance(value, tuple) and any(isinstance(part, str) for part in value):
        return tuple(stripped_all(part) for part in value)
    return value


def of(bucket: str) -> str:
    """Returns the user part for a bucket, as `s3://bucket`: empty, `anonymous`, or percent-encoded `KEY:SECRET`."""
    key, colon, secret = _known.get(bucket, "").partition(":")
    return quote(unquote(key), safe="") + colon + quote(unquote(secret), safe="")


def _remember(known: dict[str, str]) -> Keys:
    _known.update(known)
    return Keys()


class Keys:
    """Brings the keys of this process into the process that unpickles it. Give it to what works for us elsewhere."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _remember, (dict(_known),)

    def __repr__(self) -> str:
        return "Keys()"
