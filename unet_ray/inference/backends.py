"""Runs a network on its device with torch, compiled torch, or OpenVINO, for prediction and evaluation.

Legend: N images, C channels, K classes (1 for a single logit), H, W pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import logging
import platform
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from unet_ray import __version__, custom_parts
from unet_ray.config import UserError, first_line
from unet_ray.data import storage
from unet_ray.inference.arithmetic import Arithmetic
from unet_ray.models import SegmentationModel, checkpoint
from unet_ray.models.base import continue_edge
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.compiling import Compiled
from unet_ray.models.device import autocast
from unet_ray.models.operations import without_weights
from unet_ray.registry import is_custom

log = logging.getLogger("unet_ray")

Network = Callable[[Tensor], Tensor]
"""Maps uint8 [N,C,H,W] on the device to logits float32 [N,K,H,W], smaller by the margin with padding `valid`."""

EXPORTED = "openvino"
"""Folder of a model directory for the network in OpenVINO's format; it may be deleted."""


def load(
    location: str, arithmetic: Arithmetic, *, one_by_one: bool = False, allow_code: bool = False
) -> tuple[Torch | OpenVino, ModelCard]:
    """Returns the network of a model directory, ready to compute in this arithmetic, and its card.

    It never falls back to another arithmetic. Raises UserError if this process can't compute so. `one_by_one`: see
    `OpenVino`. `allow_code`: see `checkpoint.load_model`.
    """
    if arithmetic.backend == "openvino":
        card = checkpoint.read_card(location)
        custom_parts.check_permission(location, card.model.name, allow_code)
        checkpoint.say_if_code_changed(location, card)
        network = _openvino_network(location, card, arithmetic.int8)
        return OpenVino(network, card, arithmetic, one_by_one=one_by_one), card
    model, card = checkpoint.load_model(location, allow_code=allow_code)
    fold_batch_norm(model.eval())
    model = model.to(torch.device(arithmetic.device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Torch(model, arithmetic), card


def _openvino_network(location: str, card: ModelCard, int8: str) -> Any:
    """Returns the openvino.Model, in int8 if `int8` names its files. Raises UserError if OpenVINO can't run it here."""
    try:
        return read_int8(storage.join(location, int8)) if int8 else exported(location, card)
    except UserError:
        raise
    except Exception as error:  # the converter raises errors of many types
        where = f"{storage.without_secrets(location)}: OpenVINO can't run this network on {platform.node()}"
        raise UserError(f"{where}: {first_line(error)[:200]}") from None


def openvino_problem(location: str) -> str:
    """Returns why OpenVINO can't run the network of a model directory; or an empty text. Keeps the exported network."""
    try:
        _openvino_network(location, checkpoint.read_card(location), "")
    except UserError as error:
        return str(error)
    return ""


IMAGES_AT_ONCE = {"cpu": 1, "cuda": 8}
"""Of torch. On a CPU one image at a time keeps the activations in the caches, and was fastest."""


class Torch:
    """Runs a network with torch, compiled or not."""

    def __init__(self, model: SegmentationModel, arithmetic: Arithmetic) -> None:
        self.device, self.precision, self.model = torch.device(arithmetic.device), arithmetic.precision, model
        self.at_once = IMAGES_AT_ONCE[self.device.type]
        self.run: Callable[[Tensor], Tensor] = model
        if arithmetic.backend == "compiled":
            # With frozen weights, the compiler can arrange them in memory for the processor.
            settings: dict[str, Any] = {"freezing": True} if arithmetic.device == "cpu" else {}
            self.run = Compiled(model, required=True, **settings)

    def __call__(self, image_NCHW: Tensor) -> Tensor:
        with autocast(self.device, self.precision), custom_parts.explained(self.model.config.name):
            return self.run(image_NCHW).float()

    def embed(self, image_NCHW: Tensor) -> Tensor:
        """Returns the network's view of images, float32 [N,D], see `SegmentationModel.embedding`."""
        with autocast(self.device, self.precision):
            return self.model.embedding(image_NCHW).float()


def fold_batch_norm(model: SegmentationModel) -> None:
    """Folds each batch norm into the convolution before it, in place. This saves a pass over the activations; results
    change only by rounding. The model must be in evaluation mode. Networks of the user's own stay as they are: who
    knows in which order they use the layers of a Sequential."""
    if is_custom(model.config.name):
        return
    for block in model.modules():
        if isinstance(block, nn.Sequential):
            for number, (first, second) in enumerate(itertools.pairwise(block)):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    block[number], block[number + 1] = fuse_conv_bn_eval(first, second), nn.Identity()


MOST_STREAMS, IMAGES_PER_STREAM = 8, 4
"""The most images that OpenVINO computes at the same time, each of which takes memory, and how many it gets at a time
for each of them, so that none waits for long for the others."""


class OpenVino:
    """Runs a network with OpenVINO on the CPU. It compiles the network again whenever the image size changes.

    `network`: an openvino.Model, uint8 [1,H,W,C] -> float32 [1,K,H,W], for sides that the U-Net can halve.
    `one_by_one`: images come one at a time, and all threads work on each. Else each thread works on an image of its
    own, and waits for no other: of 0.56 GFLOP, two threads compute an image in 3.5 instead of 4.2 ms.
    """

    def __init__(self, network: Any, card: ModelCard, arithmetic: Arithmetic, *, one_by_one: bool) -> None:
        openvino = import_openvino()
        self.network, self.core, self.step = network, openvino.Core(), without_weights(card.model).step
        self.padded = card.model.padding == "same"
        threads = torch.get_num_threads()
        self.streams = 1 if one_by_one else min(threads, MOST_STREAMS)
        self.at_once = self.streams * IMAGES_PER_STREAM
        self.settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if arithmetic.precision == "bf16" else "f32",
            **({"PERFORMANCE_HINT": "LATENCY"} if one_by_one else {"NUM_STREAMS": self.streams}),
            "INFERENCE_NUM_THREADS": threads,
            # Otherwise two processes would pin their threads to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        self.size: tuple[int, ...] = ()
        self.queue: Any = None
        self.lock = threading.Lock()  # of the queue, which has one callback

    def __call__(self, image_NCHW: Tensor) -> Tensor:
        height, width = image_NCHW.shape[-2:]
        if self.padded:
            image_NCHW = continue_edge(image_NCHW, -height % self.step, -width % self.step)
        image = image_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
        with self.lock:
            return torch.from_numpy(self._logits(image))[..., :height, :width]

    def _logits(self, image_NHWC: np.ndarray) -> np.ndarray:
        size = image_NHWC.shape[1:]
        if size != self.size:
            self.network.reshape([1, *size])
            compiled = self.core.compile_model(self.network, "CPU", self.settings)
            self.queue, self.size = import_openvino().AsyncInferQueue(compiled, self.streams), size
        found: dict[int, np.ndarray] = {}

        def keep(request: Any, number: int) -> None:
            found[number] = request.get_output_tensor(0).data.copy()

        self.queue.set_callback(keep)
        for number, image in enumerate(image_NHWC):
            self.queue.start_async([image[None]], number)
        self.queue.wait_all()
        return np.concatenate([found[number] for number in range(len(image_NHWC))])


class _DiffersError(Exception):
    """Signals that OpenVINO's network and torch's give different outputs."""


class _ChannelsLast(nn.Module):
    """Wraps a network so that it takes uint8 [N,H,W,C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_NHWC: Tensor) -> Tensor:
        return self.model(image_NHWC.permute(0, 3, 1, 2))


def exported(location: str, card: ModelCard) -> Any:
    """Returns the network of a model directory as an openvino.Model, and keeps it in the directory for later runs, if
    that can be written. Files of other weights, or of another version of OpenVINO or this package, are not used."""
    folder = storage.join(location, EXPORTED)
    # The name has no dot, so that it has no suffix.
    code = custom_parts.source_sha256(card.model.name)[:16]
    name = f"{card.weights_sha256[:16]}{code}-{__version__}-{importlib.metadata.version('openvino')}".replace(".", "_")
    stem = storage.join(folder, name)
    if _is_kept(stem):
        return _read(stem)
    model, card = checkpoint.load_model(location)
    fold_batch_norm(model.eval())
    network = export(model, card)
    try:
        for stale in storage.names_in(folder):
            storage.delete_file(storage.join(folder, stale))
        files = serialized(network)
        write(files, stem)
        storage.write_bytes(with_suffix(stem, CHECKSUM), checksum(files).encode())
    except OSError as error:
        log.info("%s: not kept: %s", folder, error)
    return network


CHECKSUM = ".sha256"
"""Suffix of the file with the checksum of an exported network. It is written last."""


def checksum(files: Mapping[str, bytes]) -> str:
    """Returns the SHA-256, in hexadecimal, of what `serialized` returns."""
    return hashlib.sha256(files[".xml"] + files[".bin"]).hexdigest()


def _files(stem: str) -> dict[str, bytes]:
    return {suffix: storage.read_bytes(with_suffix(stem, suffix)) for suffix in (".bin", ".xml")}


def _is_kept(stem: str) -> bool:
    """Returns whether an exported network is there, complete and undamaged."""
    try:
        return storage.read_bytes(with_suffix(stem, CHECKSUM)).decode() == checksum(_files(stem))
    except OSError:
        return False


def read_int8(stem: str) -> Any:
    """Reads a network in int8 as an openvino.Model. Raises UserError if it is damaged: its name ends with the first 16
    digits of its checksum."""
    try:
        undamaged = storage.split_options(stem)[0].endswith(checksum(_files(stem))[:16])
    except OSError:
        undamaged = False
    if not undamaged:
        raise UserError(f"{storage.without_secrets(stem)}: missing or damaged: make it again with `unet-ray quantize`")
    return _read(stem)


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Hides, for a `with` block, the package through which OpenVINO's converter and NNCF report each use to their
    maker."""
    hidden = "openvino_telemetry" not in sys.modules
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if hidden and sys.modules.get("openvino_telemetry") is None:
            sys.modules.pop("openvino_telemetry", None)


def import_openvino() -> Any:
    """Imports OpenVINO without the package that reports each use to its maker. That one also forks this process, which
    must not happen in the middle of its work."""
    with without_telemetry():
        import openvino

    return openvino


def export(model: SegmentationModel, card: ModelCard) -> Any:
    """Returns the network as an openvino.Model for images of any size, checked against torch at two sizes.

    Raises _DiffersError if its output differs from torch's.
    """
    wrapped, channels = _ChannelsLast(model), card.model.in_channels
    # The graph holds for every size, so it is traced with a small image.
    images = _noise(channels, _two_sides(model, card))
    with without_telemetry(), warnings.catch_warnings(), torch.no_grad():
        import openvino

        warnings.simplefilter("ignore")  # the tracer warns of every branch, even if it depends only on sizes
        traced = torch.jit.trace(wrapped, images[0], check_trace=False)
        network = openvino.convert_model(traced, input=[[1, -1, -1, channels]])
    for image in images:
        _check_same(network, wrapped, image)
    network.reshape([1, -1, -1, channels])
    return network


def _two_sides(model: SegmentationModel, card: ModelCard) -> list[int]:
    """Returns the sides of two small square images that fit the network; an unpadded one takes only certain sizes."""
    if card.model.padding == "valid":
        fitting = (size + 2 * card.model.margin for size in itertools.count(1) if card.model.fits(size))
        return [next(fitting), next(fitting)]
    return [max(64, 2 * model.step) // model.step * model.step + more for more in (0, model.step)]


def _noise(channels: int, sides: list[int]) -> list[Tensor]:
    """Returns square images of random pixels, uint8 [1,H,W,C]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (1, side, side, channels), dtype=torch.uint8, generator=generator) for side in sides]


def _check_same(network: Any, model: nn.Module, image_NHWC: Tensor) -> None:
    """Raises _DiffersError unless OpenVINO's output equals torch's, within a tolerance."""
    openvino = import_openvino()
    network.reshape(list(image_NHWC.shape))
    compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    actual = compiled([image_NHWC.numpy()])[0]
    with torch.inference_mode():
        expected = model(image_NHWC).float().numpy()
    tolerance = 1e-3 * (1 + np.abs(expected).max())
    if actual.shape != expected.shape or not np.allclose(actual, expected, rtol=1e-3, atol=tolerance):
        raise _DiffersError("its output differs from torch's")


def serialized(network: Any) -> dict[str, bytes]:
    """Returns suffix -> contents of the two files that hold an openvino.Model."""
    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(network, f"{folder}/network.xml", compress_to_fp16=False)
        return {suffix: Path(folder, f"network{suffix}").read_bytes() for suffix in (".bin", ".xml")}


def write(files: dict[str, bytes], stem: str) -> None:
    """Writes what `serialized` returns."""
    for suffix, data in files.items():
        storage.write_bytes(with_suffix(stem, suffix), data, durable=True)


def with_suffix(stem: str, suffix: str) -> str:
    """Appends a suffix to a location. A bucket's ?options stay at the end."""
    base, options = storage.split_options(stem)
    return base + suffix + options


def _read(stem: str) -> Any:
    openvino = import_openvino()
    core = openvino.Core()
    if not storage.is_uri(stem):
        return core.read_model(f"{stem}.xml")  # maps the weights into memory, without a copy
    return core.read_model(
        storage.read_bytes(with_suffix(stem, ".xml")),
        openvino.Tensor(np.frombuffer(storage.read_bytes(with_suffix(stem, ".bin")), np.uint8)),
    )
