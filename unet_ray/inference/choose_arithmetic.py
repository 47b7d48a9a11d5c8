"""Chooses the arithmetic of a prediction once, before its first mask, by what all its machines can do."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
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

TIMED_FROM, TIMED_IMAGES = 120.0, 200
"""Work of a process, in estimated seconds and in images, from which OpenVINO and torch are timed. That takes as long as
four images, or some seconds. Which one is faster depends on network, precision and processor: on two EPYC cores with
AVX512-BF16 OpenVINO took 0.85 to 1.11 of torch's time."""


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
    times: Callable[[Sequence[Arithmetic]], Sequence[float]] | None = None
    """Returns the seconds that an image takes with each of these, where the network will run; nothing if a machine does
    not answer. None: nobody can tell."""

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

    On CPUs that is a network in int8 (if validation accepted one, and `int8`), else OpenVINO, or torch where it was
    timed to be faster, else torch, compiled if that pays. A log line says why the first choice can't be used. Raises
    UserError if no choice can be.
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
    by_openvino = device == "cpu" and options.backend in ("auto", "openvino")
    accepted = work.int8() if by_openvino and int8 and not named else None
    if accepted is not None:
        yield Arithmetic(device, "openvino", precision, accepted["network"], accepted.get("instructions", ""))
    if options.precision == "int8":
        return
    installed = any("openvino" in machine.libraries for machine in work.machines)
    if by_openvino and installed and _torch_is_faster(work, precision):
        yield Arithmetic(device, "torch", precision)
    elif by_openvino and (installed or options.backend == "openvino"):
        yield Arithmetic(device, "openvino", precision)
    if options.backend == "compiled" or (options.backend == "auto" and _compiling_pays(work, precision)):
        yield Arithmetic(device, "compiled", precision)
    if options.backend in ("auto", "torch"):
        yield Arithmetic(device, "torch", precision)


def _torch_is_faster(work: Work, precision: str) -> bool:
    """Returns whether torch was faster than OpenVINO when they were timed for this network on such processors. Times
    them before long work, and keeps the answer beside the model, so that later predictions choose the same."""
    options, model = work.options, work.models[0]
    if options.backend != "auto" or options.ensemble:
        return False
    known = checkpoint.read_choice(model, checkpoint.FASTEST, work.card) or {}
    conditions = _conditions(work, precision)
    if conditions not in known:
        rivals = [Arithmetic(work.device, backend, precision) for backend in ("torch", "openvino")]
        if work.times is None or not _is_long(work) or any(map(work.problem_of, rivals)):
            return False
        seconds = work.times(rivals)
        if not seconds:
            return False
        known[conditions] = "torch" if seconds[0] < seconds[1] else "openvino"
        with contextlib.suppress(OSError, UserError):  # some models can't be written
            checkpoint.save_choice(model, checkpoint.FASTEST, work.card, known)
    return known[conditions] == "torch"


def _conditions(work: Work, precision: str) -> str:
    """Returns all that an answer depends on, as one text."""
    machines = {f"{m.instructions} ({', '.join(map(' '.join, sorted(m.libraries.items())))})" for m in work.machines}
    size = work.options.tile or "x".join(map(str, work.card.image_size))
    return f"{' and '.join(sorted(machines))}, {precision}, threads: {work.threads or torch.get_num_threads()}, {size}"


def _is_long(work: Work) -> bool:
    return (
        work.images >= TIMED_IMAGES
        and compiling.estimated_seconds(_operations(work), work.device, work.threads) > TIMED_FROM
    )


def _operations(work: Work) -> int:
    return work.images * floating_point_operations(work.card.model, work.card.image_size) if work.images else 0


def _compiling_pays(work: Work, precision: str) -> bool:
    device = torch.device(work.device)
    return compiling.pays(_operations(work), device, bf16=precision == "bf16", threads=work.threads)
