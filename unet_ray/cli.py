"""The commands. The only place that prints, and the only one that starts Ray.

Torch and Ray are imported by the commands that need them, so that `unet-ray --help` and a wrong flag answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from unet_ray import __version__, storage
from unet_ray.config import (
    EvaluateConfig,
    PredictConfig,
    TrainConfig,
    UserError,
    load_train_config,
    recipe_names,
    recipe_text,
)

if TYPE_CHECKING:
    from unet_ray.metrics import Scores
    from unet_ray.training import Split, Watch

F = TypeVar("F", bound=Callable[..., Any])
LOG_EVERY_SECONDS = 10.0


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """What a user can cause is one line on stderr and exit code 2; Ctrl-C and SIGTERM are exit code 130."""
        _stop_like_ctrl_c()
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo(
                "Stopped. What is finished is kept: start again with --resume (train) or as before (predict).", err=True
            )
            ctx.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="unet-ray")
def main() -> None:
    """Train a U-Net on images and masks, segment whole folders, score the result: on one CPU or on a Ray cluster."""


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class _Workers(click.ParamType):
    """`4`, or `1-4`."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        try:
            numbers = [int(number) for number in str(value).split("-")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            return numbers[0]
        if len(numbers) == 2:
            return numbers[0], numbers[1]
        return self.fail(f"{value!r}: a number such as 4, or two such as 1-4", param, ctx)


_pairs = _options(
    click.option("--images", metavar="DIR", help="Folder (or s3://, gs:// URI) of the images."),
    click.option(
        "--masks", metavar="DIR", help="Folder of the masks: same relative path and stem, with or without _mask."
    ),
)
_workers = click.option(
    "--workers", type=int, metavar="N", help="Processes that hold the network, each on a GPU or on CPUs."
)
_workers_range = click.option(
    "--workers",
    type=_Workers(),
    metavar="N|FEWEST-MOST",
    help="Processes that train, each on a GPU or on CPUs; 1-4: as many as there is room for.",
)
_machine = _options(
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="auto: CUDA where there is one."),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16", "fp16", "int8"]),
        help="auto: int8 if `quantize` made it, bf16 where the device is good at it; fp16: CUDA; int8: CPUs.",
    ),
    click.option("--local", is_flag=True, help="In this process: no Ray is started."),
    click.option("--verbose", is_flag=True, help="Also show what Ray says."),
)
_mask_options = _options(
    click.option("--tile", type=int, metavar="N", help="Segment at the image's own size, in squares of N pixels."),
    click.option("--overlap", type=float, metavar="X", help="Share of a tile in common with the next.  [default: 0.5]"),
    click.option("--tta", is_flag=True, help="Average over mirrored images, as the network was trained with them."),
    click.option("--ensemble", multiple=True, metavar="MODEL", help="Average in another model; may be repeated."),
    click.option(
        "--cleanup", metavar="RULE", help="area=64, area=0.1%, largest, holes, joined by +; none.  [default: as chosen]"
    ),
    click.option(
        "--backend",
        type=click.Choice(["auto", "torch", "compiled", "openvino"]),
        help="What runs the network; auto: OpenVINO on CPUs where it is installed.",
    ),
    click.option("--max-pixels", type=int, metavar="N", help="Larger images fail undecoded.  [default: 200000000]"),
)
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")


@main.command()
@_pairs
@click.option(
    "--out", required=True, metavar="RUN", help="Run directory to write; on a cluster, where all nodes see it."
)
@click.option("--recipe", metavar="NAME", help="Settings that are known to work: see `unet-ray recipes`.")
@click.option("--config", "config_file", metavar="FILE", help="YAML of settings, such as a run's config.yaml.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting, e.g. model.base_channels=32.")
@click.option("--cache", metavar="DIR", help="Keep the resized images there: later runs don't decode them again.")
@click.option("--epochs", type=int, metavar="N")
@click.option("--batch-size", type=int, metavar="N", help="Images a step, over all workers together.")
@click.option("--image-size", type=int, metavar="N", help="Side in pixels that images are resized to.")
@click.option("--lr", type=float, metavar="X", help="Learning rate.")
@click.option("--seed", type=int, metavar="N")
@click.option("--group-by", metavar="REGEX", help="Keep images whose names share this match on one side of the split.")
@click.option(
    "--folds", type=int, metavar="K", help="Cross-validation: K runs in RUN/fold-1 …, each part held out once."
)
@click.option("--resume", is_flag=True, help="Go on from the last finished epoch in RUN.")
@_workers_range
@_machine
def train(
    images: str | None,
    masks: str | None,
    out: str,
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    folds: int | None,
    resume: bool,
    local: bool,
    verbose: bool,
    **flags: Any,
) -> None:
    """Train a U-Net on pairs of images and masks.

    \b
    Example:
      unet-ray train --images train --masks train_masks --out RUN --recipe carvana-fast --group-by '^[^_]+'

    Writes RUN/model (the best epoch), RUN/last (to go on from), RUN/metrics.jsonl, RUN/config.yaml, RUN/split.csv and
    RUN/tensorboard.
    """
    if recipe and config_file:
        raise UserError("--recipe and --config both say all settings: give one of them")
    config = load_train_config(
        recipe=recipe,
        config_file=_read_text(config_file, "--config") if config_file else None,
        settings=[*map(_setting, settings), *_flag_settings({"images": images, "masks": masks, **flags})],
    )
    from unet_ray.training import train as run

    watch = _watch(config)
    if folds is not None:
        from unet_ray.folds import cross_validate

        with nullcontext() if local else _ray(verbose):
            summary = cross_validate(
                config,
                out,
                folds,
                local=local,
                resume=resume,
                watch=watch,
                on_fold=click.echo,
                on_scores=lambda fold, dice: click.echo(f"{fold}: Dice {dice:.4f} on the images held out"),
            )
        for label, name in (("Dice", "dice"), ("IoU", "iou"), ("pixel accuracy", "pixel_accuracy")):
            mean, sd = summary.mean_and_sd(name)
            click.echo(f"{label:<16} {mean:.4f} ± {sd:.4f} (mean and sd of {folds} folds)")
        return
    result = run(config, out, local=local, resume=resume, cluster=_ray(verbose), watch=watch)
    best = result.best
    click.echo(f"best: epoch {best['epoch']}, validation Dice {best['val_dice']:.4f}: {storage.join(out, 'model')}")
    _say_next(f"unet-ray evaluate {shlex.quote(out)}", f"unet-ray predict {shlex.quote(out)} FOLDER --out MASKS")


@main.command()
@click.argument("model")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--out", required=True, metavar="OUT", help="Folder to write; on a cluster, where all nodes see it.")
@click.option(
    "--format",
    "formats",
    default="png",
    show_default=True,
    metavar="LIST",
    help="Of png, parquet, rle, kaggle, coco, prob, overlay; several with commas.",
)
@click.option("--overlay", is_flag=True, help="Also small pictures with the mask drawn in: --format …,overlay.")
@click.option("--name", metavar="PATH", help="Path of a mask below OUT/masks.  [default: {relpath}/{stem}.png]")
@click.option("--overwrite", is_flag=True, help="Remove an earlier prediction in OUT first.")
@click.option("--retry-failed", is_flag=True, help="Try images again that failed in an earlier run.")
@click.option(
    "--allow-failures", metavar="N|P%", default="0", show_default=True, help="Images that may fail with exit 0."
)
@_mask_options
@_as_json
@_workers
@_machine
def predict(
    model: str,
    inputs: tuple[str, ...],
    out: str,
    formats: str,
    overlay: bool,
    allow_failures: str,
    as_json: bool,
    local: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Segment every image of folders, files, globs, lists or buckets.

    MODEL is a run directory (then its best model) or a model directory. INPUT is a folder, an image, a glob, a .txt
    with a path on each line, a .parquet with paths or with the images themselves, here or on s3://, gs://.

    \b
    Example:
      unet-ray predict RUN photos --out MASKS --format png,parquet

    Writes OUT/masks/<path below the input>.png, OUT/manifest.parquet with one row an image, and OUT/summary.json.
    Started again after a stop, it does only what is missing. Exit code 1: some images failed.
    """
    config = PredictConfig(
        model=model,
        inputs=inputs,
        out=out,
        formats=tuple(
            dict.fromkeys([name.strip() for name in formats.split(",") if name.strip()] + ["overlay"] * overlay)
        ),
        **_given(options),
    )
    allowed = _allowance(allow_failures)
    from unet_ray.prediction import predict as run

    summary = run(config, local=local, cluster=_ray(verbose), on_progress=_ProgressPrinter("segmented"))
    if as_json:
        click.echo(json.dumps(summary.to_json()))
    else:
        new = summary.images - summary.already_done
        earlier = f"{summary.already_done} of them by an earlier run"
        speed = f"{summary.images_per_second:.2f} images/s, start included"
        details = [earlier] * bool(summary.already_done) + [speed] * bool(new)
        click.echo(
            f"{summary.ok} of {summary.images} images segmented, {summary.failed} failed: {out} ({', '.join(details)})"
        )
        for reason, count in list(summary.failures.items())[:5]:
            click.echo(f"  {count} x {reason}")
        if summary.cleanup != "none":
            click.echo(f"masks were cleaned up: {summary.cleanup}")
    if summary.failed > allowed(summary.images):
        sys.exit(1)


@main.command()
@click.argument("model")
@_pairs
@click.option("--mask-values", metavar="LIST", help="Stored value of each class in these masks, e.g. 0,255.")
@click.option(
    "--tolerance", type=float, metavar="PX", help="Of the surface Dice: edges this close agree.  [default: 2]"
)
@click.option("--table", metavar="FILE", help="Also write the scores of each image and class, as Parquet.")
@click.option("--against", metavar="OTHER", help="Score OTHER on the same images too, and test the difference.")
@click.option("--choose-cleanup", is_flag=True, help="Find the clean-up with the best Dice; predict then uses it.")
@_mask_options
@_as_json
@_workers
@_machine
def evaluate(
    model: str,
    mask_values: str | None,
    table: str | None,
    against: str | None,
    choose_cleanup: bool,
    as_json: bool,
    local: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Score a model on pairs of images and masks, at each mask's own size.

    Without --images and --masks: on the pairs that the run held out for validation.

    \b
    Example:
      unet-ray evaluate RUN --images train --masks train_masks --against OTHER_RUN
    """
    values = None
    if mask_values is not None:
        try:
            values = tuple(int(value) for value in mask_values.split(","))
        except ValueError:
            raise UserError(f"--mask-values {mask_values!r}: numbers with commas, e.g. 0,255") from None
    config = EvaluateConfig(model=model, mask_values=values, **_given(options))
    from unet_ray import evaluation, metrics

    pairs = evaluation.pairs_of(config)
    for name in filter(None, (model, against)):
        known = evaluation.trained_on(name, pairs)
        if known:
            click.echo(f"warning: {name} was trained on {known} of these {len(pairs)} images", err=True)
    if choose_cleanup:
        if against is not None or table is not None:
            raise UserError("--choose-cleanup goes without --against and --table")
        choice = evaluation.choose_cleanup(
            config, pairs=pairs, local=local, cluster=_ray(verbose), on_progress=_ProgressPrinter("scored")
        )
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(choice)))
            return
        click.echo(f"{choice.images} images       mean Dice")
        for name, dice in choice.dice.items():
            click.echo(f"{name:<20} {dice:.4f}" + ("  <- kept for predict" if name == choice.chosen else ""))
        return
    comparison = None
    with nullcontext() if local or against is None else _ray(verbose):
        score = functools.partial(evaluation.evaluate, pairs=pairs, local=local, cluster=_ray(verbose))
        scores = score(config, on_progress=_ProgressPrinter("scored"))
        if against is not None:
            other = score(dataclasses.replace(config, model=against), on_progress=_ProgressPrinter("scored"))
            comparison = metrics.compare(scores.each, other.each)
    if table is not None:
        evaluation.write_table(scores, table)
    if as_json:
        result = scores.to_json()
        if comparison is not None:
            result["against"] = {"model": against, **other.to_json(), "comparison": comparison.to_json()}
        click.echo(json.dumps(result))
    else:
        _say_scores(scores)
        if comparison is not None:
            low, high = comparison.ci95
            click.echo(
                f"against {against} (Dice {other.dice.mean:.4f}): {comparison.difference:+.4f} "
                f"(95 % {low:+.4f} – {high:+.4f}), better on {comparison.better} and worse on {comparison.worse} of "
                f"{comparison.images} images, p = {comparison.p_value:.2g} (Wilcoxon)"
            )
    if scores.failures:
        sys.exit(1)


@main.command()
@click.argument("run")
@click.option("--calibration", default=64, show_default=True, type=click.IntRange(min=1), metavar="N", help="Images.")
@_as_json
def quantize(run: str, calibration: int, as_json: bool) -> None:
    """Make a run's network in int8, twice as fast on CPUs; refused if its validation Dice falls by more than 0.001.

    \b
    Example:
      unet-ray quantize RUN
    """
    from unet_ray import quantization

    result = quantization.quantize(
        EvaluateConfig(model=run, device="cpu"), calibration=calibration, on_progress=_ProgressPrinter("scored")
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        click.echo(f"calibrated on {result.calibrated_on} training images, scored on {result.images} of validation")
        click.echo(f"Dice {result.dice:.4f} as it is, {result.dice_int8:.4f} in int8")
        if result.kept:
            click.echo("kept: predict and evaluate use it on CPUs (--precision bf16 or fp32: they don't)")
    if not result.kept:
        click.echo(f"refused: {result.dice - result.dice_int8:.4f} is more than {quantization.MAY_FALL}", err=True)
        sys.exit(1)


def _say_scores(scores: Scores) -> None:
    click.echo(f"{scores.images} images           mean    95 % interval     all pixels")
    labels = {
        "dice": "Dice",
        "iou": "IoU",
        "pixel_accuracy": "pixel accuracy",
        "precision": "precision",
        "recall": "recall",
        "surface_dice": f"surface Dice {scores.tolerance:g}px",
        "hd95": "Hausdorff95 px",
    }
    for name, label in labels.items():
        score = scores.means[name]
        if score.mean is None or score.ci95[0] is None:
            click.echo(f"{label:<16} not defined for any image")
            continue
        digits = 2 if name == "hd95" else 4
        interval = f"{score.ci95[0]:.{digits}f} – {score.ci95[1]:.{digits}f}"
        total = "" if score.total is None else f"{score.total:9.4f}"
        without = f"  ({score.undefined} images without an edge left out)" if score.undefined else ""
        click.echo(f"{label:<16} {score.mean:9.{digits}f}  {interval:<15}  {total}{without}".rstrip())
    for name, row in scores.per_class.items():
        cells = "  ".join(f"{key} {row[key]:.4f}" for key in ("dice", "iou", "iou_global") if row[key] is not None)
        click.echo(f"{name:<16} {cells or 'does not occur'}")
    for path, reason in scores.failures[:5]:
        click.echo(f"  not scored: {path}: {reason}", err=True)


@main.command()
@click.argument("folder")
@click.option("--out", required=True, metavar="DIR", help="New folder for images/ and masks/.")
@click.option("--channels", default="flair,t1,t1ce,t2", show_default=True, metavar="LIST", help="Ends of file names.")
@click.option("--labels", default="seg", show_default=True, metavar="NAME", help="End of the masks' names; none: none.")
@click.option("--every", default=1, show_default=True, type=click.IntRange(min=1), metavar="N", help="Each Nth slice.")
def slices(folder: str, out: str, channels: str, labels: str, every: int) -> None:
    """Write the slices of NIfTI volumes (BraTS) as images and masks: one folder a patient, one channel a volume.

    \b
    Example:
      unet-ray slices BraTS2020_TrainingData --out slices
      unet-ray train --images slices/images --masks slices/masks --out RUN --recipe brats
    """
    from unet_ray.volumes import write_slices

    summary = write_slices(
        folder,
        out,
        [name.strip() for name in channels.split(",") if name.strip()],
        None if labels == "none" else labels,
        every=every,
        on_volume=lambda name, count: click.echo(f"{name}: {count} slices", err=True),
    )
    values = ", ".join(map(str, summary.labels))
    click.echo(f"{summary.slices} slices of {summary.volumes} patients: {out}" + (f"; labels {values}" * bool(values)))


@main.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes, or print one as YAML, ready for --config.

    \b
    Example:
      unet-ray recipes carvana-fast > mine.yaml
    """
    if name:
        click.echo(recipe_text(name), nl=False)
        return
    for recipe in recipe_names():
        click.echo(f"{recipe:<16} {recipe_text(recipe).splitlines()[0].removeprefix('# ')}")


@main.command()
@click.option("--out", default="demo", show_default=True, metavar="DIR", help="New folder for data, run and masks.")
@click.option("--local", is_flag=True, help="In this process: no Ray is started.")
@click.option("--verbose", is_flag=True, help="Also show what Ray says.")
def demo(out: str, local: bool, verbose: bool) -> None:
    """Make a small data set, train on it, segment unseen images, score them: a few minutes on two CPUs.

    \b
    Example:
      unet-ray demo --out demo
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {out} is not empty: remove it or choose another")
    from unet_ray.demo import make_scenes

    click.echo(f"making 60 scenes with a car: {folder / 'data'}")
    data = folder / "data"
    make_scenes(data)
    config = load_train_config(
        recipe="demo",
        settings=[("data.images", str(data / "train")), ("data.masks", str(data / "train_masks"))],
    )
    run, masks = str(folder / "run"), str(folder / "masks")
    if not local:
        click.echo("starting Ray (about 20 seconds)")
    from unet_ray.evaluation import evaluate as run_evaluate
    from unet_ray.prediction import predict as run_predict
    from unet_ray.training import train as run_train

    with nullcontext() if local else _ray(verbose):
        run_train(config, run, local=local, watch=_watch(config))
        click.echo("segmenting the unseen folder")
        summary = run_predict(
            PredictConfig(model=run, inputs=(str(data / "unseen"),), out=masks, formats=("png", "parquet")), local=local
        )
        scores = run_evaluate(
            EvaluateConfig(model=run, images=str(data / "unseen"), masks=str(data / "unseen_masks")), local=local
        )
    low, high = scores.dice.ci95
    click.echo(
        f"Dice on {scores.images} unseen scenes of unseen cars: {scores.dice.mean:.4f} (95 % {low:.4f} – {high:.4f})"
    )
    click.echo(f"  model  {run}/model\n  masks  {masks}/masks ({summary.ok} PNG), {masks}/masks.parquet")
    unseen = shlex.quote(str(data / "unseen"))
    _say_next(
        f"unet-ray evaluate {shlex.quote(run)} --images {unseen} --masks {shlex.quote(str(data / 'unseen_masks'))}",
        f"unet-ray predict {shlex.quote(run)} YOUR_FOLDER --out YOUR_MASKS",
        "unet-ray train --images YOUR_IMAGES --masks YOUR_MASKS --out RUN --recipe carvana-fast",
    )


@contextmanager
def _ray(verbose: bool) -> Iterator[None]:
    """A Ray for the command: the one this process has, else the cluster that RAY_ADDRESS names (a job has it set), else
    one of its own on this machine, ended and cleaned up after."""
    # Ray Train repeats each worker's print on the driver; one voice is enough.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ side writes warnings to stderr by itself
    import ray

    if ray.is_initialized():  # a notebook or a test that has its own, and ends it
        yield
        return
    options: dict[str, Any] = {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    temporary = None
    if not os.environ.get("RAY_ADDRESS"):
        # Not just any Ray that runs on this machine: it may be somebody else's. With one CPU, a worker would hold it
        # and no image could ever be decoded, so Ray is told of two.
        temporary = tempfile.mkdtemp(prefix="unet-ray-")
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options |= {"address": "local", "num_cpus": max(2, cpus), "include_dashboard": False}
        options |= {"_temp_dir": temporary, "_node_ip_address": "127.0.0.1"}
        # Ray ends idle processes beyond one a CPU within a second. Each takes seconds to start, and the stages of Ray
        # Data need a few more than there are CPUs: kept, a short prediction took half the time.
        options |= {"_system_config": {"num_workers_soft_limit": max(2, cpus) + 6}}
    with nullcontext() if verbose else _stderr_to_nowhere():
        ray.init(**options)
    _stop_like_ctrl_c()  # Ray has set its own way
    try:
        yield
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _stop_like_ctrl_c() -> None:
    """Makes SIGTERM, which `ray job stop`, Kubernetes and others send, what Ctrl-C is."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


@contextmanager
def _stderr_to_nowhere() -> Iterator[None]:
    """Hides what C++ code prints, which Python's own redirection does not reach. Exceptions are not hidden."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r}: write KEY=VALUE, e.g. --set model.base_channels=32")
    return name.strip(), value


def _flag_settings(flags: dict[str, Any]) -> list[tuple[str, Any]]:
    """Flags that were given, as dotted settings."""
    names = {
        "images": "data.images",
        "masks": "data.masks",
        "epochs": "train.epochs",
        "batch_size": "train.batch_size",
        "image_size": "data.image_size",
        "lr": "train.learning_rate",
        "cache": "compute.cache",
        "seed": "train.seed",
        "group_by": "data.group_by",
        "workers": "compute.workers",
        "device": "compute.device",
        "precision": "train.precision",
    }
    return [(names[flag], value) for flag, value in flags.items() if value is not None]


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _read_text(location: str, option: str) -> str:
    try:
        return storage.read_bytes(storage.absolute(location)).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {location}: {getattr(error, 'strerror', None) or error}") from None


def _allowance(text: str) -> Callable[[int], float]:
    """How many of n images may fail, from `7` or `2%`."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        raise UserError(f"--allow-failures {text!r}: a number, or a percentage such as 2%") from None
    return (lambda count: count * value / 100) if text.endswith("%") else (lambda _count: value)


def _say_next(*commands: str) -> None:
    click.echo("next:")
    for command in commands:
        click.echo(f"  {command}")


def _watch(config: TrainConfig) -> Watch:
    """What a training says."""
    from unet_ray.records import leak_report
    from unet_ray.training import Watch

    def start(split: Split) -> None:
        click.echo(f"training on {len(split.train)} pairs, validating on {len(split.val)}")
        leak = leak_report(split.train_keys, split.val_keys, config.data.group_by)
        if leak.named:
            click.echo(f"groups by {leak.pattern!r}: {leak.groups}, {leak.shared} shared by training and validation")
        elif leak.shared and config.data.split_order != "name":
            click.echo(
                f"note: the names look like {leak.groups} groups, and {leak.shared} of them are shared by training "
                f"and validation, whose scores will flatter: use --group-by {shlex.quote(leak.pattern or '')}"
            )

    def epoch(line: dict[str, Any]) -> None:
        click.echo(
            f"epoch {line['epoch']:>3}/{config.train.epochs}  loss {line['train_loss']:.4f}  "
            f"val loss {line['val_loss']:.4f}  Dice {line['val_dice']:.4f}  IoU {line['val_iou']:.4f}  "
            f"{line['images_per_second']:.1f} images/s  {line['seconds']:.0f} s"
        )

    def retry(reason: str, done: int) -> None:
        click.echo(f"lost a worker ({reason[:200]}): going on after epoch {done}", err=True)

    return Watch(start, epoch, retry)


class _ProgressPrinter:
    """A line on stderr: rewritten in place on a terminal, a new one every ten seconds elsewhere."""

    def __init__(self, verb: str) -> None:
        self.verb, self.started, self.said = verb, time.monotonic(), 0.0
        self.first: int | None = None
        self.live = sys.stderr.isatty()

    def __call__(self, done: int, failed: int, total: int) -> None:
        now = time.monotonic()
        if not total:
            text = f"{done} images found"
            if self.live:
                click.echo(f"\r{text:<78}", nl=False, err=True)
            elif now - self.said >= LOG_EVERY_SECONDS:
                self.said = now
                click.echo(text, err=True)
            return
        if self.first is None:
            self.first, self.started, self.said = done, now, now
        speed = (done - self.first) / max(1e-9, now - self.started)
        left = f", {(total - done) / speed:.0f} s left" if speed and done < total else ""
        text = f"{done} of {total} images {self.verb}, {failed} failed, {speed:.2f} images/s{left}"
        if self.live:
            click.echo(f"\r{text[:78]:<78}", nl=done >= total, err=True)
        elif now - self.said >= LOG_EVERY_SECONDS:
            self.said = now
            click.echo(text, err=True)


def run_command(name: str, arguments: Sequence[str] | None = None) -> None:
    """What jobs/<name>.py does: the command of that name with this process's arguments."""
    main([name, *(sys.argv[1:] if arguments is None else arguments)])
