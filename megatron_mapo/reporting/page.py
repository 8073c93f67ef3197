"""A page as data, and as one self-contained HTML file.

Everything that a page shows is untrusted: prompts come from data sets, responses from models. The template escapes
every value (jinja2's autoescape), pictures are images and not part of the document, and the page forbids the browser to
run or load anything (Content-Security-Policy).
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mapo.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG_HEADER = "data:image/svg+xml;base64,"
_DPI = 130
_LONG_CURVE = 1000
"""Points of a curve that are not written out one by one: the page of a long run stays small."""


@dataclass(frozen=True)
class Table:
    """Cells of text, the first column to the left.

    Attributes:
        head: names of the columns; empty: none.
        rows: as many cells each.
        plain: all columns are text and stand to the left.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    plain: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        uri: ``data:`` address with the whole picture.
        alt: what it shows, in words.
    """

    uri: str
    alt: str


@dataclass(frozen=True)
class Response:
    """One response of a group: a line about it, whether it is good, its text."""

    summary: str
    good: bool
    text: str


@dataclass(frozen=True)
class Group:
    """A prompt and some of its responses."""

    summary: str
    prompt: str
    responses: Sequence[Response]


@dataclass
class Section:
    """A heading, then paragraphs, tables, pictures and groups, in this order."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The page as HTML that needs no other file and no network."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("megatron_mapo.reporting", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("page.html.j2").render(page=page)


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file in one step; its folder is made.

    Raises:
        ConfigError: it cannot be written; the message names ``option``.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate, which a damaged text may hold, has no UTF-8.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{option}: cannot write {path}: {error.strerror}") from error


def markdown(table: Table) -> str:
    """A table in Markdown."""
    rule = [":--", *(["--:"] * (len(table.head) - 1))]
    rows = [[markdown_text(cell).replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])) + "\n"


def markdown_text(text: str) -> str:
    """Text on one line that is no HTML, which Markdown would let through."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").splitlines())


def draw(paint: Callable[[Figure], None], alt: str, size: tuple[float, float] = (5.6, 3.1)) -> Picture:
    """A picture that ``paint`` draws on a figure of ``size`` inches."""
    uri = _SVG_HEADER + base64.b64encode(figure_bytes(paint, size, "svg")).decode()
    return Picture(uri, alt)


def figure_bytes(paint: Callable[[Figure], None], size: tuple[float, float], kind: str) -> bytes:
    """The same as a file's content; ``kind`` is ``svg`` or ``png``."""
    # Not pyplot: it keeps global state, and would look for a screen.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from megatron_mapo.tracking.plots import STYLE

    buffer = io.BytesIO()
    # Names come from data and from files: a dollar sign in them is no formula. Text stays text, which is small.
    style = {**STYLE, "text.parse_math": False, "svg.fonttype": "none"}
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        width, height = size
        figure.subplots_adjust(0.75 / width, 0.5 / height, 1 - 0.2 / width, 1 - 0.35 / height, hspace=0.35, wspace=0.25)
        paint(figure)
        _rasterize_long_curves(figure)
        figure.savefig(buffer, format=kind, dpi=_DPI)
    return buffer.getvalue()


def _rasterize_long_curves(figure: Figure) -> None:
    for axes in figure.axes:
        for line in axes.lines:
            line.set_rasterized(len(line.get_path()) > _LONG_CURVE)
        for collection in axes.collections:
            points = sum(len(path) for path in collection.get_paths())
            collection.set_rasterized(points > _LONG_CURVE)
