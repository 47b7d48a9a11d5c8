"""Claims the output folder of a prediction, checks its settings, and empties it."""

from __future__ import annotations

import json
from typing import Any

from unet_ray.config import PredictConfig, UserError
from unet_ray.data import storage
from unet_ray.inference import naming
from unet_ray.inference.arithmetic import NOT_RECORDED, Arithmetic
from unet_ray.inference.choose_arithmetic import begun_otherwise
from unet_ray.inference.formats import all_owned_names
from unet_ray.inference.ledger import MANIFEST, WORK
from unet_ray.inference.pipeline import Pipeline
from unet_ray.models import checkpoint

ARITHMETIC = "arithmetic"
"""Key of the settings: a list of `Arithmetic.to_json`."""
LOCK = "lock.json"
"""File in `WORK` by which a run keeps others out."""
SETTINGS, SUMMARY, REPORT = "settings.json", "summary.json", "report.html"


def settings_of(config: PredictConfig, pipeline: Pipeline) -> dict[str, Any]:
    """Returns the settings that affect the output: two runs with the same ones, and the same arithmetic, write the same
    files."""
    options = pipeline.options
    return {
        "weights_sha256": pipeline.card.weights_sha256,
        "ensemble": [checkpoint.read_card(model).weights_sha256 for model in options.ensemble],
        "inputs": naming.shown(config.inputs),
        "column": config.column,
        "formats": sorted(config.formats),
        "name": config.name,
        "tile": config.tile,
        "overlap": config.overlap if config.tile else None,
        "tta": config.tta,
        "cleanup": pipeline.cleanup_text,
    }


def check(out: str, settings: dict[str, Any], config: PredictConfig) -> None:
    """Raises UserError if `out` holds anything else than a prediction with these settings, complete or not."""
    if not storage.exists(storage.join(out, SETTINGS)):
        if set(storage.names_in(out)) - {WORK}:
            raise UserError(f"{out} holds other files, no prediction: choose another --out")
        return
    if config.overwrite:
        return
    earlier = _read(out)
    changed = [name for name in settings if settings[name] != earlier.get(name)]
    if changed:
        raise UserError(
            f"{out} holds another run (other {', '.join(changed)}): choose another --out, or --overwrite removes it"
        )
    recorded = arithmetics(out)
    wanted = recorded[-1].contradicts(config) if recorded and not config.allow_mixed else ""
    if wanted:
        raise begun_otherwise(recorded[-1], f"{wanted} asks for another")


def begin(out: str, settings: dict[str, Any]) -> bool:
    """Writes the settings into `out`. Returns whether an earlier run had begun in it."""
    begun = storage.exists(storage.join(out, SETTINGS))
    earlier = _read(out) if begun else {ARITHMETIC: []}
    _write(out, {**settings, **({ARITHMETIC: earlier[ARITHMETIC]} if ARITHMETIC in earlier else {})})
    return begun


def arithmetics(out: str) -> list[Arithmetic]:
    """Returns the arithmetics with which the masks in `out` were made, the first one first."""
    settings = _read(out)
    if ARITHMETIC not in settings:
        return [NOT_RECORDED]
    return [Arithmetic.from_json(values) for values in settings[ARITHMETIC]]


def record_arithmetics(out: str, used: list[Arithmetic]) -> None:
    """Writes the arithmetics into the settings."""
    _write(out, {**_read(out), ARITHMETIC: [arithmetic.to_json() for arithmetic in used]})


def _read(out: str) -> dict[str, Any]:
    return json.loads(storage.read_bytes(storage.join(out, SETTINGS)))


def _write(out: str, settings: dict[str, Any]) -> None:
    storage.write_bytes(storage.join(out, SETTINGS), (json.dumps(settings, indent=2) + "\n").encode(), durable=True)


def remove(out: str) -> None:
    """Removes an earlier prediction, except for the lock."""
    for name in (*all_owned_names(), MANIFEST, SUMMARY, REPORT, WORK):
        location = storage.join(out, name)
        if name == WORK:
            for inner in set(storage.names_in(location)) - {LOCK}:
                storage.delete_folder(storage.join(location, inner))
        elif storage.is_folder(location):
            storage.delete_folder(location)
        else:
            storage.delete_file(location)
    # The settings go last, because they mark the folder as a prediction that may be removed. A power cut must not bring
    # back old masks without settings, nor old records under new settings.
    storage.sync([storage.join(out, SETTINGS), storage.join(out, WORK, LOCK)])
    storage.delete_file(storage.join(out, SETTINGS))
