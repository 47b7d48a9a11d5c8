"""Defines the commands, the only code that prints.

The commands that need torch and Ray import them themselves, so that `unet-ray --help` and a wrong flag answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from unet_ray import __version__, keys
from unet_ray.cli import (
    demo,
    distill,
    doctor,
    evaluate,
    export,
    import_weights,
    masks,
    predict,
    quantize,
    recipes,
    report,
    select,
    slices,
    train,
)
from unet_ray.config import UserError
from unet_ray.data.buckets import left_a_request_behind
from unet_ray.own_process import claim
from unet_ray.ray_backend.session import stop_like_ctrl_c


class Commands(click.Group):
    """Turns errors into exit codes, and lists the commands in the order in which a user meets them."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command. A UserError gives one line on stderr and exit code 2, a fault of ours its traceback and code
        3 (Python's own 1 would mean that images failed), Ctrl-C and SIGTERM code 130."""
        claim()
        stop_like_ctrl_c()
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns that it has no folder for a cache
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo(
                "Stopped. What is finished is kept: start again with --resume (train, distill) or as before (predict).",
                err=True,
            )
            if left_a_request_behind():  # everything else has ended, and its files are closed
                sys.stderr.flush()
                os._exit(130)
            ctx.exit(130)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except BrokenPipeError:  # the reader of our output has gone, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(141)  # what a shell gives for SIGPIPE
        except Exception:
            traceback.print_exc()
            click.echo("A fault of unet-ray. What is finished is kept. Please report the lines above.", err=True)
            ctx.exit(3)

    def main(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:
        """Runs the command of these arguments, without keys in their URIs. Ray's dashboard shows `sys.argv`."""
        given = [keys.stripped(argument) for argument in (sys.argv[1:] if args is None else args)]
        sys.argv = [keys.stripped(argument) for argument in sys.argv]
        return super().main(given, *others, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="unet-ray")
def main() -> None:
    """Train a U-Net on images and masks, segment whole folders, score the result: on one CPU or on a Ray cluster.

    \b
    To begin:
      unet-ray demo                                    makes data, trains and segments in a few minutes
      unet-ray doctor --images photos --masks masks    finds what is wrong with a data set
      unet-ray COMMAND --help                          shows options, defaults, examples, files written

    Exit codes: 0 done; 1 some images failed (doctor: warnings); 2 an error that you must fix, in one line on stderr; 3
    a fault of unet-ray; 130 stopped by Ctrl-C or SIGTERM.
    """


for command in (
    demo.demo,
    doctor.doctor,
    train.train,
    predict.predict,
    select.select,
    evaluate.evaluate,
    report.report,
    quantize.quantize,
    distill.distill,
    export.export,
    recipes.recipes,
    slices.slices,
    masks.masks,
    import_weights.import_weights,
):
    main.add_command(command)


def run_command(name: str, arguments: Sequence[str] | None = None) -> None:
    """Runs the command `name` with `arguments`, or with those of this process, as jobs/<name>.py does."""
    main([name, *(sys.argv[1:] if arguments is None else arguments)])
