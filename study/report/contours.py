"""Contours of all methods side by side, as in the paper's figure 4."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from monai.bundle import ConfigParser
from monai.transforms import Compose

from components.base.volume_metadata import case_name_of_item, header_spacing_mm, is_picture
from components.data.cases import Case
from components.data.slices import IGNORED
from components.data.transforms import LoadVolumed, SlicesLastd
from components.evaluation.overlays import (
    LINE_WIDTH,
    SMALLEST_WIDTH_INCH,
    WINDOW_PERCENTILES,
    Extent,
    draw_class_contours,
    foreground_extent,
    legend_lines,
)
from study.cells import list_cases_to_score
from study.grid import Cell
from study.report.figures import TITLE_WIDTH, split_into_bands
from study.report.scores import evaluation_parser, finished_cells, prediction_file, read_scores

_PANEL_INCH = 1.5
_ROW_LABEL_INCH = 0.5


@dataclass(frozen=True)
class _Example:
    """One slice of a test case.

    Args:
        title: name of the case and, for a volume, the slice.
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


def draw_contours(cells: Iterable[Cell], output_dir: Path, *, dataset_dir: str, labelled_cases: int) -> Figure | None:
    """Draw the worst, the median and the best test case of a split, by mean Dice over methods and classes.

    Each case is shown by the slice with the largest true foreground, oriented as the network sees it. The true contours
    come first, then those of each method. The split is the first one with the most finished methods.

    Source: paper figure 4.

    Args:
        cells: all cells of the study, in its order; unfinished cells and ablations are not drawn.
        output_dir: folder of the study.
        dataset_dir: as for `study.cells.list_stages`.
        labelled_cases: the number of labelled cases of the cells to draw; a method that has only cells with 0 is
            drawn with these.

    Returns:
        the figure, which is not registered with pyplot; None if no such cell is finished.
    """
    shown = _cells_of_a_split(cells, output_dir, labelled_cases)
    if not shown:
        return None
    parser = evaluation_parser(shown[0], dataset_dir=dataset_dir)
    class_names = parser.get_parsed_content("class_names")
    examples = _read_examples(shown, output_dir, parser)
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
        _draw_row(axes_of_row, example, band, len(class_names))
        if row % len(examples) == 0:
            for axes, title in zip(axes_of_row, ["truth", *(titles[method] for method in band)], strict=False):
                axes.set_title(title, fontsize=8)
    figure.legend(handles=legend_lines(class_names), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _cells_of_a_split(cells: Iterable[Cell], output_dir: Path, labelled_cases: int) -> list[Cell]:
    """Return the cells that `draw_contours` shows, all of the same split."""
    own = [cell for cell in cells if cell.variant is None]
    trained = {cell.method.key for cell in own if cell.labelled_cases != 0}
    by_split: dict[int | str, list[Cell]] = {}
    for cell in finished_cells(own, output_dir):
        if cell.labelled_cases == (labelled_cases if cell.method.key in trained else 0):
            by_split.setdefault(cell.split, []).append(cell)
    return max(by_split.values(), key=len, default=[])


def _read_examples(shown: Sequence[Cell], output_dir: Path, parser: ConfigParser) -> list[_Example]:
    """Read the worst, the median and the best case; with fewer than three cases, all of them."""
    scores = read_scores(shown, output_dir, training_cases=0)  # no cell with labelled_cases null is shown
    dice = 100 * scores.groupby(["case", "method"])["dice"].mean().unstack("method")
    ranked = list(dice.mean(axis=1).dropna().sort_values(kind="stable").index)
    # Later entries replace earlier ones of the same rank: two cases are the worst and the best.
    rank_names = {(len(ranked) - 1) // 2: "median", 0: "worst", len(ranked) - 1: "best"}
    cases = {case_name_of_item(case): case for case in list_cases_to_score(parser)}
    reader = _Reader(shown[0], parser)
    return [
        _read_example(
            f"{rank_names[rank]}\n{ranked[rank]}",
            cases[ranked[rank]],
            [prediction_file(cell, cases[ranked[rank]], output_dir) for cell in shown],
            [dice.loc[ranked[rank], cell.method.key] for cell in shown],
            reader,
        )
        for rank in sorted(rank_names)
    ]


class _Reader:
    """Reads images, true labels and predicted labels of a study's cases, slices last.

    ACDC has its slices last, as scanners show them; volumes of a user's own data are reoriented as for the network.
    """

    def __init__(self, cell: Cell, parser: ConfigParser) -> None:
        config: Callable[[str], Any] = parser.get_parsed_content
        count = len(config("class_names")) + 1
        options: dict[str, Any] = {"num_classes": count}
        turned: list[SlicesLastd] = []
        if cell.method.data_file:
            options = {name: config(name) for name in ("label_values", "channels")}
            options["ignore_label"] = config("data")["ignore_label"]
            turned = [SlicesLastd(["image", "label"], slice_axis=config("slice_axis"), allow_missing_keys=True)]
        self._case = Compose([LoadVolumed(["image", "label"], **options), *turned])
        self._prediction = Compose([LoadVolumed("label", num_classes=count), *turned])

    def read_case(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image and true labels, 1xHxWxD; colours are reduced to green, as in overlays, and IGNORED to 0."""
        loaded: Any = self._case(dict(case))
        image, label = loaded["image"], loaded["label"]
        return image[[len(image) // 2]], label.masked_fill(label == IGNORED, 0)

    def read_prediction(self, file: Path) -> torch.Tensor:
        """Return predicted labels, 1xHxWxD."""
        loaded: Any = self._prediction({"label": file})
        return loaded["label"]


def _read_example(
    title: str, case: Case, predictions: Sequence[Path], dice: Sequence[float], reader: _Reader
) -> _Example:
    image, true_labels = reader.read_case(case)
    spacing_mm = header_spacing_mm(image)
    grey, truth, *predicted = (
        volume.numpy()[0] for volume in (image, true_labels, *(reader.read_prediction(file) for file in predictions))
    )
    if grids := {labels.shape for labels in predicted} - {truth.shape}:
        raise ValueError(f"expected predictions of {case['image']} on its grid {truth.shape}, received {grids}")
    z = int((truth > 0).sum(axis=(0, 1)).argmax())
    black, white = np.percentile(grey, WINDOW_PERCENTILES)
    return _Example(
        title=title if is_picture(case["image"]) else f"{title}\nslice {z + 1} of {truth.shape[2]}",
        image=grey[..., z],
        window=(float(black), float(white)),
        truth=truth[..., z],
        predictions=[labels[..., z] for labels in predicted],
        dice=dice,
        extent=foreground_extent([labels[..., z : z + 1] for labels in (truth, *predicted)], spacing_mm),
        spacing_mm=(spacing_mm[0], spacing_mm[1]),
    )


def _draw_row(axes_of_row: Sequence[Axes], example: _Example, methods: Sequence[int], classes: int) -> None:
    """Draw the truth and the predictions of some methods; array axis 0 points right and axis 1 down, as in overlays."""
    for unused in axes_of_row[1 + len(methods) :]:
        unused.set_axis_off()
    label_maps = [example.truth, *(example.predictions[method] for method in methods)]
    for column, (axes, labels) in enumerate(zip(axes_of_row, label_maps, strict=False)):
        vmin, vmax = example.window
        axes.imshow(example.image.T, cmap="gray", vmin=vmin, vmax=vmax, origin="upper", interpolation="bilinear")
        draw_class_contours(axes, labels, classes, {"linewidths": LINE_WIDTH})
        across, down = (np.subtract(ends, 0.5) for ends in example.extent)
        axes.set(xlim=across, ylim=down[::-1], xticks=[], yticks=[])
        axes.set_aspect(example.spacing_mm[1] / example.spacing_mm[0])
        axes.spines[:].set_visible(False)
        if column:
            axes.set_xlabel(f"Dice {example.dice[methods[column - 1]]:.1f} %", fontsize=7, labelpad=2)
    axes_of_row[0].set_ylabel(example.title, fontsize=7)
