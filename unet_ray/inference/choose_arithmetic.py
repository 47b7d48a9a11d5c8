"""Chooses the arithmetic of a prediction once, before its first mask, by what all its machines can do."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unet_ray.config import MaskOptions, UserError
from unet_ray.data import storage
from unet_ray.inference import backends
from unet_ray.inference.arithmetic import Arithmetic, Machine
from unet_ray.models import checkpoint, compiling
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.device import check_precision
from unet_ray.models.operations import floating_point_operations

log = logging.getLogger("unet_ray")


@dataclass(frozen=True, slots=True)
class Work:
    """Says what is to be segmented, and where."""

    models: tuple[str, ...]
    """The model directory, then those of the ensemble."""
    card: ModelCard
    options: MaskOptions
    device: str
    """`cpu` or `cuda`."""
    machines: tuple[Machine, ...]
    """All machines that will run the network."""
    images: int = 0
    """Number of images for each process that runs the network; 0 if it is not known."""
    threads: int | None = None
    """Threads of each such process on a CPU; None: torch's number."""

    def int8(self) -> dict[str, Any] | None:
        """Returns the record of the network in int8 that validation accepted, if there is one for these weights."""
        return None if self.options.ensemble else checkpoint.read_choice(self.models[0], checkpoint.INT8, self.card)

    def problem_of(self, arithmetic: Arithmetic) -> str:
        """Returns why this work can't be done so; or an empty text."""
        if not arithmetic.backend:
            return "which one was not recorded"
        if arithmetic.device != self.device:
            return f"this run has --device {self.device}: --device {arithmetic.device} goes on as begun"
        problems = filter(None, map(arithmetic.problem_on, self.machines))
        return next(problems, "") or self._problem_of_network(arithmetic)

    def _problem_of_network(self, arithmetic: Arithmetic) -> str:
        if arithmetic.int8:
            accepted = self.int8()
            gone = accepted is None or accepted["network"] != arithmetic.int8
            return f"{storage.without_secrets(self.models[0])} has no {arithmetic.int8} any more" if gone else ""
        if arithmetic.backend != "openvino":
            return ""
        return next(filter(None, map(backends.openvino_problem, self.models)), "")

    def with_version(self, arithmetic: Arithmetic) -> Arithmetic:
        """Returns the arithmetic with the version of its library on these machines."""
        versions = sorted({machine.libraries[arithmetic.library] for machine in self.machines})
        if len(versions) > 1:
            names = " and ".join(versions)
            log.warning("the nodes have %s %s: their masks may differ by rounding", arithmetic.library, names)
        return dataclasses.replace(arithmetic, version=", ".join(versions))


def choose(work: Work, *, int8: bool = True) -> Arithmetic:
    """Returns the fastest arithmetic that the options allow and all machines can do.

    On CPUs that is a network in int8 (if validation accepted one, and `int8`), else OpenVINO, else torch, compiled if
    that pays. A log line says why the first choice can't be used. Raises UserError if no choice can be.
    """
    _check(work)
    problems: list[str] = []
    for arithmetic in _candidates(work, int8):
        problem = work.problem_of(arithmetic)
        if not problem:
            for earlier in problems:
                log.warning("%s: %s is used instead", earlier, arithmetic)
            return work.with_version(arithmetic)
        problems.append(problem)
    raise UserError(problems[0])


def go_on(work: Work, recorded: Sequence[Arithmetic], *, allow_mixed: bool) -> Arithmetic:
    """Returns the arithmetic with which a stopped prediction goes on: the one recorded last.

    Raises UserError if these machines can't do it, unless `allow_mixed` permits another.
    """
    last = recorded[-1]
    wanted = last.contradicts(work.options)
    problem = f"{wanted} asks for another" if wanted else work.problem_of(last)
    if problem and not allow_mixed:
        raise begun_otherwise(last, problem)
    if problem:
        chosen = choose(work)
        log.warning("begun with %s, goes on with %s", last, chosen)
        return chosen
    now = work.with_version(last)
    if now != last:
        versions = now.library, now.version, last.version
        log.warning("%s is %s now, and was %s: masks may differ by rounding", *versions)
    return now


def begun_otherwise(last: Arithmetic, problem: str) -> UserError:
    return UserError(
        f"this prediction was begun with {last}, and {problem}. --allow-mixed goes on with another arithmetic, "
        "--overwrite begins again"
    )


def _check(work: Work) -> None:
    """Raises UserError for options that never go together."""
    options = work.options
    check_precision(options.precision, work.device)
    if options.backend == "openvino" and work.device != "cpu":
        raise UserError("--backend openvino is for CPUs: add --device cpu")
    if options.precision == "int8" and options.backend not in ("auto", "openvino"):
        raise UserError(f"--precision int8 is for OpenVINO: leave --backend {options.backend} out")


def _candidates(work: Work, int8: bool) -> Iterator[Arithmetic]:
    """Yields what the options allow, the fastest first."""
    options, device = work.options, work.device
    named = options.precision not in ("auto", "int8")
    fastest = "bf16" if all(machine.bf16 for machine in work.machines) else "fp32"
    precision = options.precision if named else fastest
    if device == "cpu" and options.backend in ("auto", "openvino"):
        accepted = work.int8() if int8 and not named else None
        if accepted is not None:
            instructions = accepted.get("instructions", "")
            yield Arithmetic(device, "openvino", precision, accepted["network"], instructions)
        installed = any("openvino" in machine.libraries for machine in work.machines)
        if options.precision != "int8" and (installed or options.backend == "openvino"):
            yield Arithmetic(device, "openvino", precision)
    if options.precision == "int8":
        return
    if options.backend == "compiled" or (options.backend == "auto" and _compiling_pays(work, precision)):
        yield Arithmetic(device, "compiled", precision)
    if options.backend in ("auto", "torch"):
        yield Arithmetic(device, "torch", precision)


def _compiling_pays(work: Work, precision: str) -> bool:
    if not work.images:
        return False
    operations = work.images * floating_point_operations(work.card.model, work.card.image_size)
    bf16 = precision == "bf16"
    return compiling.pays(operations, torch.device(work.device), bf16=bf16, threads=work.threads)
