"""Tells whether a trained network finds what it was trained for, and if not, why that is likely so."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from unet_ray.config import IGNORE, TrainConfig, UserError
from unet_ray.data.darkness import NEARLY_BLACK
from unet_ray.data.inputs import evenly
from unet_ray.data.pairs import Pair
from unet_ray.data.rows import Decoder

SAMPLE = 64
NOTHING = 0.001
"""A network that finds less than this share of the foreground of all validation images finds nothing."""
SMALL = 0.001
"""Objects that cover a smaller share of the pixels, at the network's size, are easily lost."""
FEW_STEPS = 100


def share_found(val_counts: Sequence[Sequence[int]]) -> float | None:
    """Returns the share of the validation images' foreground that was found; None if they have none. `val_counts`: as
    in metrics.jsonl, [K,3]."""
    counts = np.array(val_counts)
    counts = counts[1:] if len(counts) > 1 else counts
    found, missed = int(counts[:, 0].sum()), int(counts[:, 2].sum())
    return found / (found + missed) if found + missed else None


def why_nothing(
    pairs: Sequence[Pair], config: TrainConfig, found_share: float | None, steps: int
) -> tuple[str, bool] | None:
    """Returns the likely reason why the network finds nothing, and whether it lies in the data or the settings, rather
    than in the split or a short training. None: it finds something.

    `pairs`: those that were trained on, of which `SAMPLE` are read. `steps`: how many optimizer steps were done.
    """
    if found_share is not None and found_share >= NOTHING:
        return None
    decoder = Decoder.of(config)

    def seen(pair: Pair) -> tuple[int, float] | None:
        try:
            row = decoder(pair.image, pair.mask)
        except UserError:
            return None
        ids = row["mask"]
        return int(row["image"].max(initial=0)), float(np.mean((ids > 0) & (ids != IGNORE)))

    with ThreadPoolExecutor() as threads:
        found = [each for each in threads.map(seen, evenly(pairs, SAMPLE)) if each]
    tops, shares = [top for top, _ in found], [share for _, share in found]
    size = "x".join(map(str, config.data.size_hw))
    if found and not max(shares):
        meaning = config.data.mask_colors or config.data.mask_values
        remedy = "`unet-ray doctor` prints the values that occur"
        return f"no pixel of {len(found)} training masks is foreground, with values {_shown(meaning)}: {remedy}", True
    if found and max(tops) <= NEARLY_BLACK:
        remedy = "`unet-ray doctor` prints the data.value_range that fits"
        return f"no value of {len(found)} training images is above {max(tops)} of 255: {remedy}", True
    if found_share is None:
        return "no validation image has foreground, so its score means nothing: try another --seed or --split", False
    small = np.mean([share for share in shares if share]) if found else 1.0
    if small < SMALL:
        return (
            f"what there is to find covers {small:.2%} of the pixels at {size}: raise --image-size, or --set "
            "train.loss=focal+dice"
        ), True
    if steps < FEW_STEPS:
        return f"the network finds nothing yet, after {steps} steps: raise --epochs", False
    return "neither masks nor images look wrong: lower --lr, or train longer", True


def _shown(meaning: Sequence[object] | None) -> str:
    return ", ".join(str([*each]) if isinstance(each, tuple) else str(each) for each in meaning or ())
