"""Draws charts as SVG inside the page: text and axes have the page's own colour, the background is transparent."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from unet_ray.report.sections import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"
"""Colour in which matplotlib draws text and axes; `currentColor` replaces it."""
TRAINED, VALIDATED, SECOND = "#d9822b", "#2f80d0", "#8a63d2"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def svg(name: str, draw: Callable[[Axes], None], xlabel: str) -> str:
    """Returns a chart as SVG. `name` makes its ids unique in the page; `draw` draws on the axes.

    The same drawing gives the same text.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: Any = {**STYLE, "svg.hashsalt": name}
    with rc_context(settings):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(xlabel)
        axes.grid(True, color="#888888", alpha=0.25, linewidth=0.6)
        if xlabel == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)


def curves(history: Sequence[dict[str, Any]], best_epoch: int) -> list[Chart]:
    """Returns charts of loss, validation scores and learning rate over epochs; `history`: lines of metrics.jsonl."""
    epochs = [line["epoch"] for line in history]
    validated = "val_dice" in history[-1]

    def plot(axes: Axes, column: str, color: str, label: str | None = None) -> None:
        axes.plot(epochs, [line[column] for line in history], ".-", color=color, label=label)

    def loss(axes: Axes) -> None:
        plot(axes, "train_loss", TRAINED, "training")
        if validated:
            plot(axes, "val_loss", VALIDATED, "validation")
        axes.legend(frameon=False)

    def dice(axes: Axes) -> None:
        plot(axes, "val_dice", VALIDATED, "Dice")
        plot(axes, "val_iou", SECOND, "IoU")
        axes.axvline(best_epoch, color=INK, linewidth=0.8, linestyle=":")
        axes.legend(frameon=False, loc="lower right")

    def learning_rate(axes: Axes) -> None:
        plot(axes, "learning_rate", TRAINED)
        axes.set_ylim(bottom=0)

    charts = [
        Chart(svg("loss", loss, "epoch"), "Loss."),
        Chart(svg("rate", learning_rate, "epoch"), "Learning rate at the end of each epoch."),
    ]
    if validated:
        text = f"Validation scores at the network's size; best at epoch {best_epoch}."
        charts.insert(1, Chart(svg("dice", dice, "epoch"), text))
    return charts


def threshold_curves(choice: Mapping[str, Any]) -> Chart:
    """Returns a chart of Dice, precision and recall against the threshold; `choice`: what threshold.json holds."""

    def draw(axes: Axes) -> None:
        for name, color in (("dice", VALIDATED), ("precision", SECOND), ("recall", TRAINED)):
            values = [np.nan if value is None else value for value in choice[name]]  # where it is not defined
            axes.plot(choice["thresholds"], values, color=color, label=name.capitalize())
        axes.axvline(choice["threshold"], color=INK, linewidth=0.8, linestyle=":")
        axes.legend(frameon=False)

    text = f"Means over {choice['images']} images; {choice['threshold']:g} is used."
    return Chart(svg("threshold", draw, "threshold"), text)


def dice_histogram(dice: np.ndarray) -> Chart:
    """Returns a histogram of the images' Dice."""

    def histogram(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        low = np.floor(min(dice.min(), 0.95) * 20) / 20
        axes.hist(dice, bins=np.linspace(low, 1, 25).tolist(), color=VALIDATED)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    return Chart(svg("histogram", histogram, "Dice"), "Images by their Dice.")


def mask_histograms(foreground: np.ndarray, uncertainty: np.ndarray) -> list[Chart]:
    """Returns histograms of the images' share of foreground and of their uncertainty, both 0 to 1; NaN: not known."""
    known = uncertainty[np.isfinite(uncertainty)]

    def areas(axes: Axes) -> None:
        axes.hist(100 * foreground, bins=np.linspace(0, 100, 41).tolist(), color=VALIDATED)

    def uncertainties(axes: Axes) -> None:
        axes.hist(known, bins=np.linspace(0, max(0.05, float(known.max())), 41).tolist(), color=VALIDATED)

    charts = [Chart(svg("areas", areas, "% of the pixels"), "Images by how much of them is not background.")]
    if len(known):
        charts.append(Chart(svg("sure", uncertainties, "uncertainty"), "Images by their uncertainty."))
    return charts
