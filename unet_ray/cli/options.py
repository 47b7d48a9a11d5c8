"""Lists options in groups in --help, and defines those that several commands share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from unet_ray.config import EvaluateConfig, PredictConfig, UserError
from unet_ray.ray_backend.session import Runtime

F = TypeVar("F", bound=Callable[..., Any])
DATA, MASKS, WHERE, OUTPUT = "Data", "How masks are made", "Where it runs", "Output"
SETTINGS, TRAINING = "Settings", "Training"
RUNS = "Starting again, and failures"
"""Headings that several commands share."""


class Command(click.Command):
    """A command whose --help lists its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        rest: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                records = groups.setdefault(parameter.group, []) if isinstance(parameter, Option) else rest
                records.append(record)
        for title, records in [*groups.items(), ("Other", rest)]:
            with formatter.section(title):
                formatter.write_dl(records)


class Option(click.Option):
    """An option with a heading."""

    def __init__(self, *arguments: Any, group: str, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.group = group


def option(group: str, *names: str, shown: object = None, **attributes: Any) -> Callable[[F], F]:
    """Returns click.option under the heading `group`; `shown` is a default for --help, which other code applies."""
    if shown is not None:
        attributes["help"] += f"  [default: {shown}]"
    return click.option(*names, cls=Option, group=group, **attributes)


def options(*several: Callable[[F], F]) -> Callable[[F], F]:
    """Joins several options into one decorator."""

    def decorate(function: F) -> F:
        for one in reversed(several):
            function = one(function)
        return function

    return decorate


def default_of(config: type, name: str) -> Any:
    """Returns the default of a field of a settings class."""
    return next(field.default for field in dataclasses.fields(config) if field.name == name)


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def numbers(text: str, flag: str, example: str) -> tuple[int, ...]:
    """Parses whole numbers with commas between them. Raises UserError."""
    try:
        return tuple(int(value) for value in text.split(","))
    except ValueError:
        raise UserError(f"{flag} {text!r}: numbers with commas, e.g. {example}") from None


def one_or_several(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> Any:
    """Returns the value of an option that may be repeated as a setting takes it: None, a text, or several."""
    return values if len(values) > 1 else values[0] if values else None


class Workers(click.ParamType):
    """Parses `4` or `1-4`."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        try:
            counts = [int(number) for number in str(value).split("-")]
        except ValueError:
            counts = []
        if len(counts) == 1:
            return counts[0]
        if len(counts) == 2:
            return counts[0], counts[1]
        return self.fail(f"{value!r}: a number such as 4, or two such as 1-4", param, ctx)


def settings(more: str) -> Callable[[Callable], Callable]:
    """Returns the option `--set`. `more`: what wins."""
    text = f"One setting, e.g. model.base_channels=32; may be repeated. {more}"
    return option(SETTINGS, "--set", "settings", multiple=True, metavar="KEY=VALUE", help=text)


def setting(text: str) -> tuple[str, str]:
    """Returns name and value of a `--set`. Raises UserError."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r}: write KEY=VALUE, e.g. --set model.base_channels=32")
    return name.strip(), value


pairs = options(
    option(
        DATA,
        "--images",
        multiple=True,
        callback=one_or_several,
        metavar="DIR",
        help="Folder (or glob, or s3://, gs:// URI) of the images, may be repeated; or a list of pairs: .csv, .parquet",
    ),
    option(
        DATA,
        "--masks",
        multiple=True,
        callback=one_or_several,
        metavar="DIR",
        help="Folder of the masks: same relative path and stem, or stem_mask; several, in the order of --images.",
    ),
    option(
        DATA,
        "--match",
        metavar="REGEX",
        help="What it finds (its first group, or all) is the same in the names of an image and of its mask.",
    ),
)


def _picked(_ctx: click.Context, _param: click.Parameter, names: str | None) -> tuple[str, ...]:
    """Returns the names of `--classes`; none if it is not given."""
    picked = tuple(name.strip() for name in (names or "").split(",") if name.strip())
    if names is not None and not picked:
        raise UserError("--classes is empty: names of classes, with commas")
    return picked


def classes(shown: str) -> Callable[[Callable], Callable]:
    """Returns the option `--classes`. `shown`: what is drawn without it."""
    text = "Classes of annotations, in the order of their ids, which begin at 1; with commas."
    return option(DATA, "--classes", metavar="A,B,…", callback=_picked, help=text, shown=shown)


overlap_order = option(
    DATA,
    "--overlap-order",
    type=click.Choice(["later", "area"]),
    help="Of annotations that overlap, the later one is seen, or the smaller one.",
    shown="later",
)
rle_order = option(
    DATA,
    "--rle-order",
    type=click.Choice(["columns", "rows"]),
    help="Direction of run lengths in a table: columns in most of Kaggle's challenges, rows in Carvana's.",
    shown="by the name of the column",
)
workers = option(
    WHERE,
    "--workers",
    type=int,
    metavar="N",
    help="Processes that hold the network, each on a GPU or on CPUs.",
    shown="one for each GPU, or for every 8 CPUs",
)
PRECISIONS = click.Choice(["auto", "fp32", "bf16", "fp16", "int8"])
device = option(
    WHERE,
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="auto: CUDA if there is a GPU.",
    shown="auto",
)
machine = options(
    device,
    option(
        WHERE,
        "--precision",
        type=PRECISIONS,
        help="auto: int8 if `quantize` made it, else bf16 if the device computes in it. fp16: CUDA only; int8: CPUs "
        "only.",
        shown="auto",
    ),
)
again = options(
    option(RUNS, "--overwrite", is_flag=True, help="Remove what an earlier run has written into the folder first."),
    option(RUNS, "--retry-failed", is_flag=True, help="Try images again that failed in an earlier run."),
    option(RUNS, "--strict", is_flag=True, help="Files in folders that are no images are rows that fail."),
    option(
        RUNS,
        "--moved",
        multiple=True,
        metavar="OLD=NEW",
        help="Go on with inputs whose folder has another name now; may be repeated.",
    ),
    option(
        RUNS,
        "--same-content",
        is_flag=True,
        help="Keep masks of images that have another time but the same bytes, such as copies.",
    ),
    option(
        RUNS,
        "--allow-mixed",
        is_flag=True,
        help="Go on with another library or precision than the earlier run used.",
    ),
)
no_report = option(OUTPUT, "--no-report", is_flag=True, help="Don't write report.html.")
as_json = option(OUTPUT, "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
verbose = option(WHERE, "--verbose", is_flag=True, help="Also show Ray's own messages.")


def runtime(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --local and --verbose, which the command receives as `runtime`."""

    @option(WHERE, "--local", is_flag=True, help="Work in this process, without Ray.")
    @verbose
    @functools.wraps(command)
    def with_runtime(*arguments: Any, local: bool, verbose: bool, **rest: Any) -> None:
        command(*arguments, runtime=Runtime(local, verbose), **rest)

    return with_runtime


allow_code = option(
    WHERE,
    "--allow-code",
    is_flag=True,
    help="Import code that is no part of unet_ray, where a model or its settings name it: trust who wrote both.",
)
mask_options = options(
    allow_code,
    option(
        MASKS,
        "--tile",
        type=int,
        metavar="N",
        help="Segment each image at its own size, in squares of N pixels.",
        shown="resize the whole image, as in training",
    ),
    option(
        MASKS,
        "--overlap",
        type=float,
        metavar="X",
        help="Share of a tile's side by which it overlaps the next.",
        shown=default_of(PredictConfig, "overlap"),
    ),
    option(MASKS, "--tta", is_flag=True, help="Average over the flips that the network was trained with."),
    option(
        MASKS,
        "--adapt",
        is_flag=True,
        help="First adapt the model to these images if they look unlike those of its training; without masks.",
    ),
    option(MASKS, "--ensemble", multiple=True, metavar="MODEL", help="Average with another model; may be repeated."),
    option(
        MASKS,
        "--cleanup",
        metavar="RULE",
        help="Remove small regions (area=64 pixels, area=0.1% of the image), keep the largest region of each class "
        "(largest), fill holes (holes), several joined by +; none: do nothing.",
        shown="what `evaluate --choose-cleanup` chose, or none",
    ),
    option(
        MASKS,
        "--threshold",
        type=float,
        metavar="X",
        help="Probability above which a pixel is foreground (one class).",
        shown="what `evaluate --choose-threshold` chose, or 0.5",
    ),
    option(
        MASKS,
        "--backend",
        type=click.Choice(["auto", "torch", "compiled", "openvino"]),
        help="Library that runs the network. auto: on CPUs OpenVINO if it is installed (the extra `cpu`); before long "
        "work it and torch are timed, and the faster one is used.",
        shown="auto",
    ),
    option(
        MASKS,
        "--max-pixels",
        type=int,
        metavar="N",
        help="Larger images are not decoded and count as failed.",
        shown=default_of(EvaluateConfig, "max_pixels"),
    ),
)
