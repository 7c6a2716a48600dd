"""One HTML page with tables and figures, which needs no other file, no script and no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from components.base.atomic_write import write_atomically
from study.report.tables import is_numeric

_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_MEDIA_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        caption: what it shows.
        table: of text, without its index; rows that have the first column in common are kept together.
    """

    caption: str
    table: pd.DataFrame

    @property
    def numeric(self) -> list[bool]:
        """Which columns are aligned as numbers."""
        return [is_numeric(self.table[name]) for name in self.table]

    @property
    def rows(self) -> list[list[str]]:
        """The cells' text, empty for nan."""
        return self.table.astype(object).where(self.table.notna(), "").astype(str).to_numpy().tolist()

    @property
    def begins_group(self) -> list[bool]:
        """Which rows differ from the one above in the first column, if any are alike in it."""
        first = self.table.iloc[:, 0]
        begins = first.ne(first.shift())
        return [bool(value) and not begins.all() for value in begins]


@dataclass(frozen=True)
class Figure:
    """A picture of the page.

    Args:
        path: of a PNG or SVG file, which the page takes in.
        caption: what it shows.
        alt: what is to be seen, for readers who can't see it.
    """

    path: Path
    caption: str
    alt: str

    @property
    def source(self) -> str:
        """The file as a data URI.

        Raises:
            ValueError: when it is neither PNG nor SVG.
        """
        media_type = _MEDIA_TYPES.get(self.path.suffix.lower())
        if media_type is None:
            raise ValueError(f"{self.path}: expected a figure that ends in {' or '.join(_MEDIA_TYPES)}")
        return f"data:{media_type};base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Section:
    """A part of the page, with an entry in its contents.

    Args:
        heading: of the section.
        text: paragraphs, with an empty line between two.
        tables: below the text.
        figures: below the tables.
    """

    heading: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


def write_page(path: Path, *, title: str, description: str, sections: Sequence[Section]) -> None:
    """Write a page; the same content gives the same bytes.

    Args:
        path: of the HTML file.
        title: of the page.
        description: paragraphs below the title, with an empty line between two.
        sections: in their order.

    Raises:
        ValueError: when a figure is neither PNG nor SVG.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template(_TEMPLATE.name)
    text = template.render(title=title, description=description, sections=sections)
    with write_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")
