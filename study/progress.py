"""The progress of a study and the time it still takes, judged by its finished cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from study.cells import has_failed, is_finished, read_record
from study.execution import Task


def name_without_split(task: Task) -> str:
    """Return the name that a task shares with those of other splits, which take about as long."""
    return task.name.rpartition("/split_")[0] or task.name


def measured_seconds(tasks: Sequence[Task], output_dir: Path) -> dict[str, float]:
    """Return the median seconds of the tasks that ran without interruption, by their name without the split."""
    seconds: dict[str, list[float]] = {}
    for task in tasks:
        record = read_record(output_dir / task.name)
        if record and is_finished(output_dir / task.name) and not record["interrupted"]:
            seconds.setdefault(name_without_split(task), []).append(sum(record["seconds"].values()))
    return {name: median(values) for name, values in seconds.items()}


def remaining_seconds(tasks: Sequence[Task], output_dir: Path) -> float | None:
    """Estimate the seconds that the unfinished tasks take one after the other, None if no task is finished yet.

    A task without a finished one of its kind is taken to last as long as the median of the others.
    """
    measured = measured_seconds(tasks, output_dir)
    if not measured:
        return None
    unknown = median(measured.values())
    return sum(
        measured.get(name_without_split(task), unknown) for task in tasks if not is_finished(output_dir / task.name)
    )


def progress_table(tasks: Sequence[Task], output_dir: Path) -> pd.DataFrame:
    """Count the finished and failed tasks of a study.

    Args:
        tasks: all tasks of the study, in order.
        output_dir: folder of the study.

    Returns:
        a row for all splits of a task, with the columns `run` (their name), `cells`, `done`, `failed` and
        `minutes a cell`, the median of the finished ones, nan if there is none.
    """
    measured = measured_seconds(tasks, output_dir)
    rows: dict[str, dict[str, Any]] = {}
    for task in tasks:
        name, folder = name_without_split(task), output_dir / task.name
        row = rows.setdefault(name, {"cells": 0, "done": 0, "failed": 0})
        row["cells"] += 1
        row["done"] += is_finished(folder)
        row["failed"] += has_failed(folder)
        row["minutes a cell"] = measured.get(name, float("nan")) / 60
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run").reset_index()
