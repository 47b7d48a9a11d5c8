"""Keeps two runs from writing into one output folder.

On a disk the system's file lock does it. Elsewhere (a bucket, a file system without file locks) a file does, which its
holder renews. Three times make this safe, and no clock is compared with that of another machine:

    BEAT_SECONDS    the holder renews the file this often, and tries again at once where that fails
    STOP_SECONDS    a holder that could not renew it for so long stops; the time of a sleeping machine counts
    DEAD_SECONDS    another run takes the file over only after it has seen no change for so long

So the old holder has stopped before a new one begins. If it could not (its process was stopped, and wakes after hours),
it finds the other's name in the file before it records anything: see `Holder.check`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from unet_ray.config import UserError, first_line
from unet_ray.data import storage

log = logging.getLogger("unet_ray")

BEAT_SECONDS, STOP_SECONDS, DEAD_SECONDS = 5.0, 20.0, 35.0
LOOK_SECONDS = 1.0
"""Seconds between two looks at another's lock, and between two tries after a failure."""
UNREADABLE_LOOKS = 20
"""How often a lock that can't be read is read again, or one that is not there yet for this node (network file systems
keep what they know of a folder for seconds)."""


@dataclass(frozen=True, slots=True)
class Process:
    """Names a process in a way that no other process on any machine shares."""

    host: str
    pid: int
    begun: str
    """When it started, in the kernel's ticks since the machine did; empty where the system does not say."""
    boot: str
    """The kernel's name for this start of the machine."""
    pids: str
    """The kernel's name for the set of process numbers: containers have their own."""

    @classmethod
    def here(cls) -> Process:
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _begun(pid), *_kernel())

    def has_ended(self) -> bool:
        """Returns whether it is known to have ended. If in doubt, it has not."""
        here = Process.here()
        if not self.boot or (self.host, self.boot, self.pids) != (here.host, here.boot, here.pids):
            return False
        return _begun(self.pid) != self.begun


def _begun(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _kernel() -> tuple[str, str]:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        return "", ""


@dataclass(frozen=True, slots=True)
class Holder:
    """Names the run that holds a lock. It can be sent to other processes, which check it before they record."""

    out: str
    path: str
    """The lock's file."""
    id: str

    def check(self) -> None:
        """Raises UserError unless the lock is still this run's. A lock that can't be read is read again for a while."""
        content = ""
        for look in range(UNREADABLE_LOOKS):
            if look:
                time.sleep(LOOK_SECONDS)
            with contextlib.suppress(OSError):
                content = _read(self.path)
            found = _parsed(content).get("id")
            if found == self.id:
                return
            if found is not None and look >= 2:  # twice more, in case this node still shows an old file
                break
        raise taken_over(self.out, content)


class OutputLock:
    """A lock that this process holds."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder

    def check(self) -> None:
        """Raises UserError once the lock is lost. It costs nothing: call it often."""


class _RenewedLock(OutputLock):
    """A lock whose file a thread renews."""

    def __init__(self, holder: Holder, me: dict[str, Any]) -> None:
        super().__init__(holder)
        self.me = me
        self.lost, self.stop = "", threading.Event()
        self.renewed = _now()
        """When the last write that succeeded began."""
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def check(self) -> None:
        if not self.lost and _now() - self.renewed > STOP_SECONDS:
            self.lost = f"{self.holder.out} could not be written for {STOP_SECONDS:.0f} s"
        if self.lost:
            raise UserError(f"{self.lost}: this run stops. What is done is kept: give the same command again")

    def write(self, number: int) -> None:
        """Writes the file, if this run may: not after too long a silence, in which another may have taken over."""
        begun = _now()
        if begun - self.renewed <= STOP_SECONDS:
            storage.write_bytes(self.holder.path, json.dumps({**self.me, "beat": number}).encode())
            self.renewed = begun

    def _beat(self) -> None:
        number, wait = 1, BEAT_SECONDS
        while not self.stop.wait(wait) and not self.lost:
            if _now() - self.renewed > STOP_SECONDS:
                return  # `check` says so
            try:
                content = _read(self.holder.path)
                if _parsed(content).get("id") not in (None, self.holder.id):
                    self.lost = str(taken_over(self.holder.out, content))
                    return
                number += 1
                self.write(number)
                wait = BEAT_SECONDS
            except Exception as error:  # a bucket's errors have many types
                log.info("%s: not renewed: %s", self.holder.path, first_line(error))
                wait = min(LOOK_SECONDS, BEAT_SECONDS)


def _now() -> float:
    """Returns seconds, with those in which the machine slept, where the system counts them."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


@contextmanager
def output_lock(out: str, name: str) -> Iterator[OutputLock]:
    """Locks an output folder for this run with the file `name` below it.

    On a disk it takes a file lock, which the system releases when the process ends, even if it is killed. Elsewhere see
    this module's first lines. Raises UserError if another run holds the lock.
    """
    holder = Holder(out, storage.join(out, *name.split("/")), uuid.uuid4().hex)
    me = {"id": holder.id, **asdict(Process.here()), "since": time.strftime("%F %T")}
    file = None if storage.is_uri(out) else _file_lock(holder)
    if file is None:
        yield from _renewed(holder, me)
        return
    with file:
        file.truncate(0)
        file.write(json.dumps(me))
        file.flush()
        os.fsync(file.fileno())  # the other nodes of a network file system must see it
        try:
            yield OutputLock(holder)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(holder.path)  # noqa: PTH108 - while it is locked: see `_file_lock`


def _file_lock(holder: Holder) -> IO[str] | None:
    """Opens and locks the file of a lock. Returns None where there are no file locks. Raises UserError."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    os.makedirs(storage.parent(holder.path), exist_ok=True)  # noqa: PTH103
    while True:
        file = open(holder.path, "a+")  # noqa: PTH123, SIM115 - stays open
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            content = file.read()
            file.close()
            raise _occupied(holder.out, content) from None
        except OSError:  # a file system without file locks
            file.close()
            return None
        try:
            # The run before may have removed the file between `open` and `flock`: then this lock keeps nobody out.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(holder.path)):  # noqa: PTH116
                return file
        except FileNotFoundError:
            pass
        file.close()


def _renewed(holder: Holder, me: dict[str, Any]) -> Iterator[OutputLock]:
    _wait_for_end_of_other(holder)
    lock = _RenewedLock(holder, me)
    lock.write(0)
    # Where two runs found the file free at once, both have written by now, and one sees the other's name.
    time.sleep(min(LOOK_SECONDS, BEAT_SECONDS))
    holder.check()
    lock.thread.start()
    try:
        yield lock
    finally:
        lock.stop.set()
        lock.thread.join()
        with contextlib.suppress(OSError, UserError):
            if not lock.lost and _parsed(_read(holder.path)).get("id") == holder.id:
                storage.delete_file(holder.path)


def _wait_for_end_of_other(holder: Holder) -> None:
    """Waits until nobody has renewed the lock for `DEAD_SECONDS`. Raises UserError if another run renews it."""
    content = _read(holder.path)
    if not content or _process_of(content).has_ended():
        return
    # Looks are counted, not seconds: after a sleep of this machine, a holder on it must have time to renew.
    for _ in range(int(DEAD_SECONDS / LOOK_SECONDS)):
        time.sleep(LOOK_SECONDS)
        now = _read(holder.path)
        if not now:
            return
        if now != content:
            raise _occupied(holder.out, now)


def _occupied(out: str, content: str) -> UserError:
    return UserError(f"another run{_who(content)} is writing to {out}: wait for it, stop it, or choose another --out")


def taken_over(out: str, content: str) -> UserError:
    """Returns the error of a run that has lost its lock. `content`: what the lock's file holds now."""
    if not content:
        return UserError(f"the lock of {out} is gone: this run stops. Give the same command again")
    return UserError(f"another run{_who(content)} has taken over {out}: this one stops")


def _who(content: str) -> str:
    found = _parsed(content)
    try:
        return f" (process {found['pid']} on {found['host']}, since {found['since']})"
    except KeyError:
        return ""


def _process_of(content: str) -> Process:
    found = _parsed(content)
    fields = ("host", "pid", "begun", "boot", "pids")
    return Process(**{name: found.get(name, "") for name in fields})


def _parsed(content: str) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}


def _read(path: str) -> str:
    try:
        return storage.read_bytes(path).decode()
    except FileNotFoundError:
        return ""
