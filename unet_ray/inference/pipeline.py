"""Makes masks for prediction and evaluation: of whole images at the model's size, or of tiles."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from unet_ray.config import Cleanup, MaskOptions, PredictConfig, UserError
from unet_ray.data import storage
from unet_ray.data.chunks import Chunk, Stage, objects
from unet_ray.data.imaging import Source
from unet_ray.inference.arithmetic import Arithmetic, Machine
from unet_ray.inference.backends import MOST_STREAMS
from unet_ray.inference.choose_arithmetic import Work, choose
from unet_ray.inference.chunk_size import RowCost, chunks_per_block
from unet_ray.inference.local import run_here
from unet_ray.inference.reader import GivenReader, Reader
from unet_ray.inference.segmenter import BatchSegmenter, shortest_times
from unet_ray.inference.stages import (
    DecodeImages,
    Load,
    MaskSink,
    MasksToSink,
    Prediction,
    Preprocess,
    Segment,
    SegmentByTiles,
    ToOwnSize,
    unchanged,
)
from unet_ray.inference.tiles import Grid
from unet_ray.models import checkpoint, compiling
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.device import device_here
from unet_ray.models.operations import floating_point_operations
from unet_ray.models.tiles import mirrored
from unet_ray.ray_backend.session import Runtime

if TYPE_CHECKING:
    from unet_ray.ray_backend.inference import Pool

READ_SECONDS = 0.0065
"""Seconds to read an image and write its mask, measured on two cores with photographs of 512x512 pixels."""


Settle = Callable[[Work], Arithmetic]
"""Chooses the arithmetic of some work. Raises UserError."""


@dataclass(frozen=True)
class Pipeline(ABC):
    """Makes masks with one model, in three stages. `resolve.pipeline_of` chooses the subclass."""

    model: str
    """The model directory."""
    card: ModelCard
    cleanup: Cleanup
    cleanup_text: str
    options: MaskOptions
    others: tuple[ModelCard, ...] = ()
    """The cards of the ensemble's other models."""
    arithmetic: Arithmetic | None = None
    """With what the network computes; None until it is chosen for the machines that will run it."""

    @abstractmethod
    def row_cost(self) -> RowCost:
        """Returns the cost of an image, which determines the size of chunks."""

    @abstractmethod
    def preprocess(self, load: Load) -> Callable[[int], Chunk]:
        """Returns the stage before the model's."""

    @abstractmethod
    def segment(self, segmenter: BatchSegmenter, sink: MaskSink, *, probabilities: bool) -> Stage:
        """Returns the model's stage."""

    @abstractmethod
    def postprocess(self, sink: MaskSink, *, probabilities: bool) -> Stage:
        """Returns the stage after the model's."""

    @abstractmethod
    def each(
        self, segmenter: BatchSegmenter, images: Sequence[Source | str], *, probabilities: bool
    ) -> Iterator[Prediction]:
        """Segments images in this process. Yields the mask of each, or the reason of the failure; `images` may have
        that in the place of an image."""

    @abstractmethod
    def network_input(self, image: Source | str) -> np.ndarray:
        """Returns an image as the network gets it, uint8 [1,H,W,C]; of several tiles the middle one. Raises
        ImageError."""

    def of_model(self, model: str) -> Pipeline:
        """Returns the pipeline with another model directory, of a copy of the model with other weights."""
        weights = checkpoint.read_card(model).weights_sha256
        return dataclasses.replace(self, model=model, card=dataclasses.replace(self.card, weights_sha256=weights))

    def reader(self) -> Reader:
        column = self.options.column if isinstance(self.options, PredictConfig) else None
        return Reader.of(self.card, self.options.max_pixels, column)

    def segmenter(self, threads: int | None = None, *, one_by_one: bool = False) -> BatchSegmenter:
        """Loads the network. The arithmetic must be chosen. `threads`, `one_by_one`: see BatchSegmenter. Raises
        UserError if a model has other weights than when its card was read."""
        assert self.arithmetic is not None, "call chosen_here, or run"
        segmenter = BatchSegmenter(
            self.model,
            self.arithmetic,
            ensemble=self.options.ensemble,
            flips=self.card.flips if self.options.tta else "",
            threads=threads,
            one_by_one=one_by_one,
            allow_code=self.options.allow_code,
        )
        for location, read, loaded in zip(
            (self.model, *self.options.ensemble), (self.card, *self.others), segmenter.cards, strict=False
        ):
            if read.weights_sha256 != loaded.weights_sha256:
                where = storage.without_secrets(location)
                raise UserError(
                    f"{where} was replaced while it was in use: put the old one back, then give the command again"
                )
        return segmenter

    def chosen_here(self, images: int = 0, settle: Settle = choose) -> Pipeline:
        """Returns the pipeline with the arithmetic for this process. Raises UserError, as `settle` does."""
        device = device_here(self.options.device, self.options.workers).type
        return self._chosen(device, [Machine.here(device)], images, None, settle, self.times)

    def times(self, ways: Sequence[Arithmetic], threads: int | None = None) -> list[float]:
        """Returns the seconds that an image takes with each arithmetic in this process."""
        tile, before = self.options.tile, torch.get_num_threads()
        count = min(threads or before, MOST_STREAMS)  # so that each thread has an image
        shape = (count, *((tile, tile) if tile else self.card.image_size), self.card.model.in_channels)
        noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        try:
            segmenters = [dataclasses.replace(self, arithmetic=way).segmenter(threads) for way in ways]
            return [seconds / count for seconds in shortest_times(segmenters, noise)]
        finally:
            torch.set_num_threads(before)

    def _chosen(
        self,
        device: str,
        machines: Sequence[Machine],
        images: int,
        threads: int | None,
        settle: Settle,
        times: Callable[[Sequence[Arithmetic]], Sequence[float]],
    ) -> Pipeline:
        if self.arithmetic is not None:
            return self
        if not machines:
            raise UserError("no node of the cluster said within two minutes what it can compute with: try again")
        models = (self.model, *self.options.ensemble)
        work = Work(models, self.card, self.options, device, tuple(machines), images, threads, times)
        return dataclasses.replace(self, arithmetic=settle(work))

    def run(
        self,
        numbers: Sequence[int],
        load: Load,
        sink: MaskSink,
        *,
        images: int,
        again: bool = False,
        probabilities: bool = False,
        shared: Mapping[str, str],
        runtime: Runtime,
        settle: Settle = choose,
    ) -> Generator[Chunk, None, None]:
        """Runs the chunks with these numbers through the stages. Yields what `sink` returns of each chunk, in the order
        in which chunks are done.

        `images`: number of images, with those of earlier runs. `again`: the run has had masks already, so it goes on
        with as many replicas as still fit. `shared`: files that all nodes must see beside the model, in the form of
        `shared_files.check_shared`. `settle` chooses the arithmetic, once, before the first mask.
        """
        if not numbers:
            return
        preprocess, postprocess = self.preprocess(load), self.postprocess(sink, probabilities=probabilities)
        if runtime.local:
            model = ModelStage(self.chosen_here(images, settle), sink, probabilities)
            yield from run_here(numbers, preprocess, model, postprocess)
            return
        with runtime.started():
            from unet_ray.ray_backend.data_context import configure
            from unet_ray.ray_backend.inference import pool_of_replicas, run_on_cluster
            from unet_ray.ray_backend.shared_files import check_shared

            configure(runtime.verbose)
            pool = pool_of_replicas(self.options.workers, self.options.device, again=again)
            check_shared({**shared, "MODEL": storage.join(self.model, checkpoint.CARD)})
            chosen = self._chosen_on(pool, images, settle)
            pool = chosen._fitting(pool, len(numbers))
            model = ModelStage(chosen, sink, probabilities)
            each = chunks_per_block(len(numbers), self.row_cost(), pool.replicas, pool.device)
            yield from run_on_cluster(numbers, preprocess, model, postprocess, pool=pool, each=each)

    def _chosen_on(self, pool: Pool, images: int, settle: Settle) -> Pipeline:
        """Returns the pipeline with the arithmetic for the nodes of a cluster. Raises UserError, as `settle` does."""
        from unet_ray.ray_backend import nodes

        needs = pool.least if self._may_take_each_core else pool.bundle
        machines = [machine for _, machine in nodes.answers(partial(Machine.here, pool.device), needs)]

        def times(ways: Sequence[Arithmetic]) -> list[float]:
            """Of all nodes, since one way is chosen for all."""
            question = partial(self.times, ways, pool.threads)
            of_nodes = nodes.answers(question, needs, nodes.runtime_env(pool.device))
            complete = len(of_nodes) == len(machines)
            return [sum(seconds[way] for _, seconds in of_nodes) for way in range(len(ways))] if complete else []

        return self._chosen(pool.device, machines, images // pool.replicas, pool.threads, settle, times)

    @property
    def _may_take_each_core(self) -> bool:
        """Whether replicas of one thread may do the work: an image that is cut into tiles should have several."""
        return not (self.options.tile or self.options.workers)

    def _fitting(self, pool: Pool, chunks: int) -> Pool:
        """Returns the pool for the arithmetic that was chosen. OpenVINO takes each image on one thread, so it gives the
        same masks with a replica on each core."""
        from unet_ray.ray_backend.inference import on_each_core

        openvino = self.arithmetic is not None and self.arithmetic.backend == "openvino"
        return on_each_core(pool, chunks) if openvino and self._may_take_each_core else pool


@dataclass(frozen=True, slots=True)
class ModelStage:
    """Builds the model's stage, in the process that runs it."""

    pipeline: Pipeline
    sink: MaskSink
    probabilities: bool

    def __call__(self, threads: int | None = None) -> Stage:
        """Loads the network and returns the stage."""
        segmenter = self.pipeline.segmenter(threads)
        return self.pipeline.segment(segmenter, self.sink, probabilities=self.probabilities)


class WholeImagePipeline(Pipeline):
    """Resizes images to the model's size, and the masks back to the image's own."""

    def row_cost(self) -> RowCost:
        """Returns the cost of an image; its bytes are those of the image (uint8) or of the logits (float16), whichever
        are more."""
        height, width = self.card.image_size
        size = height * width * max(self.card.model.in_channels, 2 * self.card.model.num_classes)
        operations = floating_point_operations(self.card.model, self.card.image_size)
        return RowCost(size, READ_SECONDS + compiling.estimated_seconds(operations, "cpu", threads=2))

    def preprocess(self, load: Load) -> Preprocess:
        return Preprocess(load, DecodeImages(self.reader(), self.card.image_size))

    def segment(self, segmenter: BatchSegmenter, sink: MaskSink, *, probabilities: bool) -> Stage:  # noqa: ARG002
        return Segment(segmenter)

    def postprocess(self, sink: MaskSink, *, probabilities: bool) -> MasksToSink:
        return MasksToSink(ToOwnSize(self.card, self.cleanup, probabilities), sink)

    def each(
        self, segmenter: BatchSegmenter, images: Sequence[Source | str], *, probabilities: bool
    ) -> Iterator[Prediction]:
        decode = DecodeImages(GivenReader.of(self.reader(), images), self.card.image_size)
        to_own_size = ToOwnSize(self.card, self.cleanup, probabilities)
        return to_own_size(Segment(segmenter)(decode(_without_paths(images))))

    def network_input(self, image: Source | str) -> np.ndarray:
        model, size_hw = self.card.model, self.card.image_size
        pixels, _ = self.reader().resized(image, size_hw)
        side, margin = self.card.tile if model.padding == "valid" else 0, model.margin
        rows, columns = (
            mirrored(((length - side) // 2 if side else 0) - margin, (side or length) + 2 * margin, length)
            for length in size_hw
        )
        return pixels[rows][:, columns][None]


def _without_paths(images: Sequence[Source | str]) -> Chunk:
    return {"path": objects([b""] * len(images))}


class TilePipeline(Pipeline):
    """Segments images at their own size, tile by tile, see `stages.SegmentByTiles`."""

    def row_cost(self) -> RowCost:
        return RowCost(1, math.inf)  # only paths pass between the stages, and an image may have any size

    def preprocess(self, load: Load) -> Load:
        return load

    def segment(self, segmenter: BatchSegmenter, sink: MaskSink, *, probabilities: bool) -> Stage:
        return MasksToSink(self._by_tiles(segmenter, self.reader(), probabilities), sink)

    def postprocess(self, sink: MaskSink, *, probabilities: bool) -> Stage:  # noqa: ARG002
        return unchanged

    def each(
        self, segmenter: BatchSegmenter, images: Sequence[Source | str], *, probabilities: bool
    ) -> Iterator[Prediction]:
        return self._by_tiles(segmenter, GivenReader.of(self.reader(), images), probabilities)(_without_paths(images))

    def network_input(self, image: Source | str) -> np.ndarray:
        pixels = self.reader().pixels(image)
        model, options = self.card.model, self.options
        grid = Grid.of(model, pixels.size_hw, options.tile, options.overlap, torch.device("cpu"))
        rows, columns = (
            axis.window(axis.starts[len(axis.starts) // 2], model.margin) for axis in (grid.rows, grid.columns)
        )
        return pixels.window(rows, columns)[None]

    def _by_tiles(self, segmenter: BatchSegmenter, reader: Reader, probabilities: bool) -> SegmentByTiles:
        return SegmentByTiles(
            segmenter=segmenter,
            reader=reader,
            cleanup=self.cleanup,
            tile=self.options.tile,
            overlap=self.options.overlap,
            threshold=self.card.threshold,
            probabilities=probabilities,
        )
