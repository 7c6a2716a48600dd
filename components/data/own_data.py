"""A user's own data, as `configs/data.json` of their bundle describes them: cases, split, what the labels show.

`data.json` is a data list as of the Medical Segmentation Decathlon, with lists `training`, `validation` and `test`
whose paths are relative to `dataset_dir`, and beside them what all workflows go by. `python -m adapt new` writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import load_decathlon_datalist
from monai.transforms import Compose, ScaleIntensityRanged, ScaleIntensityRangePercentilesd, Transform
from scipy import ndimage

from components.data.acdc import SUBSETS, Case, split_patients
from components.data.transforms import PERCENTILES, LoadVolumed, PadInPlaneToSquared, SlicesLastd
from components.data.volume_metadata import case_name

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


def read_data(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a bundle's `data.json`.

    Args:
        path: the file.

    Returns:
        its values by name.

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
    return data


def own_cases(
    path: str | os.PathLike[str],
    subset: str,
    *,
    dataset_dir: str,
    split_seed: int = 0,
    labelled_cases: int | None = None,
) -> list[Case]:
    """List image and label of every case of a subset, as a data list for MONAI's datasets.

    Where `data.json` names no case for validation or test, both are split off `training`, 70:15:15, by `group`, such as
    a patient with several images; a case without one is a group of its own.

    Args:
        path: `data.json`.
        subset: `training`, `validation` or `test`.
        dataset_dir: the folder that its paths are relative to.
        split_seed: seed of the split and of the choice of labelled cases.
        labelled_cases: how many groups of the training subset count as labelled; None for all. A smaller selection is
            part of every larger one.

    Returns:
        dictionaries with the paths `image` and `label`.

    Raises:
        ValueError: for an unknown subset, no folder, a subset without cases, a case listed twice, a group in two lists,
            or more labelled cases than there are.
    """
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset {subset!r}: expected one of {', '.join(SUBSETS)}")
    groups, order, chosen = _split(path, dataset_dir, split_seed)
    if subset == "training":
        if labelled_cases is not None and not 1 <= labelled_cases <= len(order):
            raise ValueError(
                f"labelled_cases must be between 1 and {len(order)}, the cases of the training subset, received "
                f"{labelled_cases}"
            )
        chosen["training"] = [case for group in order[:labelled_cases] for case in groups[group]]
    cases = [{key: case[key] for key in ("image", "label")} for case in chosen[subset]]
    if not cases and subset == "test":
        raise ValueError(
            f"there are no labelled cases to test on: expected a list `test` with labels in {path}, or at least 4 "
            "cases in `training` and neither `validation` nor `test`, so that both are split off; the validation "
            "cases have chosen the model, so their score is no test"
        )
    if not cases and subset == "training":
        raise ValueError(f"{path} has no cases to train on: expected some in the list `training`")
    return cases


def own_unlabelled(
    path: str | os.PathLike[str],
    *,
    dataset_dir: str,
    labelled: Sequence[Mapping[str, str]],
    cases: int | None = None,
    split_seed: int = 0,
) -> list[Case]:
    """List the images to learn from without a label: of training cases that are not labelled, then `unlabelled`.

    `unlabelled` is an optional list of `data.json`, of images that nobody has labelled.

    Args:
        path: `data.json`.
        dataset_dir: the folder that its paths are relative to.
        labelled: the labelled cases of the training.
        cases: how many images to list, the first ones; None for all.
        split_seed: as for `own_cases`.

    Returns:
        dictionaries with the path `image`.

    Raises:
        ValueError: as `own_cases`; when an image of `unlabelled` is listed elsewhere too, or there are fewer images
            than asked for, or none.
        FileNotFoundError: for an image of `unlabelled` that is not there.
    """
    groups, order, others = _split(path, dataset_dir, split_seed)
    labelled_images = {case["image"] for case in labelled}
    of_groups = [groups[group] for group in order]
    without_labels = [members for members in of_groups if not labelled_images & {case["image"] for case in members}]
    found = [{"image": case["image"]} for cases in (*without_labels, others["unlabelled"]) for case in cases]
    count = len(found) if cases is None else cases
    if not 1 <= count <= len(found):
        raise ValueError(
            f"unlabelled_cases must be between 1 and {len(found)}, the training cases without a label and those of the "
            f"list `unlabelled` in {path}, received {count}: label fewer (labelled_cases), list images, or train "
            "without the overlay of unlabelled cases"
        )
    for case in found[:count]:
        if not Path(case["image"]).is_file():
            raise FileNotFoundError(f"there is no image {case['image']}, which the list `unlabelled` of {path} names")
    return found[:count]


def _split(
    path: str | os.PathLike[str], dataset_dir: str, split_seed: int
) -> tuple[dict[str, list[Case]], list[str], dict[str, list[Case]]]:
    """Return the groups of the list `training`, those of them that train in order, and the other cases.

    The latter are those of `validation` and `test`, split off or listed, and those of `unlabelled`.
    """
    if not dataset_dir:  # as in an archive
        raise ValueError(f"dataset_dir is not set: expected the folder of the files in {path}; give --dataset_dir PATH")
    data = read_data(path)
    listed = {
        name: load_decathlon_datalist(path, data_list_key=name, base_dir=dataset_dir) if data.get(name) else []
        for name in (*SUBSETS, "unlabelled")
    }
    check_listed_once(listed)
    groups: dict[str, list[Case]] = {}
    for case in listed["training"]:
        groups.setdefault(str(case.get("group", case["image"])), []).append(case)
    if listed["validation"] or listed["test"]:
        order = [sorted(groups)[index] for index in np.random.RandomState(split_seed).permutation(len(groups))]
        return groups, order, listed
    split = split_patients(sorted(groups), split_seed)
    held_out = {name: [case for group in split[name] for case in groups[group]] for name in ("validation", "test")}
    return groups, split["training"], listed | held_out


def groups_of_cases(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the group of every labelled case, such as the patient whose images it has; itself where none is named.

    Args:
        path: `data.json`.

    Returns:
        groups by the name of the case, by which scores and predictions go.

    Raises:
        FileNotFoundError: as `read_data`.
        ValueError: as `read_data`; when two cases have the same name.
    """
    data = read_data(path)
    groups: dict[str, str] = {}
    for case in (case for subset in SUBSETS for case in data[subset]):
        name = case_name(case["image"])
        if name in groups:
            raise ValueError(
                f"{path} lists two cases with the name {name}, so that their scores cannot be told apart: rename one"
            )
        groups[name] = str(case.get("group", name))
    return groups


def check_listed_once(lists: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Check that no case is listed twice, and no group in two lists: what has trained or chosen a model is no test.

    Args:
        lists: dictionaries with the path `image`, and a `group` where one is given, by subset.

    Raises:
        ValueError: naming the image or the group, and the lists.
    """
    place: dict[str, str] = {}
    of_group: dict[str, str] = {}
    for name, cases in lists.items():
        for case in cases:
            if (real := os.path.realpath(case["image"])) in place:
                where = "twice in the list" if place[real] == name else f"in the lists `{place[real]}` and"
                raise ValueError(f"{case['image']} is {where} `{name}`: expected it once")
            place[real] = name
            if "group" in case and (other := of_group.setdefault(str(case["group"]), name)) != name:
                raise ValueError(
                    f"the group {case['group']} is in the lists `{other}` and `{name}`: expected all its cases in one"
                )


class LabelledCases:
    """What the labelled cases of a training show, by which its preprocessing is chosen.

    Only these are looked at, so that "1 labelled case" means it. They are read when something is asked for.

    Args:
        cases: dictionaries with the paths `image` and `label`.
        class_names: of the labels but the background's, all of which some case must show.
        label_values: see `components.data.LoadVolumed`.
        channels: see `components.data.LoadVolumed`.
        slice_axis: see `components.data.SlicesLastd`.
        modality: `CT` for Hounsfield units, else any.

    Raises:
        ValueError: when they are read and none shows a class.
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
    def _seen(self) -> list[_Seen]:
        seen = [_Seen(self.load(dict(case)), self.is_ct) for case in self.cases]
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
            return ["percentiles", *PERCENTILES]
        values = np.concatenate([seen.foreground for seen in self._seen])
        return ["values", *np.percentile(values, PERCENTILES).round().tolist()]

    @property
    def largest_component(self) -> bool:
        """Whether each class of each case is one connected component."""
        return all(seen.is_one_component for seen in self._seen)


class _Seen:
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


def scaled_grey_values(keys: str, normalisation: Sequence[float | str]) -> Transform:
    """Return the transform of grey values, or colours, to 0..255.

    Args:
        keys: the item with the image.
        normalisation: `["percentiles", lower, upper]` of each image, or `["values", lowest, highest]` of all alike, as
            for CT; what lies beyond is clipped.

    Returns:
        a dictionary transform of MONAI.

    Raises:
        ValueError: for another kind.
    """
    kind, (low, high) = normalisation[0], map(float, normalisation[1:])
    if kind == "percentiles":
        return ScaleIntensityRangePercentilesd(keys, low, high, b_min=0, b_max=255, clip=True)
    if kind == "values":
        return ScaleIntensityRanged(keys, low, high, b_min=0, b_max=255, clip=True)
    raise ValueError(
        f'expected normalisation ["percentiles", 0.5, 99.5] or ["values", low, high], received {normalisation}'
    )
