"""Plots of a study: Dice against labelled patients and Bland-Altman plots; and saving of figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from components.base.atomic_write import write_atomically
from components.evaluation.overlays import SMALLEST_WIDTH_INCH
from study.data import ACDC, StudyData
from study.report.clinical import agreement, patient_pairs
from study.report.tables import split_means

BLAND_ALTMAN_QUANTITIES = ("LV EF (%)", "RV EF (%)", "myocardial mass, ED (g)")

TITLE_WIDTH = 20  # characters per line above a panel

_DPI = 150
_METADATA: Mapping[str, Mapping[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
_SALT = "study"  # any fixed value: without one, the ids in an SVG are random
_METHODS_IN_A_BAND = 6
# Okabe and Ito's colour-blind-safe palette without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_METHOD_COLOURS = (*COLOURS, "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
_MARKER_OFFSET = 0.03  # between the markers of two methods, as a fraction of the distance between two ticks


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and as SVG; the same figure gives the same bytes.

    Args:
        figure: the figure.
        stem: path of the files without a suffix.

    Returns:
        the files.
    """
    files = [stem.with_name(stem.name + suffix) for suffix in _METADATA]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # with it, each further drawing would shift the panels slightly
    for file, metadata in zip(files, _METADATA.values(), strict=True):
        with write_atomically(file) as partial, mpl.rc_context({"svg.hashsalt": _SALT}):
            figure.savefig(partial, format=file.suffix[1:], dpi=_DPI, metadata=dict(metadata))
    return files


def draw_dice_by_patients(
    scores: pd.DataFrame, published: Mapping[str, Mapping[int, float]], data: StudyData = ACDC
) -> Figure | None:
    """Draw mean Dice in percent against the number of labelled patients, with the paper's scores.

    A method with at least two numbers of labelled patients is a line with the standard deviation (ddof 1) over splits.
    A method with only 0 is a dashed horizontal line. Other methods with a single number are not drawn.

    Source: paper figure 5.

    Args:
        scores: as `read_scores` returns them; ablations are ignored.
        published: the paper's mean Dice in percent by title and number of labelled patients, drawn as hollow markers.
        data: data of the study.

    Returns:
        the figure, which is not registered with pyplot; None if no method has two numbers of labelled patients.
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
        style: dict[str, Any] = {
            "color": _METHOD_COLOURS[number % len(_METHOD_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
        }
        offset = _MARKER_OFFSET * (number - (len(of_methods) - 1) / 2)
        _draw_method(axes, table, counts, offset=offset, label=textwrap.fill(titles[key], 28), style=style)
        x = [counts.index(count) + offset for count in reported[key]]
        axes.plot(x, list(reported[key].values()), linestyle="none", markerfacecolor="none", **style)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set(xlabel=f"{data.labelled} (not to scale)", ylabel="mean Dice (%)")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    handles, _ = axes.get_legend_handles_labels()
    if any(reported.values()):
        handles.append(Line2D([], [], linestyle="none", marker="o", color="0.3", fillstyle="none", label="the paper"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False, labelspacing=0.9)
    return figure


def draw_bland_altman(measurements: pd.DataFrame, *, labelled_patients: int) -> Figure | None:
    """Draw predicted minus true against their mean, a point per patient, with bias and limits of agreement.

    Source: Bland and Altman, "Statistical methods for assessing agreement between two methods of clinical measurement",
    Lancet 1986.

    Args:
        measurements: as `read_measurements` returns them; ablations are ignored.
        labelled_patients: the number of labelled patients of the rows to draw; a method that has only rows with 0 is
            drawn with these.

    Returns:
        the figure, which is not registered with pyplot; None if there are no such rows.
    """
    own = measurements[(measurements["ablation"] == "") & measurements["quantity"].isin(BLAND_ALTMAN_QUANTITIES)]
    only_0 = own.groupby("method")["labelled_patients"].transform("max") == 0
    own = own[only_0 | (own["labelled_patients"] == labelled_patients)]
    if own.empty:
        return None
    agreements = agreement(own).set_index(["title", "quantity"])
    pairs = patient_pairs(own)
    bands = split_into_bands(list(own["title"].unique()))
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
                axes.set_title(f"{textwrap.fill(title, TITLE_WIDTH)}\n{axes.get_title()}", fontsize=7)
        axes_of_row[0].set_ylabel(quantity.replace(", ", ",\n"), fontsize=8)
    figure.supylabel("predicted - true", fontsize=9)
    figure.supxlabel("mean of predicted and true\nabove each panel: bias (limits of agreement), n patients", fontsize=9)
    return figure


def split_into_bands(items: list[Any]) -> list[list[Any]]:
    """Split methods that are drawn side by side into the fewest bands of at most 6, as equal as possible."""
    length = math.ceil(len(items) / math.ceil(len(items) / _METHODS_IN_A_BAND))
    return [items[start : start + length] for start in range(0, len(items), length)]


def _draw_method(
    axes: Axes, dice: pd.DataFrame, counts: list[int], *, offset: float, label: str, style: Mapping[str, Any]
) -> None:
    """Draw a method's mean and standard deviation by number of labelled patients, or a level if it has only 0."""
    if len(dice) == 1:
        x = [place + offset for place in range(len(counts))]
        level = [dice["mean"].iloc[0]] * len(counts)
        axes.plot(x, level, markevery=[0], linestyle="dashed", linewidth=1.2, markersize=5, label=label, **style)
        return
    x = [counts.index(count) + offset for count in dice.index]
    axes.errorbar(x, dice["mean"], yerr=dice["std"], label=label, linewidth=1.2, markersize=5, elinewidth=0.8, **style)


def _draw_agreement(axes: Axes, pairs: pd.DataFrame, statistics: pd.Series) -> None:
    """Draw the points and lines of one method, with the numbers as the title."""
    error = pairs["predicted"] - pairs["truth"]
    axes.scatter((pairs["predicted"] + pairs["truth"]) / 2, error, s=9, color=COLOURS[0], linewidths=0)
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    numbers = f"n = {statistics['n']}"
    if statistics["n"] > 0:
        axes.axhline(statistics["mean_error"], color="black", linewidth=1)
        numbers = f"{statistics['mean_error']:+z.1f}, {numbers}"
    if statistics["n"] > 1:
        limits = [statistics["lower_limit"], statistics["upper_limit"]]
        for limit in limits:
            axes.axhline(limit, color=COLOURS[1], linewidth=0.9, linestyle="dashed")
        numbers = f"{statistics['mean_error']:+z.1f} ({limits[0]:+z.1f} to {limits[1]:+z.1f}), n = {statistics['n']}"
    axes.set_title(numbers, fontsize=7, pad=3)


def _axis_limits(pairs: pd.DataFrame, agreements: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Return axis limits that contain the points and lines of all methods for one quantity."""
    means = (pairs["predicted"] + pairs["truth"]) / 2
    errors = pd.concat([pairs["predicted"] - pairs["truth"], agreements["lower_limit"], agreements["upper_limit"]])
    limits = {}
    for name, values in (("xlim", means), ("ylim", errors)):
        low, high = (values.min(), values.max()) if values.notna().any() else (0.0, 1.0)
        margin = 0.08 * (high - low) or 1.0
        limits[name] = (low - margin, high + margin)
    return limits
