"""Connects a command or a notebook to Ray, or starts one for it; disconnects and cleans up afterwards."""

from __future__ import annotations

import functools
import logging
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

from unet_ray.config import UserError, first_line
from unet_ray.keys import Keys
from unet_ray.own_process import claim, is_own
from unet_ray.ray_backend import address, internals

log = logging.getLogger("unet_ray")

LOGGERS = (None, "ray", "ray.data", "ray.train", "ray.tune", "ray.serve", "ray.rllib")
"""The loggers that we or Ray change; None is the root."""
LONGEST_FOLDER = 44
"""Bytes of the longest folder in which Ray can make its sockets: a socket's path takes at most 107, and Ray appends
`/session_…/sockets/plasma_store`, with the time and a process number of up to 7 digits."""
LEAST_MEMORY = 3 * 2**30
"""Bytes of memory with which a Ray of our own and one small network run. With 2 GiB the system killed them."""
OWN_PREFIX = "unet-ray-"
_own_ray = False
_used_in: int | None = None
"""Number of the process that has connected to Ray."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """The place where work is done: this process, or Ray."""

    local: bool = False
    """Work in this process; Ray is neither started nor imported."""
    verbose: bool = False
    """Show Ray's messages."""

    @contextmanager
    def started(self) -> Iterator[None]:
        """Connects to Ray for a `with` block, see `ray_session`. Does nothing with `local`."""
        with nullcontext() if self.local else ray_session(self.verbose):
            yield

    def in_task(self, function: Callable[..., None]) -> Callable[..., None]:
        """Returns a function that runs this one in a task of Ray, on any node, and waits for it; with `local` it
        returns the function itself. Raises what the function raises. Call it while Ray is started."""
        return function if self.local else functools.partial(_in_task, function)


def _in_task(function: Callable[..., None], *arguments: Any) -> None:
    import ray
    from ray.exceptions import RayTaskError

    try:
        ray.get(_task().remote(function, arguments, Keys()))
    except RayTaskError as error:  # whose text is that of all processes in between
        raise error.cause from None


@functools.cache
def _task() -> Any:
    import ray

    # It takes no CPU, since the replicas of a model may leave none.
    return ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_called)


def _called(function: Callable[..., None], arguments: tuple[Any, ...], _keys: Keys) -> None:
    claim()
    function(*arguments)


LOCAL = Runtime(local=True)


def is_own_ray() -> bool:
    """Returns whether `ray_session` started the Ray that is in use: it has this machine only and never grows."""
    return _own_ray


@contextmanager
def ray_session(verbose: bool = False) -> Iterator[None]:
    """Provides Ray for a `with` block.

    Uses the connection that this process already has, or else the cluster that RAY_ADDRESS names (it is set in a job).
    Otherwise starts a Ray on this machine, and at the end stops it and deletes its files.
    """
    wanted = internals.ENVIRONMENT | ({} if verbose else {internals.BACKEND_LOG_VARIABLE: "fatal"})
    with _put_back(wanted), _provided(verbose):
        yield


@contextmanager
def _put_back(wanted: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables that nobody has set, and puts back what we and Ray change in this process.

    In the end the environment, the loggers, the handler of SIGTERM, Python's random numbers and Ray Data's options are
    as `import ray.data` leaves them. Only the main thread can set a handler.
    """
    before = dict(os.environ)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    handler, numbers = signal.getsignal(signal.SIGTERM), random.getstate()
    import ray.data

    found = map(logging.getLogger, LOGGERS)
    loggers = [(logger, logger.level, logger.propagate, [*logger.handlers]) for logger in found]
    options, imported = ray.data.DataContext.get_current(), dict(os.environ)
    waits = internals.data_waits()
    try:
        # A copy, since our settings are not for a host's own datasets.
        with ray.data.DataContext.current(options.copy()):
            yield
    finally:
        internals.look_for_finished_tasks_often(waits)
        random.setstate(numbers)  # Ray draws names
        for logger, level, propagate, handlers in loggers:
            logger.level, logger.propagate, logger.handlers = level, propagate, handlers
            logger.setLevel(level)  # forgets what was cached
        for name in {*wanted, *(os.environ.keys() - imported.keys())}:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _provided(verbose: bool) -> Iterator[None]:
    import ray

    if _used_in not in (None, os.getpid()):
        raise UserError(
            "this process was forked from one that has used Ray, which can't work in both: start it with"
            ' multiprocessing.get_context("spawn"), or work without Ray (--local, local=True)'
        )
    if ray.is_initialized():  # by a notebook or a test, which also ends it
        yield
        return
    options: dict[str, Any] = {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    named = os.environ.get("RAY_ADDRESS")
    if named and named != "local":
        with nullcontext() if verbose else _stderr_to_nowhere():
            address.check_address(named)
        with _connected(options, verbose, lambda error: address.refused(named, error)):
            yield
        return
    _check_memory()
    with (
        _own_folder() as folder,
        _own_token(),
        _connected(options | _own_options(folder), verbose, _not_started),
        _remembered_as_own(),
    ):
        yield


def _not_started(error: Exception) -> UserError:
    return UserError(f"Ray can't be started on this machine ({first_line(error)}): use --local, which needs no Ray")


def _check_memory() -> None:
    memory = internals.memory_of_machine()
    if memory < LEAST_MEMORY:
        raise UserError(
            f"this machine has {memory / 2**30:.1f} GiB of memory, and Ray needs {LEAST_MEMORY / 2**30:.0f}:"
            " use --local, which needs no Ray"
        )


@contextmanager
def _connected(options: dict[str, Any], verbose: bool, failed: Callable[[Exception], UserError]) -> Iterator[None]:
    import ray

    global _used_in
    _used_in = os.getpid()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with nullcontext() if verbose else _stderr_to_nowhere():
            ray.init(**options)
    except Exception as error:  # Ray raises many kinds
        log.info("Ray: %s", error, exc_info=True)
        ray.shutdown()
        raise failed(error) from None
    # `ray.init` has installed its own handler. A host's own comes back at once; without one, SIGTERM must not end this
    # process at once, since a Ray and its files would stay.
    if is_own() or handler == signal.SIG_DFL:
        stop_like_ctrl_c()
    elif handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_token() -> Iterator[None]:
    """Gives a Ray of our own a token for this run, unless the user has chosen."""
    token = {internals.TOKEN_MODE_VARIABLE: "token", internals.TOKEN_VARIABLE: secrets.token_hex(32)}
    if token.keys() & os.environ.keys():
        yield
        return
    os.environ |= token
    internals.read_token_variables()
    try:
        yield
    finally:
        for name in token:
            os.environ.pop(name, None)
        internals.read_token_variables()


@contextmanager
def _own_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix=OWN_PREFIX, dir=_short_parent())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _short_parent() -> str:
    """Returns the temporary folder, or another one if its path is too long for Ray's sockets. Raises UserError."""
    wanted = tempfile.gettempdir()
    for parent in (wanted, "/tmp", "/var/tmp", "/dev/shm"):
        length = len(os.fsencode(parent)) + len(f"/{OWN_PREFIX}12345678")
        if length <= LONGEST_FOLDER and os.access(parent, os.W_OK | os.X_OK):
            return parent
    raise UserError(f"TMPDIR={wanted} is too long for Ray's sockets: set TMPDIR to a shorter folder, or use --local")


def _own_options(folder: str) -> dict[str, Any]:
    """Returns arguments with which `ray.init` starts a new Ray: one that already runs here may be somebody else's."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # At least two: a worker would hold the only CPU, and no image could be decoded.
    options = {"address": "local", "num_cpus": max(2, cpus), "include_dashboard": False}
    return options | internals.own_ray_options(folder)


@contextmanager
def _remembered_as_own() -> Iterator[None]:
    global _own_ray
    _own_ray = True
    try:
        yield
    finally:
        _own_ray = False


def stop_like_ctrl_c() -> None:
    """Makes SIGTERM, which `ray job stop`, Kubernetes and others send, act like Ctrl-C."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


@contextmanager
def _stderr_to_nowhere() -> Iterator[None]:
    """Hides what C++ code prints to stderr, which Python's own redirection does not catch. Exceptions pass through.
    What other threads log meanwhile, such as the one that lists the inputs, is logged afterwards."""
    meanwhile: list[logging.LogRecord] = []

    def later(record: logging.LogRecord) -> bool:
        meanwhile.append(record)
        return False

    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    log.addFilter(later)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
        log.removeFilter(later)
        for record in meanwhile:
            log.handle(record)
