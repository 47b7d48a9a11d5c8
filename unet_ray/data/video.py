"""Reads frames of videos with PyAV (the extra `video`). `clip.mp4#123` is the frame with number 123, the first is 0."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import numpy as np

from unet_ray.data.headers import ImageError, check_pixels

SUFFIXES = frozenset(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv".split())  # noqa: SIM905
AHEAD = 64
"""Frames further ahead are looked up by their time; nearer ones are reached by decoding those between."""
INSTALL = "videos need PyAV: pip install 'unet_ray[video]'"

_open = threading.local()
"""The video that a thread has read last: the next frame is the likeliest to be read next."""


def is_installed() -> bool:
    """Returns whether PyAV is there."""
    return importlib.util.find_spec("av") is not None


def count(path: str) -> int:
    """Returns the number of frames. Raises av.FFmpegError, ImageError."""
    return len(_times(path))


def read_frame(path: str, number: int, max_pixels: int) -> np.ndarray:
    """Returns a frame as a player shows it, uint8 RGB [H,W,3]. Raises ImageError, OSError."""
    if not is_installed():
        raise ImageError(INSTALL)
    import av

    try:
        key = path, Path(path).stat().st_mtime_ns
        if getattr(_open, "key", None) != key:
            _close()
            _open.video, _open.key = _Video(path), key
        stream = _open.video.stream
        check_pixels(stream.width * stream.height, max_pixels)
        frame = _open.video.frame(number)
        return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    except av.FFmpegError as error:  # some are OSError, some ValueError
        _close()
        raise ImageError(f"frame {number} can't be decoded: {error.strerror or error}") from None


def _close() -> None:
    if getattr(_open, "key", None) is not None:
        _open.key = None
        _open.video.container.close()


def _opened(path: str) -> Any:
    import av

    # Old containers say when a frame is decoded, but not when it is shown.
    container = av.open(path, options={"fflags": "+genpts"})
    if not container.streams.video:
        container.close()
        raise ImageError("no video in it")
    return container


def _times(path: str) -> list[int]:
    """Returns when each frame is shown, in order, in the stream's own units. It reads the file without decoding it."""
    with _opened(path) as container:
        packets = container.demux(container.streams.video[0])
        return sorted({p.pts for p in packets if p.size and p.pts is not None and not p.is_discard})


class _Video:
    """An open video. The decoder stands behind the frame that was read last."""

    def __init__(self, path: str) -> None:
        self.times = _times(path)
        self.places = {time: place for place, time in enumerate(self.times)}
        self.container = _opened(path)
        self.stream = self.container.streams.video[0]
        self.frames, self.next = self.container.decode(self.stream), 0

    def frame(self, number: int) -> Any:
        """Returns a frame. Raises ImageError if it can't be decoded."""
        if number >= len(self.times):
            raise ImageError(f"it has {len(self.times)} frames, and no number {number}")
        if not self.next <= number < self.next + AHEAD:
            self._seek(self.times[number])
        found = self._decoded(number)
        if found is None:  # a container whose index is wrong, so from the beginning
            self._seek(self.times[0])
            found = self._decoded(number)
        if found is None:
            raise ImageError(f"frame {number} can't be decoded")
        return found

    def _seek(self, time: int) -> None:
        """Goes to the key frame before a time."""
        self.container.seek(time, stream=self.stream, backward=True)
        self.frames = self.container.decode(self.stream)

    def _decoded(self, number: int) -> Any:
        """Decodes up to a frame; returns None if the decoder is behind it already."""
        for frame in self.frames:
            place = self.places.get(frame.pts, -1)
            self.next = place + 1
            if place >= number:
                return frame if place == number else None
        return None
