"""Segments batches of images, or one image of any size tile by tile, with the network of a model directory.

Legend: N images, C channels, K classes (1 for a single logit), H, W pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from unet_ray.config import UserError
from unet_ray.data import own_size
from unet_ray.data.imaging import Pixels
from unet_ray.inference import backends
from unet_ray.inference.arithmetic import Arithmetic
from unet_ray.inference.certainty import Certainty
from unet_ray.inference.tiles import Band, Grid
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.device import check_gpu, keep_freed_memory, run_network

TURNS, TURNS_SECONDS = 10, 5.0
"""How often networks are timed at most, and the seconds after which no further turn begins."""


@dataclass(frozen=True, slots=True)
class Segmentation:
    """Holds the network's output for a batch of images at the model's size."""

    logits: np.ndarray
    """float16 [N,K,H,W]: half the bytes of float32 on the way to the stage that writes. Signs are kept exactly."""
    confidence: np.ndarray
    """float32 [N]: probability of the decided class, averaged over the pixels; NaN where a score is not finite."""
    uncertainty: np.ndarray
    """float32 [N], 0 to 1: see `Certainty.uncertainty`."""


@dataclass(frozen=True, slots=True)
class SegmentedMask:
    """Holds the mask of one image at its own size."""

    mask: np.ndarray
    """Class ids, uint8 [H,W]."""
    confidence: float
    """Probability of the decided class, averaged over the pixels; NaN where a score is not finite."""
    uncertainty: float
    """From 0 to 1, see `Certainty.uncertainty`."""
    probabilities: np.ndarray | None
    """uint8 [K,H,W], 255 for certainty; None unless they were asked for."""


class BatchSegmenter:
    """Loads a model once, then segments batch after batch: uint8 [N,H,W,C] at the model's image size -> Segmentation.

    `ensemble`: further models with the same channels, image size and classes; probabilities are averaged. `flips`: axes
    (`h`, `v` or both) along which images are flipped, too, before the probabilities are averaged. `threads`: threads on
    a CPU; None keeps torch's number. `one_by_one`: see `backends.OpenVino`. `allow_code`: see `checkpoint.load_model`.
    Raises UserError if a model does not exist, if the models do not go together, or if this process can't compute in
    this arithmetic.
    """

    def __init__(
        self,
        location: str,
        arithmetic: Arithmetic,
        *,
        ensemble: Sequence[str] = (),
        flips: str = "",
        threads: int | None = None,
        one_by_one: bool = False,
        allow_code: bool = False,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        if arithmetic.device == "cpu":
            keep_freed_memory(of_any_size=True)
        else:
            check_gpu()
        self.device = torch.device(arithmetic.device)
        self.models = [
            backends.load(path, arithmetic, one_by_one=one_by_one, allow_code=allow_code)
            for path in (location, *ensemble)
        ]
        network, self.card = self.models[0]
        self.at_once = network.at_once
        self.cards = [card for _, card in self.models]
        check_ensemble(self.cards, [location, *ensemble])
        # Each view is an image flipped along some axes of NCHW.
        self.views: list[tuple[int, ...]] = [()]
        for axis in (3 * ("h" in flips), 2 * ("v" in flips)):
            self.views += [(*view, axis) for view in self.views if axis]

    @torch.inference_mode()
    def __call__(self, image_NHWC: np.ndarray) -> Segmentation:
        logits, confidence, uncertainty = [], [], []
        with self._without_torchs_threads():
            for output in self._with_room(self._logits, image_NHWC):
                logits.append(output.half().cpu().numpy())
                certainty = Certainty.of(output)
                confidence.append(torch.where(_finite(output), certainty.confidence(), torch.nan).float().cpu().numpy())
                uncertainty.append(certainty.uncertainty().float().cpu().numpy())
        return Segmentation(*map(np.concatenate, (logits, confidence, uncertainty)))

    @contextmanager
    def _without_torchs_threads(self) -> Iterator[None]:
        """Leaves the cores to OpenVINO's threads during a `with` block. Torch's go on spinning for some milliseconds
        after each operation that they shared: beside them an image of 0.56 GFLOP took 1.4 times as long on two cores,
        one of 3.2 GFLOP 1.2 times."""
        threads = torch.get_num_threads()
        try:
            if isinstance(self.models[0][0], backends.OpenVino):
                torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def embed(self, image_NHWC: np.ndarray) -> np.ndarray:
        """Returns what the first network's deepest layer sees in images, float32 [N,D], see
        `SegmentationModel.embedding`. Its arithmetic must be torch's."""
        network = self.models[0][0]
        assert isinstance(network, backends.Torch), "OpenVINO gives no inner layers"
        images = torch.from_numpy(np.require(image_NHWC, requirements=["C", "W"])).to(self.device)
        return torch.cat([network.embed(image[None]) for image in images.permute(0, 3, 1, 2)]).cpu().numpy()

    def _with_room(self, logits_of: Callable[[np.ndarray], Tensor], image_NHWC: np.ndarray) -> Iterator[Tensor]:
        """Yields logits [n,K,h,w] for at most `at_once` images at a time. If the GPU's memory runs out, it halves
        `at_once` and continues."""
        start = 0
        while start < len(image_NHWC):
            # Ray's batches are read-only views of shared memory. Torch needs writable arrays, so those are copied.
            images = np.require(image_NHWC[start : start + self.at_once], requirements=["C", "W"])
            try:
                output = logits_of(images)
            except torch.OutOfMemoryError:
                if len(images) == 1:
                    height, width = images.shape[1:3]
                    raise UserError(
                        f"the GPU has no room for one image of {width}x{height}: use a smaller --tile, fewer models in "
                        "--ensemble, or --device cpu"
                    ) from None
                self.at_once = len(images) // 2
            else:
                start += len(images)
                yield output

    def _logits(self, image_NHWC: np.ndarray) -> Tensor:
        """Returns logits float32 [N,K,H,W] on the device. For several models or views, they are the logits of the mean
        probability."""
        image = torch.from_numpy(image_NHWC).to(self.device, non_blocking=True)
        outputs = []
        for model, card in self.models:
            for view in self.views:
                # Flipped as NHWC, so that the network's input stays channels_last.
                seen = image.flip([axis - 1 for axis in view]) if view else image
                output = run_network(model, seen, card.model, card.data)
                outputs.append(output.flip(view) if view else output)
        if len(outputs) == 1:
            return outputs[0]
        if self.card.model.num_classes == 1:
            return torch.stack([output.sigmoid() for output in outputs]).mean(dim=0).logit(eps=1e-6)
        return torch.stack([output.softmax(dim=1) for output in outputs]).mean(dim=0).clamp_min(1e-6).log()

    @torch.inference_mode()
    def by_tiles(
        self, pixels: Pixels, tile: int, overlap: float, threshold: float, *, probabilities: bool
    ) -> SegmentedMask:
        """Segments one image at its own size, in tiles of `tile` pixels a side.

        `threshold`: see `ModelCard`. `overlap`: the share of a tile's side that the next tile covers, too. The logits
        of overlapping tiles are averaged with Gaussian weights (as nnU-Net does). An unpadded network needs no overlap:
        its tiles are exact. The image is mirrored at its edges. Memory holds the image, its mask and one row of tiles.
        """
        height, width = pixels.size_hw
        classes = self.card.model.num_classes
        mask = np.empty((height, width), np.uint8)
        maps = np.empty((classes, height, width), np.uint8) if probabilities else None
        certainty: Certainty | None = None
        finite = True
        with self._without_torchs_threads():
            for top, logits in self._bands(pixels, tile, overlap):
                bottom = top + logits.shape[1]
                planes = logits.cpu().numpy()
                mask[top:bottom] = own_size.decide(planes, classes, threshold)
                here = Certainty.of(logits[None])
                certainty = here if certainty is None else certainty + here
                finite = finite and bool(_finite(logits[None]))
                if maps is not None:
                    maps[:, top:bottom] = own_size.to_probabilities(planes)
        assert certainty is not None, "an image has a row"
        confidence = float(certainty.confidence()) if finite else np.nan
        return SegmentedMask(mask, confidence, float(certainty.uncertainty()), maps)

    def _bands(self, pixels: Pixels, tile: int, overlap: float) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, logits float32 [K,h,W]) of bands of the image from top to bottom."""
        grid = Grid.of(self.card.model, pixels.size_hw, tile, overlap, self.device)
        band = Band(grid, self.card.model.num_classes)
        margin, at_once = self.card.model.margin, self.at_once
        for number, top in enumerate(grid.rows.starts):
            rows = grid.rows.window(top, margin)
            for first in range(0, len(grid.columns.starts), at_once):
                lefts = grid.columns.starts[first : first + at_once]
                windows = [pixels.window(rows, grid.columns.window(left, margin)) for left in lefts]
                tiles = chain.from_iterable(self._with_room(self._tile_logits, np.stack(windows)))
                for left, logits in zip(lefts, tiles, strict=True):
                    band.add(left, logits)
            yield from band.pop_complete_rows(number)

    def _tile_logits(self, image_NHWC: np.ndarray) -> Tensor:
        """Returns logits [N,K,T,T] of windows: tiles of T pixels a side with the network's margin around them."""
        if self.card.model.margin == 0:
            return self._logits(image_NHWC)
        image = torch.from_numpy(image_NHWC).to(self.device).permute(0, 3, 1, 2)
        return torch.stack([model(image) for model, _ in self.models]).mean(dim=0)


def _finite(logits_NKHW: Tensor) -> Tensor:
    """Returns which images have finite scores only, bool [N].

    A training that went wrong, or fp16 that overflowed, gives others. Decided, they would be black masks.
    """
    planes = logits_NKHW.flatten(1)
    finite = planes.sum(dim=1).isfinite()  # a seventh of the time that `isfinite` of each score takes
    return finite if finite.all() else planes.isfinite().all(dim=1)  # a sum of finite scores may overflow, too


def check_ensemble(cards: Sequence[ModelCard], names: Sequence[str]) -> None:
    """Raises UserError unless all models take the same images and have the same classes."""
    for card, name in zip(cards[1:], names[1:], strict=True):
        for what, one, other in (
            ("channels", card.model.in_channels, cards[0].model.in_channels),
            ("image size", card.image_size, cards[0].image_size),
            ("number of classes", card.model.num_classes, cards[0].model.num_classes),
            ("value range", card.value_range, cards[0].value_range),
        ):
            if one != other:
                raise UserError(f"--ensemble {name}: its {what} is {one}, that of {names[0]} {other}")


def shortest_times(segmenters: Sequence[BatchSegmenter], image_NHWC: np.ndarray) -> list[float]:
    """Returns the shortest time in seconds that each segmenter takes for a batch, uint8 [N,H,W,C].

    They take turns, so that other programs on this machine disturb all alike.
    """
    shortest, begun = [math.inf] * len(segmenters), time.perf_counter()
    for turn in range(1 + TURNS):
        if turn > 1 and time.perf_counter() - begun > TURNS_SECONDS:
            break
        for number, segmenter in enumerate(segmenters):
            started = time.perf_counter()
            segmenter(image_NHWC)
            if turn:  # the first one prepares
                shortest[number] = min(shortest[number], time.perf_counter() - started)
    return shortest
