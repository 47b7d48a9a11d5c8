"""Scores predictions: counts first, ratios last."""

from unet_ray.metrics.bootstrap import bootstrap_interval
from unet_ray.metrics.comparison import Comparison, compare
from unet_ray.metrics.counts import NOTHING, RATIOS, count, dice, image_mean, iou, pixel_accuracy, precision, recall
from unet_ray.metrics.scores import LABELS, ImageScores, Score, Scores, score
from unet_ray.metrics.surface import SURFACE, surface_distances, surface_scores

__all__ = [
    "LABELS",
    "NOTHING",
    "RATIOS",
    "SURFACE",
    "Comparison",
    "ImageScores",
    "Score",
    "Scores",
    "bootstrap_interval",
    "compare",
    "count",
    "dice",
    "image_mean",
    "iou",
    "pixel_accuracy",
    "precision",
    "recall",
    "score",
    "surface_distances",
    "surface_scores",
]
