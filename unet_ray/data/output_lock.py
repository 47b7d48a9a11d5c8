"""Keeps two runs from writing into one output folder.

On a disk the system's file lock does it. Elsewhere (a bucket, a file system without file locks) a file does, which its
holder renews. Three times make this safe, and no clock is compared with that of another machine:

    BEAT_SECONDS    the holder renews the file this often, and tries again at once where that fails
    STOP_SECONDS    a holder that could not renew it for so long stops; the time of a sleeping machine counts
    DEAD_SECONDS    another run takes the file over only after it has seen no change for so long

So the old holder has stopped before a new one begins. If it could not (its process was stopped, and wakes after hours),
it finds out before it records anything: see `Holder.check`.

One gap remains, because a bucket has no write that depends on another file: a process that is stopped between this
check and its write, for longer than another run takes to begin, writes late. In a prediction the late file does no
harm: both runs have the same settings, so it holds the same masks, and it counts only for an image of the same size and
time. With --overwrite and other settings it may do harm. In a training the new run's next checkpoint, if one follows,
replaces it.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from unet_ray.config import UserError, first_line
from unet_ray.data import buckets, storage

log = logging.getLogger("unet_ray")

BEAT_SECONDS, STOP_SECONDS, DEAD_SECONDS = 5.0, 20.0, 35.0
LOOK_SECONDS = 1.0
"""Seconds between two looks at another's lock, and between two tries after a failure."""
AGAIN = "give the same command again"
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
    """Returns when a process of this machine started; empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # a zombie writes nothing
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
    again: str = AGAIN
    """What the user does to go on after the run has stopped."""
    own: OutputLock | None = field(default=None, compare=False, repr=False)
    """The lock, in the process that holds it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Holder, (self.out, self.path, self.id, self.again)

    def check(self) -> None:
        """Raises UserError unless the lock is this run's now. Call it right before each write that other runs read.

        A lock that can't be read is read again for a while.
        """
        content = failure = ""
        for look in range(UNREADABLE_LOOKS):
            if look:
                time.sleep(LOOK_SECONDS)
            looked = _now()
            try:
                content, failure = _read(self.path), ""
            except Exception as error:  # a bucket's errors have many types
                content, failure = "", first_line(error)
            if self.own is not None:
                self.own.check()
            found = _parsed(content).get("id")
            # A look counts only while it is fresh: the process may have been stopped since.
            if found == self.id and _now() - looked < STOP_SECONDS:
                return
            if found not in (None, self.id) and look >= 2:  # twice more, in case this node still shows an old file
                break
        raise self.lost(content, failure)

    def lost(self, content: str, failure: str = "") -> UserError:
        """Returns the error of a run that has lost its lock. `content`: what the lock's file holds now; `failure`: why
        it can't be read."""
        out = storage.without_secrets(self.out)
        if failure or _parsed(content).get("id") == self.id:
            return self.stopped(f"the lock of {out} can't be read ({failure or 'each look takes too long'})")
        if not content:
            return self.stopped(f"the lock of {out} is gone")
        return self.stopped(f"another run{_who(content)} has taken over {out}")

    def stopped(self, reason: str) -> UserError:
        return UserError(f"{reason}: this run stops. What is done is kept: {self.again}")


class OutputLock:
    """A lock that this process holds."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder

    def check(self) -> None:
        """Raises UserError once it is known that the lock is lost. It reads no file: call it often."""


class _RenewedLock(OutputLock):
    """A lock whose file a thread renews."""

    def __init__(self, holder: Holder, me: dict[str, Any]) -> None:
        super().__init__(replace(holder, own=self))
        self.me = me
        self.lost: UserError | None = None
        self.failure, self.stop = "", threading.Event()
        self.renewed = _now()
        """When the last write that succeeded began."""
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def check(self) -> None:
        silence = _now() - self.renewed
        if self.lost is None and silence > STOP_SECONDS:
            why = f" ({self.failure})" if self.failure else ""
            out = storage.without_secrets(self.holder.out)
            reason = f"the lock of {out} was not renewed for {silence:.0f} s{why}"
            self.lost = self.holder.stopped(f"{reason}, so another run may take over")
        if self.lost is not None:
            raise self.lost

    def write(self, number: int) -> None:
        """Writes the file, if this run may: not after too long a silence, in which another may have taken over."""
        begun = _now()
        if begun - self.renewed <= STOP_SECONDS:
            storage.write_bytes(self.holder.path, json.dumps({**self.me, "beat": number}).encode())
            self.renewed, self.failure = begun, ""

    def _beat(self) -> None:
        number, wait = 1, BEAT_SECONDS
        with buckets.at_once():  # a request that is repeated for minutes would come too late
            self._renew(number, wait)

    def _renew(self, number: int, wait: float) -> None:
        while not self.stop.wait(wait) and not self.lost:
            if _now() - self.renewed > STOP_SECONDS:
                return  # `check` says so
            try:
                content = _read(self.holder.path)
                if _parsed(content).get("id") not in (None, self.holder.id):
                    self.lost = self.holder.lost(content)
                    return
                number += 1
                self.write(number)
                wait = BEAT_SECONDS
            except Exception as error:  # a bucket's errors have many types
                self.failure = first_line(error)
                log.info("%s: not renewed: %s", self.holder.path, self.failure)
                wait = min(LOOK_SECONDS, BEAT_SECONDS)


def _now() -> float:
    """Returns seconds, with those in which the machine slept, where the system counts them."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


JOB_FOLDER = "/runtime_resources/working_dir_files/"
"""Part of the path of the folder into which Ray unpacks `--working-dir`."""


@contextmanager
def output_lock(out: str, name: str, again: str = AGAIN) -> Iterator[OutputLock]:
    """Locks an output folder for this run with the file `name` below it. `again`: see `Holder`.

    On a disk it takes a file lock, which the system releases when the process ends, even if it is killed. Elsewhere see
    this module's first lines. Raises UserError if another run holds the lock, or if Ray will delete the folder.
    """
    _check_lasting(out)
    holder = Holder(out, storage.join(out, *name.split("/")), uuid.uuid4().hex, again)
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
                if _parsed(_read(holder.path)).get("id") == holder.id:  # else the user removed the folder meanwhile
                    os.unlink(holder.path)  # noqa: PTH108 - while it is locked: see `_file_lock`


def _check_lasting(out: str) -> None:
    """Raises UserError for a folder in the working directory of a Ray job, which Ray deletes after the job."""
    if not storage.is_uri(out) and JOB_FOLDER in f"{os.path.realpath(out)}/":
        raise UserError(
            f"--out {out} is in the job's working directory, which Ray deletes when the job has ended: give an absolute"
            f" path that all nodes see, such as /shared/{os.path.basename(out)}, or a bucket"  # noqa: PTH119
        )


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
            file.close()
            time.sleep(0.1)  # the other may have locked it just now, and write its name yet
            raise _occupied(holder.out, _read(holder.path)) from None
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
    content = _read(holder.path)
    if _parsed(content).get("id") != holder.id:
        raise _occupied(holder.out, content)
    lock.thread.start()
    try:
        yield lock
    finally:
        lock.stop.set()
        lock.thread.join(STOP_SECONDS)  # not for ever: a write to a file system that hangs may never return
        with contextlib.suppress(Exception):  # a file that stays keeps the next run waiting, no more
            content = _read(holder.path)
            lock.check()
            if _parsed(content).get("id") == holder.id and not lock.thread.is_alive():
                storage.delete_file(holder.path)


def _wait_for_end_of_other(holder: Holder) -> None:
    """Waits until nobody has renewed the lock for `DEAD_SECONDS`. Raises UserError if another run renews it."""
    content = _read(holder.path)
    if not content or _process_of(content).has_ended():
        return
    out, who = storage.without_secrets(holder.out), _who(content)
    log.warning("%s is locked by another run%s: watching for %.0f s whether it is at work", out, who, DEAD_SECONDS)
    # Looks are counted, not seconds: after a sleep of this machine, a holder on it must have time to renew.
    for _ in range(int(DEAD_SECONDS / LOOK_SECONDS)):
        time.sleep(LOOK_SECONDS)
        now = _read(holder.path)
        if not now:
            return
        if now != content:
            raise _occupied(holder.out, now)


class OccupiedError(UserError):
    """Another run holds the lock."""


def _occupied(out: str, content: str) -> OccupiedError:
    out, who, found = storage.without_secrets(out), _who(content), _parsed(content)
    stop = f"stop it (`kill {found['pid']}` on {found['host']})" if who else "stop it"
    return OccupiedError(f"another run{who} is writing to {out}: wait for it, {stop}, or choose another --out")


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
