"""Defines the type of callbacks that report progress."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int, int], None]
"""Called with (done, failed, total) files. `total` is 0 while files are still being listed; `done` then counts those
listed so far."""
