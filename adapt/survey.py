"""Read a data set once, check it, and summarise it for the bundle's `data.json`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from monai.data.utils import affine_to_spacing
from monai.transforms import LoadImage
from tqdm import tqdm

from adapt.layouts import Item, Layout
from components.base.volume_metadata import is_picture
from components.data.acdc import CLASS_NAMES
from components.data.cases import SUBSETS
from components.data.geometry import find_slice_axis, on_grid_of
from components.data.pictures import PictureReader
from components.data.reader import VolumeReader

SIDES = re.compile(r"(left|right|anterior|posterior|superior|inferior|upper|lower|dorsal|ventral|l|r)", re.IGNORECASE)
MOST_CLASSES = 64  # a label map with more different values is rejected
AIR_HU = -500  # only CT has values below it
load_volume = LoadImage(image_only=True, ensure_channel_first=True, dtype=np.float64)

_COLOURS = {1: "grey values", 3: "colours"}


def survey(layout: Layout, data: Path) -> tuple[dict[str, Any], list[str]]:
    """Read every labelled case and choose the bundle's settings.

    Args:
        layout: the cases.
        data: absolute path of the folder that the listed paths will be relative to.

    Returns:
        the values of `data.json`, and sentences on the data and the chosen settings.

    Raises:
        ValueError: if a label does not fit its image or has a value that is not listed. If images are of several
            kinds, or no training case shows a class.
    """
    said: list[str] = []
    seen = {
        name: [_look(item) for item in tqdm(layout.lists.get(name, []), desc=f"Reading {name}", disable=None)]
        for name in SUBSETS
    }
    cases = [case for items in seen.values() for case in items]
    channels = _only(cases, "channels", lambda value: _COLOURS[value])
    pictures = _only(cases, "is_picture", lambda value: "2D pictures" if value else "3D volumes")
    values = sorted({value for case in cases for value in case["values"]})
    label_values, class_names = _classes(layout, values, cases, said)
    in_training = {value for case in seen["training"] for value in case["values"]}
    for value, name in zip(label_values[1:], class_names, strict=True):
        if value not in in_training:
            raise ValueError(
                f"class {name} ({value}) is in no training case: add cases that show it, or remove it from dataset.json"
            )
    modality = layout.modality or ("CT" if not pictures and all(case["is_like_ct"] for case in cases) else "")
    if modality.upper() == "CT" and not layout.modality:
        said.append(
            "the values look like Hounsfield units, so a fixed window is used as for CT (`modality` of data.json)"
        )
    axes = Counter(case["slice_axis"] for case in cases)
    sided = [name for name in class_names if any(SIDES.fullmatch(word) for word in re.split(r"[^A-Za-z]+", name))]
    said.append(
        f"{', '.join(sided)} name sides, so images are neither mirrored nor turned (`turned_views` of data.json)"
        if sided
        else "no class names a side, so images are mirrored and turned (`turned_views` of data.json: true)"
    )
    description = {
        "dataset_dir": str(data),
        "class_names": class_names,
        "label_values": label_values,
        "channels": channels,
        "pictures": pictures,
        "modality": modality,
        "slice_axis": next(iter(axes)) if len(axes) == 1 else None,
        "turned_views": not sided,
        **{name: [_relative(item, data) for item in layout.lists.get(name, [])] for name in SUBSETS},
        "unlabelled": [_relative(item, data) for item in layout.lists.get("unlabelled", [])],
    }
    sizes = np.array([case["size"] for case in cases])
    said[:0] = [
        f"{len(cases)} labelled cases in the layout {layout.kind}: "
        + ", ".join(f"{len(seen[n])} {n}" for n in SUBSETS),
        f"{'2D pictures' if pictures else '3D volumes'} of {_COLOURS[channels]}, {_range(sizes)}"
        + ("" if pictures else f", slices across axis {description['slice_axis']}"),
        "classes: " + ", ".join(f"{name} ({value})" for value, name in zip(label_values[1:], class_names, strict=True)),
    ]
    if not description["validation"] and not description["test"]:
        said.append("validation and test are split off training, 70:15:15 (`split_seed`)")
    elif not description["test"]:
        said.append("there is no test list: training works, evaluation stops with an error")
    return description, said


def _look(item: Item) -> dict[str, Any]:
    """Return the properties of one case."""
    image, label = (
        load_volume(item[role], PictureReader(is_label=role == "label") if is_picture(item[role]) else VolumeReader())
        for role in ("image", "label")
    )
    on_grid_of(image, label)
    values = np.unique(label.numpy())
    if len(values) > MOST_CLASSES or not np.equal(values, values.round()).all():
        raise ValueError(
            f"{item['label']} has {len(values)} values from {values[0]:g}: expected a whole number for each class"
        )
    spacing = affine_to_spacing(image.affine.numpy(), r=3).tolist()
    return {
        "image": item["image"],
        "channels": len(image),
        "is_picture": is_picture(item["image"]),
        "size": tuple(image.shape[1:]),
        "values": {int(value) for value in values},
        "slice_axis": 2 if is_picture(item["image"]) else find_slice_axis(spacing),
        "is_like_ct": np.percentile(image.numpy(), 0.5) < AIR_HU,
    }


def _only(cases: list[dict[str, Any]], key: str, in_words: Any) -> Any:
    """Return the value that all cases share."""
    first: dict[Any, str] = {}
    for case in cases:
        first.setdefault(case[key], case["image"])
    if len(first) > 1:
        found = " and ".join(f"{in_words(value)}, such as {path}" for value, path in first.items())
        raise ValueError(f"expected images of one kind, received {found}: convert them, or make a bundle for each kind")
    return next(iter(first))


def _classes(
    layout: Layout, values: list[int], cases: list[dict[str, Any]], said: list[str]
) -> tuple[list[int], list[str]]:
    """Return the value of each class in the files, background first, and the names of the other classes."""
    if layout.class_names is None:
        label_values = [0, *(value for value in values if value != 0)]
        names = [f"class_{index}" for index in range(1, len(label_values))] if len(label_values) > 2 else ["foreground"]
    else:
        label_values = [0, *sorted(value for value in layout.class_names if value != 0)]
        names = [layout.class_names[value] for value in label_values[1:]]
        if unknown := [value for value in values if value not in label_values]:
            path = next(case["image"] for case in cases if unknown[0] in case["values"])
            raise ValueError(
                f"the label of {path} has the value {unknown[0]}: expected one of those in dataset.json, "
                f"{label_values}; add it there"
            )
    if sorted(map(str.lower, names)) == sorted(map(str.lower, CLASS_NAMES)):  # hearts: use the phantoms' class order
        by_name = dict(zip(map(str.lower, names), label_values[1:], strict=True))
        label_values = [0, *(by_name[name.lower()] for name in CLASS_NAMES)]
        names = list(CLASS_NAMES)
    if len(label_values) == 1:
        raise ValueError("all labels are 0: expected a whole number from 1 for each class")
    if label_values != list(range(len(label_values))):
        said.append(
            "labels in the files: " + ", ".join(f"{value} -> {index}" for index, value in enumerate(label_values))
        )
    return label_values, names


def _relative(item: Item, data: Path) -> Item:
    """Return a case with paths relative to the folder, if they lie in it."""
    kept: Item = {key: item[key] for key in ("image", "label", "group") if key in item}
    return kept | {
        key: str(Path(item[key]).relative_to(data))
        for key in kept.keys() & {"image", "label"}
        if Path(item[key]).is_relative_to(data)
    }


def _range(sizes: np.ndarray) -> str:
    low, high = ("x".join(map(str, side)) for side in (sizes.min(0), sizes.max(0)))
    return low if low == high else f"{low} to {high}"
