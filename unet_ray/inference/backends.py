"""Runs a network on its device with torch, compiled torch, or OpenVINO, for prediction and evaluation.

Legend: N images, C channels, K classes (1 for a single logit), H, W pixels.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from unet_ray.config import UserError, first_line
from unet_ray.data import storage
from unet_ray.models import SegmentationModel, checkpoint, compiling
from unet_ray.models.base import continue_edge
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.compiling import Compiled, floating_point_operations, without_weights
from unet_ray.models.device import autocast, in_bf16

log = logging.getLogger("unet_ray")

Network = Callable[[Tensor], Tensor]
"""Maps uint8 [N,C,H,W] on the device to logits float32 [N,K,H,W], smaller by the margin with padding `valid`."""

EXPORTED = "openvino"
"""Folder of a model directory for the network in OpenVINO's format; it may be deleted."""
INSTALL = "pip install 'unet_ray[cpu]'"


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """Holds the options with which networks run."""

    device: torch.device
    precision: str = "auto"
    """`auto`, `fp32`, `bf16`, `fp16`, `int8`."""
    backend: str = "auto"
    """`torch`, `compiled`, `openvino`. `auto`: OpenVINO on a CPU if it is installed, else torch, compiled if that pays
    for `images` (`compiling_pays`)."""
    images: int = 0
    """Number of images to segment; 0 if it is not known."""

    @property
    def bf16(self) -> bool:
        """Whether the network computes in bfloat16, apart from what it computes in int8."""
        return in_bf16(self.device, "auto" if self.precision == "int8" else self.precision)


def load(location: str, options: RuntimeOptions, quantized: str | None = None) -> tuple[Network, ModelCard]:
    """Returns the network of a model directory, ready to run, and its card.

    `quantized`: stem of the files of the network in int8. On a CPU this network replaces the other, unless another
    precision is asked for. Raises UserError if the options can't be used.
    """
    card = checkpoint.read_card(location)
    on_cpu, installed = options.device.type == "cpu", importlib.util.find_spec("openvino") is not None
    _check(options, quantized, installed=installed)
    if on_cpu and installed and options.backend in ("auto", "openvino"):
        network = _load_openvino(location, card, options, quantized)
        if network is not None:
            return network, card
    model, card = checkpoint.load_model(location)
    fold_batch_norm(model.eval())
    model = model.to(options.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    compiled = options.backend == "compiled" or (options.backend == "auto" and compiling_pays(card, options))
    return Torch(model, options, compiled=compiled), card


def _check(options: RuntimeOptions, quantized: str | None, *, installed: bool) -> None:
    """Raises UserError if OpenVINO or int8 is asked for and not available."""
    on_cpu = options.device.type == "cpu"
    if options.backend == "openvino" and not (on_cpu and installed):
        raise UserError(
            f"--backend openvino: {INSTALL}" if on_cpu else "--backend openvino is for CPUs: add --device cpu"
        )
    if options.precision == "int8" and not (installed and quantized):
        raise UserError(f"--precision int8: {'make it first with `unet-ray quantize`' if installed else INSTALL}")


def _load_openvino(location: str, card: ModelCard, options: RuntimeOptions, quantized: str | None) -> OpenVino | None:
    """Returns the network for OpenVINO. If OpenVINO can't run it, raises UserError if OpenVINO or int8 was asked for,
    else returns None."""
    try:
        if quantized and options.precision in ("auto", "int8"):
            return OpenVino(_read(quantized), card, options)
        return OpenVino(exported(location, card), card, options)
    except UserError:
        raise
    except Exception as error:  # the converter raises errors of many types
        if options.precision == "int8" or options.backend == "openvino":
            raise UserError(f"{location}: OpenVINO can't run it: {error}") from None
        log.warning("OpenVINO can't run this network, torch does: %s", first_line(error)[:200])
        return None


class Torch:
    """Runs a network with torch, compiled or not."""

    def __init__(self, model: SegmentationModel, options: RuntimeOptions, *, compiled: bool) -> None:
        self.options = options
        self.run: Callable[[Tensor], Tensor] = model
        if compiled:
            # With frozen weights, the compiler can arrange them in memory for the processor.
            settings: dict[str, Any] = {"freezing": True} if options.device.type == "cpu" else {}
            self.run = Compiled(model, **settings)

    def __call__(self, image_NCHW: Tensor) -> Tensor:
        with autocast(self.options.device, self.options.precision):
            return self.run(image_NCHW).float()


def compiling_pays(card: ModelCard, options: RuntimeOptions) -> bool:
    """Returns whether compiling saves time in a process that segments `options.images` images."""
    if not options.images:
        return False
    operations = options.images * floating_point_operations(card.model, card.image_size)
    return compiling.pays(operations, options.device, bf16=options.bf16)


def fold_batch_norm(model: nn.Module) -> None:
    """Folds each batch norm into the convolution before it, in place. This saves a pass over the activations; results
    change only by rounding. The model must be in evaluation mode."""
    for block in model.modules():
        if isinstance(block, nn.Sequential):
            for number, (first, second) in enumerate(itertools.pairwise(block)):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    block[number], block[number + 1] = fuse_conv_bn_eval(first, second), nn.Identity()


class OpenVino:
    """Runs a network with OpenVINO on the CPU. It compiles the network again whenever the image size changes.

    `network`: an openvino.Model, uint8 [1,H,W,C] -> float32 [1,K,H,W], for sides that the U-Net can halve.
    """

    def __init__(self, network: Any, card: ModelCard, options: RuntimeOptions) -> None:
        import openvino

        self.network, self.core, self.step = network, openvino.Core(), without_weights(card.model).step
        self.padded = card.model.padding == "same"
        self.settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if options.bf16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Otherwise two processes would pin their threads to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        self.size: tuple[int, ...] = ()
        self.request: Any = None

    def __call__(self, image_NCHW: Tensor) -> Tensor:
        height, width = image_NCHW.shape[-2:]
        if self.padded:
            image_NCHW = continue_edge(image_NCHW, -height % self.step, -width % self.step)
        image = image_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
        if image.shape[1:] != self.size:
            self.network.reshape([1, *image.shape[1:]])
            self.request = self.core.compile_model(self.network, "CPU", self.settings).create_infer_request()
            self.size = image.shape[1:]
        logits = np.concatenate([self.request.infer([one[None]])[0] for one in image])
        return torch.from_numpy(logits)[..., :height, :width]


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
    that can be written."""
    folder = storage.join(location, EXPORTED)
    name = card.weights_sha256[:16]
    stem = storage.join(folder, name)
    if storage.exists(with_suffix(stem, ".xml")):
        return _read(stem)
    model, card = checkpoint.load_model(location)
    fold_batch_norm(model.eval())
    network = export(model, card)
    try:
        # The network of an earlier epoch, if the training went on.
        for stale in (other for other in storage.names_in(folder) if not other.startswith(name)):
            storage.delete_file(storage.join(folder, stale))
        write(serialized(network), stem)
    except OSError as error:
        log.info("%s: not kept: %s", folder, error)
    return network


def without_telemetry() -> None:
    """Hides the package through which OpenVINO's converter and NNCF report each use to their maker."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def export(model: SegmentationModel, card: ModelCard) -> Any:
    """Returns the network as an openvino.Model for images of any size, checked against torch at two sizes.

    Raises _DiffersError if its output differs from torch's.
    """
    without_telemetry()
    import openvino

    wrapped, channels = _ChannelsLast(model), card.model.in_channels
    # The graph holds for every size, so it is traced with a small image.
    images = _noise(channels, _two_sides(model, card))
    with warnings.catch_warnings(), torch.no_grad():
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
    import openvino

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
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(network, f"{folder}/network.xml", compress_to_fp16=False)
        return {suffix: Path(folder, f"network{suffix}").read_bytes() for suffix in (".bin", ".xml")}


def write(files: dict[str, bytes], stem: str) -> None:
    """Writes what `serialized` returns, the .xml last: if it exists, the .bin is complete."""
    for suffix, data in files.items():
        storage.write_bytes(with_suffix(stem, suffix), data)


def with_suffix(stem: str, suffix: str) -> str:
    """Appends a suffix to a location. A bucket's ?options stay at the end."""
    base, options = storage.split_options(stem)
    return base + suffix + options


def _read(stem: str) -> Any:
    import openvino

    core = openvino.Core()
    if not storage.is_uri(stem):
        return core.read_model(f"{stem}.xml")  # maps the weights into memory, without a copy
    return core.read_model(
        storage.read_bytes(with_suffix(stem, ".xml")),
        openvino.Tensor(np.frombuffer(storage.read_bytes(with_suffix(stem, ".bin")), np.uint8)),
    )
