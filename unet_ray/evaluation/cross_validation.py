"""Cross-validates: trains K models, and scores each on the fold that it was not trained on."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unet_ray.config import EvaluateConfig, TrainConfig, UserError
from unet_ray.data import storage
from unet_ray.evaluation.evaluate import evaluate
from unet_ray.ray_backend.session import Runtime
from unet_ray.training.run import Callbacks, train

FOLDS, SCORES = "folds.json", "scores.json"


@dataclass(frozen=True, slots=True)
class FoldScores:
    """Holds the scores of all folds."""

    out: str
    scores: list[dict[str, Any]]
    """One per fold: `Scores.to_json()` of its best epoch on its held-out images, at each mask's own size."""

    def mean_and_sd(self, name: str) -> tuple[float, float]:
        """Returns mean and sample standard deviation over the folds of a score's mean over images. `name`: the score,
        such as `dice`."""
        values = [scores[name]["mean"] for scores in self.scores]
        return statistics.mean(values), statistics.stdev(values)

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of folds.json."""
        summary = {name: self.mean_and_sd(name) for name in ("dice", "iou", "pixel_accuracy")}
        return {
            **{name: {"mean": mean, "sd": sd} for name, (mean, sd) in summary.items()},
            "folds": self.scores,
        }


def cross_validate(
    config: TrainConfig,
    out: str,
    folds: int,
    *,
    runtime: Runtime = Runtime(),
    resume: bool = False,
    callbacks: Callbacks = Callbacks(),
    on_fold: Callable[[str], None] = lambda _run: None,
    on_scores: Callable[[str, float], None] = lambda _run, _dice: None,
) -> FoldScores:
    """Trains and scores `folds` runs in `out`/fold-1 and so on.

    A fold's best epoch is chosen on the images that then score it. This is common practice and flatters it a little.
    With `resume`, finished folds are kept. `on_fold` receives each run directory before its training starts,
    `on_scores` the run directory and its mean Dice. Raises UserError as `train` does.
    """
    out = storage.absolute(out)
    if folds < 2:
        raise UserError(f"--folds {folds}: 2 or more")
    results = []
    for fold in range(folds):
        run = storage.join(out, f"fold-{fold + 1}")
        path = storage.join(run, SCORES)
        on_fold(run)
        if not (resume and storage.exists(path)):
            data = dataclasses.replace(config.data, folds=folds, fold=fold)
            train(dataclasses.replace(config, data=data), run, runtime=runtime, resume=resume, callbacks=callbacks)
            evaluate_config = EvaluateConfig(model=run, device=config.compute.device, precision=config.train.precision)
            scores = evaluate(evaluate_config, runtime=runtime)
            storage.write_bytes(path, (json.dumps(scores.to_json(), indent=2) + "\n").encode())
        results.append(json.loads(storage.read_bytes(path)))
        on_scores(run, results[-1]["dice"]["mean"])
    summary = FoldScores(out, results)
    storage.write_bytes(storage.join(out, FOLDS), (json.dumps(summary.to_json(), indent=2) + "\n").encode())
    return summary
