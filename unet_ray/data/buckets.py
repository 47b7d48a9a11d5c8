"""What buckets need beyond pyarrow: patience while they fail, one line when they refuse, an end to every wait.

pyarrow repeats a request for some seconds, and then raises an OSError without a number whose text names the error. A
request can't be interrupted: Ctrl-C would be handled only after it.
"""

from __future__ import annotations

import configparser
import functools
import logging
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote

from unet_ray.config import UserError, first_line

log = logging.getLogger("unet_ray")

Given = ParamSpec("Given")
Item = TypeVar("Item")
Answer = TypeVar("Answer")

PATIENCE_SECONDS = 120.0
"""How long a request is repeated while its bucket fails."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 10.0
"""Seconds between two requests, which double each time, and vary so that many processes do not ask at once."""
SAY_SECONDS = 10.0
REQUESTS_AT_ONCE = 128
"""Requests that wait at once: each takes some tens of milliseconds."""
PROBE_SECONDS = 1.0
"""Time in which the machine's own source of credentials accepts a connection, if it has one: it is in the same rack."""
PASSING = re.compile(
    r"SLOW_?DOWN|SERVICE_?UNAVAILABLE|INTERNAL_?(FAILURE|ERROR)|NETWORK_CONNECTION|REQUEST_?TIME(OUT|_TOO_SKEWED)"
    r"|THROTTL|HTTP (status|Error) (5\d\d|429)|curlCode|connection (was )?(reset|refused|closed|aborted)|timed out"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)
"""What an error says that may be over in a minute. (AWS SDK's CoreErrors, S3's error codes, gRPC's status codes.)"""
_here = threading.local()
THREAD = "unet_ray: bucket"


class OutOfReachError(UserError):
    """A bucket that failed for `PATIENCE_SECONDS`. No image's own fault: the run ends, and goes on later."""


def is_uri(location: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", location) is not None


def is_passing(error: BaseException) -> bool:
    """Returns whether an error of a bucket may be over soon: no refusal, and nothing that is missing."""
    return isinstance(error, OSError) and error.errno is None and PASSING.search(str(error)) is not None


def patient(call: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Makes a function of a location, which is its first argument, repeat itself while the location's bucket fails.

    Then it raises OutOfReachError. A path on a disk is passed on at once.
    """

    @functools.wraps(call)
    def repeated(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        location = str(args[0])
        if not is_uri(location):
            return call(*args, **kwargs)
        begun, wait, said = time.monotonic(), FIRST_WAIT, 0.0
        while True:
            try:
                return _interruptible(functools.partial(call, *args, **kwargs))
            except OSError as error:
                passed, pause = time.monotonic() - begun, wait * random.uniform(0.7, 1.3)
                if not is_passing(error) or getattr(_here, "at_once", False):
                    raise
                if passed + pause > PATIENCE_SECONDS:
                    raise OutOfReachError(
                        f"{bucket_of(location)} has failed for {passed:.0f} s ({first_line(error)[:300]}). What is done"
                        " is kept: give the same command again"
                    ) from None
                if passed > SAY_SECONDS and passed - said > SAY_SECONDS:
                    said = passed
                    left = PATIENCE_SECONDS - passed
                    log.warning("waiting for %s, %.0f s more: %s", bucket_of(location), left, first_line(error)[:200])
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)

    return repeated


@contextmanager
def at_once() -> Iterator[None]:
    """Makes patient functions raise the first error in this thread, for a caller that has little time."""
    _here.at_once = True
    try:
        yield
    finally:
        _here.at_once = False


def _interruptible(call: Callable[[], Answer]) -> Answer:
    """Returns what `call` returns. In the main thread Ctrl-C ends the wait at once; the request is left behind."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    return each(lambda _: call(), [None])[0]


def each(call: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
    """Returns `call(item)` of each item, `REQUESTS_AT_ONCE` at a time. Raises the first error.

    An executor's threads would be waited for at the end, also after Ctrl-C.
    """
    futures: list[Future[Answer]] = [Future() for _ in items]
    todo, lock, stop = zip(items, futures, strict=True), threading.Lock(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with lock:
                item, future = next(todo, (None, None))
            if future is None:
                return
            try:
                future.set_result(call(item))  # type: ignore[arg-type]
            except BaseException as error:
                future.set_exception(error)

    for _ in range(min(REQUESTS_AT_ONCE, len(items))):
        threading.Thread(target=work, name=THREAD, daemon=True).start()
    try:
        return [future.result() for future in futures]
    finally:
        stop.set()


def left_a_request_behind() -> bool:
    """Returns whether a request was given up that still runs. At its end Python would wait for it, in pyarrow."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def bucket_of(location: str) -> str:
    """Returns scheme and bucket of a URI, without keys."""
    scheme, _, rest = location.partition("://")
    return f"{scheme}://{re.split('[/?]', rest)[0].rpartition('@')[2]}"


def check_credentials(location: str) -> None:
    """Raises UserError if this machine has no credentials for a URI: pyarrow would look for some for minutes."""
    scheme, _, rest = location.partition("://")
    authority, _, options = rest.partition("?")
    if "@" in authority.partition("/")[0] or "anonymous=" in options:
        return
    if scheme == "s3" and not _has_aws():
        raise UserError(
            f"{bucket_of(location)}: no credentials: run `aws configure` or `aws sso login`, or set AWS_ACCESS_KEY_ID"
            f" and AWS_SECRET_ACCESS_KEY; a public bucket needs none: {_anonymous(location)}"
        )
    if scheme in ("gs", "gcs") and not _has_google():
        raise UserError(
            f"{bucket_of(location)}: no credentials: run `gcloud auth application-default login`, or set"
            f" GOOGLE_APPLICATION_CREDENTIALS; a public bucket needs none: {_anonymous(location)}"
        )


def _anonymous(location: str) -> str:
    return bucket_of(location).replace("://", "://anonymous@")


AWS_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Any of them is a source of credentials (the AWS SDK's default chain); the others are files and the machine itself."""


def _has_aws() -> bool:
    if any(os.environ.get(name) for name in AWS_VARIABLES):
        return True
    if any(path.exists() for path in _aws_files()):
        return True
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    return _answers("169.254.169.254", 80)


def _aws_files() -> list[Path]:
    named = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
    return [Path(os.environ.get(name) or f"~/.aws/{file}").expanduser() for name, file in named.items()]


def _has_google() -> bool:
    if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT"):
        return True
    folder = os.environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud"
    if Path(folder, "application_default_credentials.json").expanduser().exists():
        return True
    return _answers(os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal", 80)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def with_endpoint(uri: str) -> str:
    """Adds the server of S3 that the environment or the profile names, unless the URI names one.

    pyarrow reads the variables AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL itself, and no profile.
    """
    set_by = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    if not uri.startswith("s3://") or "endpoint_override=" in uri or any(os.environ.get(name) for name in set_by):
        return uri
    endpoint = _profile().get("endpoint_url", "")
    scheme, _, host = endpoint.partition("://")
    if not host:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}scheme={scheme}&endpoint_override={quote(host.rstrip('/'), safe=':')}"


def _profile() -> dict[str, Any]:
    """Returns the settings of the AWS profile in use; none if there is no such file."""
    name = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read(_aws_files()[1], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}
    section = next((each for each in (f"profile {name}", name) if config.has_section(each)), None)
    return dict(config[section]) if section else {}
