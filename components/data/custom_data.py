"""A user's own data, as `configs/data.json` of their bundle describes them, and what their labelled cases show.

`data.json` is a data list as of the Medical Segmentation Decathlon, with lists `training`, `validation` and `test`
whose paths are relative to `dataset_dir`, maybe `unlabelled`, images that nobody has labelled, and beside them what all
workflows go by. `python -m adapt new` writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Compose
from scipy import ndimage

from components.data.cases import SUBSETS
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
STEP = 16  # of the sides of canvas and crop, which four poolings halve
LARGEST_CANVAS = 256  # beyond it training takes too long without a GPU
SMALLEST_CANVAS = 64
MARGIN = 1 / 8  # of the canvas, around all labels: other cases lie elsewhere


def read_data(path: str | os.PathLike[str], dataset_dir: str | None = None) -> dict[str, Any]:
    """Read a bundle's `data.json`.

    Args:
        path: the file.
        dataset_dir: the folder that its paths are relative to; None for that which the file names.

    Returns:
        its values by name. Paths are joined with `dataset_dir`; where that is empty, as in an archive, they stay
        relative, and listing cases is an error.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: when it lacks something.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no {path}, which describes the data: make a bundle with `python -m adapt new NAME --data FOLDER`"
        )
    data = json.loads(Path(path).read_text())
    if missing := [name for name in FIELDS if name not in data]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: write it again with `python -m adapt new`")
    folder = data["dataset_dir"] if dataset_dir is None else dataset_dir
    lists = {name: [_in_folder(case, folder) for case in data.get(name, [])] for name in (*SUBSETS, "unlabelled")}
    return data | lists | {"dataset_dir": folder}


def _in_folder(case: Mapping[str, str], folder: str) -> dict[str, str]:
    """Return a case with the paths of its files in a folder, if that is known."""
    paths = {key: os.path.normpath(Path(folder, case[key])) for key in ("image", "label") if key in case}
    return {**case, **paths} if folder else dict(case)


class DatasetStatistics:
    """What the labelled cases of a training show, by which its preprocessing is chosen.

    Only these are looked at, so that "1 labelled case" means it. They are read when something is asked for.

    Args:
        cases: dictionaries with the paths `image` and `label`.
        class_names: of the labels but the background's, all of which some case must show.
        label_values: see `components.data.LoadVolumed`.
        channels: see `components.data.LoadVolumed`.
        slice_axis: see `components.data.transforms.SlicesLastd`.
        modality: `CT` for Hounsfield units, else any.

    Raises:
        ValueError: when they are read and there is none, or none shows a class.
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, str]],
        *,
        class_names: Sequence[str],
        label_values: Sequence[int],
        channels: int,
        slice_axis: int | None,
        modality: str,
    ) -> None:
        self.cases = cases
        self.class_names = class_names
        self.is_ct = modality.upper() == "CT"
        keys = ["image", "label"]
        self.load = Compose(
            [
                LoadVolumed(keys, num_classes=len(label_values), label_values=label_values, channels=channels),
                SlicesLastd(keys, slice_axis=slice_axis),
                PadInPlaneToSquared(keys),
            ]
        )

    @cached_property
    def _seen(self) -> list[CaseStatistics]:
        if not self.cases:
            raise ValueError(
                "expected a labelled case by which to choose canvas, crop and grey values, received none: give "
                "--labelled_cases 1 or more"
            )
        seen = [CaseStatistics(self.load(dict(case)), self.is_ct) for case in self.cases]
        shown = {value for each in seen for value in each.classes}
        if absent := [name for value, name in enumerate(self.class_names, start=1) if value not in shown]:
            raise ValueError(
                f"{', '.join(absent)} is in none of the {len(seen)} labelled cases: expected every class in some; give "
                "more with --labelled_cases, or others with --split_seed"
            )
        return seen

    @property
    def canvas_size(self) -> int:
        """The side of the square to which slices are resized: the median of theirs, within limits, in pixels."""
        side = float(np.median([seen.side for seen in self._seen]))
        return int(np.clip(STEP * round(side / STEP), SMALLEST_CANVAS, LARGEST_CANVAS))

    def crop_size(self, canvas_size: int) -> int:
        """Return the side of the central square of a canvas that holds all labels with a margin, in pixels."""
        reach = max(seen.reach for seen in self._seen) + 2 * MARGIN
        return int(min(canvas_size, max(SMALLEST_CANVAS, STEP * np.ceil(reach * canvas_size / STEP))))

    @property
    def normalisation(self) -> list[float | str]:
        """What `scaled_grey_values` takes: for CT the range of the labelled voxels, else percentiles of each case."""
        if not self.is_ct:
            return list(PERCENTILES)
        values = np.concatenate([seen.foreground for seen in self._seen])
        return ["values", *np.percentile(values, PERCENTILES).round().tolist()]

    @property
    def largest_component(self) -> bool:
        """Whether each class of each case is one connected component."""
        return all(seen.is_one_component for seen in self._seen)


class CaseStatistics:
    """What one case shows.

    Attributes:
        side: of its padded slices, in pixels.
        reach: the side of the smallest central square that holds its labels, as a share of `side`.
        foreground: the image's values within its labels; read for CT only.
        classes: the labels that it has.
        is_one_component: whether no class has two components.
    """

    def __init__(self, case: Mapping[str, Any], is_ct: bool) -> None:
        image, label = (case[key].numpy() for key in ("image", "label"))
        self.side = label.shape[1]
        places = np.argwhere(label[0].any(axis=2))
        distance = np.abs(places + 0.5 - self.side / 2).max(initial=0) + 0.5
        self.reach = 2 * distance / self.side
        self.foreground = image[0][label[0] > 0] if is_ct else np.empty(0)
        self.classes = [int(value) for value in np.unique(label) if value > 0]
        whole = np.ones((3, 3, 3))
        self.is_one_component = all(ndimage.label(label[0] == value, whole)[1] == 1 for value in self.classes)
