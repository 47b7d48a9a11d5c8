"""Bulk image segmentation on Ray: train a U-Net, segment whole folders or buckets, score the result.

Each of four verbs is a function with a typed result and a command of the same name; a Segmenter is for single images:

    unet_ray.train("photos", "photo_masks", "RUN", recipe="carvana-fast")     # unet-ray train
    unet_ray.predict("RUN", "other_photos", "MASKS")                          # unet-ray predict
    unet_ray.evaluate("RUN")                                                  # unet-ray evaluate
    unet_ray.select("RUN", "other_photos", "PICKS", count=20)                 # unet-ray select
    unet_ray.Segmenter("RUN")(image).mask
    unet_ray.export("RUN", "model.onnx")                                      # unet-ray export

Importing this package loads neither torch nor Ray. The first use of one of these names loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unet_ray.api import (
        PredictSummary,
        Scores,
        SegmentedImage,
        Segmenter,
        Selection,
        TrainResult,
        Watch,
        evaluate,
        load_network,
        predict,
        select,
        train,
    )
    from unet_ray.config import UserError
    from unet_ray.evaluation.export import export
    from unet_ray.models.milesial import import_milesial
    from unet_ray.report.page import write as write_report


__version__ = "0.1.0"

__all__ = [
    "PredictSummary",
    "Scores",
    "SegmentedImage",
    "Segmenter",
    "Selection",
    "TrainResult",
    "UserError",
    "Watch",
    "evaluate",
    "export",
    "import_milesial",
    "load_network",
    "predict",
    "select",
    "train",
    "write_report",
]

_ELSEWHERE = {
    "UserError": ("config", "UserError"),
    "export": ("evaluation.export", "export"),
    "import_milesial": ("models.milesial", "import_milesial"),
    "write_report": ("report.page", "write"),
}
"""Public name that is not in `api` -> its module, and its name there."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _ELSEWHERE.get(name, ("api", name))
    value = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value  # the next access doesn't come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
