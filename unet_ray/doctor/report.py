"""The result of an examination, and its text for a terminal."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from unet_ray.config import TrainConfig
from unet_ray.doctor.words import counts, percent, some
from unet_ray.report.progress import duration
from unet_ray.settings import load_train_config

NAMED = 20
"""The most files that a finding lists."""
SHOWN_CLASSES = 16

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem, or one fact worth knowing."""

    level: Level
    code: str
    """Name of the finding, such as `mask-of-another-size`."""
    text: str
    """One line: the problem, how many files, up to three names."""
    remedy: str
    """What the user can do."""
    files: tuple[str, ...] = ()
    """Names below their folder, at most `NAMED`."""


def _finding(level: Level, code: str, text: str, remedy: str, files: Sequence[str] | None = None) -> list[Finding]:
    if files is None:
        return [Finding(level, code, text, remedy)]
    return [Finding(level, code, f"{text}: {some(files)}", remedy, tuple(files[:NAMED]))] if files else []


error, warning, note = partial(_finding, "error"), partial(_finding, "warning"), partial(_finding, "note")
"""Make a finding whose text ends with the names of its files; make none if the list of files is empty."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Settings that fit the data."""

    recipe: str
    image_size: int | tuple[int, int]
    """`data.image_size`."""
    settings: tuple[tuple[str, str], ...]
    """Settings that differ from the recipe's: dotted name and YAML value, as `--set` takes them."""
    command: str
    """The whole `unet-ray train …`, quoted for a shell."""

    def config(self) -> TrainConfig:
        """Returns the settings that the command trains with."""
        return load_train_config(recipe=self.recipe, settings=self.settings)


@dataclass(frozen=True, slots=True)
class Expected:
    """Time and memory of the suggested training on this machine."""

    seconds_per_epoch: float
    row_bytes: int
    """Size of all decoded pairs, in bytes."""
    fits: bool
    """The decoded pairs fit in memory; otherwise each epoch decodes them again."""
    device: str
    measured: str
    """How the time was measured, in words."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `examine`."""

    images: str
    masks: str | None
    pairs: int
    facts: dict[str, Any]
    """Numbers of `images`, `masks` and `sampled` pairs; number of files with each of `image_formats`, `image_modes`,
    `image_bands`, `image_sizes`, and the same for masks; number of masks with each of `mask_values`; `class_shares` of
    the pixels; `empty_masks`; `groups`."""
    findings: tuple[Finding, ...]
    """Errors first, then warnings, then notes."""
    suggestion: Suggestion | None
    expected: Expected | None

    @property
    def exit_code(self) -> int:
        """0: no findings, or only notes; 1: warnings; 2: errors."""
        levels = {finding.level for finding in self.findings}
        return 2 if "error" in levels else 1 if "warning" in levels else 0

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON, including `exit_code`."""
        return {**dataclasses.asdict(self), "exit_code": self.exit_code}


def table(report: Report) -> str:
    """Formats the report for a terminal: at most 80 columns, except the command to copy."""
    lines = [f"images       {report.images}", f"masks        {report.masks or 'none given'}"]
    lines += [line for label, text in _facts(report.facts, report.pairs) for line in _wrapped(f"{label:<12} ", text)]
    for finding in report.findings:
        lines += ["", *_wrapped(f"{finding.level:<8} ", f"{finding.text} [{finding.code}]")]
        lines += _wrapped("         -> ", finding.remedy)
    if not report.findings:
        lines += ["", "no problems found"]
    if report.suggestion is not None:
        lines += ["", "suggested", f"  {report.suggestion.command}"]
    if report.expected is not None:
        expected = report.expected
        fits = "fit in memory" if expected.fits else "do not fit in memory: each epoch decodes them, or see --cache"
        size = expected.row_bytes / 2**20
        memory = f"{size:.0f} MiB" if size < 1024 else f"{size / 1024:.1f} GiB"
        text = (
            f"{duration(max(1.0, expected.seconds_per_epoch))} an epoch on {expected.device} ({expected.measured}); "
            f"the decoded pairs take {memory} and {fits}"
        )
        lines += _wrapped("expected     ", text)
    return "\n".join(lines)


def _facts(facts: Mapping[str, Any], pairs: int) -> Iterator[tuple[str, str]]:
    yield "found", f"{facts['images']} images, {facts['masks']} masks, {pairs} pairs"
    if facts["sampled"]:
        yield "pixels", f"read of {'all' if facts['sampled'] == pairs else facts['sampled']} pairs"
    for kind in ("image", "mask"):
        parts = [facts[f"{kind}_{what}"] for what in ("formats", "modes", "bands", "sizes")]
        if any(parts):
            yield f"{kind} files", "; ".join(map(counts, parts))
    if facts["class_shares"]:
        shares = [f"{value}: {percent(share)}" for value, share in facts["class_shares"].items()]
        more = f" and {len(shares) - SHOWN_CLASSES} more" if len(shares) > SHOWN_CLASSES else ""
        yield "mask values", f"{', '.join(shares[:SHOWN_CLASSES])}{more} of the pixels"
    if facts["empty_masks"]:
        yield "empty masks", f"{facts['empty_masks']} of {facts['sampled']}"
    if facts["groups"]:
        yield "groups", f"{facts['groups']['groups']} by {facts['groups']['pattern']!r}"


def _wrapped(first: str, text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)
