"""Computes the embeddings of images: what the network's deepest layer sees in them, through Ray or in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from unet_ray.config import PredictConfig
from unet_ray.data.chunks import Chunk, Stage
from unet_ray.inference.pipeline import WholeImagePipeline
from unet_ray.inference.resolve import pipeline_of
from unet_ray.inference.segmenter import BatchSegmenter
from unet_ray.inference.stages import Chunks, MaskSink, Prediction, unchanged
from unet_ray.ray_backend.session import Runtime

CHUNK = 8
"""Images in a chunk."""


@dataclasses.dataclass(frozen=True, slots=True)
class Embed:
    """Replaces the column `image` with `embedding` float32 [N,D]; zeros for rows that failed."""

    segmenter: BatchSegmenter

    def __call__(self, chunk: Chunk) -> Chunk:
        embedding = self.segmenter.embed(chunk["image"])
        embedding[chunk["error"] != ""] = 0
        return {"row": chunk["row"], "error": chunk["error"], "embedding": embedding}


class EmbeddingPipeline(WholeImagePipeline):
    """Resizes images to the model's size and computes their embeddings instead of masks."""

    def segment(self, segmenter: BatchSegmenter, sink: MaskSink, *, probabilities: bool) -> Stage:  # noqa: ARG002
        return Embed(segmenter)

    def postprocess(self, sink: MaskSink, *, probabilities: bool) -> Stage:  # type: ignore[override]  # noqa: ARG002
        return unchanged


def embeddings(config: PredictConfig, columns: dict[str, list], runtime: Runtime) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (row, embedding float32 [D]) of each image that can be read, in any order.

    `columns`: `row` and those of the ledger's inputs. torch computes them, since OpenVINO gives no inner layers, with
    the first model of an ensemble.
    """
    precision = "auto" if config.precision == "int8" else config.precision
    options = dataclasses.replace(config, tile=0, tta=False, ensemble=(), backend="torch", precision=precision)
    base = pipeline_of(config.model, options)
    pipeline = EmbeddingPipeline(base.model, base.card, base.cleanup, base.cleanup_text, base.options)
    chunks = Chunks(columns, CHUNK)
    done = pipeline.run(range(len(chunks)), chunks, _no_masks, images=len(columns["row"]), shared={}, runtime=runtime)
    for chunk in done:
        for row, error, embedding in zip(chunk["row"], chunk["error"], chunk["embedding"], strict=True):
            if not error:
                yield int(row), embedding


def _no_masks(_chunk: Chunk, _masks: Iterator[Prediction]) -> Chunk:
    raise AssertionError("embeddings are no masks")
