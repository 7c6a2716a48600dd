"""Pictures of a case: every slice with its prediction, and its truth if there is one."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from monai.data import MetaTensor
from monai.transforms import MapTransform

from components.base.atomic_write import write_atomically
from components.base.volume_metadata import FRAME, case_name_of, checked_spacing_mm, files_of, header_spacing_mm
from components.data.acdc import CLASS_NAMES
from components.data.geometry import slices_last
from components.data.pictures import CLASS_COLOURS
from components.data.slices import IGNORED
from components.data.transforms import LoadVolumed

TRUTH_COLOUR, LINE_WIDTH, FILL = "white", 1.1, 0.35
TRUTH_OUTLINE: dict[str, Any] = {"colors": TRUTH_COLOUR, "linewidths": LINE_WIDTH}
DPI = 150
PANELS_PER_ROW = 6
PANEL_WIDTH_INCH, LARGEST_PANEL_INCH = 2.2, 7.0
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
    """Draw the prediction in the classes' colours and the truth in white, on one panel per slice.

    A picture, one slice deep, is shown as a whole, with prediction and truth side by side. Volumes are cropped to what
    is labelled.

    Convention: array axis 0 runs to the right, axis 1 down, slices in the order of axis 2. ACDC volumes are then drawn
    from base to apex, with the patient's head up and the RV left of the LV.

    Args:
        image: grey values `(H,W,D)`, any range, or colours `(H,W,D,3)` in 0..255.
        label: true labels `(H,W,D)`, 0 the background; None draws the prediction alone. `IGNORED` voxels are not drawn.
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
    depth, no_prediction = image.shape[2], np.zeros_like(pred)
    if depth > 1:
        extent = foreground_extent(label_maps, spacing_mm)
        figure, panels = _panel_grid(depth, extent, spacing_mm, PANEL_WIDTH_INCH)
        contents = [(z, f"slice {z + 1} of {depth}", label, pred) for z in range(depth)]
    else:
        extent = (0, image.shape[0]), (0, image.shape[1])
        width = min(max(image.shape[0] / DPI, PANEL_WIDTH_INCH), LARGEST_PANEL_INCH)
        figure, panels = _panel_grid(len(label_maps), extent, spacing_mm, width)
        contents = [(0, "prediction", None, pred), (0, "truth", label, no_prediction)][: len(label_maps)]
    vmin, vmax = np.percentile(image, WINDOW_PERCENTILES)
    for axes, (z, heading, truth, prediction) in zip(panels, contents, strict=True):
        shown = image[:, :, z].swapaxes(0, 1)
        if image.ndim == 4:
            axes.imshow(shown.astype(np.uint8), origin="upper")
        else:
            axes.imshow(shown, cmap="gray", vmin=vmin, vmax=vmax, origin="upper", interpolation="bilinear")
        _fill(axes, prediction[..., z], len(class_names))
        draw_class_contours(axes, prediction[..., z], len(class_names), {"linewidths": LINE_WIDTH})
        if truth is not None:
            draw_class_contours(axes, truth[..., z], len(class_names), TRUTH_OUTLINE)
        axes.set(xlim=np.subtract(extent[0], 0.5), ylim=np.subtract(extent[1], 0.5)[::-1], xticks=[], yticks=[])
        axes.set_aspect(spacing_mm[1] / spacing_mm[0])
        axes.set_title(heading, fontsize=8, color="0.35", pad=3)
        axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11)
    lines = legend_lines(class_names)
    lines += [Line2D([], [], color=TRUTH_COLOUR, linewidth=LINE_WIDTH, label="truth")] if label is not None else []
    place: Any = {"loc": "outside lower center", "ncols": 5, "fontsize": 9}
    figure.legend(handles=lines, facecolor="0.3", labelcolor="white", **place)
    return figure


class SaveOverlayd(MapTransform):
    """Write `<output_dir>/<case>_overlay.png` of every case, see `draw_overlay`, and pass the data on unchanged.

    The image is read anew from its file, so that it is shown whole and as fine as it is. Slices are shown as the
    network sees them, see `components.data.transforms.SlicesLastd`. Of a cine the first frame is drawn.

    Args:
        output_dir: folder of the pictures, made if missing.
        label_key: key of the true label map `(1,H,W,D)` on the image's grid; if missing from the data, only the
            prediction is drawn.
        pred_key: key of the predicted label map `(1,H,W,D)` on the image's grid, with the image's metadata.
        class_names: names of labels 1, 2, ...
        channels: channels of the image, 1 for grey values, 3 for colours.
        slice_axis: the axis across the slices, see `components.data.transforms.SlicesLastd`.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        label_key: str = "label",
        pred_key: str = "pred",
        class_names: Sequence[str] = CLASS_NAMES,
        channels: int = 1,
        slice_axis: int | None = None,
    ) -> None:
        super().__init__([label_key, pred_key], allow_missing_keys=True)
        self.output_dir = Path(output_dir)
        self.label_key = label_key
        self.pred_key = pred_key
        self.class_names = tuple(class_names)
        self.slice_axis = slice_axis
        self.load = LoadVolumed("image", channels=channels)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw and write one case.

        Raises:
            ValueError: if a label map has more than one channel, the grids differ, or the prediction has no metadata.
        """
        pred, label = data[self.pred_key], data.get(self.label_key)
        case, (file,) = case_name_of(pred), files_of(pred)
        frame = int(pred.meta.get(FRAME, 0))
        if frame > 0:
            return dict(data)
        image = slices_last(
            self.load({"image": file, FRAME: frame} if FRAME in pred.meta else {"image": file})["image"],
            self.slice_axis,
        )
        figure = draw_overlay(
            _as_array(image[0] if len(image) == 1 else image.movedim(0, -1)),
            None if label is None else self._label_array(label, self.label_key, pred.affine),
            self._label_array(pred, self.pred_key, pred.affine),
            spacing_mm=header_spacing_mm(image),
            title=case,
            class_names=self.class_names,
        )
        with write_atomically(self.output_dir / f"{case}_overlay.png") as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)
        return dict(data)

    def _label_array(self, labels: torch.Tensor, key: str, affine: torch.Tensor) -> np.ndarray:
        """Return a label map `(1,H,W,D)` on an image's grid as an array `(H,W,D)`, reoriented like the image."""
        if labels.shape[0] != 1:
            raise ValueError(
                f"Expected {key!r} a label map (1,H,W,D), received {tuple(labels.shape)}: "
                "apply AsDiscreted(argmax=True) before, and to_onehot only after the overlay."
            )
        return _as_array(slices_last(MetaTensor(_as_array(labels), affine=affine), self.slice_axis)[0])


def _as_array(tensor: torch.Tensor | np.ndarray) -> np.ndarray:
    """Return a tensor of any device, or an array, as an array."""
    return torch.as_tensor(tensor).detach().cpu().numpy()


def _check(image: np.ndarray, label_maps: Sequence[np.ndarray], spacing_mm: Sequence[float]) -> None:
    """Raise if the volumes do not share one grid or the spacing is invalid."""
    is_colour = image.ndim == 4 and image.shape[3] == 3
    if not (image.ndim == 3 or is_colour) or any(labels.shape != image.shape[:3] for labels in label_maps):
        raise ValueError(
            f"Expected image, label and pred (H,W,D) on one grid, received {[v.shape for v in (image, *label_maps)]}: "
            "invert prediction and image to the native grid first."
        )
    checked_spacing_mm(spacing_mm, spatial_dims=3)


def foreground_extent(label_maps: Sequence[np.ndarray], spacing_mm: Sequence[float]) -> Extent:
    """Return start and stop on axes 0 and 1 of all foreground plus a margin; the whole grid if there is none.

    Args:
        label_maps: labels `(H,W,D)` on one grid; voxels that are `IGNORED` are no foreground.
        spacing_mm: voxel spacing in mm of axes 0 and 1 at least.
    """
    foreground = np.any([(labels > 0) & (labels != IGNORED) for labels in label_maps], axis=(0, 3))
    height, width = foreground.shape
    if not foreground.any():
        return (0, height), (0, width)
    extent = []
    for axis, size in enumerate((height, width)):
        inside = np.flatnonzero(foreground.any(axis=1 - axis))
        margin = math.ceil(MARGIN_MM / spacing_mm[axis])
        extent.append((max(int(inside[0]) - margin, 0), min(int(inside[-1]) + 1 + margin, size)))
    return extent[0], extent[1]


def _panel_grid(
    n_panels: int, extent: Extent, spacing_mm: Sequence[float], panel_inch: float
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, row by row, in as few rows as possible and of equal length."""
    rows = math.ceil(n_panels / PANELS_PER_ROW)
    columns = math.ceil(n_panels / rows)
    right_mm, down_mm = ((stop - start) * mm for (start, stop), mm in zip(extent, spacing_mm[:2], strict=True))
    width = max(columns * panel_inch, SMALLEST_WIDTH_INCH)
    height = rows * (width / columns * down_mm / right_mm + 0.2) + HEADING_INCH
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.05))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[n_panels:]:
        unused.set_axis_off()
    return figure, panels[:n_panels]


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
            outline = {"colors": _colour(value), **style}
            axes.contour(x, y, np.pad(mask, 1).T.astype(float), levels=[0.5], **outline)


def legend_lines(class_names: Sequence[str]) -> list[Line2D]:
    """Return a legend's handles: one line for each class."""
    return [Line2D([], [], color=_colour(n), linewidth=3, label=name) for n, name in enumerate(class_names, start=1)]


def _fill(axes: Axes, labels: np.ndarray, count: int) -> None:
    """Colour the pixels of each class, so that structures of a pixel's width are seen as well."""
    shades = np.zeros((*labels.shape, 4))
    for value in range(1, count + 1):
        shades[labels == value] = to_rgba(_colour(value), FILL)
    axes.imshow(shades.swapaxes(0, 1), origin="upper", interpolation="nearest")
