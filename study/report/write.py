"""Writing the report: every table and figure as files of their own, and one page with them all."""

from __future__ import annotations

from pathlib import Path

from study.grid import Grid


def write_report(grid: Grid, output_dir: Path, *, dataset_dir: str) -> Path:
    """Write the report of a study's finished cells (in the making)."""
    return output_dir
