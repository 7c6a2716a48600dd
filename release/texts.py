"""Edits of a bundle's README that leave the rest of it as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping


def with_defaults(readme: str, defaults: Mapping[str, str]) -> str:
    """Set the second column of a README's table of knobs.

    Args:
        readme: Markdown with one row `| `knob` | `default` | meaning |` for each knob.
        defaults: new defaults by knob.

    Returns:
        the text with these defaults.
    """
    text = readme
    for name, default in defaults.items():
        text = replaced(text, rf"^\| `{re.escape(name)}` \| [^|]* \|", f"| `{name}` | `{default}` |")
    return text


def with_section(readme: str, heading: str, body: str) -> str:
    """Put a text in the place of a README's section.

    Args:
        readme: Markdown with headings of the second level.
        heading: of the section, without `## `.
        body: what takes its place, heading included, or nothing.

    Returns:
        the text with the other section.
    """
    return replaced(readme, rf"^## {re.escape(heading)}\n.*?(?=^## )", f"{body.strip()}\n\n" if body else "")


def replaced(text: str, pattern: str, new: str) -> str:
    """Replace what a pattern matches, which must be one place.

    Args:
        text: to look in.
        pattern: regular expression; `^` begins a line, `.` matches line ends.
        new: taken literally.

    Returns:
        the text with `new` in it.

    Raises:
        ValueError: when the pattern matches nowhere or more than once.
    """
    changed, count = re.subn(pattern, lambda _: new, text, flags=re.MULTILINE | re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one place in the text that matches {pattern!r}, found {count}")
    return changed
