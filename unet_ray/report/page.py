"""Writes report.html: one self-contained page that shows a training run, a prediction or a selection.

Charts are SVG in the page's own text colour, so that they suit light and dark themes. Pictures are small JPEGs, a
bounded number of them, so that the page stays small however large the run is.
"""

from __future__ import annotations

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.data.progress import OnProgress
from unet_ray.inference.output_folder import REPORT, SUMMARY
from unet_ray.models import run_files
from unet_ray.ray_backend.session import LOCAL, Runtime
from unet_ray.report.of_prediction import of_prediction
from unet_ray.report.of_run import of_run
from unet_ray.report.of_selection import of_selection
from unet_ray.selection.select import PICKS


def write(
    location: str,
    *,
    runtime: Runtime = LOCAL,
    on_progress: OnProgress = lambda _done, _failed, _all: None,
    allow_code: bool = False,
) -> str:
    """Writes report.html into a run directory, or the output folder of a prediction or selection. Returns its location.

    For a run, it scores up to 128 validation images at their own size: in this process, or through Ray Data with
    `runtime=Runtime(local=False)`. `on_progress` receives (done, failed, all). `allow_code`: see `custom_parts`. Raises
    UserError if `location` is neither.
    """
    location = storage.absolute(location)
    if storage.exists(storage.join(location, run_files.METRICS)):
        page = of_run(location, runtime, on_progress, allow_code)
    elif storage.exists(storage.join(location, SUMMARY)):
        page = of_prediction(location)
    elif storage.exists(storage.join(location, PICKS)):
        page = of_selection(location)
    elif storage.exists(location):
        raise UserError(
            f"{location}: no finished training, prediction or selection (--out of `train`, `predict`, `select`)"
        )
    else:
        raise UserError(f"{location}: no such folder")
    path = storage.join(location, REPORT)
    storage.write_bytes(path, page.encode())
    return path
