"""Claims the output folder of a prediction, checks its settings, and empties it."""

from __future__ import annotations

import json
from typing import Any

from unet_ray.config import PredictConfig, UserError
from unet_ray.data import storage
from unet_ray.inference.formats import all_owned_names
from unet_ray.inference.ledger import MANIFEST, WORK
from unet_ray.inference.output_lock import LOCK
from unet_ray.inference.pipeline import Pipeline
from unet_ray.models import checkpoint

SETTINGS, SUMMARY, REPORT = "settings.json", "summary.json", "report.html"


def settings_of(config: PredictConfig, pipeline: Pipeline) -> dict[str, Any]:
    """Returns the settings that affect the output: two runs with the same ones write the same files."""
    options = pipeline.options
    return {
        "weights_sha256": pipeline.card.weights_sha256,
        "ensemble": [checkpoint.read_card(model).weights_sha256 for model in options.ensemble],
        "inputs": [storage.without_secrets(storage.absolute(location)) for location in config.inputs],
        "formats": sorted(config.formats),
        "name": config.name,
        "precision": config.precision,
        "int8": pipeline.quantized and storage.split_options(pipeline.quantized)[0].rpartition("/")[2],
        "backend": config.backend,
        "tile": config.tile,
        "overlap": config.overlap if config.tile else None,
        "tta": config.tta,
        "cleanup": pipeline.cleanup_text,
    }


def check(out: str, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Raises UserError if `out` holds anything else than a prediction with these settings, complete or not."""
    path = storage.join(out, SETTINGS)
    if storage.exists(path):
        earlier = json.loads(storage.read_bytes(path))
        changed = [name for name in settings if settings[name] != earlier.get(name)]
        if changed and not overwrite:
            raise UserError(
                f"{out} holds another run (other {', '.join(changed)}): choose another --out, or --overwrite removes it"
            )
    elif set(storage.names_in(out)) - {WORK}:
        raise UserError(f"{out} holds other files, no prediction: choose another --out")


def begin(out: str, settings: dict[str, Any]) -> bool:
    """Writes the settings into `out`. Returns whether an earlier run had begun in it."""
    path = storage.join(out, SETTINGS)
    begun = storage.exists(path)
    storage.write_bytes(path, (json.dumps(settings, indent=2) + "\n").encode())
    return begun


def remove(out: str) -> None:
    """Removes an earlier prediction, except for the lock."""
    # The settings go last, because they mark the folder as a prediction that may be removed.
    for name in (*all_owned_names(), MANIFEST, SUMMARY, REPORT, WORK, SETTINGS):
        location = storage.join(out, name)
        if name == WORK:
            for inner in set(storage.names_in(location)) - {LOCK}:
                storage.delete_folder(storage.join(location, inner))
        elif storage.is_folder(location):
            storage.delete_folder(location)
        else:
            storage.delete_file(location)
