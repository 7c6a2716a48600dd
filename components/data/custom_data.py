"""A user's own data: the bundle's `configs/data.json`, and statistics of the labelled cases.

`data.json` is a data list in the format of the Medical Segmentation Decathlon, written by `autosam new`. Paths
in its lists `training`, `validation`, `test` and, optionally, `unlabelled` are relative to `dataset_dir`. It also holds
the settings that all workflows share.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from monai.data.utils import affine_to_spacing
from monai.transforms import Compose
from scipy import ndimage

from components.data.cases import SUBSETS, named_cases
from components.data.geometry import THICK_SLICES
from components.data.slices import IGNORED
from components.data.transforms import PERCENTILES, LoadVolumed, PadInPlaneToSquared, SlicesLastd

FIELDS = (
    "dataset_dir",
    "class_names",
    "label_values",
    "channels",
    "pictures",
    "modality",
    "slice_axis",
    "turned_views",
    *SUBSETS,
)
STEP = 16  # sides of canvas and crop are multiples of it, since four poolings halve them
LARGEST_CANVAS = 256  # unless structures would be too thin: a larger canvas takes more time
SMALLEST_CANVAS = 64
LARGEST_PATCH_OF_PICTURES = 128
THIN = 4  # width in pixels that the thinnest class has on the canvas, if not in its images already less
MARGIN = 1 / 8  # share of the canvas around all labels, since other cases lie elsewhere


def read_data(path: str | os.PathLike[str], dataset_dir: str | None = None) -> dict[str, Any]:
    """Read a bundle's `data.json`.

    Args:
        path: the file.
        dataset_dir: folder that its paths are relative to; None for the folder that the file names.

    Returns:
        its values by name; `ignore_label` is None if missing. Paths are joined with `dataset_dir`. If that is empty, as
        in an archive, they stay relative, and listing cases raises an error. Cases have names; see `named_cases`.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if a field is missing, or two cases have the same name.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no {path}, which describes the data: make a bundle with `autosam new NAME FOLDER`"
        )
    data = json.loads(Path(path).read_text())
    if missing := [name for name in FIELDS if name not in data]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: write it again with `autosam new`")
    folder = data["dataset_dir"] if dataset_dir is None else dataset_dir
    lists = {name: [_in_folder(case, folder) for case in data.get(name, [])] for name in (*SUBSETS, "unlabelled")}
    return {"ignore_label": None} | data | named_cases(lists) | {"dataset_dir": folder}


def _in_folder(case: Mapping[str, str], folder: str) -> dict[str, str]:
    """Return a case with its paths joined to a folder, if that is known."""
    paths = {key: os.path.normpath(Path(folder, case[key])) for key in ("image", "label") if key in case}
    return {**case, **paths} if folder else dict(case)


class DatasetStatistics:
    """Statistics of a training's labelled cases, from which its preprocessing is chosen.

    No other cases are read, so that "1 labelled case" is true. They are read on first use.

    Args:
        cases: dictionaries with the paths `image` and `label`.
        class_names: names of the classes without the background; each must be in some case.
        label_values: see `components.data.LoadVolumed`.
        channels: see `components.data.LoadVolumed`.
        slice_axis: see `components.data.transforms.SlicesLastd`.
        modality: `CT` for Hounsfield units, else any.
        ignore_label: see `components.data.LoadVolumed`.

    Raises:
        ValueError: on first use, if there are no cases, or a class is in none of them.
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, str]],
        *,
        class_names: Sequence[str],
        label_values: Sequence[int] | Sequence[str],
        channels: int,
        slice_axis: int | None,
        modality: str,
        ignore_label: int | None = None,
    ) -> None:
        self.cases = cases
        self.class_names = class_names
        self.is_ct = modality.upper() == "CT"
        keys = ["image", "label"]
        self.load = Compose(
            [
                LoadVolumed(keys, label_values=label_values, ignore_label=ignore_label, channels=channels),
                SlicesLastd(keys, slice_axis=slice_axis),
                PadInPlaneToSquared(keys),
            ]
        )

    @cached_property
    def _seen(self) -> list[CaseStatistics]:
        if not self.cases:
            raise ValueError(
                "expected labelled cases from which to choose canvas, crop and grey values, received none: give "
                "--labelled_cases 1 or more"
            )
        seen = [CaseStatistics(self.load(dict(case)), self.is_ct) for case in self.cases]
        shown = {value for each in seen for value in each.classes}
        if absent := [name for value, name in enumerate(self.class_names, start=1) if value not in shown]:
            raise ValueError(
                f"{', '.join(absent)} is in none of the {len(seen)} labelled cases: expected every class in at least "
                "one; give more with --labelled_cases, or others with --split_seed"
            )
        return seen

    @property
    def canvas_size(self) -> int:
        """Side in pixels of the square to which slices are resized: the median of theirs, within limits.

        See `canvas_side`.
        """
        side = float(np.median([seen.side for seen in self._seen]))
        return canvas_side(side, thinnest_class([seen.widths for seen in self._seen])[1])

    def crop_size(self, canvas_size: int) -> int:
        """Return the side in pixels of the canvas's central square that holds all labels with a margin."""
        reach = max(seen.reach for seen in self._seen) + 2 * MARGIN
        return int(min(canvas_size, max(SMALLEST_CANVAS, STEP * np.ceil(reach * canvas_size / STEP))))

    @property
    def normalisation(self) -> list[float | str]:
        """The argument of `scaled_grey_values`: the range of labelled voxels for CT, else percentiles of each case."""
        if not self.is_ct:
            return list(PERCENTILES)
        values = np.concatenate([seen.foreground for seen in self._seen])
        return ["values", *np.percentile(values, PERCENTILES).round().tolist()]

    @property
    def planes(self) -> int:
        """In how many planes slices are seen: 3 if the voxels of all volumes are nearly cubes, else 1."""
        return 3 if all(seen.is_isotropic for seen in self._seen) else 1

    @property
    def largest_component(self) -> bool:
        """Whether every class is one connected component in every case."""
        return all(seen.is_one_component for seen in self._seen)


class CaseStatistics:
    """Statistics of one case.

    Attributes:
        side: side of its padded slices, in pixels.
        reach: side of the smallest central square that holds its labels, as a share of `side`.
        foreground: image values within its labels; for CT only.
        classes: label values of the case.
        widths: see `class_widths`.
        is_one_component: whether every class is one connected component.
        is_isotropic: whether no side of a voxel is twice another, and slices are several.
    """

    def __init__(self, case: Mapping[str, Any], is_ct: bool) -> None:
        image, label = (case[key].numpy() for key in ("image", "label"))
        label = np.where(label == IGNORED, 0, label)
        self.side = label.shape[1]
        places = np.argwhere(label[0].any(axis=2))
        distance = np.abs(places + 0.5 - self.side / 2).max(initial=0) + 0.5
        self.reach = 2 * distance / self.side
        self.foreground = image[0][label[0] > 0] if is_ct else np.empty(0)
        spacing = affine_to_spacing(case["image"].affine.numpy(), r=3)
        self.is_isotropic = label.shape[-1] > 1 and spacing.max() < THICK_SLICES * spacing.min()
        self.widths = class_widths(label[0])
        self.classes = list(self.widths)
        whole = np.ones((3, 3, 3))
        self.is_one_component = all(ndimage.label(label[0] == value, whole)[1] == 1 for value in self.classes)


def class_widths(label: np.ndarray) -> dict[int, float]:
    """Return the mean width of each class in the slices of a label map, as a share of the slices' longer side.

    A strip has two pixels at its edges for each of its pixels across. The width is thus twice the ratio of a class's
    pixels to those at its edges, where a longer strip counts more. That of a disc is its radius.

    Args:
        label: HxWxD, slices along the last axis.

    Returns:
        the width of each class that the label map has, by value; 0 is the background.
    """
    neighbours = ndimage.generate_binary_structure(3, 1)
    neighbours[1, 1, ::2] = False  # of the same slice
    widths = {}
    for value in np.unique(label[label > 0]):
        mask = label == value
        inner = ndimage.binary_erosion(mask, neighbours)
        widths[int(value)] = float(2 * mask.sum() / (mask.sum() - inner.sum()) / max(label.shape[:2]))
    return widths


def thinnest_class(widths: Sequence[Mapping[int, float]]) -> tuple[int, float]:
    """Return the class that is thinnest in the median case, and its width there.

    Args:
        widths: of each case what `class_widths` returns; some case must have a class.
    """
    medians = {
        value: float(np.median([each[value] for each in widths if value in each])) for each in widths for value in each
    }
    thinnest = min(medians, key=medians.__getitem__)
    return thinnest, medians[thinnest]


def patch_side(crop_size: int, *, pictures: bool) -> int:
    """Return the side in pixels of the squares that the network sees at once.

    Args:
        crop_size: side of the slices in pixels.
        pictures: whether they are 2D pictures instead of volumes' slices.
    """
    return min(crop_size, LARGEST_PATCH_OF_PICTURES if pictures else LARGEST_CANVAS)


def canvas_side(side: float, width: float) -> int:
    """Return the side of the canvas in pixels: that of the slices, at least 64, and at most 256.

    If the thinnest class were less than 4 pixels wide on it, it may be larger, up to where that is so.

    Args:
        side: that of the padded slices, in pixels.
        width: that of the thinnest class, as a share of it.
    """
    limit = max(LARGEST_CANVAS, STEP * math.ceil(THIN / width / STEP))
    return int(np.clip(STEP * round(side / STEP), SMALLEST_CANVAS, limit))
