"""The test cases and the scores of a study's cells."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from monai.bundle import ConfigParser

from components.base.volume_metadata import case_name_of_item
from components.data.cases import Case
from components.data.prediction_writer import prediction_name
from study.cells import is_finished, list_cases_to_score, list_stages
from study.data import ACDC, StudyData
from study.grid import LABELLED_CASES, Cell


def finished_cells(cells: Iterable[Cell], output_dir: Path) -> list[Cell]:
    """List the finished cells, in the order given."""
    return [cell for cell in cells if is_finished(output_dir / cell.name)]


def evaluation_parser(
    cell: Cell, *, dataset_dir: str, output_dir: Path | None = None, sam_dir: str | None = None
) -> ConfigParser:
    """Read the configs that a cell is evaluated with.

    Args:
        cell: the cell.
        dataset_dir: as for `study.cells.list_stages`.
        output_dir: folder of the study; None for uses that do not involve the cell's folder.
        sam_dir: folder of SAM's checkpoints; None for the bundle's own `models`.
    """
    stages = list_stages(cell, dataset_dir=dataset_dir, output_dir=output_dir or Path(), sam_dir=sam_dir)
    parser = stages[-1].parser()
    parser["bundle_root"] = str(cell.method.folder)
    return parser


def list_test_cases(cell: Cell, dataset_dir: str) -> list[Case]:
    """List the test cases of a cell; in ACDC, ED comes before ES."""
    return list_cases_to_score(evaluation_parser(cell, dataset_dir=dataset_dir))


def prediction_file(cell: Cell, case: Case, output_dir: Path) -> Path:
    """Return the path of a finished cell's prediction for a test case."""
    return output_dir / cell.name / "eval" / prediction_name(case)


def count_training_cases(cells: Iterable[Cell], dataset_dir: str, data: StudyData = ACDC) -> int:
    """Count the training cases, or ACDC patients, that a null of `labelled_cases` stands for.

    They are counted for the first cell that trains; without such a cell the count is 0.
    """
    cell = next((cell for cell in cells if cell.method.trains), None)
    if cell is None:
        return 0
    parser = evaluation_parser(cell, dataset_dir=dataset_dir)
    parser[LABELLED_CASES] = None
    training = parser.get_parsed_content("train#dataset#data")
    return len({data.group_of(case_name_of_item(case)) for case in training})


def read_scores(cells: Iterable[Cell], output_dir: Path, *, training_cases: int) -> pd.DataFrame:
    """Read the scores of finished cells.

    Args:
        cells: finished cells.
        output_dir: folder of the study.
        training_cases: the number of labelled cases that null stands for.

    Returns:
        a row for each cell, case and class, sorted as the cells are. Columns: `method` (key), `title`, `ablation`,
        `value`, `labelled_patients` (the number of labelled cases), `split`, `case`, `class`, `dice` in 0..1 and
        `assd_mm`. `ablation` and `value` are empty for the method as it is. Undefined scores are nan.
    """
    return _read(cells, output_dir, "metrics.csv", training_cases)


def read_misses(cells: Iterable[Cell], output_dir: Path, *, training_cases: int) -> pd.DataFrame:
    """Read how often finished cells predicted no voxel of a class that is present.

    Returns:
        a row for each cell and class with the first columns of `read_scores` up to `split`, `class`, `n_volumes`,
        `n_misses` and `n_false_alarms`.
    """
    table = _read(cells, output_dir, "summary.csv", training_cases)
    table = table[table["class"] != "mean"]
    return table.drop(columns=[name for name in table if name.startswith(("dice_", "assd_"))])


def cell_labels(cell: Cell, training_cases: int) -> dict[str, Any]:
    """Return the columns `method` to `split`, which identify a cell in every table of the report."""
    return {
        "method": cell.method.key,
        "title": cell.method.title,
        "ablation": cell.variant.ablation if cell.variant else "",
        "value": cell.variant.value if cell.variant else "",
        "labelled_patients": training_cases if cell.labelled_cases is None else cell.labelled_cases,
        "split": cell.split,
    }


def _read(cells: Iterable[Cell], output_dir: Path, file: str, training_cases: int) -> pd.DataFrame:
    tables = []
    for cell in cells:
        table = pd.read_csv(output_dir / cell.name / "eval" / file, converters={"case": str, "class": str})
        for position, (name, value) in enumerate(cell_labels(cell, training_cases).items()):
            table.insert(position, name, value)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
