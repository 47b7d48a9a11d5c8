"""Builds the pipeline for a model directory and the options of its masks."""

from __future__ import annotations

import dataclasses

from unet_ray import custom_parts, registry
from unet_ray.config import Cleanup, MaskOptions, UserError
from unet_ray.data import storage
from unet_ray.inference.pipeline import Pipeline, TilePipeline, WholeImagePipeline
from unet_ray.inference.segmenter import check_ensemble
from unet_ray.models import checkpoint
from unet_ray.models.checkpoint import ModelCard


def pipeline_of(model: str, options: MaskOptions) -> Pipeline:
    """Returns the pipeline for a run or model directory. Raises UserError if the model does not exist or the options do
    not fit it."""
    model = checkpoint.model_directory(storage.absolute(model))
    card = checkpoint.read_card(model)
    ensemble = tuple(checkpoint.model_directory(storage.absolute(other)) for other in options.ensemble)
    cards = [card, *map(checkpoint.read_card, ensemble)]
    check_ensemble(cards, [model, *ensemble])
    custom = _load_custom([model, *ensemble], cards, options.allow_code)
    options = dataclasses.replace(options, ensemble=ensemble, allow_code=custom)
    _check_tile(card, options)
    if options.tta and not card.flips:
        raise UserError(f"--tta: {model} was trained without flips, so it does not know mirrored images")
    text = checkpoint.read_cleanup(model, card) if options.cleanup is None else options.cleanup
    _check_int8(model, card, options)
    if options.threshold is not None and card.model.num_classes > 1:
        raise UserError(f"--threshold is for one class: {model} has {card.model.num_classes}")
    chosen = checkpoint.read_threshold(model, card) if options.threshold is None else options.threshold
    card = dataclasses.replace(card, threshold=chosen)
    pipeline = TilePipeline if options.tile else WholeImagePipeline
    return pipeline(model, card, Cleanup.parse(text), text, options, tuple(cards[1:]))


def _load_custom(models: list[str], cards: list[ModelCard], allow_code: bool) -> bool:
    """Imports the networks of the user's own here, before a cluster starts. Returns whether there is one. Raises
    UserError if it is not allowed, or can't be imported."""
    found = False
    for model, card in zip(models, cards, strict=True):
        if custom_parts.check_permission(model, card.model.name, allow_code):
            custom_parts.load(registry.NETWORKS, card.model.name, "config")
            checkpoint.say_if_code_changed(model, card)
            found = True
    return found


def _check_tile(card: ModelCard, options: MaskOptions) -> None:
    """Raises UserError if the model can't be used with this --tile."""
    if not options.tile:
        return
    card.model.check_size(options.tile, "--tile")
    # With a shorter tile, an unpadded network's step would be 0 pixels (`tiles.Grid.of`), and a padded U-Net would
    # extend each tile to this size anyway. Networks without levels (fcn, otsu, ...) do not use `depth`, but have it, so
    # the rule holds for them, too. One rule for all is simpler, and such short tiles help no network.
    if options.tile < 2**card.model.depth:
        raise UserError(f"--tile {options.tile}: at least {2**card.model.depth} for this model")
    if options.tta and card.model.padding == "valid":
        raise UserError("--tta with --tile is for networks with padding=same")


def _check_int8(model: str, card: ModelCard, options: MaskOptions) -> None:
    """Raises UserError if a network in int8 is asked for and can't be used."""
    if options.precision != "int8":
        return
    if options.ensemble:
        raise UserError("--precision int8 is for one model: leave --ensemble out")
    if checkpoint.read_choice(model, checkpoint.INT8, card) is None:
        raise UserError(f"--precision int8: {model} has no network in int8: see `unet-ray quantize`")
