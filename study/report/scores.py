"""The scores of a study's finished cells, as one table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from components.data.acdc import Case, list_cases, list_patients, split_patients
from study.cells import is_finished
from study.grid import Cell


def finished_cells(cells: Iterable[Cell], output_dir: Path) -> list[Cell]:
    """List the cells of a study that are done, in the study's order."""
    return [cell for cell in cells if is_finished(output_dir / cell.name)]


def cases_of(cell: Cell, dataset_dir: str) -> list[Case]:
    """List the test cases of a cell, ED before ES."""
    return list_cases(dataset_dir, "test", split_seed=cell.split, include_testing=_includes_testing(cell))


def count_training_patients(cell: Cell, dataset_dir: str) -> int:
    """Count the patients that a cell with `labelled_patients` null trains on."""
    patients = list_patients(dataset_dir, include_testing=_includes_testing(cell))
    return len(split_patients(list(patients), seed=cell.split)["training"])


def read_scores(cells: Iterable[Cell], output_dir: Path, *, training_patients: int) -> pd.DataFrame:
    """Read what finished cells scored.

    Args:
        cells: finished ones.
        output_dir: of the study.
        training_patients: how many patients `labelled_patients` null means.

    Returns:
        a row for each cell, case and class with the columns `method` (key), `title`, `ablation` and `value` (empty for
        the method as it is), `labelled_patients`, `split`, `case`, `class`, `dice` in 0..1 and `assd_mm`, both nan
        where undefined; sorted as the cells are.
    """
    return _read(cells, output_dir, "metrics.csv", training_patients)


def read_misses(cells: Iterable[Cell], output_dir: Path, *, training_patients: int) -> pd.DataFrame:
    """Read how often finished cells predicted nothing of a class that is there.

    Returns:
        a row for each cell and class with the first columns of `read_scores` up to `split`, `class`, `n_volumes`,
        `n_misses` and `n_false_alarms`.
    """
    table = _read(cells, output_dir, "summary.csv", training_patients)
    table = table[table["class"] != "mean"]
    return table.drop(columns=[name for name in table if name.startswith(("dice_", "assd_"))])


def cell_labels(cell: Cell, training_patients: int) -> dict[str, Any]:
    """Name a cell by the columns `method` to `split` that its rows have in every table of the report."""
    return {
        "method": cell.method.key,
        "title": cell.method.title,
        "ablation": cell.variant.ablation if cell.variant else "",
        "value": cell.variant.value if cell.variant else "",
        "labelled_patients": training_patients if cell.labelled_patients is None else cell.labelled_patients,
        "split": cell.split,
    }


def _includes_testing(cell: Cell) -> bool:
    return bool(cell.method.knobs.get("include_testing", False))


def _read(cells: Iterable[Cell], output_dir: Path, file: str, training_patients: int) -> pd.DataFrame:
    tables = []
    for cell in cells:
        table = pd.read_csv(output_dir / cell.name / "eval" / file)
        for place, (name, value) in enumerate(cell_labels(cell, training_patients).items()):
            table.insert(place, name, value)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
