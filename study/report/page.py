"""One HTML page with tables and figures, which needs no other file, script or network access."""

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
        caption: what the table shows.
        table: table of text, shown without its index. Adjacent rows with the same first column form a group.
    """

    caption: str
    table: pd.DataFrame

    @property
    def numeric(self) -> list[bool]:
        """Which columns are aligned as numbers."""
        return [is_numeric(self.table[name]) for name in self.table]

    @property
    def rows(self) -> list[list[str]]:
        """The text of the cells, empty for nan."""
        return self.table.astype(object).where(self.table.notna(), "").astype(str).to_numpy().tolist()

    @property
    def begins_group(self) -> list[bool]:
        """Which rows start a group; none do if every group has a single row."""
        first = self.table.iloc[:, 0]
        begins = first.ne(first.shift())
        return [bool(value) and not begins.all() for value in begins]


@dataclass(frozen=True)
class Figure:
    """A picture of the page.

    Args:
        path: PNG or SVG file, which is embedded in the page.
        caption: what the figure shows.
        alt: the alternative text for screen readers.
    """

    path: Path
    caption: str
    alt: str

    @property
    def source(self) -> str:
        """The file as a data URI.

        Raises:
            ValueError: if it is neither PNG nor SVG.
        """
        media_type = _MEDIA_TYPES.get(self.path.suffix.lower())
        if media_type is None:
            raise ValueError(f"{self.path}: expected a figure that ends in {' or '.join(_MEDIA_TYPES)}")
        return f"data:{media_type};base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Section:
    """A section of the page, with an entry in the table of contents.

    Args:
        heading: the section's heading.
        text: paragraphs, separated by empty lines.
        tables: shown below the text.
        figures: shown below the tables.
    """

    heading: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


def write_page(path: Path, *, title: str, description: str, sections: Sequence[Section]) -> None:
    """Write a page; the same content gives the same bytes.

    Args:
        path: the HTML file.
        title: the page's title.
        description: paragraphs below the title, separated by empty lines.
        sections: sections in the order of the page.

    Raises:
        ValueError: if a figure is neither PNG nor SVG.
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
