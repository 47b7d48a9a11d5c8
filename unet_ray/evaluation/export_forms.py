"""The forms of file to which a network is exported: how each is written, opened and used.

To add a form, write its function and add its entry to `FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unet_ray.inference import backends
from unet_ray.inference.portable import Portable

Runs = Callable[[np.ndarray], np.ndarray]
"""Runs a network from its file: image uint8 [1,H,W,C] -> output, see `Portable`."""

OPSET = 17
"""Of ONNX, of 2022: the oldest that has all that our networks need."""
IN_INT8 = ["Conv", "ConvTranspose", "Relu", "MaxPool", "Concat", "Add", "Resize"]
"""Operations of ONNX that are computed in int8. Probabilities stay in fp32."""


@dataclass(frozen=True, slots=True)
class Work:
    """A file to write."""

    portable: Portable
    image: Tensor
    """An example, uint8 [1,H,W,C]."""
    path: Path
    precision: str
    calibration: Sequence[np.ndarray]
    """Images uint8 [1,H,W,C] that give the ranges of activations in int8."""

    @property
    def output(self) -> str:
        """Name of the network's output."""
        return "probability" if self.portable.threshold is None else "classes"


def _traced(work: Work) -> Any:
    with torch.no_grad():
        return torch.jit.trace(work.portable, work.image, check_trace=False)


def _onnx(work: Work) -> Runs:
    import onnxruntime

    sides = {2: "height", 3: "width"} if work.portable.threshold is None else {1: "height", 2: "width"}
    with torch.no_grad():
        torch.onnx.export(
            work.portable,
            (work.image,),
            str(work.path),
            input_names=["image"],
            output_names=[work.output],
            dynamic_axes={"image": {1: "height", 2: "width"}, work.output: sides},
            opset_version=OPSET,
            dynamo=False,
        )
    {"fp32": lambda _: None, "fp16": _onnx_in_fp16, "int8": _onnx_in_int8}[work.precision](work)
    session = onnxruntime.InferenceSession(str(work.path), providers=["CPUExecutionProvider"])
    return lambda each: session.run(None, {"image": each})[0]


def _onnx_in_fp16(work: Work) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(work.path), keep_io_types=True), work.path)


def _onnx_in_int8(work: Work) -> None:
    """Quantizes the network, each channel's weights apart (onnxruntime's static quantization)."""
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(work.calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"image": image}

    quantize_static(
        work.path,
        work.path,
        Images(),
        op_types_to_quantize=IN_INT8,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _torchscript(work: Work) -> Runs:
    torch.jit.save(_traced(work), str(work.path))
    loaded = torch.jit.load(str(work.path))
    return lambda each: loaded(torch.from_numpy(each)).detach().numpy()


def _torch_export(work: Work) -> Runs:
    any_size = {1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.export.export(work.portable, (work.image,), dynamic_shapes=(any_size,))
    torch.export.save(program, str(work.path))
    loaded = torch.export.load(str(work.path)).module()
    return lambda each: loaded(torch.from_numpy(each)).detach().numpy()


def _openvino(work: Work) -> Runs:
    openvino = backends.import_openvino()
    with backends.without_telemetry():
        shape = [1, -1, -1, work.image.shape[-1]]
        network = openvino.convert_model(_traced(work), input=[("image_NHWC", shape)])
    network.inputs[0].get_tensor().set_names({"image"})
    network.outputs[0].get_tensor().set_names({work.output})
    openvino.save_model(network, str(work.path), compress_to_fp16=work.precision == "fp16")
    # In fp32 also where the processor has bf16: the file is compared, not the processor.
    compiled = openvino.compile_model(str(work.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda each: compiled([each])[0]


@dataclass(frozen=True, slots=True)
class Form:
    """A form of file."""

    suffix: str
    write: Callable[[Work], Runs]
    """Writes the file, and returns what runs it."""
    module: str
    """What a program imports to use the file, as does the example that is printed."""
    opened: str
    """Line of Python that opens `{file}`."""
    run: str
    """Expression that runs it on `image`, uint8 [H,W,C]."""
    needs: tuple[str, ...] = ()
    """Packages that it needs."""
    extra: str = "export"
    precisions: tuple[str, ...] = ("fp32",)


_RUN_TORCH = "network(torch.from_numpy(image[None])).detach().numpy()"
FORMS = {
    "onnx": Form(
        ".onnx",
        _onnx,
        "onnxruntime",
        'session = onnxruntime.InferenceSession("{file}")',
        'session.run(None, {"image": image[None]})[0]',
        ("onnx", "onnxruntime"),
        precisions=("fp32", "fp16", "int8"),
    ),
    "torchscript": Form(".pt", _torchscript, "torch", 'network = torch.jit.load("{file}")', _RUN_TORCH),
    "torch-export": Form(".pt2", _torch_export, "torch", 'network = torch.export.load("{file}").module()', _RUN_TORCH),
    "openvino": Form(
        ".xml",
        _openvino,
        "openvino",
        'network = openvino.compile_model("{file}", "CPU")',
        "network([image[None]])[0]",
        ("openvino",),
        "cpu",
        ("fp32", "fp16"),
    ),
}
"""Name -> form, as `--to` takes it."""
