"""Says whether this process is ours: the command line's, or a worker of ours on Ray. Others belong to a host.

A host is a program or notebook that imports unet_ray. What lasts, such as the settings of its memory or of its loggers,
is the host's own business: code that sets such a thing asks `is_own` first, or puts it back.
"""

from __future__ import annotations

_own = False


def claim() -> None:
    """Declares this process ours. The commands call it, and what we run in Ray's workers."""
    global _own
    _own = True


def is_own() -> bool:
    """Returns whether somebody has claimed this process."""
    return _own
