"""unet-ray select."""

from __future__ import annotations

from typing import Any

import click

from unet_ray.cli.messages import print_next, print_places, written_report
from unet_ray.cli.options import (
    OUTPUT,
    Command,
    again,
    given,
    machine,
    mask_options,
    no_report,
    option,
    runtime,
    workers,
)
from unet_ray.config import PredictConfig
from unet_ray.data import storage
from unet_ray.ray_backend.session import Runtime
from unet_ray.report.progress import ImagesDisplay, say

FORMS = ("labelme", "labelstudio", "coco", "png")


@click.command(cls=Command, short_help="Choose the images that are worth a label next.")
@click.argument("model")
@click.argument("inputs", nargs=-1, required=True, metavar="POOL...")
@option(OUTPUT, "--out", required=True, metavar="PICKS", help="Folder or URI to write into.")
@option(OUTPUT, "--count", type=int, default=50, show_default=True, metavar="N", help="How many images to choose.")
@option(
    OUTPUT,
    "--format",
    "form",
    type=click.Choice(FORMS),
    default="labelme",
    show_default=True,
    help="Form of the annotations to correct.",
)
@option(OUTPUT, "--column", metavar="NAME", help="Column of a list with paths, as in `predict`.")
@no_report
@again
@mask_options
@workers
@machine
@runtime
def select(
    model: str,
    inputs: tuple[str, ...],
    out: str,
    count: int,
    form: str,
    no_report: bool,
    runtime: Runtime,
    **options: Any,
) -> None:
    """Choose the images that are worth a label next, with a first annotation of each to correct.

    MODEL is a run directory or a model directory, POOL a folder, list or bucket of images, as in `predict`. Images that
    the run has masks of are left out.

    \b
    Example:
      unet-ray select RUN photos --count 20 --out PICKS --cleanup area=0.1%+holes

    \b
    Writes:
      PICKS/picks.csv                        path, rank (1: the best), uncertainty, what is found, share of foreground
      PICKS/annotations/labelme/<path>.json  polygons to correct in labelme; or label_studio.json, coco.json
      PICKS/annotations/masks, probabilities the same as pictures
      PICKS/report.html                      each image, its mask, and where the network is unsure
      PICKS/pool/manifest.parquet            the uncertainty of every image of the pool

    The uncertainty is the entropy of the pixels' classes, from 0 to 1, in the mean over what may be foreground: a large
    background, of which every network is sure, does not count. Images are divided by the rarest class found in them,
    in proportion to the uncertainty in each group, so that rare classes have their share. In each group those are
    chosen that stand for the others, the uncertain above all, by what the network's deepest layer sees: lookalikes
    don't fill the list, nor do oddities.

    The choice is the same for any number of workers. The same command goes on after a stop. Annotations are never
    written twice: your corrections stay, unless --overwrite is given. --cleanup keeps specks and holes out of them,
    which take long to correct. When they are done, train on with them:

    \b
      unet-ray train --init RUN --images photos --masks labels --masks PICKS/annotations/labelme --out RUN2
    """
    config = PredictConfig(model=model, inputs=inputs, out=out, formats=(form,), **given(options))
    from unet_ray.selection.select import select as run

    chosen = run(config, count, runtime=runtime, progress=ImagesDisplay)
    report = written_report(out, no_report)
    click.echo(f"{len(chosen.picks)} of {chosen.pool} images chosen")
    if chosen.labelled:
        click.echo(f"{chosen.labelled} images are left out: {model} has their masks")
    if chosen.failed:
        say(f"{chosen.failed} images can't be read: see `error` in {storage.join(out, 'pool', 'manifest.parquet')}")
    where = {"labelme": "labelme", "labelstudio": "label_studio.json", "coco": "coco.json", "png": "masks"}[form]
    places = {"picks": storage.join(out, "picks.csv"), "labels": storage.join(out, "annotations", where)}
    print_places(**places, **report)
    print_next("correct the annotations, put them beside your others, and train on with --init")
