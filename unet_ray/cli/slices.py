"""unet-ray slices."""

from __future__ import annotations

import click

from unet_ray.cli.options import DATA, OUTPUT, Command, option


@click.command(cls=Command, short_help="Write the slices of NIfTI volumes as images and masks.")
@click.argument("folder")
@option(
    DATA,
    "--channels",
    default="flair,t1,t1ce,t2",
    show_default=True,
    metavar="LIST",
    help="Endings of the volumes' file names; each becomes a channel.",
)
@option(
    DATA,
    "--labels",
    default="seg",
    show_default=True,
    metavar="NAME",
    help="Ending of the label volumes' file names; none: there are no labels.",
)
@option(
    DATA,
    "--every",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Take each Nth slice.",
)
@option(
    DATA,
    "--neighbours",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Add the channels of N slices on each side (2.5-D).",
)
@option(OUTPUT, "--out", required=True, metavar="DIR", help="New folder for images/ and masks/.")
def slices(folder: str, out: str, channels: str, labels: str, every: int, neighbours: int) -> None:
    """Write the slices of NIfTI volumes (BraTS) as images and masks: a folder per patient, a channel per volume.

    It needs the extra `brats`. Values between a volume's 0.5 and 99.5 percentiles are scaled to 8 bits; its most
    frequent value is the background and becomes 0.

    \b
    Example:
      unet-ray slices BraTS2020_TrainingData --out slices
      unet-ray train --images slices/images --masks slices/masks --out RUN --recipe brats

    Writes DIR/images/<patient>/<slice>.png (.npy of more than four channels) and DIR/masks/<patient>/<slice>.png.
    """
    from unet_ray.data.volumes import write_slices

    names = [name.strip() for name in channels.split(",") if name.strip()]
    summary = write_slices(
        folder,
        out,
        names,
        None if labels == "none" else labels,
        every=every,
        neighbours=neighbours,
        on_volume=lambda name, count: click.echo(f"{name}: {count} slices", err=True),
    )
    values = ", ".join(map(str, summary.labels))
    click.echo(f"{summary.slices} slices of {summary.volumes} patients: {out}" + (f"; labels {values}" * bool(values)))
    count = len(names) * (2 * neighbours + 1)
    click.echo(f"each has {count} channels: train with --set model.in_channels={count}")
