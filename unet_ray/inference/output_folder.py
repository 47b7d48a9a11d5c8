"""Claims the output folder of a prediction, checks its settings, and empties it.

settings.json       what affects the output, and the arithmetic of a run that is not divided into parts
.work/lock.json     keeps other runs out; `lock-2.json` is that of part 2
.work/parts/2.json  the arithmetic of part 2, and, once it is done, how many images it has
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unet_ray import custom_parts
from unet_ray.config import PredictConfig, UserError
from unet_ray.data import storage
from unet_ray.data.output_lock import OutputLock, output_lock
from unet_ray.inference import adapt, naming
from unet_ray.inference.arithmetic import NOT_RECORDED, Arithmetic
from unet_ray.inference.choose_arithmetic import begun_otherwise
from unet_ray.inference.formats import all_owned_names
from unet_ray.inference.ledger import MANIFEST, WORK
from unet_ray.inference.moved import Move, renamed
from unet_ray.inference.parts import WHOLE, Part
from unet_ray.inference.pipeline import Pipeline

ARITHMETIC = "arithmetic"
"""Key of the settings: a list of `Arithmetic.to_json`."""
LOCK = "lock.json"
"""File in `WORK` by which a run keeps others out."""
PARTS = f"{WORK}/parts"
LISTED = "listed"
"""Key of a part's record: its number of images; None until it is done."""
SETTINGS, SUMMARY, REPORT = "settings.json", "summary.json", "report.html"


def settings_of(config: PredictConfig, pipeline: Pipeline, part: Part) -> dict[str, Any]:
    """Returns the settings that affect the output: two runs with the same ones, and the same arithmetic, write the same
    files."""
    code = [custom_parts.source_sha256(card.model.name) for card in (pipeline.card, *pipeline.others)]
    return {
        "weights_sha256": pipeline.card.weights_sha256,
        "ensemble": [card.weights_sha256 for card in pipeline.others],
        "inputs": naming.shown(config.inputs),
        "column": config.column,
        "formats": sorted(config.formats),
        "name": config.name,
        "tile": config.tile,
        "overlap": config.overlap if config.tile else None,
        "tta": config.tta,
        "adapt": adapt.STRENGTH if config.adapt else None,
        "cleanup": pipeline.cleanup_text,
        "threshold": None if pipeline.card.threshold == 0.5 else pipeline.card.threshold,
        "code": code if any(code) else None,
        "parts": part.of if part != WHOLE else None,
    }


def lock_of(part: Part) -> str:
    """Returns the path of a run's lock below the output folder."""
    return f"{WORK}/{LOCK}" if part == WHOLE else f"{WORK}/lock-{part.number}.json"


@contextmanager
def claimed(out: str, part: Part) -> Iterator[OutputLock]:
    """Locks `out` for a run, or for one part of it. Raises UserError if another run works there; other parts may."""
    with output_lock(out, lock_of(part)) as lock:
        names = storage.names_in(storage.join(out, WORK))
        others = [name for name in names if (name == LOCK if part != WHOLE else re.fullmatch(r"lock-\d+\.json", name))]
        for name in others:
            with output_lock(out, f"{WORK}/{name}"):  # raises if somebody holds it
                pass
        yield lock


def check(out: str, settings: dict[str, Any], config: PredictConfig) -> None:
    """Raises UserError if `out` holds anything else than a prediction with these settings, complete or not."""
    if not storage.exists(storage.join(out, SETTINGS)):
        if set(storage.names_in(out)) - {WORK}:
            raise UserError(f"{out} holds other files, no prediction: choose another --out")
        return
    if config.overwrite:
        return
    earlier = _read(out)
    moved = moves(out, config)
    earlier["inputs"] = [renamed(location, moved) for location in earlier["inputs"]]
    changed = [name for name in settings if settings[name] != earlier.get(name)]
    if changed:
        raise UserError(
            f"{out} holds another run (other {', '.join(changed)}): choose another --out"
            + (", or --overwrite removes it" if config.part is None else "")
            + (_has_it_moved(earlier["inputs"], settings["inputs"]) if changed == ["inputs"] else "")
        )
    recorded = arithmetics(out)
    wanted = recorded[-1].contradicts(config) if recorded and not config.allow_mixed else ""
    if wanted:
        raise begun_otherwise(recorded[-1], f"{wanted} asks for another")


def _has_it_moved(old: list[str], new: list[str]) -> str:
    """Returns the option for a folder that has another name now, if only one input is another."""
    different = [pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]]
    if len(old) != len(new) or len(different) != 1:
        return ""
    moved = shlex.quote("=".join(different[0]))
    return f", or, if it is the same folder under another name: --moved {moved}"


def moves(out: str, config: PredictConfig) -> list[Move]:
    """Returns which inputs have another name than in the earlier run. Raises UserError if there was none."""
    if config.moved and not storage.exists(storage.join(out, SETTINGS)):
        raise UserError(f"--moved: {out} holds no earlier prediction")
    return [Move.parse(text, _read(out)["inputs"]) for text in config.moved]


def begin(out: str, settings: dict[str, Any], part: Part) -> bool:
    """Writes the settings into `out`, and the record of a part. Returns whether an earlier run had begun in it."""
    if part != WHOLE:
        _record(out, part, **{LISTED: None})
    begun = storage.exists(storage.join(out, SETTINGS))
    earlier = _read(out) if begun else {ARITHMETIC: []}
    if not begun or part == WHOLE or earlier["inputs"] != settings["inputs"]:  # they were moved
        _write(out, {**settings, **({ARITHMETIC: earlier[ARITHMETIC]} if ARITHMETIC in earlier else {})})
    return begun


def arithmetics(out: str) -> list[Arithmetic]:
    """Returns the different arithmetics with which the masks in `out` were made, the first one first."""
    settings = _read(out)
    if ARITHMETIC not in settings:
        return [NOT_RECORDED]
    values = [*settings[ARITHMETIC]]
    for record in _records(out).values():
        values += record.get(ARITHMETIC, [])
    return [*dict.fromkeys(map(Arithmetic.from_json, values))]


def record_arithmetics(out: str, used: list[Arithmetic], part: Part) -> None:
    """Writes the arithmetics of a run, or of one part, into `out`."""
    values = [arithmetic.to_json() for arithmetic in used]
    if part == WHOLE:
        _write(out, {**_read(out), ARITHMETIC: values})
    else:
        _record(out, part, **{ARITHMETIC: values})


def record_done(out: str, part: Part, listed: int) -> None:
    """Records that a part is done. `listed`: its number of images."""
    _record(out, part, **{LISTED: listed})


def listed_by_parts(out: str) -> dict[int, int]:
    """Returns number -> images of each part that is done."""
    return {number: record[LISTED] for number, record in _records(out).items() if record.get(LISTED) is not None}


def _record(out: str, part: Part, **values: Any) -> None:
    location = storage.join(out, *PARTS.split("/"), f"{part.number}.json")
    known = json.loads(storage.read_bytes(location)) if storage.exists(location) else {}
    storage.write_bytes(location, json.dumps({**known, **values}).encode(), durable=True)


def _records(out: str) -> dict[int, dict[str, Any]]:
    """Returns number -> record of each part that has begun."""
    folder = storage.join(out, *PARTS.split("/"))
    numbers = sorted(int(name.removesuffix(".json")) for name in storage.names_in(folder))
    return {number: json.loads(storage.read_bytes(storage.join(folder, f"{number}.json"))) for number in numbers}


def _read(out: str) -> dict[str, Any]:
    return json.loads(storage.read_bytes(storage.join(out, SETTINGS)))


def _write(out: str, settings: dict[str, Any]) -> None:
    storage.write_bytes(storage.join(out, SETTINGS), (json.dumps(settings, indent=2) + "\n").encode(), durable=True)


def remove(out: str) -> None:
    """Removes an earlier prediction, except for the lock."""
    for name in (*all_owned_names(), adapt.FOLDER, MANIFEST, SUMMARY, REPORT, WORK):
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


def take_back(out: str, part: Part) -> None:
    """Undoes `begin`, after which nothing else was done: else wrong inputs would refuse the right ones."""
    if part == WHOLE:
        remove(out)
        return
    storage.delete_file(storage.join(out, *PARTS.split("/"), f"{part.number}.json"))
    if not _records(out):
        storage.delete_file(storage.join(out, SETTINGS))
