"""CSV reports of an evaluation: every case and class, and a summary per class."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import decollate_batch
from monai.utils import string_list_all_gather

from components.base.atomic_write import write_atomically
from components.base.volume_metadata import case_name_of, files_of, is_picture
from components.data.acdc import CLASS_NAMES

logger = logging.getLogger(__name__)

METRICS_COLUMNS = ("case", "class", "dice", "assd_mm")
UNIT_COLUMN, PIXELS = "assd_unit", "pixels"  # the last column of both tables of pictures, and all its values
SUMMARY_COLUMNS = (
    "class",
    "n_volumes",
    "dice_mean",
    "dice_std_ddof1",
    "dice_n_undefined",
    "assd_mm_mean",
    "assd_mm_std_ddof1",
    "assd_mm_n_undefined",
    "n_misses",
    "n_false_alarms",
    "assd_mm_mean_detected",
)

Row = dict[str, str | int | float]


def summarise(
    *, dice: np.ndarray, assd_mm: np.ndarray, in_pred: np.ndarray, in_truth: np.ndarray, class_names: Sequence[str]
) -> list[Row]:
    """Summarise the scores of N volumes per class, and over all classes.

    Undefined scores (nan: the class is absent from both masks) are counted and left out of means and standard
    deviations. Standard deviations are over volumes, with ddof 1, hence nan for fewer than two volumes. A miss is a
    class present in the truth only, a false alarm one present in the prediction only; detected means present in both.

    Args:
        dice: `(N,K)` Dice in 0..1.
        assd_mm: `(N,K)` surface distances in mm, or in pixels for pictures.
        in_pred: `(N,K)` bool, whether the prediction holds the class.
        in_truth: `(N,K)` bool, whether the truth holds the class.
        class_names: K names of the foreground classes.

    Returns:
        K rows and one named `mean`, with `SUMMARY_COLUMNS` as keys. In the row `mean`, means and standard deviations
        are the mean of the classes' values, ignoring nan; misses, false alarms and undefined scores are totals.
    """
    rows: list[Row] = []
    for k, class_name in enumerate(class_names):
        detected = in_pred[:, k] & in_truth[:, k]
        rows.append(
            {
                "class": class_name,
                "n_volumes": len(dice),
                **_statistics("dice", dice[:, k]),
                **_statistics("assd_mm", assd_mm[:, k]),
                "n_misses": int((in_truth[:, k] & ~in_pred[:, k]).sum()),
                "n_false_alarms": int((in_pred[:, k] & ~in_truth[:, k]).sum()),
                "assd_mm_mean_detected": _mean(assd_mm[detected, k]),
            }
        )
    return [*rows, _row_over_classes(rows)]


class EvaluationReport:
    """Ignite handler that writes `metrics.csv` and `summary.csv` when the evaluation is completed.

    `metrics.csv` has one row per case and class, sorted by case; `summary.csv` holds the rows of `summarise`. Undefined
    values are written as `nan`. Distances of pictures are in pixels, as their last column `assd_unit` says. The name
    of the column `assd_mm` stays, since other programs read it. Both metrics must be `VolumeMetricHandler`s
    with `save_details`. In a distributed run rank 0 writes the files.

    Args:
        output_dir: folder of both files, made if missing.
        class_names: names of the foreground classes, in channel order.
        dice: name under which the Dice handler is attached.
        assd: name under which the surface distance handler is attached.
        image_key: key of the batch whose metadata names the case.

    Attributes:
        n_cases: number of scored cases.
        mean_dice: mean over the classes' mean Dice.
        table: the summary for a terminal, with the Dice of trivial answers.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        class_names: Sequence[str] = CLASS_NAMES,
        dice: str = "val_mean_dice",
        assd: str = "val_assd_mm",
        image_key: str = "image",
    ) -> None:
        self.output_dir = Path(output_dir)
        self.class_names = tuple(class_names)
        self.dice = dice
        self.assd = assd
        self.image_key = image_key
        self.n_cases, self.mean_dice, self.table = 0, math.nan, ""
        self._cases: list[str] = []
        self._of_pictures = False

    def attach(self, engine: Engine) -> None:
        """Register the handler on an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._forget_cases)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect_cases)
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write both files and log their paths and the summary.

        Raises:
            ValueError: if a metric's details are missing or do not match the cases or class names.
        """
        # every rank takes part in the gathering, whose order is that of the metrics' own buffers
        cases = string_list_all_gather(self._cases) if idist.get_world_size() > 1 else self._cases
        if idist.get_rank() != 0:
            return
        order = sorted(range(len(cases)), key=cases.__getitem__)  # independent of how the ranks share the cases
        names = (self.dice, self.assd, *(f"{self.assd}_{kind}" for kind in ("in_pred", "in_truth", "share")))
        dice, assd_mm, in_pred, in_truth, share = (self._details(engine, name, len(cases))[order] for name in names)
        scores: list[Row] = [
            dict(zip(METRICS_COLUMNS, (cases[index], class_name, float(dice[n, k]), float(assd_mm[n, k])), strict=True))
            for n, index in enumerate(order)
            for k, class_name in enumerate(self.class_names)
        ]
        summary = summarise(
            dice=dice, assd_mm=assd_mm, in_pred=in_pred, in_truth=in_truth, class_names=self.class_names
        )
        unit = (UNIT_COLUMN,) if self._of_pictures else ()
        for row in (*scores, *summary) if unit else ():
            row[UNIT_COLUMN] = PIXELS
        metrics_path = write_csv(self.output_dir / "metrics.csv", (*METRICS_COLUMNS, *unit), scores)
        summary_path = write_csv(self.output_dir / "summary.csv", (*SUMMARY_COLUMNS, *unit), summary)
        self.n_cases, self.mean_dice = len(cases), float(summary[-1]["dice_mean"])
        self.table = _as_table(summary, share, of_pictures=self._of_pictures)
        logger.info(f"Every case and class: {metrics_path}\nSummary: {summary_path}\n{self.table}")

    def _forget_cases(self, _: Engine) -> None:
        self._cases = []

    def _collect_cases(self, engine: Engine) -> None:
        batch: Any = engine.state.batch
        # MONAI's engines decollate the batch after the network's forward pass, unless `decollate=False`
        images = (
            decollate_batch(batch[self.image_key]) if isinstance(batch, Mapping) else [b[self.image_key] for b in batch]
        )
        self._cases.extend(case_name_of(image) for image in images)
        self._of_pictures = all(is_picture(file) for image in images for file in files_of(image))

    def _details(self, engine: Engine, name: str, n_cases: int) -> np.ndarray:
        """Return the details `(N,K)` that a metric left in the engine, checked."""
        details = getattr(engine.state, "metric_details", {})
        if name not in details:
            raise ValueError(
                f"Expected details {name!r}, received {sorted(details)}: attach VolumeDiceHandler and "
                f"VolumeAssdHandler with save_details=True under the names {self.dice!r} and {self.assd!r}."
            )
        values = torch.as_tensor(details[name]).cpu().numpy()
        if values.shape != (n_cases, len(self.class_names)):
            raise ValueError(
                f"Expected {name!r} of shape {(n_cases, len(self.class_names))} (cases, class names), received "
                f"{values.shape}: check class_names and that every batch was both scored and named."
            )
        return values


def _statistics(name: str, scores: np.ndarray) -> Row:
    """Return mean, standard deviation (ddof 1) and number of undefined scores of `(N)` scores, keyed by column."""
    defined = scores[~np.isnan(scores)]
    return {
        f"{name}_mean": _mean(defined),
        f"{name}_std_ddof1": float(defined.std(ddof=1)) if defined.size > 1 else float("nan"),
        f"{name}_n_undefined": int(scores.size - defined.size),
    }


def _mean(values: np.ndarray) -> float:
    """Return the mean, or nan for no values (without NumPy's warning)."""
    return float(values.mean()) if values.size else float("nan")


def _row_over_classes(rows: Sequence[Row]) -> Row:
    """Return the row `mean` of `summarise`."""
    over_classes: Row = {"class": "mean", "n_volumes": rows[0]["n_volumes"]}
    for column in SUMMARY_COLUMNS[2:]:
        values = np.array([row[column] for row in rows])
        is_count = values.dtype.kind == "i"
        over_classes[column] = int(values.sum()) if is_count else _mean(values[~np.isnan(values)])
    return over_classes


def _as_text(value: str | int | float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> Path:
    """Write rows of a table in one step.

    Args:
        path: file to create or replace.
        columns: column names, in order.
        rows: values by column; floats are written with 6 decimals.

    Returns:
        the file's absolute path.
    """
    with write_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_as_text(row[column], decimals=6) for column in columns] for row in rows)
    return path.resolve()


def _as_table(rows: Sequence[Row], share: np.ndarray, *, of_pictures: bool) -> str:
    """Lay the summary out in aligned columns.

    The Dice of two trivial answers stands beside it: every voxel is of the class, and none is. So does the class's
    share of the voxels, `(N,K)` by volume.
    """
    items, unit = ("pictures", PIXELS) if of_pictures else ("volumes", "mm")
    trivial = [
        (
            f"{(2 * of_class / (1 + of_class)).mean():.3f}",
            "0.000" if of_class.any() else "nan",
            f"{of_class.mean():.1%}",
        )
        for of_class in share.T
    ]
    head = ("class", "Dice", "if all", "if none", "share", f"ASSD {unit}", "undefined", "misses", "false alarms")
    table: list[Sequence[str]] = [head]
    for row, answers in zip(rows, [*trivial, ("", "", "")], strict=True):
        dice, assd = (f"{row[f'{m}_mean']:.3f} +- {row[f'{m}_std_ddof1']:.3f}" for m in ("dice", "assd_mm"))
        counts = (str(row[column]) for column in ("dice_n_undefined", "n_misses", "n_false_alarms"))
        table.append((str(row["class"]), dice, *answers, assd, *counts))
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    about = f"{rows[0]['n_volumes']} {items}, mean +- standard deviation; if all, if none: Dice of trivial answers"
    return "\n".join([about, *lines])
