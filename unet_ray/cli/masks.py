"""unet-ray masks."""

from __future__ import annotations

import click

from unet_ray.cli.messages import print_places
from unet_ray.cli.options import DATA, OUTPUT, Command, classes, given, option, overlap_order, rle_order, runtime
from unet_ray.data import storage
from unet_ray.ray_backend.session import Runtime
from unet_ray.report.progress import ImagesDisplay


@click.command(cls=Command, short_help="Write annotations (COCO, labelme, …) as masks.")
@click.argument("annotations")
@option(DATA, "--images", required=True, metavar="DIR", help="Folder (or glob, or URI) of the images.")
@classes("all that there are")
@overlap_order
@rle_order
@option(OUTPUT, "--out", required=True, metavar="OUT", help="Folder or URI to write into.")
@option(OUTPUT, "--overlay", is_flag=True, help="Also write pictures with the mask drawn in.")
@runtime
def masks(
    annotations: str,
    images: str,
    classes: tuple[str, ...],
    overlap_order: str | None,
    rle_order: str | None,
    out: str,
    overlay: bool,
    runtime: Runtime,
) -> None:
    """Write annotations as masks: class ids, to look at or to hand to other tools.

    ANNOTATIONS is a file or a folder: COCO's JSON, labelme's, VIA's or Label Studio's, CVAT's XML, YOLO's polygons,
    run lengths in a table, or what `predict` writes. train and evaluate read them without this step (--masks).

    \b
    Example:
      unet-ray masks instances.json --images photos --out DRAWN --overlay

    \b
    Writes:
      OUT/masks/<path below the images>.png     1 bit for one class, else a palette of class ids
      OUT/overlays/<path>.jpg                   --overlay
      OUT/classes.json                          the names of the class ids

    The same command goes on after a stop, and writes what is missing.
    """
    from unet_ray.inference.drawn_masks import write_masks

    options = given({"overlap_order": overlap_order, "rle_order": rle_order})
    with ImagesDisplay("drawn") as display:
        found = write_masks(
            images,
            annotations,
            out,
            classes=classes,
            overlay=overlay,
            runtime=runtime,
            on_progress=display,
            **options,
        )
    click.echo(f"{found.images} masks of {', '.join(found.classes)}")
    print_places(masks=storage.join(out, "masks"), classes=storage.join(out, "classes.json"))
