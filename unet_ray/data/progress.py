"""Defines the type of callbacks that report progress."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int, int], None]
"""Called with (done, failed, total) files. `total` is 0 until work begins; `done` then counts the files listed so far.
It grows if work begins while others are still listed."""
