"""Passes errors of training workers to the driver, through a folder that all machines share.

Ray hands a worker's exception to the driver in wrappers of its own, which keep it in private attributes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import ray.exceptions

from unet_ray.config import UserError, first_line
from unet_ray.data import storage

PREFIX, SUFFIX = "error-", ".json"


@dataclass(frozen=True, slots=True)
class WorkerError:
    """An error that a worker has raised."""

    kind: Literal["user", "lost", "program"]
    """`user`: a UserError. `lost`: from lost processes, objects or connections, so another attempt may succeed.
    `program`: all others, which another attempt would raise again."""
    message: str
    """A UserError's text; otherwise the exception's type and the first line of its text."""
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> WorkerError:
        """Describes an exception by its first cause."""
        causes = causes_of(error)
        text = "".join(traceback.format_exception(error))
        users = [cause for cause in causes if isinstance(cause, UserError)]
        if users:
            # Take the last one: Ray wraps it in a UserError too, whose text is a traceback.
            return cls("user", str(users[-1]), text)
        # torch.distributed raises RuntimeError for a lost peer.
        lost = isinstance(causes[-1], (ray.exceptions.RayError, RuntimeError, ConnectionError))
        return cls("lost" if lost else "program", f"{type(causes[-1]).__name__}: {first_line(causes[-1])}", text)


@contextmanager
def writing_errors(folder: str, rank: int) -> Iterator[None]:
    """Writes an exception of the `with` block into the folder, as the error of this rank, and re-raises it."""
    try:
        yield
    except BaseException as error:
        data = json.dumps(dataclasses.asdict(WorkerError.of(error)), indent=2).encode()
        with contextlib.suppress(OSError):  # a full disk, or a bucket that is gone
            storage.write_bytes(storage.join(folder, f"{PREFIX}{rank}{SUFFIX}"), data)
        raise


def read_errors(folder: str) -> dict[int, WorkerError]:
    """Returns rank -> error that this worker has written. A worker whose process or node is lost writes nothing."""
    names = [name for name in storage.names_in(folder) if name.startswith(PREFIX) and name.endswith(SUFFIX)]
    return {
        int(name.removeprefix(PREFIX).removesuffix(SUFFIX)): WorkerError(
            **json.loads(storage.read_bytes(storage.join(folder, name)))
        )
        for name in names
    }


def causes_of(error: BaseException) -> list[BaseException]:
    """Returns an exception and its causes, the first cause last."""
    chain = [error]
    while True:
        # ray.exceptions.RayTaskError has `cause`.
        causes = (getattr(chain[-1], name, None) for name in ("cause", "__cause__"))
        cause = next((c for c in causes if isinstance(c, BaseException) and c not in chain), None)
        if cause is None:
            return chain
        chain.append(cause)
