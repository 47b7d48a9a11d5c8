"""What a page consists of, and how charts and pictures are drawn."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unet_ray.data import storage

if TYPE_CHECKING:
    pass


SIDE = 360
"""Longer side of the pictures, pixels."""
INK = "#010203"
"""What matplotlib draws text and axes in; the page's own colour is put in its place."""
TRAINED, VALIDATED = "#d9822b", "#2f80d0"
FALSE_POSITIVE, FALSE_NEGATIVE = (230, 60, 40), (60, 110, 255)


@dataclass(frozen=True, slots=True)
class Chart:
    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Table:
    rows: list[list[str]]
    head: list[str] = field(default_factory=list)
    words: bool = False
    """All columns are text: no numbers to put below each other."""


@dataclass(frozen=True, slots=True)
class Row:
    """Pictures beside each other, of one image."""

    anchor: str
    pictures: list[tuple[str, str]]
    caption: str


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    rows: list[Row] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    title: str
    text: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    links_text: str = ""
    links: list[tuple[str, str, str]] = field(default_factory=list)
    table: Table | None = None
    groups: list[Group] = field(default_factory=list)
    command: str = ""
    keep: bool = False
    """Not broken over two printed pages."""


def page(**content: Any) -> str:
    import jinja2

    source = resources.files("unet_ray.report").joinpath("page.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source).render(**content)


# --- charts and pictures ---


def svg(draw: Any, xlabel: str) -> str:
    """A chart without a background, text in the colour of the page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": draw.__name__,  # the same page for the same run
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
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
    # Ids are the page's, and clip paths of several charts must not be one.
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{draw.__name__}-", text)


def small(ids: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(ids).resize(size_hw[::-1], Image.Resampling.NEAREST))


def jpeg(picture: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=82)
    return embedded(stream.getvalue())


def embedded(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def anchor(path: str) -> str:
    return "image-" + hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def short(path: str) -> str:
    return "/".join(storage.without_secrets(path).rsplit("/", 2)[-2:])


def name_of(location: str) -> str:
    return storage.without_secrets(location).rstrip("/").rpartition("/")[2]


def plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
