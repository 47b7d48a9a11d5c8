"""Measures how far apart the edges of two masks are: Hausdorff distances and surface Dice."""

from __future__ import annotations

import numpy as np

from unet_ray.config import IGNORE

SURFACE = ("hd95", "hd95_pooled", "surface_dice")
"""Names of the scores in the columns of `surface_scores`."""


def surface_distances(predicted: np.ndarray, ground_truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distance in pixels from each edge pixel of one region, bool [H,W], to the nearest of the other.

    The result is float64 [P] from predicted to ground truth, and [T] back; both are empty if either region is. An edge
    pixel has a side neighbour outside its region or outside the image, as in MONAI's `get_mask_edges`.
    """
    from scipy.spatial import KDTree  # imported here because prediction does not need it and should start fast

    edges = [np.argwhere(_edge(region)) for region in (predicted, ground_truth)]
    if not (len(edges[0]) and len(edges[1])):
        return np.empty(0), np.empty(0)
    return KDTree(edges[1]).query(edges[0])[0], KDTree(edges[0]).query(edges[1])[0]


def _edge(region: np.ndarray) -> np.ndarray:
    padded = np.pad(region, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return region & ~inside


def surface_scores(predicted: np.ndarray, ground_truth: np.ndarray, num_classes: int, tolerance: float) -> np.ndarray:
    """Computes the `SURFACE` scores of each class, float64 [K,3], from class ids, uint8 [H,W].

    hd95: 95 % Hausdorff distance in pixels, the larger of the 95th percentiles of the two directions (MONAI's and
    DeepMind's). hd95_pooled: the 95th percentile of the distances of both directions together (medpy's). Both are NaN
    if either region is empty. surface_dice: the share of both edges' pixels that lie within `tolerance` pixels of the
    other edge (Nikolov et al. 2018, counting pixels as MONAI does); 0 if one region is empty, NaN if both are. Pixels
    that are `IGNORE` in the ground truth belong to no region.
    """
    valid = ground_truth != IGNORE
    scores = np.full((num_classes, len(SURFACE)), np.nan)
    for k in range(num_classes):
        class_id = 1 if num_classes == 1 else k
        regions = [(ids == class_id) & valid for ids in (predicted, ground_truth)]
        forward, backward = surface_distances(*regions)
        if len(forward):
            scores[k, 0] = max(np.percentile(forward, 95), np.percentile(backward, 95))
            pooled = np.concatenate([forward, backward])
            scores[k, 1] = np.percentile(pooled, 95)
            scores[k, 2] = (pooled <= tolerance).mean()
        elif regions[0].any() or regions[1].any():
            scores[k, 2] = 0.0
    return scores
