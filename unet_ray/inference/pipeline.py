"""How masks are made: what prediction and evaluation share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from unet_ray.config import Cleanup, MaskOptions, UserError
from unet_ray.data import storage
from unet_ray.data.chunks import Chunk, Stage, objects
from unet_ray.inference.ledger import RowCost
from unet_ray.inference.reader import Reader
from unet_ray.inference.segmenter import BatchSegmenter, check_ensemble
from unet_ray.inference.stages import (
    AtOwnSize,
    Decode,
    Finish,
    Load,
    Prediction,
    Preprocess,
    Segment,
    SegmentByTiles,
    run_here,
)
from unet_ray.models import checkpoint, compiling
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.device import device_here
from unet_ray.ray_backend.session import Runtime

READ_SECONDS = 0.0065
"""For reading an image and writing its mask: two cores and photographs of 512x512 measured."""

OnProgress = Callable[[int, int, int], None]
"""(done, failed, all) images; `all` is 0 as long as they are being listed, and `done` then what was found."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How masks are made: what prediction and evaluation share."""

    model: str
    card: ModelCard
    cleanup: Cleanup
    cleanup_text: str
    options: MaskOptions
    quantized: str | None = None
    """Stem of the files of the network in int8, where there is one that may be used."""

    @classmethod
    def of(cls, model: str, options: MaskOptions) -> Pipeline:
        """Raises UserError if there is no such model or the options don't go with it."""
        model = checkpoint.model_directory(storage.absolute(model))
        card = checkpoint.read_card(model)
        ensemble = tuple(checkpoint.model_directory(storage.absolute(other)) for other in options.ensemble)
        check_ensemble([card, *map(checkpoint.read_card, ensemble)], [model, *ensemble])
        if options.tile:
            card.model.check_size(options.tile, "--tile")
            if options.tile < 2**card.model.depth:
                raise UserError(f"--tile {options.tile}: at least {2**card.model.depth} for this model")
        if options.tta and card.model.padding == "valid" and options.tile:
            raise UserError("--tta with --tile is for networks with padding=same")
        if options.tta and not card.flips:
            raise UserError(f"--tta: {model} was trained without flips, so it does not know mirrored images")
        text = checkpoint.read_cleanup(model, card) if options.cleanup is None else options.cleanup
        options = dataclasses.replace(options, ensemble=ensemble)
        accepted = checkpoint.read_choice(model, checkpoint.INT8, card)
        if options.precision == "int8":
            if ensemble:
                raise UserError("--precision int8 is for one model: leave --ensemble out")
            if accepted is None:
                raise UserError(f"--precision int8: {model} has no network in int8: see `unet-ray quantize`")
        usable = accepted is not None and not ensemble and options.precision in ("auto", "int8")
        quantized = storage.join(model, accepted["network"]) if accepted is not None and usable else None
        return cls(model, card, Cleanup.parse(text), text, options, quantized)

    def row_cost(self) -> RowCost:
        """Bytes are those of the larger of a row's image (uint8) and its logits (float16) between the stages."""
        if self.options.tile:
            return RowCost(1, 1.0)  # only paths are handed around, and an image may be of any size
        height, width = self.card.image_size
        size = height * width * max(self.card.model.in_channels, 2 * self.card.model.num_classes)
        operations = compiling.floating_point_operations(self.card.model, self.card.image_size)
        return RowCost(size, READ_SECONDS + operations / (2 * compiling.FLOPS["cpu"]))

    def reader(self) -> Reader:
        return Reader.of(self.card, self.options.max_pixels)

    def segmenter(self, *, device: str, threads: int | None = None, images: int = 0) -> BatchSegmenter:
        """The network, loaded. `threads`, `images`: see BatchSegmenter."""
        options = self.options
        return BatchSegmenter(
            self.model,
            ensemble=options.ensemble,
            flips=self.card.flips if options.tta else "",
            device=device,
            precision=options.precision,
            backend=options.backend,
            threads=threads,
            images=images,
            quantized=self.quantized,
        )

    def segment(self, segmenter: BatchSegmenter, reader: Reader, finish: Finish, probabilities: bool) -> Stage:
        """The model's stage; with tiles it also reads, and finishes."""
        options = self.options
        if not options.tile:
            return Segment(segmenter)
        return SegmentByTiles(
            segmenter,
            finish,
            reader=reader,
            cleanup=self.cleanup,
            tile=options.tile,
            overlap=options.overlap,
            probabilities=probabilities,
        )

    def decode(self, reader: Reader) -> Decode | None:
        """The stage before the model's, if it is one of its own."""
        return None if self.options.tile else Decode(reader, self.card.image_size)

    def after(self, finish: Finish, probabilities: bool) -> Stage:
        """The stage after the model's."""
        if self.options.tile:
            return _unchanged
        return AtOwnSize(finish, self.card, self.cleanup, probabilities)

    def one(self, segmenter: BatchSegmenter, path: str, reader: Reader, probabilities: bool) -> Prediction:
        """The mask of one image, or why there is none, in this process."""
        found: list[Prediction] = []

        def keep(chunk: Chunk, predictions: Iterator[Prediction]) -> Chunk:
            found.extend(predictions)
            return chunk

        chunk = {"path": objects([os.fsencode(path)])}
        decode = self.decode(reader)
        segmented = self.segment(segmenter, reader, keep, probabilities)(decode(chunk) if decode else chunk)
        self.after(keep, probabilities)(segmented)
        return found[0]

    def run(
        self,
        numbers: Sequence[int],
        load: Load,
        finish: Finish,
        *,
        images: int,
        probabilities: bool = False,
        shared: Mapping[str, str],
        runtime: Runtime,
    ) -> Iterator[Chunk]:
        """Chunks through decode, model and `finish`; yields what that returns, as chunks are finished.

        `images`: how many there are in all, those of an earlier run among them. `shared`: what all nodes must see
        beside the model, as of `nodes.check_shared`.
        """
        if not numbers:
            return
        options = self.options
        model = ModelStage(self, finish, images, probabilities)
        before, after = Preprocess(load, self.decode(self.reader())), self.after(finish, probabilities)
        if runtime.local:
            here = device_here(options.device, options.workers).type
            yield from run_here(numbers, before, lambda: model(device=here, threads=None), after)
            return
        with runtime.started():
            from unet_ray.ray_backend.data_context import configure
            from unet_ray.ray_backend.inference import run_on_cluster

            configure()
            shared = {**shared, "MODEL": storage.join(self.model, checkpoint.CARD)}
            yield from run_on_cluster(
                numbers, before, model, after, workers=options.workers, device=options.device, shared=shared
            )


@dataclass(frozen=True, slots=True)
class ModelStage:
    """Builds the model's stage where it is to run."""

    pipeline: Pipeline
    finish: Finish
    images: int
    probabilities: bool

    def __call__(self, *, device: str, threads: int | None, copies: int = 1) -> Stage:
        """`copies`: of the model in all, that share the images."""
        pipeline = self.pipeline
        segmenter = pipeline.segmenter(device=device, threads=threads, images=self.images // copies)
        return pipeline.segment(segmenter, pipeline.reader(), self.finish, self.probabilities)


def _unchanged(chunk: Chunk) -> Chunk:
    return chunk
