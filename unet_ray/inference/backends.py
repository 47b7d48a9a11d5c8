"""How a network runs on its device: torch as it is, torch compiled, or OpenVINO; for prediction and evaluation.

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

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.models import SegmentationModel, checkpoint, compiling
from unet_ray.models.base import continue_edge
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.compiling import Compiled, first_line, floating_point_operations, without_weights
from unet_ray.models.device import autocast, in_bf16

log = logging.getLogger("unet_ray")

Network = Callable[[Tensor], Tensor]
"""uint8 [N,C,H,W] on the device -> logits float32 [N,K,H,W], smaller by the margin with padding `valid`."""

EXPORTED = "openvino"
"""Folder of a model directory for the network as OpenVINO reads it; may be deleted."""
INSTALL = "pip install 'unet_ray[cpu]'"


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How networks are to run."""

    device: torch.device
    precision: str = "auto"
    """`auto`, `fp32`, `bf16`, `fp16`, `int8`."""
    backend: str = "auto"
    """`torch`, `compiled`, `openvino`; `auto`: OpenVINO on a CPU where it is installed, else torch, compiled if
    there are images enough (`compiling_pays`)."""
    images: int = 0
    """How many images there are to be segmented; 0: not known."""

    @property
    def bf16(self) -> bool:
        """Whether what is not int8 is computed in it."""
        return in_bf16(self.device, "auto" if self.precision == "int8" else self.precision)


def load(location: str, how: RuntimeOptions, quantized: str | None = None) -> tuple[Network, ModelCard]:
    """The network of a model directory, ready to run, and its card.

    `quantized`: stem of the files of the network in int8, which takes its place on a CPU unless another precision is
    asked for. Raises UserError.
    """
    card = checkpoint.read_card(location)
    cpu, able = how.device.type == "cpu", importlib.util.find_spec("openvino") is not None
    if how.backend == "openvino" and not (cpu and able):
        raise UserError(f"--backend openvino: {INSTALL}" if cpu else "--backend openvino is for CPUs: add --device cpu")
    wanted = how.precision == "int8"
    if wanted and not (able and quantized):
        raise UserError(f"--precision int8: {'make it first with `unet-ray quantize`' if able else INSTALL}")
    if cpu and able and how.backend in ("auto", "openvino"):
        try:
            if quantized and how.precision in ("auto", "int8"):
                return OpenVino(_read(quantized), card, how), card
            return OpenVino(exported(location, card), card, how), card
        except UserError:
            raise
        except Exception as error:  # a converter's errors are of many kinds
            if wanted or how.backend == "openvino":
                raise UserError(f"{location}: OpenVINO can't run it: {error}") from None
            log.warning("OpenVINO can't run this network, torch does: %s", first_line(error))
    model, card = checkpoint.load_model(location)
    fold_batch_norm(model.eval())
    model = model.to(how.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    compiled = how.backend == "compiled" or (how.backend == "auto" and compiling_pays(card, how))
    return Torch(model, how, compiled=compiled), card


class Torch:
    """A network as torch runs it, compiled or not."""

    def __init__(self, model: SegmentationModel, how: RuntimeOptions, *, compiled: bool) -> None:
        self.how = how
        self.run: Callable[[Tensor], Tensor] = model
        if compiled:
            # Freezing lets the compiler lay the weights out for the processor.
            options: dict[str, Any] = {"freezing": True} if how.device.type == "cpu" else {}
            self.run = Compiled(model, **options)

    def __call__(self, image_NCHW: Tensor) -> Tensor:
        with autocast(self.how.device, self.how.precision):
            return self.run(image_NCHW).float()


def compiling_pays(card: ModelCard, how: RuntimeOptions) -> bool:
    """Whether compiling pays for a process that segments `how.images` images."""
    if not how.images:
        return False
    operations = how.images * floating_point_operations(card.model, card.image_size)
    return compiling.pays(operations, how.device, bf16=how.bf16)


def fold_batch_norm(model: nn.Module) -> None:
    """Makes each convolution do the work of the batch norm after it, in place: the same to rounding, a pass less over
    the activations. The model must be in evaluation mode."""
    for block in model.modules():
        if isinstance(block, nn.Sequential):
            for place, (first, second) in enumerate(itertools.pairwise(block)):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    block[place], block[place + 1] = fuse_conv_bn_eval(first, second), nn.Identity()


class OpenVino:
    """A network as OpenVINO runs it on the CPU; it is laid out anew for every size of image.

    `network`: an openvino.Model, uint8 [1,H,W,C] -> float32 [1,K,H,W], for sides that the U-Net can halve.
    """

    def __init__(self, network: Any, card: ModelCard, how: RuntimeOptions) -> None:
        import openvino

        self.network, self.core, self.step = network, openvino.Core(), without_weights(card.model).step
        self.same = card.model.padding == "same"
        self.settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if how.bf16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Pinned, the threads of two processes would share the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        self.size: tuple[int, ...] = ()
        self.request: Any = None

    def __call__(self, image_NCHW: Tensor) -> Tensor:
        height, width = image_NCHW.shape[-2:]
        if self.same:
            image_NCHW = continue_edge(image_NCHW, -height % self.step, -width % self.step)
        image = image_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
        if image.shape[1:] != self.size:
            self.network.reshape([1, *image.shape[1:]])
            self.request = self.core.compile_model(self.network, "CPU", self.settings).create_infer_request()
            self.size = image.shape[1:]
        logits = np.concatenate([self.request.infer([one[None]])[0] for one in image])
        return torch.from_numpy(logits)[..., :height, :width]


class _DiffersError(Exception):
    """OpenVINO's network says something else than torch's."""


class _ChannelsLast(nn.Module):
    """The network for uint8 [N,H,W,C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_NHWC: Tensor) -> Tensor:
        return self.model(image_NHWC.permute(0, 3, 1, 2))


def exported(location: str, card: ModelCard) -> Any:
    """The network of a model directory as an openvino.Model; kept there for the next time, if it can be written."""
    folder = storage.join(location, EXPORTED)
    stem = storage.join(folder, card.weights_sha256[:16])
    if storage.exists(with_end(stem, ".xml")):
        return _read(stem)
    model, card = checkpoint.load_model(location)
    fold_batch_norm(model.eval())
    network = export(model, card)
    try:
        stale = [name for name in storage.names_in(folder) if not name.startswith(card.weights_sha256[:16])]
        for name in stale:  # of an earlier epoch of a training that goes on
            storage.delete_file(storage.join(folder, name))
        write(serialized(network), stem)
    except OSError as error:
        log.info("%s: not kept: %s", folder, error)
    return network


def without_telemetry() -> None:
    """OpenVINO's converter and NNCF tell their maker of each use, unless the package that does it is missing."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def export(model: SegmentationModel, card: ModelCard) -> Any:
    """The network as an openvino.Model for images of any size, checked against torch at two sizes.

    Raises _DiffersError where it says something else.
    """
    without_telemetry()
    import openvino

    wrapped, channels = _ChannelsLast(model), card.model.in_channels
    # The graph holds for every size, so it is drawn from a small image; without padding only certain sizes fit.
    if card.model.padding == "valid":
        fitting = (size + 2 * card.model.margin for size in itertools.count(1) if card.model.fits(size))
        sides = [next(fitting), next(fitting)]
    else:
        sides = [max(64, 2 * model.step) // model.step * model.step + more for more in (0, model.step)]
    generator = torch.Generator().manual_seed(0)

    def noise(side: int) -> Tensor:
        return torch.randint(0, 256, (1, side, side, channels), dtype=torch.uint8, generator=generator)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of every branch, also of those that sizes decide
        traced = torch.jit.trace(wrapped, noise(sides[0]), check_trace=False)
        network = openvino.convert_model(traced, input=[[1, -1, -1, channels]])
    core = openvino.Core()
    for side in sides:
        image = noise(side)
        network.reshape([1, side, side, channels])
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        found = core.compile_model(network, "CPU", settings)([image.numpy()])[0]
        with torch.inference_mode():
            expected = wrapped(image).float().numpy()
        if found.shape != expected.shape or not np.allclose(
            found, expected, rtol=1e-3, atol=1e-3 * (1 + np.abs(expected).max())
        ):
            raise _DiffersError("its output is another than torch's")
    network.reshape([1, -1, -1, channels])
    return network


def serialized(network: Any) -> dict[str, bytes]:
    """End of the name -> contents, of the two files that an openvino.Model is stored in."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(network, f"{folder}/network.xml", compress_to_fp16=False)
        return {end: Path(folder, f"network{end}").read_bytes() for end in (".bin", ".xml")}


def write(files: dict[str, bytes], stem: str) -> None:
    """Writes what `serialized` returns, the .xml last: where it is, the other is whole."""
    for end, data in files.items():
        storage.write_bytes(with_end(stem, end), data)


def with_end(stem: str, end: str) -> str:
    """A stem with the end of a file's name; a bucket's ?options stay behind it."""
    base, options = storage.split_options(stem)
    return base + end + options


def _read(stem: str) -> Any:
    import openvino

    core = openvino.Core()
    if not storage.is_uri(stem):
        return core.read_model(f"{stem}.xml")  # maps the weights
    return core.read_model(
        storage.read_bytes(with_end(stem, ".xml")),
        openvino.Tensor(np.frombuffer(storage.read_bytes(with_end(stem, ".bin")), np.uint8)),
    )
