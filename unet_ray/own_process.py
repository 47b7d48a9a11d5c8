"""Tells our own processes (a command's, Ray's workers) from a host's process, which has imported this package.

Some settings belong to a whole process: malloc's, handlers of signals, levels of loggers, Pillow's limit of pixels. We
change them for good only in processes of our own. In a host's process, what a call changes is put back at its end.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_own = False
_waiting: list[Callable[[], None]] = []
PREFIXES = ("RAY_", "GLOO_", "PYTHONBREAKPOINT")
"""Beginnings of the names of environment variables that a call may set."""


def claim() -> None:
    """Says that this process is ours. Runs what `when_claimed` has kept."""
    global _own
    _own = True
    while _waiting:
        _waiting.pop()()


def is_own() -> bool:
    """Returns whether this process is ours."""
    return _own


def when_claimed(change: Callable[[], None]) -> None:
    """Calls the function once this process is ours: now, later or never."""
    if _own:
        change()
    else:
        _waiting.append(change)


@contextmanager
def unchanged() -> Iterator[None]:
    """In a host's process, puts back at the end of a `with` block what Ray and torch have changed.

    That is: handlers of SIGINT and SIGTERM, levels and handlers of loggers, environment variables (`PREFIXES`), torch's
    threads, and the states of torch's and Python's random numbers. During the block they may differ.
    """
    if _own:
        yield
        return
    put_back = [_signals(), _loggers(), _environment(), _random_numbers(), _torch()]
    try:
        yield
    finally:
        for restore in put_back:
            restore()


def _signals() -> Callable[[], None]:
    if threading.current_thread() is not threading.main_thread():
        return lambda: None  # neither Ray nor we can change them here
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in handlers.items():
            if handler is not None:  # None: not set by Python
                signal.signal(number, handler)

    return restore


def _loggers() -> Callable[[], None]:
    known = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    states = [(each, each.level, each.handlers[:], each.propagate, each.disabled) for each in (logging.root, *known)]

    def restore() -> None:
        for logger, level, handlers, propagate, disabled in states:
            logger.setLevel(level)
            logger.handlers[:] = handlers
            logger.propagate, logger.disabled = propagate, disabled

    return restore


def _environment() -> Callable[[], None]:
    def ours() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}

    before = ours()

    def restore() -> None:
        for name in ours().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)

    return restore


def _random_numbers() -> Callable[[], None]:
    state = random.getstate()
    return lambda: random.setstate(state)


def _torch() -> Callable[[], None]:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return lambda: None  # a host that has not loaded it has no settings of its own
    threads, cpu = torch.get_num_threads(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore() -> None:
        torch.set_num_threads(threads)
        torch.set_rng_state(cpu)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)

    return restore
