"""Defines the parts of a page, and turns a page into HTML."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from importlib import resources

from unet_ray.data import storage


@dataclass(frozen=True, slots=True)
class Chart:
    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Table:
    rows: list[list[str]]
    head: list[str] = field(default_factory=list)
    words: bool = False
    """All columns are text: no column is aligned as numbers."""


@dataclass(frozen=True, slots=True)
class Row:
    """Pictures of one image, side by side."""

    anchor: str
    pictures: list[tuple[str, str]]
    """(data URI, caption)."""
    caption: str


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    rows: list[Row] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    """(data URI, caption)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    title: str
    text: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)
    """(CSS colour, meaning)."""
    charts: list[Chart] = field(default_factory=list)
    links_text: str = ""
    links: list[tuple[str, str, str]] = field(default_factory=list)
    """(anchor, text, value)."""
    table: Table | None = None
    groups: list[Group] = field(default_factory=list)
    command: str = ""
    keep: bool = False
    """Keep the section on one page when printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    title: str
    subtitle: str
    tiles: list[tuple[str, str]]
    """(value, label): the figures at the top."""
    notes: list[str]
    sections: list[Section]

    def html(self) -> str:
        """Returns the page as one HTML file that needs no network."""
        import jinja2

        source = resources.files("unet_ray.report").joinpath("page.html.j2").read_text()
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return environment.from_string(source).render(**content)


def anchor(path: str) -> str:
    """Returns the id of an image's row of pictures."""
    return "image-" + hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def short(path: str) -> str:
    """Returns the last folder and the file name."""
    return "/".join(storage.without_secrets(path).rsplit("/", 2)[-2:])


def name_of(location: str) -> str:
    """Returns the last folder's name."""
    return storage.without_secrets(location).rstrip("/").rpartition("/")[2]


def plural(count: int, one: str, many: str = "") -> str:
    """Returns `1 image`, `2 images`."""
    return f"{count} {one if count == 1 else many or one + 's'}"
