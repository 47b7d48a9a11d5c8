"""The forms of file to which a network is exported: how each is written, opened and used.

To add a form, write its function and add its entry to `FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable
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


def _traced(portable: Portable, image: Tensor) -> Any:
    with torch.no_grad():
        return torch.jit.trace(portable, image, check_trace=False)


def _onnx(portable: Portable, image: Tensor, path: Path, _precision: str) -> Runs:
    import onnxruntime

    output = _output(portable)
    sides = {"height": -2, "width": -1} if portable.threshold is None else {"height": 1, "width": 2}
    axes = {
        "image": {1: "height", 2: "width"},
        output: {place % 4 if place < 0 else place: n for n, place in sides.items()},
    }
    with torch.no_grad():
        torch.onnx.export(
            portable,
            (image,),
            str(path),
            input_names=["image"],
            output_names=[output],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda each: session.run(None, {"image": each})[0]


def _torchscript(portable: Portable, image: Tensor, path: Path, _precision: str) -> Runs:
    torch.jit.save(_traced(portable, image), str(path))
    loaded = torch.jit.load(str(path))
    return lambda each: loaded(torch.from_numpy(each)).detach().numpy()


def _torch_export(portable: Portable, image: Tensor, path: Path, _precision: str) -> Runs:
    any_size = {1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.export.export(portable, (image,), dynamic_shapes=(any_size,))
    torch.export.save(program, str(path))
    loaded = torch.export.load(str(path)).module()
    return lambda each: loaded(torch.from_numpy(each)).detach().numpy()


def _openvino(portable: Portable, image: Tensor, path: Path, precision: str) -> Runs:
    with backends.without_telemetry():
        import openvino

        shape = [1, -1, -1, image.shape[-1]]
        network = openvino.convert_model(_traced(portable, image), input=[("image_NHWC", shape)])
    network.inputs[0].get_tensor().set_names({"image"})
    network.outputs[0].get_tensor().set_names({_output(portable)})
    openvino.save_model(network, str(path), compress_to_fp16=precision == "fp16")
    # In fp32 also where the processor has bf16: the file is compared, not the processor.
    compiled = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda each: compiled([each])[0]


def _output(portable: Portable) -> str:
    return "probability" if portable.threshold is None else "classes"


@dataclass(frozen=True, slots=True)
class Form:
    """A form of file."""

    suffix: str
    write: Callable[[Portable, Tensor, Path, str], Runs]
    """Writes the network at the path, in a precision, and returns what runs the file. The tensor is an example."""
    module: str
    """What a program imports to use the file, as does the example that is printed."""
    opened: str
    """Line of Python that opens `{file}`."""
    run: str
    """Expression that runs it on `image`, uint8 [H,W,C]."""
    needs: tuple[str, ...] = ()
    """Packages that it needs."""
    extra: str = "export"


_RUN_TORCH = "network(torch.from_numpy(image[None])).detach().numpy()"
FORMS = {
    "onnx": Form(
        ".onnx",
        _onnx,
        "onnxruntime",
        'session = onnxruntime.InferenceSession("{file}")',
        'session.run(None, {"image": image[None]})[0]',
        ("onnx", "onnxruntime"),
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
    ),
}
"""Name -> form, as `--to` takes it."""
