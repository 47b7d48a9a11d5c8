"""Reads frames of videos with PyAV (the extra `video`). `clip.mp4#123` is the frame with number 123, the first is 0.

Frames are numbered in the order in which they are shown. Containers that say when each frame is shown (MP4, Matroska,
WebM) are entered anywhere. Others (AVI, MPEG, WMV) are decoded from their beginning, which alone gives right numbers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unet_ray.data.headers import ImageError, check_pixels

SUFFIXES = frozenset(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv".split())  # noqa: SIM905
INDEXED = ("mp4", "matroska", "webm")
"""Containers, as FFmpeg names them, whose times can be trusted."""
AHEAD = 64
"""Frames further ahead are looked up by their time; nearer ones are reached by decoding those between."""
CUT_SECONDS = 1.0
"""A video that ends so much before its length says is cut off."""
INSTALL = "videos need PyAV: pip install 'unet_ray[video]'"

_open = threading.local()
"""The video that a thread has read last: the next frame is the likeliest to be read next."""


class _Frames(NamedTuple):
    """What a file says of its frames."""

    times: tuple[int, ...]
    """When each is shown, in order, in the stream's units; empty if they have to be counted from the beginning."""
    total: int
    """Number of frames, with those that the file names but does not hold."""


def is_video(name: str) -> bool:
    """Returns whether a file is a video, by its name."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - called often


def is_installed() -> bool:
    """Returns whether PyAV is there."""
    return importlib.util.find_spec("av") is not None


def count(path: str) -> int:
    """Returns the number of frames, at least 1: reading those that are missing says why. Raises av.FFmpegError."""
    return max(1, _frames(path, Path(path).stat().st_mtime_ns).total)


def read_frame(path: str, number: int, max_pixels: int) -> np.ndarray:
    """Returns a frame, turned as the video says, uint8 RGB [H,W,3]; pixels that are not square stay as they are stored.
    Raises ImageError, OSError."""
    if not is_installed():
        raise ImageError(INSTALL)
    import av

    try:
        video = _opened_here(path)
        check_pixels(video.stream.width * video.stream.height, max_pixels)
        frame = video.frame(number)
        return _turned(video.converter.reformat(frame, format="rgb24").to_ndarray(), frame)
    except av.FFmpegError as error:  # some are OSError, some ValueError
        _forget()
        raise ImageError(f"frame {number} can't be decoded: {error.strerror or error}") from None


def _opened_here(path: str) -> _Video:
    """Returns the open video of this thread. One that a parent process had open is left alone."""
    mtime = Path(path).stat().st_mtime_ns
    key = path, mtime, os.getpid()
    if getattr(_open, "key", None) != key:
        _forget()
        _open.video, _open.key = _Video(path, _frames(path, mtime)), key
    return _open.video


def _forget() -> None:
    key = getattr(_open, "key", None)
    if key is not None and key[2] == os.getpid():
        _open.video.close()
    elif key is not None:
        _inherited.append(_open.video)  # its threads are the parent's, so that closing it would wait for ever
    _open.key = _open.video = None


_inherited: list[_Video] = []


def _opened(path: str) -> Any:
    import av

    container = av.open(path)
    if not container.streams.video:
        container.close()
        raise ImageError("no video in it")
    # Several processes decode at the same time; and a forked one would wait for ever for threads of its parent.
    container.streams.video[0].codec_context.thread_count = 1
    return container


@functools.lru_cache(maxsize=256)
def _frames(path: str, _mtime_ns: int) -> _Frames:
    """Reads a file once, without decoding it where its container says enough."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        if not any(name in container.format.name for name in INDEXED):
            return _Frames((), max(sum(1 for _ in container.decode(stream)), stream.frames))
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = [packet for packet in packets if not packet.is_discard]
        times = sorted({packet.pts for packet in shown if packet.pts is not None})
        missing = max(0, stream.frames - len(packets)) or int(_is_cut(container, stream, times))
        if len(times) == len(shown):
            return _Frames(tuple(times), len(times) + missing)
    with _opened(path) as container:  # frames without times, or several at one time
        return _Frames((), sum(1 for _ in container.decode(video=0)) + missing)


def _is_cut(container: Any, stream: Any, times: list[int]) -> bool:
    """Returns whether the file says that it is longer than its last frame."""
    if not times or container.duration is None:
        return False
    last = float((times[-1] - (stream.start_time or 0)) * stream.time_base)
    return container.duration / 1e6 - last > max(CUT_SECONDS, 0.05 * last)


class _Video:
    """An open video. The decoder stands before the frame `next`."""

    def __init__(self, path: str, frames: _Frames) -> None:
        from av.video.reformatter import VideoReformatter

        self.path, self.count, self.times = path, frames.total, frames.times
        self.places = {time: place for place, time in enumerate(frames.times)}
        self.container: Any = None
        self.converter = VideoReformatter()  # the frame's own has threads, which a forked process lacks
        self.from_the_beginning()

    def from_the_beginning(self) -> None:
        """Opens the file again: seeking to the first frame does not always reach it."""
        if self.container is not None:
            self.container.close()
        self.container = _opened(self.path)
        self.stream = self.container.streams.video[0]
        self.frames, self.next = self.container.decode(self.stream), 0

    def close(self) -> None:
        self.container.close()

    def frame(self, number: int) -> Any:
        """Returns a frame. Raises ImageError if it can't be decoded, or is damaged."""
        if number >= self.count:
            raise ImageError(f"it has {self.count} frames, and no number {number}")
        if not self.next <= number < self.next + AHEAD:
            self._go_to(number)
        found = self._decoded(number)
        if found is None and self.times:  # a container whose index is wrong
            self.from_the_beginning()
            found = self._decoded(number)
        if found is None:
            raise ImageError(f"frame {number} can't be decoded: the video is cut off or damaged")
        if found.is_corrupt:
            raise ImageError(f"frame {number} is damaged")
        return found

    def _go_to(self, number: int) -> None:
        if self.times and number < len(self.times):
            self.container.seek(self.times[number], stream=self.stream, backward=True)
            self.frames = self.container.decode(self.stream)
        elif number < self.next:
            self.from_the_beginning()

    def _decoded(self, number: int) -> Any:
        """Decodes up to a frame; returns None if the decoder is behind it already."""
        for frame in self.frames:
            place = self.places.get(frame.pts, -1) if self.times else self.next
            self.next = place + 1
            if place >= number:
                return frame if place == number else None
        return None


def _turned(image: np.ndarray, frame: Any) -> np.ndarray:
    """Turns and mirrors an image as its frame's display matrix says: x' = a x + c y, y' = b x + d y."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5]
    if abs(int(b)) > abs(int(a)):
        image, right, down = image.swapaxes(0, 1), c, b
    else:
        right, down = a, d
    return image[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]
