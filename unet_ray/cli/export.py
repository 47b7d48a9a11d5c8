"""unet-ray export."""

from __future__ import annotations

import click

from unet_ray.cli.messages import print_places
from unet_ray.cli.options import OUTPUT, Command, allow_code, option
from unet_ray.data import storage

FORMS = ("onnx", "torchscript", "torch-export", "openvino")


@click.command(cls=Command, short_help="Write a model as ONNX, TorchScript, torch.export or OpenVINO.")
@click.argument("model")
@option(OUTPUT, "--out", required=True, metavar="FILE", help="File to write: .onnx, .pt, .pt2 or .xml.")
@option(
    OUTPUT,
    "--to",
    "form",
    type=click.Choice(FORMS),
    help="Form of the file.",
    shown="by the name of the file",
)
@option(OUTPUT, "--decide", is_flag=True, help="The network gives class ids instead of probabilities.")
@option(
    OUTPUT,
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="fp16: half the bytes, for ONNX and OpenVINO; int8: a quarter, and faster on CPUs, for ONNX.",
)
@allow_code
def export(model: str, out: str, form: str | None, decide: bool, precision: str, allow_code: bool) -> None:
    """Write a model as a file that other programs run without unet_ray and Ray.

    MODEL is a run directory or a model directory. The file takes an image, uint8 [1, height, width, channels] of any
    height and width, and gives probabilities [1, classes, height, width], or with --decide class ids. Normalisation and
    padding are inside. Resizing is not: FILE.json says to which size, with names of classes, mask values, threshold and
    score. The command prints the lines of Python that use the file.

    \b
    Example:
      unet-ray export RUN --out model.onnx

    Before the file is written, its own program opens it and compares it with torch, on validation images of the run and
    at odd sizes. It is refused if a probability differs by more than 1e-4 (with instance norm 0.005; fp16: 0.02), or in
    int8 if the class of more than 0.5 % of an image's pixels differs. In int8, 32 training images give the ranges of
    values.

    ONNX needs onnx and onnxruntime (the extra `export`), OpenVINO the extra `cpu`. A network in int8 for OpenVINO is
    what `unet-ray quantize` makes.
    """
    from unet_ray.evaluation import export as exporting
    from unet_ray.evaluation.export_example import example
    from unet_ray.models import checkpoint

    location = checkpoint.model_directory(storage.absolute(model))
    form = form or exporting.form_of(out)
    written = exporting.export(model, out, form, decide=decide, precision=precision, allow_code=allow_code)
    kind = "validation images" if written.real else "images of noise, since there are no validation images"
    what = "largest share of differing pixels" if written.by_class else "largest difference of a probability"
    click.echo(f"compared with torch on {written.images} {kind}: {what} {written.difference:.2g}")
    print_places(network=f"{written.file} ({written.bytes / 2**20:.1f} MiB)", about=written.about)
    card = checkpoint.read_card(location)
    threshold = checkpoint.read_threshold(location, card)
    click.echo(f"to use it:\n\n{example(out, form, card, decide=decide, threshold=threshold)}")
