"""Plots of a study: Dice against labelled patients, Bland-Altman plots; and how every figure is saved."""

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
from study.report.clinical import agreement, patient_pairs
from study.report.tables import split_means

BLAND_ALTMAN_QUANTITIES = ("LV EF (%)", "RV EF (%)", "myocardial mass, ED (g)")

TITLE_WIDTH = 20  # characters over a panel

_DPI = 150
_METADATA: Mapping[str, Mapping[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
_SALT = "study"  # any will do: without one, the ids in an SVG are drawn by chance
_METHODS_IN_A_ROW = 6
# Okabe and Ito's colour-blind-safe palette without its yellow, which white paper hides; markers tell repeats apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_METHOD_COLOURS = (*COLOURS, "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
_APART = 0.03  # of the distance of two numbers of patients, between two methods' markers


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
        style: dict[str, Any] = {
            "color": _METHOD_COLOURS[number % len(_METHOD_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
        }
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
    bands = in_bands(list(own["title"].unique()))
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
    figure.supxlabel("mean of predicted and true\nover each panel: bias (limits of agreement), n patients", fontsize=9)
    return figure


def in_bands(items: list[Any]) -> list[list[Any]]:
    """Cut a list of what stands side by side into as few and as equal rows as are not too wide."""
    length = math.ceil(len(items) / math.ceil(len(items) / _METHODS_IN_A_ROW))
    return [items[start : start + length] for start in range(0, len(items), length)]


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
    """Return limits that hold every method's points and lines of one quantity."""
    means = (pairs["predicted"] + pairs["truth"]) / 2
    errors = pd.concat([pairs["predicted"] - pairs["truth"], agreements["lower_limit"], agreements["upper_limit"]])
    limits = {}
    for name, values in (("xlim", means), ("ylim", errors)):
        low, high = (values.min(), values.max()) if values.notna().any() else (0.0, 1.0)
        margin = 0.08 * (high - low) or 1.0
        limits[name] = (low - margin, high + margin)
    return limits
