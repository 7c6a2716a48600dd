"""Pictures of a case: every slice with the contours of truth and prediction."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from monai.data import MetaTensor
from monai.transforms import MapTransform

from components.base.atomic_write import write_atomically
from components.base.volume_metadata import case_name_of, checked_spacing_mm, header_spacing_mm
from components.data.acdc import CLASS_NAMES
from components.data.geometry import slices_last
from components.data.pictures import CLASS_COLOURS

TRUTH_STYLE: dict[str, Any] = {"linestyles": "solid", "linewidths": 1.1}
PREDICTION_STYLE: dict[str, Any] = {"linestyles": [(0, (2.5, 1.2))], "linewidths": 1.1}
PANELS_PER_ROW = 6
PANEL_WIDTH_INCH = 2.2
SMALLEST_WIDTH_INCH = 4.5
HEADING_INCH = 0.75
MARGIN_MM = 15.0
WINDOW_PERCENTILES = (0.5, 99.5)

Extent = tuple[tuple[int, int], tuple[int, int]]


def draw_overlay(
    image: np.ndarray,
    label: np.ndarray | None,
    pred: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    title: str,
    class_names: Sequence[str] = CLASS_NAMES,
) -> Figure:
    """Draw one panel per slice, the image grey, the truth's contours solid and the prediction's dashed.

    Convention: array axis 0 runs to the right, axis 1 down, slices in the order of axis 2. ACDC volumes are then drawn
    from base to apex, with the patient's head up and the RV left of the LV.

    Args:
        image: grey values `(H,W,D)`, any range.
        label: true labels `(H,W,D)`, 0 the background; None draws the prediction alone.
        pred: predicted labels `(H,W,D)`.
        spacing_mm: voxel spacing in mm in array order, three numbers.
        title: heading of the figure.
        class_names: names of labels 1, 2, ...

    Returns:
        A figure independent of pyplot's global state, to be saved with `savefig`.

    Raises:
        ValueError: if the arrays are not volumes on one grid, or `spacing_mm` is not three positive numbers.
    """
    label_maps = [labels for labels in (label, pred) if labels is not None]
    _check(image, label_maps, spacing_mm)
    extent = foreground_extent(label_maps, spacing_mm)
    figure, panels = _panel_grid(image.shape[2], extent, spacing_mm)
    vmin, vmax = np.percentile(image, WINDOW_PERCENTILES)
    for z, axes in enumerate(panels):
        axes.imshow(image[..., z].T, cmap="gray", vmin=vmin, vmax=vmax, origin="upper", interpolation="bilinear")
        if label is not None:
            draw_class_contours(axes, label[..., z], len(class_names), TRUTH_STYLE)
        draw_class_contours(axes, pred[..., z], len(class_names), PREDICTION_STYLE)
        axes.set(xlim=np.subtract(extent[0], 0.5), ylim=np.subtract(extent[1], 0.5)[::-1], xticks=[], yticks=[])
        axes.set_aspect(spacing_mm[1] / spacing_mm[0])
        axes.set_title(f"slice {z + 1} of {image.shape[2]}", fontsize=8, color="0.35", pad=3)
        axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.legend(
        handles=legend_lines(class_names, has_truth=label is not None), loc="outside lower center", ncols=5, fontsize=9
    )
    return figure


class SaveOverlayd(MapTransform):
    """Write `<output_dir>/<case>_overlay.png` of every case, see `draw_overlay`, and pass the data on unchanged.

    Slices are shown as the network sees them, see `components.data.transforms.SlicesLastd`.

    The case's name and spacing come from the image's metadata.

    Args:
        output_dir: folder of the pictures, made if missing.
        image_key: key of the image, a MetaTensor `(C,H,W,D)` on its native grid. Its middle channel is shown: the slice
            itself if it has neighbours as channels, or the green of colours.
        label_key: key of the true label map `(1,H,W,D)` on the same grid; if None or missing from the data, only the
            prediction is drawn.
        pred_key: key of the predicted label map `(1,H,W,D)` on the same grid.
        class_names: names of labels 1, 2, ...
        slice_axis: the axis across the slices, see `components.data.transforms.SlicesLastd`.
        dpi: dots per inch of the picture.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        image_key: str = "image",
        label_key: str | None = "label",
        pred_key: str = "pred",
        class_names: Sequence[str] = CLASS_NAMES,
        slice_axis: int | None = None,
        dpi: int = 150,
    ) -> None:
        super().__init__([key for key in (image_key, label_key, pred_key) if key is not None])
        self.output_dir = Path(output_dir)
        self.image_key = image_key
        self.label_key = label_key
        self.pred_key = pred_key
        self.class_names = tuple(class_names)
        self.slice_axis = slice_axis
        self.dpi = dpi

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw and write one case.

        Raises:
            ValueError: if a label map has more than one channel, the grids differ, or the image has no file name or no
                spacing.
        """
        image = data[self.image_key]
        label = data.get(self.label_key)
        case = case_name_of(image)
        header_spacing_mm(image)  # raises if there is none
        turned = slices_last(image[[len(image) // 2]], self.slice_axis)
        figure = draw_overlay(
            _as_array(turned[0]),
            None if label is None else self._label_array(label, self.label_key, image),
            self._label_array(data[self.pred_key], self.pred_key, image),
            spacing_mm=header_spacing_mm(turned),
            title=case,
            class_names=self.class_names,
        )
        with write_atomically(self.output_dir / f"{case}_overlay.png") as temporary:
            figure.savefig(temporary, format="png", dpi=self.dpi)
        return dict(data)

    def _label_array(self, labels: torch.Tensor, key: str | None, image: MetaTensor) -> np.ndarray:
        """Return a label map `(1,H,W,D)` on an image's grid as an array `(H,W,D)`, reoriented like the image."""
        if labels.shape[0] != 1:
            raise ValueError(
                f"Expected {key!r} a label map (1,H,W,D), received {tuple(labels.shape)}: "
                "apply AsDiscreted(argmax=True) before, and to_onehot only after the overlay."
            )
        return _as_array(slices_last(MetaTensor(_as_array(labels), affine=image.affine), self.slice_axis)[0])


def _as_array(tensor: torch.Tensor | np.ndarray) -> np.ndarray:
    """Return a tensor of any device, or an array, as an array."""
    return torch.as_tensor(tensor).detach().cpu().numpy()


def _check(image: np.ndarray, label_maps: Sequence[np.ndarray], spacing_mm: Sequence[float]) -> None:
    """Raise if the volumes do not share one grid or the spacing is invalid."""
    if image.ndim != 3 or any(labels.shape != image.shape for labels in label_maps):
        raise ValueError(
            f"Expected image, label and pred (H,W,D) on one grid, received {[v.shape for v in (image, *label_maps)]}: "
            "invert prediction and image to the native grid first."
        )
    checked_spacing_mm(spacing_mm, spatial_dims=3)


def foreground_extent(label_maps: Sequence[np.ndarray], spacing_mm: Sequence[float]) -> Extent:
    """Return start and stop on axes 0 and 1 of all foreground plus a margin; the whole grid if there is none.

    Args:
        label_maps: labels `(H,W,D)` on one grid.
        spacing_mm: voxel spacing in mm of axes 0 and 1 at least.
    """
    foreground = np.any([labels > 0 for labels in label_maps], axis=(0, 3))
    height, width = foreground.shape
    if not foreground.any():
        return (0, height), (0, width)
    extent = []
    for axis, size in enumerate((height, width)):
        inside = np.flatnonzero(foreground.any(axis=1 - axis))
        margin = math.ceil(MARGIN_MM / spacing_mm[axis])
        extent.append((max(int(inside[0]) - margin, 0), min(int(inside[-1]) + 1 + margin, size)))
    return extent[0], extent[1]


def _panel_grid(n_slices: int, extent: Extent, spacing_mm: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, row by row, in as few rows as possible and of equal length."""
    rows = math.ceil(n_slices / PANELS_PER_ROW)
    columns = math.ceil(n_slices / rows)
    right_mm, down_mm = ((stop - start) * mm for (start, stop), mm in zip(extent, spacing_mm[:2], strict=True))
    width = max(columns * PANEL_WIDTH_INCH, SMALLEST_WIDTH_INCH)
    height = rows * (width / columns * down_mm / right_mm + 0.2) + HEADING_INCH
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.05))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[n_slices:]:
        unused.set_axis_off()
    return figure, panels[:n_slices]


def _colour(label: int) -> str:
    return CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)]


def draw_class_contours(axes: Axes, labels: np.ndarray, count: int, style: Mapping[str, Any]) -> None:
    """Draw the outline of each class that is present in one slice.

    Args:
        axes: where the slice's image is drawn, array axis 0 to the right.
        labels: label map `(H,W)`, 0 the background.
        count: classes to draw, labels 1 to `count`.
        style: arguments of matplotlib's `contour`, such as `TRUTH_STYLE`.
    """
    for value in range(1, count + 1):
        mask = labels == value
        if mask.any():
            # a margin of background closes the outline of a mask that touches the slice's border
            x, y = (np.arange(-1, size + 1) for size in mask.shape)
            axes.contour(x, y, np.pad(mask, 1).T.astype(float), levels=[0.5], colors=_colour(value), **style)


def legend_lines(class_names: Sequence[str], *, has_truth: bool) -> list[Line2D]:
    """Return a legend's handles: one line for each class and one for each kind of contour."""
    lines = [Line2D([], [], color=_colour(n), linewidth=3, label=name) for n, name in enumerate(class_names, start=1)]
    kinds = [("truth", TRUTH_STYLE["linestyles"])] if has_truth else []
    kinds.append(("prediction", PREDICTION_STYLE["linestyles"][0]))
    return lines + [Line2D([], [], color="0.2", linestyle=style, label=name) for name, style in kinds]
