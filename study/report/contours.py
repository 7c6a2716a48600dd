"""Contours of all methods side by side, as in the paper's figure 4."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from components.data.acdc import CLASS_NAMES, Case
from components.data.volume_metadata import case_name
from components.evaluation.overlays import (
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
from study.report.clinical import prediction_file
from study.report.figures import TITLE_WIDTH, split_into_bands
from study.report.scores import finished_cells, list_test_cases, read_scores

_PANEL_INCH = 1.5
_ROW_LABEL_INCH = 0.5


@dataclass(frozen=True)
class _Example:
    """One slice of a test case.

    Args:
        title: name of the case and the slice.
        image: grey values `(H,W)`.
        window: the grey values shown as black and as white.
        truth: labels `(H,W)`.
        predictions: labels `(H,W)` of each method.
        dice: mean Dice over classes of the case, in percent, of each method.
        extent: the ranges of axes 0 and 1 to show.
        spacing_mm: voxel spacing of axes 0 and 1.
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
        """Height of the shown extent over its width, in mm."""
        right_mm, down_mm = (
            (stop - start) * mm for (start, stop), mm in zip(self.extent, self.spacing_mm, strict=True)
        )
        return down_mm / right_mm


def draw_contours(
    cells: Iterable[Cell], output_dir: Path, *, dataset_dir: str, labelled_patients: int
) -> Figure | None:
    """Draw the worst, the median and the best test case of a split, by mean Dice over methods and classes.

    Each case is shown by the slice with the largest true foreground, first with the true contours, then with each
    method's. The split is the one with the most finished methods, the first of several.

    Source: paper figure 4.

    Args:
        cells: all cells of the study, in its order; unfinished cells and ablations are not drawn.
        output_dir: folder of the study.
        dataset_dir: folder of ACDC, or of a data set in its layout.
        labelled_patients: the number of labelled patients of the cells to draw; a method that has only cells with 0 is
            drawn with these.

    Returns:
        the figure, which is not registered with pyplot; None if no such cell is finished.
    """
    shown = _cells_of_a_split(cells, output_dir, labelled_patients)
    if not shown:
        return None
    examples = _read_examples(shown, output_dir, dataset_dir)
    methods = list(range(len(shown)))
    bands = split_into_bands(methods)
    ratios = [example.height_ratio for example in examples] * len(bands)
    columns = 1 + len(bands[0])
    width = max(columns * _PANEL_INCH + _ROW_LABEL_INCH, SMALLEST_WIDTH_INCH)
    height = sum(ratios) * (width - _ROW_LABEL_INCH) / columns + 0.22 * len(ratios) + 0.4 * len(bands) + 0.4
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, compress=True)
    figure = Figure(figsize=(width, height), layout=layout)
    panels = figure.subplots(len(ratios), columns, squeeze=False, gridspec_kw={"height_ratios": ratios})
    titles = [textwrap.fill(cell.method.title, TITLE_WIDTH) for cell in shown]
    for row, axes_of_row in enumerate(panels):
        band, example = bands[row // len(examples)], examples[row % len(examples)]
        _draw_row(axes_of_row, example, band)
        if row % len(examples) == 0:
            for axes, title in zip(axes_of_row, ["truth", *(titles[method] for method in band)], strict=False):
                axes.set_title(title, fontsize=8)
    figure.legend(handles=legend_lines(CLASS_NAMES, has_truth=True), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _cells_of_a_split(cells: Iterable[Cell], output_dir: Path, labelled_patients: int) -> list[Cell]:
    """Return the cells that `draw_contours` shows, all of the same split."""
    own = [cell for cell in cells if cell.variant is None]
    trained = {cell.method.key for cell in own if cell.labelled_patients != 0}
    by_split: dict[int, list[Cell]] = {}
    for cell in finished_cells(own, output_dir):
        if cell.labelled_patients == (labelled_patients if cell.method.key in trained else 0):
            by_split.setdefault(cell.split, []).append(cell)
    return max(by_split.values(), key=len, default=[])


def _read_examples(shown: Sequence[Cell], output_dir: Path, dataset_dir: str) -> list[_Example]:
    """Read the worst, the median and the best case; with fewer than three cases, all of them."""
    scores = read_scores(shown, output_dir, training_patients=0)  # no cell with labelled_patients null is shown
    dice = 100 * scores.groupby(["case", "method"])["dice"].mean().unstack("method")
    ranked = list(dice.mean(axis=1).dropna().sort_values(kind="stable").index)
    # Later entries replace earlier ones of the same rank: two cases are the worst and the best.
    rank_names = {(len(ranked) - 1) // 2: "median", 0: "worst", len(ranked) - 1: "best"}
    cases = {case_name(case["image"]): case for case in list_test_cases(shown[0], dataset_dir)}
    return [
        _read_example(
            f"{rank_names[rank]}\n{ranked[rank]}",
            cases[ranked[rank]],
            [prediction_file(cell, cases[ranked[rank]], output_dir) for cell in shown],
            [dice.loc[ranked[rank], cell.method.key] for cell in shown],
        )
        for rank in sorted(rank_names)
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
    """Draw the truth and the predictions of some methods; array axis 0 points right and axis 1 down, as in overlays."""
    for unused in axes_of_row[1 + len(methods) :]:
        unused.set_axis_off()
    label_maps = [example.truth, *(example.predictions[method] for method in methods)]
    for column, (axes, labels) in enumerate(zip(axes_of_row, label_maps, strict=False)):
        vmin, vmax = example.window
        axes.imshow(example.image.T, cmap="gray", vmin=vmin, vmax=vmax, origin="upper", interpolation="bilinear")
        draw_class_contours(axes, labels, len(CLASS_NAMES), PREDICTION_STYLE if column else TRUTH_STYLE)
        across, down = (np.subtract(ends, 0.5) for ends in example.extent)
        axes.set(xlim=across, ylim=down[::-1], xticks=[], yticks=[])
        axes.set_aspect(example.spacing_mm[1] / example.spacing_mm[0])
        axes.spines[:].set_visible(False)
        if column:
            axes.set_xlabel(f"Dice {example.dice[methods[column - 1]]:.1f} %", fontsize=7, labelpad=2)
    axes_of_row[0].set_ylabel(example.title, fontsize=7)
