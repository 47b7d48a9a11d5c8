"""Keeps two runs from writing into one output folder."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.inference.ledger import WORK

LOCK, BEAT_SECONDS, DEAD_AFTER_SECONDS = "lock.json", 10.0, 35.0


@contextmanager
def output_lock(out: str) -> Iterator[Callable[[], None]]:
    """Locks an output folder for this run. Yields a function that raises UserError once the lock is lost.

    On a disk it takes a file lock, which the system releases when the process ends, even if it is killed. In a bucket
    it writes an object and renews it every ten seconds; it takes over an object that nobody renews. Raises UserError if
    another run holds the lock.
    """
    me = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
    path = storage.join(out, WORK, LOCK)
    if storage.is_uri(out):
        yield from _lock_by_heartbeat(out, path, me)
        return
    try:
        import fcntl
    except ImportError:  # Windows
        yield from _lock_by_heartbeat(out, path, me)
        return
    os.makedirs(storage.parent(path), exist_ok=True)  # noqa: PTH103
    with open(path, "a+") as file:  # noqa: PTH123
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _occupied(out, file.read()) from None
        except OSError:  # a network file system without locks
            yield from _lock_by_heartbeat(out, path, me)
            return
        file.truncate(0)
        file.write(json.dumps(me))
        file.flush()
        yield lambda: None
        file.truncate(0)


def _occupied(out: str, text: str) -> UserError:
    try:
        holder = json.loads(text)
        who = f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (ValueError, KeyError):
        who = ""
    return UserError(f"another run{who} is writing to {out}: wait for it, stop it, or choose another --out")


def _lock_by_heartbeat(out: str, path: str, me: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Does what `output_lock` does, with a file that a thread renews every `BEAT_SECONDS`."""
    _wait_for_end_of_other(out, path)
    lost, stop = threading.Event(), threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(BEAT_SECONDS if number else 0):
            if number and json.loads(_read(path) or "{}").get("id") != me["id"]:
                lost.set()
                return
            number += 1
            storage.write_bytes(path, json.dumps({**me, "beat": number}).encode())

    def check() -> None:
        if lost.is_set():
            raise UserError(f"another run has taken over {out}: this one stops")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield check
    finally:
        stop.set()
        thread.join()
        if not lost.is_set():
            storage.delete_file(path)


def _wait_for_end_of_other(out: str, path: str) -> None:
    """Waits `DEAD_AFTER_SECONDS` if the lock exists. Raises UserError if another run renews it in this time."""
    content = _read(path)
    if not content or _is_over(content):
        return
    until = time.monotonic() + DEAD_AFTER_SECONDS
    while time.monotonic() < until:
        time.sleep(1)
        if _read(path) not in (content, ""):
            raise _occupied(out, content)


def _read(path: str) -> str:
    try:
        return storage.read_bytes(path).decode()
    except FileNotFoundError:
        return ""


def _is_over(text: str) -> bool:
    """Returns whether the holder of the lock is a process of this machine that has ended."""
    holder = json.loads(text)
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
