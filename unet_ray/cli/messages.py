"""Prints what several commands share: where results are, what comes next, how a training goes."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from unet_ray.config import TrainConfig
from unet_ray.data import storage
from unet_ray.report.progress import ImagesDisplay, TrainingDisplay, say

if TYPE_CHECKING:
    from unet_ray.training.run import Callbacks
    from unet_ray.training.setup import Split


def print_places(**places: str) -> None:
    """Prints where results are, one line each."""
    for name, place in places.items():
        click.echo(f"  {name:<8}{storage.without_secrets(place)}")


def print_next(*commands: str) -> None:
    """Prints what the user can do next."""
    click.echo("next:")
    for command in commands:
        click.echo(f"  {command}")


def written_report(location: str, no_report: bool) -> dict[str, str]:
    """Writes report.html into a finished run or prediction. Returns its place for `print_places`.

    A failure only prints one line on stderr, since the results themselves are complete.
    """
    if no_report:
        return {}
    from unet_ray.report.page import REPORT, write

    try:
        with ImagesDisplay("scored for the report") as display:
            write(location, on_progress=display)
    except Exception as error:
        say(f"no report.html: {type(error).__name__}: {error}", err=True)
        return {}
    return {"report": storage.join(location, REPORT)}


def training_callbacks(config: TrainConfig, display: TrainingDisplay) -> Callbacks:
    """Returns callbacks that show a training on `display`."""
    from unet_ray.data.splits import leak_report
    from unet_ray.training.run import Callbacks

    def start(split: Split) -> None:
        validated = str(len(split.val)) if split.val else "none: the last epoch is kept"
        without = f" and {split.unlabeled} images without masks" if split.unlabeled else ""
        display.tell(f"training on {len(split.train)} pairs{without}, validating on {validated}")
        leak = leak_report(split.train_keys, split.val_keys, config.data.group_by)
        if leak.named and leak.groups < len(split.train) + len(split.val):
            display.tell(f"groups by {leak.pattern!r}: {leak.groups}, {leak.shared} shared by training and validation")
        elif leak.shared and config.data.split_order != "name":
            display.tell(
                f"note: the names look like {leak.groups} groups, and {leak.shared} of them are shared by training "
                f"and validation, whose scores will flatter: use --group-by {shlex.quote(leak.pattern or '')}"
            )
        display.start()

    def retry(reason: str, done: int) -> None:
        display.tell(f"lost a worker ({reason[:200]}): going on after epoch {done}", err=True)

    return Callbacks(on_start=start, on_epoch=display.epoch, on_step=display.step, on_retry=retry)
