"""The figures of a study: contours beside each other, Dice against labelled patients, Bland-Altman plots."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from components.acdc import CLASS_NAMES, Case, list_cases
from components.cases import case_name
from components.files import write_atomically
from components.overlays import (
    PREDICTION_STYLE,
    SMALLEST_WIDTH_INCH,
    TRUTH_STYLE,
    WINDOW_PERCENTILES,
    Extent,
    draw_class_contours,
    foreground_extent,
    legend_lines,
)
from study.grid import Cell
from study.report.clinical import agreement, patient_pairs, prediction_file
from study.report.scores import finished_cells, read_scores
from study.report.tables import split_means

BLAND_ALTMAN_QUANTITIES = ("LV EF (%)", "RV EF (%)", "myocardial mass, ED (g)")

_DPI = 150
_METADATA: Mapping[str, Mapping[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
_SALT = "study"  # any will do: without one, the ids in an SVG are drawn by chance
_METHODS_IN_A_ROW = 6
_PANEL_INCH = 1.5
_ROW_LABEL_INCH = 0.5
_TITLE_WIDTH = 20  # characters over a panel
# Okabe and Ito's colour-blind-safe palette without its yellow, which white paper hides; markers tell repeats apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
_APART = 0.03  # of the distance of two numbers of patients, between two methods' markers


@dataclass(frozen=True)
class _Example:
    """One slice of a test case.

    Args:
        title: names the case and the slice.
        image: grey values `(H,W)`.
        window: grey values that are black and white.
        truth: labels `(H,W)`.
        predictions: labels `(H,W)` of each method.
        dice: the case's mean Dice over classes of each method, in percent.
        extent: what to show of axes 0 and 1.
        spacing_mm: of axes 0 and 1.
    """

    title: str
    image: np.ndarray
    window: tuple[float, float]
    truth: np.ndarray
    predictions: Sequence[np.ndarray]
    dice: Sequence[float]
    extent: Extent
    spacing_mm: tuple[float, float]

    @property
    def height_ratio(self) -> float:
        """Height over width of what is shown."""
        right_mm, down_mm = (
            (stop - start) * mm for (start, stop), mm in zip(self.extent, self.spacing_mm, strict=True)
        )
        return down_mm / right_mm


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and as SVG, the same bytes whenever the same is drawn.

    Args:
        figure: which.
        stem: of the files, without a suffix.

    Returns:
        the files.
    """
    files = [stem.with_name(stem.name + suffix) for suffix in _METADATA]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # each further drawing would shift the panels a little
    for file, metadata in zip(files, _METADATA.values(), strict=True):
        with write_atomically(file) as partial, mpl.rc_context({"svg.hashsalt": _SALT}):
            figure.savefig(partial, format=file.suffix[1:], dpi=_DPI, metadata=dict(metadata))
    return files


def draw_contours(
    cells: Iterable[Cell], output_dir: Path, *, dataset_dir: str, labelled_patients: int
) -> Figure | None:
    """Draw the worst, the median and the best test case of a split, by mean Dice over methods and classes.

    Of each case it shows the slice with the largest true foreground, first with the true contours and then with each
    method's. The split is the first of those with the most methods finished.

    Source: paper figure 4.

    Args:
        cells: of the study, in its order; those that aren't finished and ablations are left out.
        output_dir: of the study.
        dataset_dir: of ACDC, or a data set in its layout.
        labelled_patients: which cells of the methods that train; those that have cells with 0 only come with these.

    Returns:
        A figure that belongs to no global state; None when no such cell is finished.
    """
    shown = _cells_of_a_split(cells, output_dir, labelled_patients)
    if not shown:
        return None
    examples = _read_examples(shown, output_dir, dataset_dir)
    methods = list(range(len(shown)))
    bands = _bands(methods, _METHODS_IN_A_ROW)
    ratios = [example.height_ratio for example in examples] * len(bands)
    columns = 1 + len(bands[0])
    width = max(columns * _PANEL_INCH + _ROW_LABEL_INCH, SMALLEST_WIDTH_INCH)
    height = sum(ratios) * (width - _ROW_LABEL_INCH) / columns + 0.22 * len(ratios) + 0.4 * len(bands) + 0.4
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, compress=True)
    figure = Figure(figsize=(width, height), layout=layout)
    panels = figure.subplots(len(ratios), columns, squeeze=False, gridspec_kw={"height_ratios": ratios})
    titles = [textwrap.fill(cell.method.title, _TITLE_WIDTH) for cell in shown]
    for row, axes_of_row in enumerate(panels):
        band, example = bands[row // len(examples)], examples[row % len(examples)]
        _draw_row(axes_of_row, example, band)
        if row % len(examples) == 0:
            for axes, title in zip(axes_of_row, ["truth", *(titles[method] for method in band)], strict=False):
                axes.set_title(title, fontsize=8)
    figure.legend(handles=legend_lines(CLASS_NAMES, has_truth=True), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def draw_dice_by_patients(scores: pd.DataFrame, published: Mapping[str, Mapping[int, float]]) -> Figure | None:
    """Draw mean Dice in percent against the number of labelled patients, beside the paper's.

    A line for each method with two numbers or more, with the standard deviation (ddof 1) over splits; methods with
    nothing but 0 as dashed lines, those with one number not at all.

    Source: paper figure 5.

    Args:
        scores: as `read_scores` returns them; ablations are left out.
        published: the paper's mean Dice in percent by title and number of labelled patients, drawn hollow.

    Returns:
        A figure that belongs to no global state; None when no method has two numbers.
    """
    own = scores[scores["ablation"] == ""]
    by_split = 100 * split_means(own, "dice")["mean"]
    dice = by_split.groupby(["method", "labelled_patients"]).agg(["mean", "std"])
    of_methods = {key: dice.loc[key] for key in own["method"].unique()}
    of_methods = {key: table for key, table in of_methods.items() if len(table) > 1 or table.index[0] == 0}
    if all(len(table) == 1 for table in of_methods.values()):
        return None
    titles = own.drop_duplicates("method").set_index("method")["title"]
    reported = {key: published.get(titles[key], {}) for key in of_methods}
    counts = sorted({count for key, table in of_methods.items() for count in (*table.index, *reported[key])})
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for number, (key, table) in enumerate(of_methods.items()):
        style: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        apart = _APART * (number - (len(of_methods) - 1) / 2)
        _draw_method(axes, table, counts, apart=apart, label=textwrap.fill(titles[key], 28), style=style)
        x = [counts.index(count) + apart for count in reported[key]]
        axes.plot(x, list(reported[key].values()), linestyle="none", markerfacecolor="none", **style)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set(xlabel="labelled patients (not to scale)", ylabel="mean Dice (%)")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    handles, _ = axes.get_legend_handles_labels()
    if any(reported.values()):
        handles.append(Line2D([], [], linestyle="none", marker="o", color="0.3", fillstyle="none", label="the paper"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False, labelspacing=0.9)
    return figure


def draw_bland_altman(measurements: pd.DataFrame, *, labelled_patients: int) -> Figure | None:
    """Draw predicted minus true against the mean of both, with bias and limits of agreement, a point for each patient.

    Source: Bland and Altman, "Statistical methods for assessing agreement between two methods of clinical measurement",
    Lancet 1986.

    Args:
        measurements: as `read_measurements` returns them; ablations are left out.
        labelled_patients: which rows of the methods that train; those that have rows with 0 only come with these.

    Returns:
        A figure that belongs to no global state; None when there is no such row.
    """
    own = measurements[(measurements["ablation"] == "") & measurements["quantity"].isin(BLAND_ALTMAN_QUANTITIES)]
    only_0 = own.groupby("method")["labelled_patients"].transform("max") == 0
    own = own[only_0 | (own["labelled_patients"] == labelled_patients)]
    if own.empty:
        return None
    agreements = agreement(own).set_index(["title", "quantity"])
    pairs = patient_pairs(own)
    bands = _bands(list(own["title"].unique()), _METHODS_IN_A_ROW)
    rows = [(band, quantity) for band in bands for quantity in BLAND_ALTMAN_QUANTITIES]
    columns = len(bands[0])
    figure = Figure(
        figsize=(max(1.8 * columns + 0.6, SMALLEST_WIDTH_INCH), 1.5 * len(rows) + 0.7), layout="constrained"
    )
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for (band, quantity), axes_of_row in zip(rows, panels, strict=True):
        of_quantity = pairs[pairs["quantity"] == quantity]
        limits = _axis_limits(of_quantity, agreements.xs(quantity, level="quantity"))
        for unused in axes_of_row[len(band) :]:
            unused.set_axis_off()
        for title, axes in zip(band, axes_of_row, strict=False):
            _draw_agreement(axes, of_quantity[of_quantity["title"] == title], agreements.loc[(title, quantity)])
            axes.set(**limits)
            axes.tick_params(labelsize=7, labelleft=axes is axes_of_row[0])
            if quantity == BLAND_ALTMAN_QUANTITIES[0]:
                axes.set_title(f"{textwrap.fill(title, _TITLE_WIDTH)}\n{axes.get_title()}", fontsize=7)
        axes_of_row[0].set_ylabel(quantity.replace(", ", ",\n"), fontsize=8)
    figure.supylabel("predicted - true", fontsize=9)
    figure.supxlabel("mean of predicted and true\nover each panel: bias (limits of agreement), n patients", fontsize=9)
    return figure


def _bands(items: list[Any], most: int) -> list[list[Any]]:
    """Cut a list into as few and as equal parts as hold `most` items each."""
    length = math.ceil(len(items) / math.ceil(len(items) / most))
    return [items[start : start + length] for start in range(0, len(items), length)]


def _cells_of_a_split(cells: Iterable[Cell], output_dir: Path, labelled_patients: int) -> list[Cell]:
    """Return the cells that `draw_contours` shows."""
    own = [cell for cell in cells if cell.variant is None]
    trained = {cell.method.key for cell in own if cell.labelled_patients != 0}
    by_split: dict[int, list[Cell]] = {}
    for cell in finished_cells(own, output_dir):
        if cell.labelled_patients == (labelled_patients if cell.method.key in trained else 0):
            by_split.setdefault(cell.split, []).append(cell)
    return max(by_split.values(), key=len, default=[])


def _read_examples(shown: Sequence[Cell], output_dir: Path, dataset_dir: str) -> list[_Example]:
    """Read the worst, the median and the best case; fewer where there are fewer."""
    scores = read_scores(shown, output_dir, training_patients=0)  # none of these cells is of all patients
    dice = 100 * scores.groupby(["case", "method"])["dice"].mean().unstack("method")
    ranked = list(dice.mean(axis=1).dropna().sort_values(kind="stable").index)
    places = {(len(ranked) - 1) // 2: "median", 0: "worst", len(ranked) - 1: "best"}  # of two cases none is the median
    cases = {case_name(case["image"]): case for case in list_cases(dataset_dir, "test", split_seed=shown[0].split)}
    return [
        _read_example(
            f"{places[place]}\n{ranked[place]}",
            cases[ranked[place]],
            [prediction_file(cell, cases[ranked[place]], output_dir) for cell in shown],
            [dice.loc[ranked[place], cell.method.key] for cell in shown],
        )
        for place in sorted(places)
    ]


def _read_example(title: str, case: Case, predictions: Sequence[Path], dice: Sequence[float]) -> _Example:
    image = nib.Nifti1Image.from_filename(case["image"])
    grey = np.asarray(image.dataobj)
    files = [Path(case["label"]), *predictions]
    truth, *predicted = (np.asarray(nib.Nifti1Image.from_filename(file).dataobj) for file in files)
    if grids := {labels.shape for labels in predicted} - {truth.shape}:
        raise ValueError(f"expected predictions of {case['image']} on its grid {truth.shape}, received {grids}")
    z = int((truth > 0).sum(axis=(0, 1)).argmax())
    spacing_mm = tuple(float(mm) for mm in image.header.get_zooms()[:3])
    black, white = np.percentile(grey, WINDOW_PERCENTILES)
    return _Example(
        title=f"{title}\nslice {z + 1} of {truth.shape[2]}",
        image=grey[..., z],
        window=(float(black), float(white)),
        truth=truth[..., z],
        predictions=[labels[..., z] for labels in predicted],
        dice=dice,
        extent=foreground_extent([labels[..., z : z + 1] for labels in (truth, *predicted)], spacing_mm),
        spacing_mm=(spacing_mm[0], spacing_mm[1]),
    )


def _draw_row(axes_of_row: Sequence[Axes], example: _Example, methods: Sequence[int]) -> None:
    """Draw the truth and some methods' predictions, array axis 0 to the right and axis 1 down as overlays do."""
    for unused in axes_of_row[1 + len(methods) :]:
        unused.set_axis_off()
    label_maps = [example.truth, *(example.predictions[method] for method in methods)]
    for place, (axes, labels) in enumerate(zip(axes_of_row, label_maps, strict=False)):
        vmin, vmax = example.window
        axes.imshow(example.image.T, cmap="gray", vmin=vmin, vmax=vmax, origin="upper", interpolation="bilinear")
        draw_class_contours(axes, labels, len(CLASS_NAMES), PREDICTION_STYLE if place else TRUTH_STYLE)
        across, down = (np.subtract(ends, 0.5) for ends in example.extent)
        axes.set(xlim=across, ylim=down[::-1], xticks=[], yticks=[])
        axes.set_aspect(example.spacing_mm[1] / example.spacing_mm[0])
        axes.spines[:].set_visible(False)
        if place:
            axes.set_xlabel(f"Dice {example.dice[methods[place - 1]]:.1f} %", fontsize=7, labelpad=2)
    axes_of_row[0].set_ylabel(example.title, fontsize=7)


def _draw_method(
    axes: Axes, dice: pd.DataFrame, counts: list[int], *, apart: float, label: str, style: Mapping[str, Any]
) -> None:
    """Draw a method's mean and spread by number of labelled patients, or its level where that is 0 alone."""
    if len(dice) == 1:
        x = [place + apart for place in range(len(counts))]
        level = [dice["mean"].iloc[0]] * len(counts)
        axes.plot(x, level, markevery=[0], linestyle="dashed", linewidth=1.2, markersize=5, label=label, **style)
        return
    x = [counts.index(count) + apart for count in dice.index]
    axes.errorbar(x, dice["mean"], yerr=dice["std"], label=label, linewidth=1.2, markersize=5, elinewidth=0.8, **style)


def _draw_agreement(axes: Axes, pairs: pd.DataFrame, statistics: pd.Series) -> None:
    """Draw one method's points and lines, and say the numbers above."""
    error = pairs["predicted"] - pairs["truth"]
    axes.scatter((pairs["predicted"] + pairs["truth"]) / 2, error, s=9, color=_COLOURS[0], linewidths=0)
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    numbers = f"n = {statistics['n']}"
    if statistics["n"] > 0:
        axes.axhline(statistics["mean_error"], color="black", linewidth=1)
        numbers = f"{statistics['mean_error']:+z.1f}, {numbers}"
    if statistics["n"] > 1:
        limits = [statistics["lower_limit"], statistics["upper_limit"]]
        for limit in limits:
            axes.axhline(limit, color=_COLOURS[1], linewidth=0.9, linestyle="dashed")
        numbers = f"{statistics['mean_error']:+z.1f} ({limits[0]:+z.1f} to {limits[1]:+z.1f}), n = {statistics['n']}"
    axes.set_title(numbers, fontsize=7, pad=3)


def _axis_limits(pairs: pd.DataFrame, agreements: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Return limits that hold every method's points and lines of one quantity."""
    means = (pairs["predicted"] + pairs["truth"]) / 2
    errors = pd.concat([pairs["predicted"] - pairs["truth"], agreements["lower_limit"], agreements["upper_limit"]])
    limits = {}
    for name, values in (("xlim", means), ("ylim", errors)):
        low, high = (values.min(), values.max()) if values.notna().any() else (0.0, 1.0)
        margin = 0.08 * (high - low) or 1.0
        limits[name] = (low - margin, high + margin)
    return limits
