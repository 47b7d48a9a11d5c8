"""Names the arithmetic of a prediction: two runs with the same one make the same masks, up to rounding."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unet_ray.config import MaskOptions
from unet_ray.models import compiling
from unet_ray.models.device import bf16_is_fast, check_gpu, instruction_set

INSTALL = "pip install 'unet_ray[cpu]'"


@dataclass(frozen=True, slots=True)
class Machine:
    """Says what a machine can compute with."""

    name: str
    bf16: bool
    """Whether the device computes in bfloat16 instead of emulating it."""
    compiles: bool
    """Whether torch.compile finds what it needs."""
    instructions: str
    """The processor's instruction set, see `device.instruction_set`."""
    libraries: Mapping[str, str]
    """Name -> version of `torch` and, if it is installed, `openvino`."""

    @classmethod
    def here(cls, device: str) -> Machine:
        """Describes the machine of this process. `device`: `cpu` or `cuda`. Raises UserError if torch can't use it."""
        if device == "cuda":
            check_gpu()
        versions = {"torch": str(torch.__version__)}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions["openvino"] = importlib.metadata.version("openvino")
        where = torch.device(device)
        return cls(platform.node(), bf16_is_fast(where), compiling.is_possible(where), instruction_set(), versions)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Says with what a network computes."""

    device: str
    """`cpu` or `cuda`."""
    backend: str
    """`torch`, `compiled` or `openvino`; empty if it is not known."""
    precision: str
    """`fp32`, `bf16` or `fp16`; beside a network in int8, the precision of its other parts."""
    int8: str = ""
    """Stem of the files of the network in int8, inside the model directory; empty for the network as trained."""
    instructions: str = ""
    """The instruction set on which validation accepted the network in int8."""
    version: str = ""
    """The library's version. Another version may change masks by rounding."""

    def __str__(self) -> str:
        if not self.backend:
            return "an arithmetic of an earlier version of unet-ray"
        name = {"torch": "torch", "compiled": "torch, compiled,", "openvino": "OpenVINO"}[self.backend]
        precision = f"int8 ({self.int8}, {self.instructions})" if self.int8 else self.precision
        return f"{name} in {precision} on {'a GPU' if self.device == 'cuda' else 'CPUs'}"

    @property
    def library(self) -> str:
        """`torch` or `openvino`, the key of `Machine.libraries`."""
        return "openvino" if self.backend == "openvino" else "torch"

    def to_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Arithmetic:
        """Reads what `to_json` returns. Keys of a newer package are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def contradicts(self, options: MaskOptions) -> str:
        """Returns the first option that asks for another arithmetic, such as `--precision bf16`; or an empty text."""
        precision = "int8" if self.int8 else self.precision
        for name, here in (("device", self.device), ("backend", self.backend), ("precision", precision)):
            wanted = getattr(options, name)
            if self.backend and wanted not in ("auto", here):
                return f"--{name} {wanted}"
        return ""

    def problem_on(self, machine: Machine) -> str:
        """Returns why this machine can't compute so; or an empty text."""
        if self.library not in machine.libraries:
            return f"{machine.name} has no OpenVINO: {INSTALL}"
        if self.backend == "openvino" and self.precision == "bf16" and not machine.bf16:
            return f"OpenVINO has no bf16 on {machine.name}"  # it would compute in fp32 and say nothing
        if self.int8 and self.instructions != machine.instructions:
            return (
                f"int8 was accepted on {self.instructions or 'a processor that was not recorded'}, {machine.name} has "
                f"{machine.instructions}: measure it there with `unet-ray quantize`"
            )
        if self.backend == "compiled" and not machine.compiles:
            return f"{machine.name} has no C++ compiler that torch.compile can use"
        return ""


NOT_RECORDED = Arithmetic("", "", "")
"""Stands for the arithmetic of a prediction that an earlier version of this package began."""
