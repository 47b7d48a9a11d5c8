"""unet-ray doctor."""

from __future__ import annotations

import json
import sys

import click

from unet_ray.cli.options import Command, as_json, given, option, pairs
from unet_ray.config import UserError
from unet_ray.report.progress import ImagesDisplay

EXAMINATION = "Examination"


@click.command(cls=Command, short_help="Find what is wrong with a data set, and which settings fit.")
@pairs
@option(
    EXAMINATION,
    "--samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of evenly spaced pairs whose pixels are read; names and headers of all files are read.",
    shown=200,
)
@option(
    EXAMINATION,
    "--against",
    metavar="MODEL",
    help="Also say if the images look unlike those that MODEL was trained on, and, with RAY_ADDRESS, whether the "
    "cluster's CPUs can feed its GPUs.",
)
@option(EXAMINATION, "--no-timing", is_flag=True, help="Don't time a training step.")
@as_json
def doctor(
    images: str | tuple[str, ...] | None,
    masks: str | tuple[str, ...] | None,
    match: str | None,
    samples: int | None,
    against: str | None,
    no_timing: bool,
    as_json: bool,
) -> None:
    """Find what is wrong with a data set, and which settings fit it, before hours are spent on it.

    Finds images without a mask and masks without an image (and which suffix would pair them); files that are damaged,
    empty or no image; masks of another size than their image, in colours, with the in-between values of a JPEG or with
    other values than the rest; classes that are missing or rare; empty masks; duplicates; 16-bit and alpha channels;
    images that belong together, and a --group-by for them.

    Each finding says what to do. The output ends with the `unet-ray train` command that fits the data, the time of an
    epoch on this machine (one step is timed), and the memory that it needs.

    \b
    Example:
      unet-ray doctor --images photos --masks photo_masks
      unet-ray doctor --images photos --against RUN

    Exit code 0: only notes; 1: warnings; 2: errors, at which training would stop.
    """
    if images is None:
        raise UserError("--images is missing: the folder of the images")
    if isinstance(images, tuple) or isinstance(masks, tuple):
        raise UserError("doctor looks at one --images and one --masks: a glob such as 'SET/*/images' names several")
    from unet_ray.doctor import examine, table

    with ImagesDisplay("looked at") as display:
        options = given({"samples": samples, "match": match, "against": against})
        found = examine(images, masks, timing=not no_timing, on_progress=display, **options)
    click.echo(json.dumps(found.to_json()) if as_json else table(found))
    sys.exit(found.exit_code)
