"""Shows progress: on a terminal it updates one line, elsewhere it prints a new line now and then."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any

import click

from unet_ray.config import TrainConfig

if TYPE_CHECKING:
    from rich.progress import Progress
    from typing_extensions import Self

    from unet_ray.training.progress import EpochProgress


LOG_EVERY_SECONDS = 10.0
"""Seconds between lines about images, without a terminal."""
STEPS_EVERY_SECONDS = 60.0
"""Seconds between lines about training steps, without a terminal."""


def say(text: str, *, err: bool = False) -> None:
    """Prints a message of one paragraph: on a terminal wrapped between words, elsewhere as one line."""
    stream = sys.stderr if err else sys.stdout
    if stream.isatty():
        width = shutil.get_terminal_size().columns
        text = _filled(text, width)
    click.echo(text, err=err)


def _filled(text: str, width: int) -> str:
    # Names and paths are not broken, so that they can be copied.
    options: Any = {"break_long_words": False, "break_on_hyphens": False, "drop_whitespace": True}
    return text if len(text) <= width else textwrap.fill(text, width, subsequent_indent="  ", **options)


def duration(seconds: float) -> str:
    """Returns `4 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def speed(images_per_second: float) -> str:
    """Returns `0.12 img/s`, `12.3 img/s`, `1234 img/s`."""
    return f"{images_per_second:.{2 if images_per_second < 10 else 1 if images_per_second < 100 else 0}f} img/s"


class _Display:
    """Shows and updates a line at the bottom of a terminal; without one, `bar` is None. Use it in a `with` block."""

    def __init__(self, bar: Progress | None) -> None:
        self.bar, self.task = bar, None if bar is None else bar.add_task("", details="", visible=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, what: str, done: int, total: int | None, details: str) -> None:
        """Updates the line, if there is a terminal."""
        if self.bar is not None and self.task is not None:
            self.bar.start()
            self.bar.update(self.task, description=what, completed=done, total=total, details=details, visible=True)

    def tell(self, text: str, *, err: bool = False) -> None:
        """Prints a message that stays, above the line if there is one."""
        if self.bar is not None and self.bar.live.is_started:
            self.bar.console.print(_filled(text, self.bar.console.width), markup=False, highlight=False, soft_wrap=True)
        else:
            say(text, err=err)

    def hide(self) -> None:
        """Removes the line."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, visible=False)


class TrainingDisplay(_Display):
    """Prints a line for each epoch; on a terminal the running epoch is below them."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(_bar(err=False) if sys.stdout.isatty() and sys.stderr.isatty() else None)
        self.epochs = config.train.epochs
        self.begun = self.said = time.monotonic()
        self.first: int | None = None

    def start(self) -> None:
        """Starts the display of a training, perhaps one of several."""
        self.first = None
        self.show("starting", 0, None, "")

    def epoch(self, line: dict[str, Any]) -> None:
        """Prints a finished epoch; `line`: its line of metrics.jsonl."""
        now, epoch = time.monotonic(), line["epoch"]
        if self.first is None:  # the first epoch of this process, which may resume an earlier run
            self.first, self.begun = epoch, now
        text = f"epoch {epoch:>3}/{self.epochs}  loss {line['train_loss']:.4f}"
        if "val_dice" in line:
            text += f" val {line['val_loss']:.4f}  Dice {line['val_dice']:.4f} IoU {line['val_iou']:.4f}"
        text += f"  {speed(line['images_per_second'])}  {line['seconds']:.0f} s"
        self.said = now
        self.tell(text)
        if epoch < self.epochs:
            self.show(f"epoch {epoch + 1}/{self.epochs}", 0, 1, self._left(epoch, now))
        else:
            self.hide()

    def step(self, progress: EpochProgress) -> None:
        """Shows the running epoch."""
        now = time.monotonic()
        what = f"loss {progress.loss:.4f}  {speed(progress.images_per_second)}"
        if self.bar is not None:
            step = f"{progress.step}/{progress.steps}"
            details = "  ".join(filter(None, (step, what, self._left(progress.epoch - 1, now))))
            self.show(f"epoch {progress.epoch}/{self.epochs}", progress.step, progress.steps, details)
        elif now - self.said >= STEPS_EVERY_SECONDS and progress.step < progress.steps:
            self.said = now
            click.echo(f"epoch {progress.epoch:>3}/{self.epochs}  step {progress.step}/{progress.steps}  {what}")

    def _left(self, done: int, now: float) -> str:
        """Returns the time left. The first epoch seen here does not count: its start took longer."""
        if self.first is None or done <= self.first:
            return ""
        return f"{duration((self.epochs - done) * (now - self.begun) / (done - self.first))} left"


class ImagesDisplay(_Display):
    """Counts finished images, as `on_progress` of prediction and evaluation; on stderr, since stdout is for results."""

    def __init__(self, verb: str) -> None:
        super().__init__(_bar(err=True) if sys.stderr.isatty() else None)
        self.verb, self.started, self.said = verb, time.monotonic(), 0.0
        self.first: int | None = None

    def __call__(self, done: int, failed: int, total: int) -> None:
        now = time.monotonic()
        if not total:
            self._tell(now, f"{done} images found", 0, None, "")
            return
        if self.first is None:
            self.first, self.started, self.said = done, now, now
        rate = (done - self.first) / max(1e-9, now - self.started)
        details = speed(rate) if rate else "starting" * (done < total)
        if rate and done < total:
            details += f"  {duration((total - done) / rate)} left"
        if failed:
            details += f"  {failed} failed"
        self._tell(now, f"{done}/{total} images {self.verb}", done, total, details)

    def _tell(self, now: float, what: str, done: int, total: int | None, details: str) -> None:
        self.show(what, done, total, details)
        if self.bar is None and now - self.said >= LOG_EVERY_SECONDS:
            self.said = now
            click.echo("  ".join(filter(None, (what, details))), err=True)


def _bar(*, err: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[details]}"),
        console=Console(stderr=err),
        refresh_per_second=4,
    )
