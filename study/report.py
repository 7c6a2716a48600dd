"""The table of a study: Dice per class, mean and spread over splits."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from statistics import mean, median, stdev

from components.acdc import CLASS_NAMES
from study.cells import finished, read_record
from study.grid import Cell

_COLUMNS = ("method", "labelled patients", *CLASS_NAMES, "mean", "splits", "seconds of training")


def to_markdown(cells: Sequence[Cell], output_dir: Path) -> str:
    """Write a table of the finished cells, a row for each method and number of labelled patients.

    Args:
        cells: of the study.
        output_dir: of the study.

    Returns:
        a Markdown table: Dice in percent of the test volumes' mean, its mean over splits and their standard deviation
        (ddof 1); and the median over splits of the training's seconds, without interrupted trainings.
    """
    lines = [_row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
    row_of = attrgetter("labelled_patients", "title")
    for (count, title), group in itertools.groupby(sorted(cells, key=row_of), key=row_of):
        folders = [output_dir / cell.name for cell in group]
        records = {folder: record for folder in folders if (record := read_record(folder)) and finished(record)}
        if not records:
            continue
        scores = [_dice(folder) for folder in records]
        seconds = [
            r["seconds"]["training"] for r in records.values() if "training" in r["seconds"] and not r["interrupted"]
        ]
        dice = [_mean_and_spread([score[name] for score in scores]) for name in (*CLASS_NAMES, "mean")]
        lines.append(_row([title, count, *dice, len(records), f"{median(seconds):.0f}" if seconds else ""]))
    return "\n".join(lines) + "\n"


def _dice(folder: Path) -> dict[str, float]:
    """Read a cell's Dice in percent, by class and `mean`."""
    with (folder / "eval" / "summary.csv").open() as file:
        return {row["class"]: 100 * float(row["dice_mean"]) for row in csv.DictReader(file)}


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _row(values: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, values))} |"
