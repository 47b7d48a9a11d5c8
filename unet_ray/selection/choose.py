"""Chooses images by the network's uncertainty, divided over what they show, and spread out among lookalikes.

Legend: N images, K classes with the background, D numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NOTHING = 0
"""Stratum of the images in which nothing was found; the others have the class id after which they are named."""
CANDIDATES = 2048
"""The most images of a group that are compared with each other, unless more are to be chosen."""
DIGITS = 4
"""Uncertainties are rounded to so many digits: sums in another order, with other threads, must not change a choice."""


@dataclass(frozen=True, slots=True)
class Stratum:
    """Holds the candidates among images that show the same."""

    shows: int
    """The class that fewest images show of those that these show; or `NOTHING`."""
    seats: int
    """How many of them are to be chosen."""
    rows: np.ndarray
    """Places of the candidates among all images, int64, sorted."""


def classes_shown(pixels_NK: np.ndarray) -> np.ndarray:
    """Returns which classes each image shows, bool [N,K]. `pixels_NK`: number of pixels of each class."""
    shown = pixels_NK > 0
    shown[:, 0] = False  # the background is everywhere
    return shown


def shown_classes(presence_NK: np.ndarray, images_of_class: np.ndarray) -> np.ndarray:
    """Returns the stratum of each image, int64 [N]. `images_of_class`: how many images show each class, int [K]."""
    rarest_first = np.argsort(images_of_class, kind="stable")
    first = presence_NK[:, rarest_first].argmax(axis=1)
    return np.where(presence_NK.any(axis=1), rarest_first[first], NOTHING)


def divided(uncertainty: np.ndarray, shows: np.ndarray, count: int) -> list[Stratum]:
    """Divides `count` seats over the strata, and returns the candidates for them.

    A stratum has seats in proportion to the sum of its images' uncertainties: a rare class of which the network is
    unsure has more than its share of the images, and images in which it surely finds nothing have few.
    `uncertainty`: float [N]; `shows`: the stratum of each image, int [N].
    """
    uncertainty = np.round(uncertainty.astype(np.float64), DIGITS)
    strata = np.unique(shows)
    sizes = np.array([(shows == stratum).sum() for stratum in strata])
    weights = np.array([uncertainty[shows == stratum].sum() for stratum in strata])
    found = []
    for stratum, seats in zip(strata.tolist(), _seats(weights, sizes, count), strict=True):
        if seats:
            rows = np.flatnonzero(shows == stratum)
            found.append(Stratum(stratum, seats, _candidates(rows, uncertainty[rows], max(seats, CANDIDATES))))
    return found


def _candidates(rows: np.ndarray, uncertainty: np.ndarray, most: int) -> np.ndarray:
    """Returns at most so many of the rows, sorted: half of them the most uncertain, half evenly spaced among the
    others, as `spread` weighs both."""
    if len(rows) <= most:
        return rows
    order = np.argsort(-uncertainty, kind="stable")  # of equal ones the first in the listing
    half = most // 2
    others = np.sort(order[half:])
    even = others[np.arange(most - half) * len(others) // (most - half)]
    return rows[np.sort(np.concatenate([order[:half], even]))]


def _seats(weights: np.ndarray, sizes: np.ndarray, count: int) -> list[int]:
    """Divides seats in proportion to the weights by largest remainders, no more than `sizes`. Without any weight, in
    proportion to the sizes."""
    seats = np.zeros(len(sizes), np.int64)
    count = min(count, int(sizes.sum()))
    while (left := count - int(seats.sum())) > 0:  # again, if a stratum had less room than its share
        room = sizes - seats
        share = np.where(room > 0, weights, 0.0)
        share = share if share.sum() else room.astype(np.float64)
        exact = np.round(left * share / share.sum(), 9)
        given = np.floor(exact).astype(np.int64)
        most = np.argsort(given - exact, kind="stable")[: left - int(given.sum())]
        given[most] += share[most] > 0
        seats += np.minimum(given, room)
    return seats.tolist()


def spread(uncertainty: np.ndarray, embedding_ND: np.ndarray, seats: int) -> list[int]:
    """Chooses candidates one after the other, so that they stand for all of them. Returns their places, in this order.

    An image is covered as far as a chosen one looks like it: by the cosine between their embeddings, from which the
    candidates' mean is taken. Next comes always the image that covers most anew (the greedy way to a facility
    location's optimum; Nemhauser, Wolsey and Fisher 1978). Each image counts with its uncertainty plus the mean of all:
    a network that has seen few labels is a poor guide to what it lacks, and what is typical then teaches it more
    (Hacohen, Dekel and Weinshall 2022). Copies of a chosen image come last, and so does an odd one that stands for no
    other.
    """
    sure = np.round(uncertainty.astype(np.float64), DIGITS)
    weight = (sure + sure.mean()).astype(np.float32) if len(sure) else sure.astype(np.float32)
    centred = embedding_ND.astype(np.float64) - embedding_ND.mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    likeness = np.round(np.maximum(0, unit @ unit.T), DIGITS).astype(np.float32)
    covered = np.zeros(len(weight), np.float32)
    chosen: list[int] = []
    for _ in range(min(seats, len(weight))):
        value = np.round(np.maximum(0, likeness - covered) @ weight, DIGITS)
        value[chosen] = -1
        best = int(np.lexsort((-weight, -value))[0])  # of equal ones the most uncertain, then the first in the listing
        chosen.append(best)
        covered = np.maximum(covered, likeness[best])
    return chosen


def merged(orders: Sequence[Sequence[int]]) -> list[int]:
    """Merges the orders of several strata so that any beginning of the list is divided as the whole is."""
    places = [
        ((step + 0.5) / len(order), number, row)
        for number, order in enumerate(orders)
        for step, row in enumerate(order)
    ]
    return [row for _, _, row in sorted(places)]
