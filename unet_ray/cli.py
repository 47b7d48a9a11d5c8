"""The commands. The only place that prints, and the only one that starts Ray.

Torch and Ray are imported by the commands that need them, so that `unet-ray --help` and a wrong flag answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from unet_ray import __version__
from unet_ray.config import EvaluateConfig, PredictConfig, TrainConfig, UserError
from unet_ray.data import storage
from unet_ray.ray_backend.session import Runtime, stop_like_ctrl_c
from unet_ray.report.progress import ImagesDisplay, TrainingDisplay, duration, say, speed
from unet_ray.settings import load_train_config, recipe_names, recipe_text

if TYPE_CHECKING:
    from unet_ray.training.run import Callbacks
    from unet_ray.training.setup import Split


F = TypeVar("F", bound=Callable[..., Any])


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """What a user can cause is one line on stderr and exit code 2; Ctrl-C and SIGTERM are exit code 130."""
        stop_like_ctrl_c()
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
)


def _runtime(command: Callable[..., None]) -> Callable[..., None]:
    """Options --local and --verbose, given to the command as `runtime`."""

    @click.option("--local", is_flag=True, help="In this process: no Ray is started.")
    @click.option("--verbose", is_flag=True, help="Also show what Ray says.")
    @functools.wraps(command)
    def with_runtime(*arguments: Any, local: bool, verbose: bool, **options: Any) -> None:
        command(*arguments, runtime=Runtime(local, verbose), **options)

    return with_runtime


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
_no_report = click.option("--no-report", is_flag=True, help="Don't write report.html.")
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
@click.option("--init", metavar="MODEL", help="Start from the weights of this run or model, and take its network.")
@click.option("--resume", is_flag=True, help="Go on from the last finished epoch in RUN.")
@_no_report
@_workers_range
@_machine
@_runtime
def train(
    images: str | None,
    masks: str | None,
    out: str,
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    folds: int | None,
    resume: bool,
    no_report: bool,
    runtime: Runtime,
    **flags: Any,
) -> None:
    """Train a U-Net on pairs of images and masks.

    \b
    Example:
      unet-ray train --images train --masks train_masks --out RUN --recipe carvana-fast --group-by '^[^_]+'

    Writes RUN/model (the best epoch), RUN/last (to go on from), RUN/metrics.jsonl, RUN/config.yaml, RUN/split.csv,
    RUN/tensorboard and, at the end, RUN/report.html to look at.
    """
    if recipe and config_file:
        raise UserError("--recipe and --config both say all settings: give one of them")
    network: list[tuple[str, Any]] = []
    if flags["init"] is not None:
        from unet_ray.models.checkpoint import model_settings_of

        network = model_settings_of(flags["init"])
    config = load_train_config(
        recipe=recipe,
        config_file=_read_text(config_file, "--config") if config_file else None,
        settings=[*network, *map(_setting, settings), *_flag_settings({"images": images, "masks": masks, **flags})],
    )
    from unet_ray.training.run import train as run

    if folds is not None:
        from unet_ray.evaluation.cross_validation import cross_validate

        with TrainingDisplay(config) as display, runtime.started():
            summary = cross_validate(
                config,
                out,
                folds,
                runtime=runtime,
                resume=resume,
                callbacks=_callbacks(config, display),
                on_fold=display.tell,
                on_scores=lambda fold, dice: display.tell(f"{fold}: Dice {dice:.4f} on the images held out"),
            )
        for label, name in (("Dice", "dice"), ("IoU", "iou"), ("pixel accuracy", "pixel_accuracy")):
            mean, sd = summary.mean_and_sd(name)
            click.echo(f"{label:<16} {mean:.4f} ± {sd:.4f} (mean and sd of {folds} folds)")
        return
    with TrainingDisplay(config) as display:
        result = run(config, out, runtime=runtime, resume=resume, callbacks=_callbacks(config, display))
    best = result.best
    click.echo(f"best: epoch {best['epoch']}, validation Dice {best['val_dice']:.4f}")
    _say_places(model=storage.join(out, "model"), **_reported(out, no_report))
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
@_no_report
@_as_json
@_workers
@_machine
@_runtime
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

    MODEL is a run directory (then its best model) or a model directory. INPUT is a folder, an image, a glob, a .txt
    with a path on each line, a .parquet with paths or with the images themselves, here or on s3://, gs://.

    \b
    Example:
      unet-ray predict RUN photos --out MASKS --format png,parquet

    Writes OUT/masks/<path below the input>.png, OUT/manifest.parquet with one row an image, OUT/summary.json, and
    OUT/report.html to look at. Started again after a stop, it does only what is missing. Exit code 1: some images
    failed.
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
    from unet_ray.inference.predict import predict as run

    with ImagesDisplay("segmented") as display:
        summary = run(config, runtime=runtime, on_progress=display)
    places = {"masks": storage.join(out, "masks")} if {"png"} & set(config.formats) else {"output": out}
    places |= {"table": storage.join(out, "manifest.parquet"), **_reported(out, no_report)}
    if as_json:
        click.echo(json.dumps(summary.to_json()))
    else:
        new = summary.images - summary.already_done
        click.echo(f"{summary.ok} of {summary.images} images segmented, {summary.failed} failed")
        if summary.already_done:
            click.echo(f"{summary.already_done} of them by an earlier run")
        if new:
            click.echo(f"{new} in {duration(summary.seconds)}, {speed(summary.images_per_second)}, start included")
        for reason, count in list(summary.failures.items())[:5]:
            say(f"  {count} x {reason}")
        if summary.cleanup != "none":
            click.echo(f"masks were cleaned up: {summary.cleanup}")
        _say_places(**places)
        if summary.failed:
            _say_next("mend the files and give the same command again (others: --retry-failed)")
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
@_runtime
def evaluate(
    model: str,
    mask_values: str | None,
    table: str | None,
    against: str | None,
    choose_cleanup: bool,
    as_json: bool,
    runtime: Runtime,
    **options: Any,
) -> None:
    """Score a model on pairs of images and masks, at each mask's own size.

    Without --images and --masks: on the pairs that the run held out for validation.

    \b
    Example:
      unet-ray evaluate RUN --images train --masks train_masks --against OTHER_RUN
    """
    values = None if mask_values is None else _numbers(mask_values, "--mask-values", "0,255")
    config = EvaluateConfig(model=model, mask_values=values, **_given(options))
    from unet_ray import metrics
    from unet_ray.evaluation.choose_cleanup import choose_cleanup as find_cleanup
    from unet_ray.evaluation.evaluate import evaluate, write_table
    from unet_ray.evaluation.run_pairs import pairs_of, trained_on

    pairs = pairs_of(config)
    for name in filter(None, (model, against)):
        known = trained_on(name, pairs)
        if known:
            click.echo(f"warning: {name} was trained on {known} of these {len(pairs)} images", err=True)
    if choose_cleanup:
        if against is not None or table is not None:
            raise UserError("--choose-cleanup goes without --against and --table")
        with ImagesDisplay("scored") as display:
            choice = find_cleanup(config, pairs=pairs, runtime=runtime, on_progress=display)
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(choice)))
            return
        click.echo(f"{choice.images} images       mean Dice")
        for name, dice in choice.dice.items():
            click.echo(f"{name:<20} {dice:.4f}" + ("  <- kept for predict" if name == choice.chosen else ""))
        return
    comparison = None
    with nullcontext() if against is None else runtime.started():
        score = functools.partial(evaluate, pairs=pairs, runtime=runtime)
        with ImagesDisplay("scored") as display:
            scores = score(config, on_progress=display)
        if against is not None:
            with ImagesDisplay("scored") as display:
                other = score(dataclasses.replace(config, model=against), on_progress=display)
            comparison = metrics.compare(scores.each, other.each)
    if table is not None:
        write_table(scores, table)
    if as_json:
        result = scores.to_json()
        if comparison is not None:
            result["against"] = {"model": against, **other.to_json(), "comparison": comparison.to_json()}
        click.echo(json.dumps(result))
    else:
        click.echo(scores.table())
        for path, reason in scores.failures[:5]:
            click.echo(f"  not scored: {path}: {reason}", err=True)
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
    from unet_ray.evaluation.quantization import MAY_FALL, quantize

    with ImagesDisplay("scored") as display:
        result = quantize(EvaluateConfig(model=run, device="cpu"), calibration=calibration, on_progress=display)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        click.echo(f"calibrated on {result.calibrated_on} training images, scored on {result.images} of validation")
        click.echo(f"Dice {result.dice:.4f} as it is, {result.dice_int8:.4f} in int8")
        if result.kept:
            click.echo("kept: predict and evaluate use it on CPUs (--precision bf16 or fp32: they don't)")
    if not result.kept:
        click.echo(f"refused: {result.dice - result.dice_int8:.4f} is more than {MAY_FALL}", err=True)
        sys.exit(1)


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
    from unet_ray.data.volumes import write_slices

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
@_pairs
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Pairs whose pixels are read.  [default: 200]")
@click.option("--no-timing", is_flag=True, help="Don't time a training step.")
@_as_json
def doctor(images: str | None, masks: str | None, samples: int | None, no_timing: bool, as_json: bool) -> None:
    """Say what is wrong with a data set, and which settings fit it, before hours are spent on it.

    \b
    Example:
      unet-ray doctor --images photos --masks photo_masks

    Exit code 0: nothing but notes; 1: warnings; 2: errors, at which training would stop.
    """
    if images is None:
        raise UserError("--images is missing: the folder of the images")
    from unet_ray import doctor

    with ImagesDisplay("looked at") as display:
        found = doctor.examine(images, masks, timing=not no_timing, on_progress=display, **_given({"samples": samples}))
    click.echo(json.dumps(found.to_json()) if as_json else doctor.table(found))
    sys.exit(found.exit_code)


@main.command("import")
@click.argument("checkpoint", metavar="CHECKPOINT.pth")
@click.option("--out", required=True, metavar="MODEL", help="Model directory to write.")
@click.option(
    "--image-size",
    required=True,
    metavar="N|HEIGHT,WIDTH",
    help="Size that images are resized to: that of the images times milesial's --scale.",
)
@click.option("--mask-values", metavar="LIST", help="Stored value of each class.  [default: as in the checkpoint]")
@click.option("--classes", metavar="LIST", help="Their names, with commas.")
def import_weights(checkpoint: str, out: str, image_size: str, mask_values: str | None, classes: str | None) -> None:
    """Make a model directory of weights from milesial/Pytorch-UNet, for predict and for train --init.

    \b
    Example:
      unet-ray import checkpoint_epoch5.pth --out MODEL --image-size 640,960
    """
    size = _numbers(image_size, "--image-size", "640 or 640,960")
    if len(size) not in (1, 2):
        raise UserError(f"--image-size {image_size}: one number, or height and width")
    from unet_ray.models.milesial import import_milesial

    card = import_milesial(
        checkpoint,
        out,
        image_size=size[0] if len(size) == 1 else (size[0], size[1]),
        mask_values=None if mask_values is None else _numbers(mask_values, "--mask-values", "0,255"),
        classes=None if classes is None else [name.strip() for name in classes.split(",")],
    )
    model = card.model
    click.echo(
        f"U-Net of {model.base_channels} channels, {model.depth} levels, {model.in_channels} channels in, classes "
        + ", ".join(card.classes)
    )
    _say_places(model=out)
    _say_next(
        f"unet-ray predict {shlex.quote(out)} FOLDER --out MASKS",
        f"unet-ray train --images DIR --masks DIR --out RUN --init {shlex.quote(out)}",
    )


@main.command()
@click.argument("location", metavar="RUN|OUT")
@click.option("--cluster", "on_cluster", is_flag=True, help="Score the validation images through Ray.")
@click.option("--verbose", is_flag=True, help="Also show what Ray says.")
def report(location: str, on_cluster: bool, verbose: bool) -> None:
    """Write report.html anew, for a run or a prediction: one page to look at and to send.

    \b
    Example:
      unet-ray report RUN
    """
    from unet_ray.report.page import write

    with ImagesDisplay("scored") as display:
        place = write(location, runtime=Runtime(not on_cluster, verbose), on_progress=display)
    click.echo(storage.without_secrets(place))


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
@_runtime
def demo(out: str, runtime: Runtime) -> None:
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
    if not runtime.local:
        click.echo("starting Ray (about 20 seconds)")
    from unet_ray.evaluation.evaluate import evaluate as run_evaluate
    from unet_ray.inference.predict import predict as run_predict
    from unet_ray.training.run import train as run_train

    with runtime.started():
        with TrainingDisplay(config) as display:
            run_train(config, run, runtime=runtime, callbacks=_callbacks(config, display))
        click.echo("segmenting the unseen folder")
        summary = run_predict(
            PredictConfig(model=run, inputs=(str(data / "unseen"),), out=masks, formats=("png", "parquet")),
            runtime=runtime,
        )
        scores = run_evaluate(
            EvaluateConfig(model=run, images=str(data / "unseen"), masks=str(data / "unseen_masks")), runtime=runtime
        )
    low, high = scores.dice.ci95
    click.echo(
        f"Dice on {scores.images} unseen scenes of unseen cars: {scores.dice.mean:.4f} (95 % {low:.4f} – {high:.4f})"
    )
    _say_places(model=f"{run}/model", masks=f"{masks}/masks ({summary.ok} PNG), {masks}/masks.parquet")
    _say_places(**_reported(run, False))
    unseen = shlex.quote(str(data / "unseen"))
    _say_next(
        f"unet-ray evaluate {shlex.quote(run)} --images {unseen} --masks {shlex.quote(str(data / 'unseen_masks'))}",
        f"unet-ray predict {shlex.quote(run)} YOUR_FOLDER --out YOUR_MASKS",
        "unet-ray train --images YOUR_IMAGES --masks YOUR_MASKS --out RUN --recipe carvana-fast",
    )


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r}: write KEY=VALUE, e.g. --set model.base_channels=32")
    return name.strip(), value


def _numbers(text: str, option: str, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text!r}: numbers with commas, e.g. {example}") from None


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
        "init": "train.init",
        "workers": "compute.workers",
        "device": "compute.device",
        "precision": "train.precision",
    }
    # Text of settings is YAML, which `data #1` or `[a-z]+` would not be; in quotes it is what it is.
    quoted = {flag: json.dumps(value) if isinstance(value, str) else value for flag, value in flags.items()}
    return [(names[flag], value) for flag, value in quoted.items() if value is not None]


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


def _reported(location: str, no_report: bool) -> dict[str, str]:
    """Writes report.html where a run has ended, and says where; what is finished does not fail by its page."""
    if no_report:
        return {}
    from unet_ray.report.page import write

    try:
        with ImagesDisplay("scored for the report") as display:
            write(location, on_progress=display)
    except Exception as error:
        say(f"no report.html: {type(error).__name__}: {error}", err=True)
        return {}
    from unet_ray.inference.predict import REPORT

    return {"report": storage.join(location, REPORT)}


def _say_places(**places: str) -> None:
    for name, place in places.items():
        click.echo(f"  {name:<8}{storage.without_secrets(place)}")


def _say_next(*commands: str) -> None:
    click.echo("next:")
    for command in commands:
        click.echo(f"  {command}")


def _callbacks(config: TrainConfig, display: TrainingDisplay) -> Callbacks:
    """What a training says."""
    from unet_ray.data.splits import leak_report
    from unet_ray.training.run import Callbacks

    def start(split: Split) -> None:
        display.tell(f"training on {len(split.train)} pairs, validating on {len(split.val)}")
        leak = leak_report(split.train_keys, split.val_keys, config.data.group_by)
        if leak.named and leak.groups < len(split.train) + len(split.val):
            display.tell(f"groups by {leak.pattern!r}: {leak.groups}, {leak.shared} shared by training and validation")
        elif leak.shared and config.data.split_order != "name":
            display.tell(
                f"note: the names look like {leak.groups} groups, and {leak.shared} of them are shared by training "
                f"and validation, whose scores will flatter: use --group-by {shlex.quote(leak.pattern or '')}"
            )
        display.start()

    def retry(reason: str, done: int) -> None:
        display.tell(f"lost a worker ({reason[:200]}): going on after epoch {done}", err=True)

    return Callbacks(on_start=start, on_epoch=display.epoch, on_step=display.step, on_retry=retry)


def run_command(name: str, arguments: Sequence[str] | None = None) -> None:
    """What jobs/<name>.py does: the command of that name with this process's arguments."""
    main([name, *(sys.argv[1:] if arguments is None else arguments)])
