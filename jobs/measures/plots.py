"""Draws the benchmark's plots, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from measures.names import Sample

OURS, THEIRS, SECOND = "#2f80d0", "#888888", "#d9822b"


def _figure(rows: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for each in axes:
        each.grid(True, color="#888888", alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


FAR = 0.02
"""A Dice that is so much lower than the best one is far below it."""


def frontier(location: Path, points: Sequence[tuple[str, str, float, float]], peer: float | None) -> None:
    """Draws Dice against images a second. `points`: model, way of prediction, images a second, Dice; `peer`: milesial's
    images a second, with weights that nobody trained. A Dice far below the best one is named, at the lower edge: to
    scale, it would press all others into one line."""
    best = max(dice for *_, dice in points)
    edge = min(dice for *_, dice in points if dice > best - FAR) - FAR / 40
    given, points = points, [(model, way, rate, max(dice, edge)) for model, way, rate, dice in points]
    named = {model: f", Dice {dice:.2f}" for model, _, _, dice in given if dice < edge}
    figure, (axes,) = _figure(1, (7, 4.2))
    for way, marker in zip(dict.fromkeys(way for _, way, _, _ in points), cycle("o^sDvP"), strict=False):
        of_way = [(rate, dice) for _, its_way, rate, dice in points if its_way == way]
        axes.plot(*zip(*of_way, strict=True), marker, color=OURS, label=way)
    fastest = {model: (rate, dice) for model, _, rate, dice in sorted(points, key=lambda point: point[2])}
    for model, (rate, dice) in fastest.items():
        offset = {"xytext": (9, -3), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"{model}: {rate:.0f} a second{named.get(model, '')}", (rate, dice), **offset)
    if peer:
        axes.axvline(peer, color=THEIRS, linestyle="--")
        axes.text(peer, best, " milesial's predict.py", color=THEIRS, fontsize=8)
    axes.set(xscale="log", xlabel="images a second, photographs to PNG masks", ylabel="mean Dice")
    axes.margins(0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, 1))
    figure.savefig(location)


def learning_curves(location: Path, curves: Mapping[str, Sequence[tuple[int, float, float, float]]]) -> None:
    """Draws Dice against labelled images. `curves`: network -> images, mean Dice, ends of its interval."""
    figure, (axes,) = _figure(1, (4.2, 3.2))
    for (network, points), color in zip(curves.items(), cycle((THEIRS, OURS, SECOND)), strict=False):
        labelled, dice, low, high = zip(*points, strict=True)
        axes.plot(labelled, dice, "o-", color=color, label=network)
        axes.fill_between(labelled, low, high, color=color, alpha=0.15, linewidth=0)
    counts = sorted({count for points in curves.values() for count, *_ in points})
    axes.set(xscale="log", xlabel="labelled images", ylabel="Dice on unseen images")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(location)


def scale(
    location: Path, replicas: Sequence[int], rates: Sequence[float], driver: Sequence[float], rate: float
) -> None:
    """Draws what one command hands out. `rates`: images a second; `driver`: its seconds of CPU a thousand images;
    `rate`: images a second of a replica."""
    figure, (above, below) = _figure(2, (7, 5))
    above.plot(replicas, [rate * count for count in replicas], "--", color=THEIRS, label="what the replicas could take")
    above.plot(replicas, rates, "o-", color=OURS, label="handed out")
    above.set(xscale="log", yscale="log", ylabel="images a second")
    above.legend(frameon=False)
    below.plot(replicas, driver, "o-", color=SECOND)
    below.set(xlabel="replicas", ylabel="driver: seconds of CPU\na thousand images", ylim=(0, None))
    figure.savefig(location)


def names(location: Path, first: Sequence[Sample], second: Sequence[Sample]) -> None:
    """Draws images a second, the driver's CPU and its memory over the two runs."""
    figure, (rate, cpu, memory) = _figure(3, (7, 6.5))
    for run in (first, second):
        minutes = [(sample.time - first[0].time) / 60 for sample in run]
        rate.plot(minutes[1:], _a_second(run, "listed"), color=THEIRS, label="listed" if run is first else None)
        rate.plot(minutes[1:], _a_second(run, "done"), color=OURS, label="done" if run is first else None)
        cpu.plot(minutes[1:], _a_second(run, "cpu"), color=SECOND)
        memory.plot(minutes, [sample.memory / 2**30 for sample in run], color=SECOND)
    for axes in (rate, cpu, memory):
        axes.axvline((first[-1].time - first[0].time) / 60, color="black", linewidth=0.8, linestyle=":")
    rate.set(ylabel="images a second", ylim=(0, None))
    rate.legend(frameon=False)
    cpu.set(ylabel="driver: CPUs", ylim=(0, None))
    memory.set(xlabel="minutes (dotted: killed)", ylabel="driver: GiB", ylim=(0, None))
    figure.savefig(location)


def _a_second(run: Sequence[Sample], what: str) -> list[float]:
    """Returns by how much a figure grows a second, between samples. What was 0 is known for the first time: 0."""
    return [
        (getattr(after, what) - getattr(before, what)) / (after.time - before.time) if getattr(before, what) else 0.0
        for before, after in pairwise(run)
    ]
