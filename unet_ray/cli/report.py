"""unet-ray report."""

from __future__ import annotations

import click

from unet_ray.cli.options import WHERE, Command, allow_code, option, verbose
from unet_ray.data import storage
from unet_ray.ray_backend.session import Runtime
from unet_ray.report.progress import ImagesDisplay


@click.command(cls=Command, short_help="Write report.html anew, for a run, a prediction or a selection.")
@click.argument("location", metavar="RUN|OUT")
@option(WHERE, "--cluster", "on_cluster", is_flag=True, help="Score the validation images through Ray.")
@allow_code
@verbose
def report(location: str, on_cluster: bool, allow_code: bool, verbose: bool) -> None:
    """Write report.html anew, for a run or a prediction: one page to view and to send.

    RUN is the output of train, OUT the output of predict. For a run, it scores up to 128 validation images, evenly
    spaced, at their own size. The page is one file that needs no network.

    \b
    Example:
      unet-ray report RUN

    Writes RUN/report.html and prints its location.
    """
    from unet_ray.report.page import write

    with ImagesDisplay("scored") as display:
        place = write(location, runtime=Runtime(not on_cluster, verbose), on_progress=display, allow_code=allow_code)
    click.echo(storage.without_secrets(place))
