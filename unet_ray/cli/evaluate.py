"""unet-ray evaluate."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import click
import yaml

from unet_ray.cli.options import (
    DATA,
    OUTPUT,
    Command,
    as_json,
    default_of,
    given,
    machine,
    mask_options,
    numbers,
    one_or_several,
    option,
    pairs,
    rle_order,
    runtime,
    workers,
)
from unet_ray.config import DataConfig, EvaluateConfig, MaskValue, UserError
from unet_ray.ray_backend.session import Runtime
from unet_ray.report.progress import ImagesDisplay, say
from unet_ray.settings import from_mapping

if TYPE_CHECKING:
    from unet_ray.data.pairs import Pair
    from unet_ray.evaluation.choose_cleanup import CleanupChoice
    from unet_ray.evaluation.choose_threshold import ThresholdChoice
    from unet_ray.metrics import Comparison, Scores

    Choice = TypeVar("Choice", CleanupChoice, ThresholdChoice)

SCORING = "Scoring"
OF_FILES = {"masks", "match", "tolerance"}
"""Options that go with --predictions, beside those of the output."""
REASONS = 5
"""The most images that could not be scored whose path and reason are printed."""


@click.command(cls=Command, short_help="Score a model on pairs of images and masks.")
@click.argument("model", required=False)
@pairs
@option(
    DATA,
    "--predictions",
    multiple=True,
    callback=one_or_several,
    metavar="DIR",
    help="Instead of MODEL: masks that any tool has made; scored against --masks of the same names.",
)
@rle_order
@option(
    DATA,
    "--part",
    type=click.Choice(["train", "val", "test"]),
    help="Without --images: which of the run's own images.",
    shown="val",
)
@option(
    DATA,
    "--mask-values",
    metavar="LIST",
    help="Stored value of each class in these masks, e.g. 0,255 or \"[0, '>0']\" (see data.mask_values).",
    shown="as in training",
)
@option(
    SCORING,
    "--tolerance",
    type=float,
    metavar="PX",
    help="Largest distance, in pixels, at which two edges agree in the surface Dice.",
    shown=default_of(EvaluateConfig, "tolerance"),
)
@option(
    SCORING,
    "--against",
    metavar="OTHER",
    help="Score OTHER on the same images too, and test the difference (Wilcoxon's signed-rank test). --adapt is for "
    "MODEL alone.",
)
@option(SCORING, "--choose-cleanup", is_flag=True, help="Find the clean-up with the best Dice; predict then uses it.")
@option(
    SCORING,
    "--choose-threshold",
    is_flag=True,
    help="Find the threshold nearest to 0.5 that is as good as the best (one class); predict then uses it.",
)
@option(OUTPUT, "--table", metavar="FILE", help="Also write the scores of each image and class, as Parquet.")
@as_json
@mask_options
@workers
@machine
@runtime
def evaluate(
    model: str | None,
    predictions: str | tuple[str, ...] | None,
    mask_values: str | None,
    table: str | None,
    against: str | None,
    choose_cleanup: bool,
    choose_threshold: bool,
    as_json: bool,
    runtime: Runtime,
    **options: Any,
) -> None:
    """Score a model on pairs of images and masks, at each mask's own size.

    Without --images and --masks, it scores the pairs that the run held out for validation. It warns if a model was
    trained on some of the images.

    \b
    Example:
      unet-ray evaluate RUN --images train --masks train_masks --against OTHER_RUN
      unet-ray evaluate --predictions THEIR_MASKS --masks train_masks

    With --predictions, and with --against then another folder of masks, no model is needed: files with one value beside
    0 are background and foreground, others class ids (255 in --masks is left out), and the command says so.

    \b
    Prints the mean over images with a bootstrap 95 % interval, and the value from the counts of all pixels:
      Dice, IoU, pixel accuracy, precision, recall
      surface Dice  counts edge pixels, as MONAI does (DeepMind: their lengths)
      hd95          Hausdorff distance: the larger of both directions' 95th percentiles (MONAI, DeepMind)
      hd95_pooled   --json and --table: the percentile of both directions together (medpy)

    An image whose mask is empty and predicted empty has Dice 1. Not defined, blank in tables and left out of means, are
    precision where nothing is predicted, recall where nothing is there, and distances where a region is empty.
    Exit code 1: some images could not be scored.
    """
    if (choose_cleanup or choose_threshold) and (against is not None or table is not None or predictions):
        raise UserError("--choose-cleanup and --choose-threshold go without --against, --table and --predictions")
    if (choose_cleanup or choose_threshold) and options["adapt"]:
        raise UserError("--choose-cleanup and --choose-threshold are for the model as it is: leave --adapt out")
    if predictions:
        scores, other = _scores_of_files(predictions, model, against, _mask_values(mask_values), options)
    elif model is None:
        raise UserError("name a MODEL, or with --predictions the masks that another tool has made")
    else:
        config = EvaluateConfig(model=model, mask_values=_mask_values(mask_values), **given(options))
        scored_pairs = _pairs_to_score(config, against)
        if choose_threshold:  # first, since a clean-up is chosen for masks at the threshold
            _choose_threshold(config, scored_pairs, runtime, as_json)
        if choose_cleanup:
            _choose_cleanup(config, scored_pairs, runtime, as_json)
        if choose_cleanup or choose_threshold:
            return
        scores, other = _scores(config, against, scored_pairs, runtime)
    from unet_ray import metrics

    comparison = None if other is None else metrics.compare(scores.each, other.each)
    if table is not None:
        from unet_ray.evaluation.evaluate import write_table

        write_table(scores, table)
    if as_json:
        result = scores.to_json()
        if other is not None and comparison is not None:
            result["against"] = {"model": against, **other.to_json(), "comparison": comparison.to_json()}
        click.echo(json.dumps(result))
    else:
        _print_scores(scores)
        if other is not None and comparison is not None:
            _print_comparison(str(against), other, comparison)
    if scores.failures:
        sys.exit(1)


def _pairs_to_score(config: EvaluateConfig, against: str | None) -> list[Pair]:
    """Returns the pairs to score. Warns of those that a model was trained on."""
    from unet_ray.evaluation.run_pairs import pairs_of, trained_on

    scored_pairs = pairs_of(config)
    held_out = config.images is None and config.part != "train"  # by the run itself, so its images are not listed again
    for name in filter(None, (None if held_out else config.model, against)):
        known = trained_on(name, scored_pairs)
        if known:
            click.echo(f"warning: {name} was trained on {known} of these {len(scored_pairs)} images", err=True)
    return scored_pairs


def _scores_of_files(
    predictions: str | tuple[str, ...],
    model: str | None,
    against: str | None,
    mask_values: tuple[MaskValue, ...] | None,
    options: dict[str, Any],
) -> tuple[Scores, Scores | None]:
    """Scores masks that another tool has made, and those of a second one."""
    used = {name for name, value in options.items() if value not in (None, False, ())} | ({"model"} if model else set())
    if of_a_model := sorted(used - OF_FILES):
        names = ", ".join("MODEL" if name == "model" else f"--{name.replace('_', '-')}" for name in of_a_model)
        raise UserError(f"--predictions: leave {names} out: the masks are made already")
    if options["masks"] is None:
        raise UserError("--predictions: name the ground truth with --masks")
    from unet_ray.evaluation.compare_files import find_predictions, meaning_of, same_images, score_files

    masks, match = options["masks"], options["match"]
    tolerance = default_of(EvaluateConfig, "tolerance") if options["tolerance"] is None else options["tolerance"]
    sets = [find_predictions(predictions, masks, match)]
    if against is not None:
        sets.append(same_images(sets[0], find_predictions(against, masks, match), against))
    scores = []
    for scored_pairs in sets:
        meaning = meaning_of(scored_pairs, mask_values)
        say(str(meaning), err=True)
        with ImagesDisplay("scored") as display:
            scores.append(score_files(scored_pairs, meaning, tolerance, display))
    return scores[0], scores[1] if against is not None else None


def _scores(
    config: EvaluateConfig, against: str | None, scored_pairs: list[Pair], runtime: Runtime
) -> tuple[Scores, Scores | None]:
    """Scores the model and, if there is one, the other model; starts Ray once for both."""
    from unet_ray.evaluation.evaluate import evaluate as run

    with nullcontext() if against is None else runtime.started():
        with ImagesDisplay("scored") as display:
            scores = run(config, pairs=scored_pairs, runtime=runtime, on_progress=display)
        if against is None:
            return scores, None
        with ImagesDisplay("scored") as display:
            other_config = dataclasses.replace(config, model=against, adapt=False)
            return scores, run(other_config, pairs=scored_pairs, runtime=runtime, on_progress=display)


def _chosen(
    choose: Callable[..., Choice], config: EvaluateConfig, scored_pairs: list[Pair], runtime: Runtime, as_json: bool
) -> Choice | None:
    """Returns the choice to print; with --json prints it and returns None."""
    with ImagesDisplay("scored") as display:
        choice = choose(config, pairs=scored_pairs, runtime=runtime, on_progress=display)
    if not as_json:
        return choice
    click.echo(json.dumps(dataclasses.asdict(choice)))
    return None


def _choose_threshold(config: EvaluateConfig, scored_pairs: list[Pair], runtime: Runtime, as_json: bool) -> None:
    from unet_ray.evaluation.choose_threshold import USUAL, choose_threshold

    choice = _chosen(choose_threshold, config, scored_pairs, runtime, as_json)
    if choice is None:
        return
    click.echo(f"{choice.images} images       mean Dice  precision  recall")
    for place, threshold in enumerate(choice.thresholds):
        if round(100 * threshold) % 10 == 0 or threshold == choice.chosen:
            values = choice.dice[place], choice.precision[place], choice.recall[place]
            dice, precision, recall = ("–" if value is None else f"{value:.4f}" for value in values)
            kept = "  <- kept for predict" if threshold == choice.chosen else ""
            click.echo(f"threshold {threshold:<10.2f} {dice:<10} {precision:<7} {recall:<6}{kept}".rstrip())
    if choice.chosen == USUAL:
        click.echo("no other threshold is better by more than chance")


def _choose_cleanup(config: EvaluateConfig, scored_pairs: list[Pair], runtime: Runtime, as_json: bool) -> None:
    from unet_ray.evaluation.choose_cleanup import choose_cleanup

    choice = _chosen(choose_cleanup, config, scored_pairs, runtime, as_json)
    if choice is None:
        return
    click.echo(f"{choice.images} images       mean Dice")
    for name, dice in choice.dice.items():
        click.echo(f"{name:<20} {dice:.4f}" + ("  <- kept for predict" if name == choice.chosen else ""))


def _print_scores(scores: Scores) -> None:
    click.echo(scores.table())
    for path, reason in scores.failures[:REASONS]:
        click.echo(f"  not scored: {path}: {reason}", err=True)


def _print_comparison(against: str, other: Scores, comparison: Comparison) -> None:
    low, high = comparison.ci95
    click.echo(
        f"against {against} (Dice {other.dice.mean:.4f}): {comparison.difference:+.4f} "
        f"(95 % {low:+.4f} – {high:+.4f}), better on {comparison.better} and worse on {comparison.worse} of "
        f"{comparison.images} images, p = {comparison.p_value:.2g} (Wilcoxon)"
    )


def _mask_values(text: str | None) -> tuple[MaskValue, ...] | None:
    """Reads `0,255`, or a list as `--set data.mask_values` takes it. Raises UserError."""
    if text is None or not text.startswith("["):
        return None if text is None else numbers(text, "--mask-values", "0,255")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--mask-values {text!r} is no list, e.g. \"[0, '>0']\"") from None
    return from_mapping(DataConfig, {"mask_values": values}).mask_values
