"""unet-ray predict."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from unet_ray.cli.messages import print_next, print_places, written_report
from unet_ray.cli.options import (
    OUTPUT,
    RUNS,
    WHERE,
    Command,
    again,
    as_json,
    default_of,
    given,
    machine,
    mask_options,
    no_report,
    option,
    runtime,
    workers,
)
from unet_ray.config import PredictConfig, UserError
from unet_ray.data import storage
from unet_ray.ray_backend.session import Runtime
from unet_ray.registry import FORMATS
from unet_ray.report.progress import ImagesDisplay, duration, say, speed

if TYPE_CHECKING:
    from unet_ray.inference.summary import PredictSummary

REASONS = 5
"""The most reasons of failure that are printed; summary.json has all."""


@click.command(cls=Command)
@click.argument("model")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@option(OUTPUT, "--out", required=True, metavar="OUT", help="Folder to write; on a cluster, all nodes must see it.")
@option(
    OUTPUT,
    "--format",
    "formats",
    default="png",
    show_default=True,
    metavar="LIST",
    help=f"What to write: {', '.join(FORMATS)}; several with commas.",
)
@option(
    OUTPUT,
    "--column",
    metavar="NAME",
    help="Column of a list or Parquet file with paths or images.  [default: path, uri, url, … or image, bytes, …]",
)
@option(OUTPUT, "--overlay", is_flag=True, help="The same as adding overlay to --format.")
@option(
    OUTPUT,
    "--name",
    metavar="PATH",
    help="Path of a mask below OUT/masks, from {relpath}, {stem}, {name}, {ext}.",
    shown=default_of(PredictConfig, "name"),
)
@no_report
@as_json
@again
@option(
    RUNS,
    "--allow-failures",
    metavar="N|P%",
    default="0",
    show_default=True,
    help="How many images may fail with exit code 0.",
)
@option(
    WHERE,
    "--part",
    metavar="I/N",
    help="Do one part of N, beside the commands that do the others, into the same OUT: for another scheduler than Ray.",
)
@mask_options
@workers
@machine
@runtime
def predict(
    model: str,
    inputs: tuple[str, ...],
    out: str,
    formats: str,
    overlay: bool,
    allow_failures: str,
    no_report: bool,
    as_json: bool,
    runtime: Runtime,
    **options: Any,
) -> None:
    """Segment every image of folders, files, globs, lists or buckets.

    MODEL is a run directory (then its best model) or a model directory. INPUT is a folder (with its subfolders), an
    image, a glob of images or folders, a list (.txt, .csv, .tsv, .jsonl or .parquet with a column of paths or URIs), or
    Parquet files with the encoded images themselves, each on a disk or on s3://, gs://; a list may also name
    http:// and https:// images. Images are JPEG, JPEG 2000, PNG, GIF, TIFF, BMP, WebP, AVIF, HEIC (the extra `heic`),
    PPM or NPY, of any mode and size, and known by their content where the name says nothing. Each page of a TIFF on a
    disk and each frame of a GIF or a video (the extra `video`) is an image. For models of many channels or 16 bits:
    TIFF and NPY.

    \b
    Example:
      unet-ray predict RUN photos --out MASKS --format png,parquet
      unet-ray predict RUN photos --out TILED --tile 64 --tta --cleanup largest+holes

    \b
    Writes:
      OUT/masks/<path below the input>.png  --format png: 1 bit for one class, else a palette of class ids
      OUT/masks.parquet/                    --format parquet: path, height, width, pixels, confidence, PNG bytes
      OUT/geotiff/<path>.tif                --format geotiff: class ids with the georeference of the image
      OUT/rle.parquet/                      --format rle: COCO's run lengths, area and box of each class
      OUT/submission.csv                    --format kaggle: img,rle_mask as the Carvana challenge took them
      OUT/coco.json                         --format coco: images, annotations, categories
      OUT/labelme/<path>.json               --format labelme: polygons to correct there (IoU with the mask >= 0.99)
      OUT/label_studio.json                 --format labelstudio: tasks with the same, as predictions
      OUT/probabilities/<path>.png          --format prob: 8 bits; of several classes <path>.<class id>.png
      OUT/overlays/<path>.jpg               --format overlay: at most 1024 pixels, with the mask drawn in
      OUT/manifest.parquet/                 one row for each image: path, status, error, height, width, output,
                                            pixels of each class, mean confidence, uncertainty (0 to 1),
                                            milliseconds
      OUT/summary.json                      counts, failures by reason, images/s, seconds by stage
      OUT/report.html                       failures and their reasons, sample masks, distributions
      OUT/adapted/                          --adapt: the model that made the masks, if it was adapted

    Masks are at each image's own size. If two masks would have the same name (of a.jpg, a.png), the later keeps its
    extension (a.png.png).

    After a stop, the same command segments only the missing images, and ends with the same bytes. Given again, it also
    segments images that are new or have changed (in size or modification time), and no others. For images that were
    copied or moved see --same-content and --moved. Other settings for the
    same OUT are an error, and so is a second run at the same time. Library and precision are chosen once, for all
    nodes, and recorded in OUT/settings.json. Where they can't be had later, going on is an error, too, unless
    --allow-mixed is given.

    Parts (--part 1/3, 2/3, 3/3) may run at the same time, on machines that share nothing but OUT and the inputs. Each
    may be stopped and given again. The last one that is done writes summary and report.

    An image that can't be read becomes a row of the manifest with the reason, and the others are segmented. Reasons:
    truncated, empty, mislabelled, gone since it was listed, not a regular file, too many pixels, other channels than
    the model's. With DuckDB: select * from 'OUT/manifest.parquet/*.parquet' where status = 'failed'. Exit code 1: more
    images failed than --allow-failures allows.

    By default an image is resized whole, as in training. --tile segments it at its own size, mirrored at the edges and
    blended with Gaussian weights where tiles overlap. It suits images of any size, and networks whose judgement is
    local.
    """
    names = [name.strip() for name in formats.split(",") if name.strip()] + ["overlay"] * overlay
    if not names:
        raise UserError(f"--format is empty: one or more of {', '.join(FORMATS)}")
    config = PredictConfig(model=model, inputs=inputs, out=out, formats=tuple(dict.fromkeys(names)), **given(options))
    allowed = _allowance(allow_failures)
    from unet_ray.inference.predict import predict as run

    with ImagesDisplay("segmented") as display:
        summary = run(config, runtime=runtime, on_progress=display)
    report = {} if summary.parts_missing else written_report(out, no_report)
    if as_json:
        click.echo(json.dumps(summary.to_json()))
    else:
        _print_summary(summary, "an earlier run" if config.part is None else "other parts or an earlier run")
        _print_files(summary, config, report)
    if summary.failed > allowed(summary.images):
        sys.exit(1)


def _print_files(summary: PredictSummary, config: PredictConfig, report: dict[str, str]) -> None:
    """Prints what was written, and what can be done about the rest."""
    out = config.out
    masks = {"masks": storage.join(out, "masks")} if "png" in config.formats else {"output": out}
    print_places(**masks, table=storage.join(out, "manifest.parquet"), **report)
    if summary.parts_missing:
        click.echo(f"summary and report follow when these parts are done: {', '.join(summary.parts_missing)}")
    if summary.failed:
        print_next("fix the files and give the same command again (others: --retry-failed)")


def _print_summary(summary: PredictSummary, others: str) -> None:
    new = summary.images - summary.already_done
    click.echo(f"{summary.ok} of {summary.images} images segmented, {summary.failed} failed")
    if summary.already_done:
        click.echo(f"{summary.already_done} of them by {others}")
    if new:
        click.echo(f"{new} in {duration(summary.seconds)}, {speed(summary.images_per_second)}, start included")
    for reason, count in list(summary.failures.items())[:REASONS]:
        say(f"  {count} x {reason}")
    click.echo(f"computed by {', then '.join(summary.arithmetic)}")
    if summary.cleanup != "none":
        click.echo(f"masks were cleaned up: {summary.cleanup}")
    if summary.threshold != 0.5:
        click.echo(f"foreground is what has a probability above {summary.threshold:g}")


def _allowance(text: str) -> Callable[[int], float]:
    """Returns how many of n images may fail, from `7` or `2%`. Raises UserError."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        raise UserError(f"--allow-failures {text!r}: a number, or a percentage such as 2%") from None
    return (lambda count: count * value / 100) if text.endswith("%") else (lambda _count: value)
