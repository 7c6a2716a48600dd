"""Read a data set once, check it, and summarise it for the bundle's `data.json`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
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
from components.data.custom_data import canvas_side, class_widths, patch_side, thinnest_class
from components.data.geometry import find_slice_axis, on_grid_of, slices_last
from components.data.pictures import PictureReader, used_colours
from components.data.reader import VolumeReader
from components.data.transforms import ROUNDING_ERROR

SIDES = re.compile(r"(left|right|anterior|posterior|superior|inferior|upper|lower|dorsal|ventral|l|r)", re.IGNORECASE)
NAMELESS = re.compile(r"(class|label)?[ _-]?\d+", re.IGNORECASE)  # names that are none, as in some `dataset.json`
IGNORE = "ignore"  # nnU-Net's name for the value of voxels that nobody has annotated
MOST_CLASSES = 64  # a label map with more different values is rejected, unless they have names
FEWEST_PAIRS = 5  # cases with both of two classes from which their directions are judged
SAME_DIRECTION = 0.5  # length of the mean of unit vectors; 1 if all have one direction
BLACK = "#000000"
AIR_HU = -500  # only CT has values below it
load_volume = LoadImage(image_only=True, ensure_channel_first=True, dtype=np.float64)

_COLOURS = {1: "grey values", 3: "colours"}


def survey(
    layout: Layout, data: Path, *, classes: Sequence[str] | None = None, turned: bool | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Read every labelled case and choose the bundle's settings.

    Args:
        layout: the cases.
        data: absolute path of the folder that the listed paths will be relative to.
        classes: names of the classes in the order of their values, without the background; None for the layout's.
        turned: whether images are mirrored and turned; None to decide by the classes.

    Returns:
        the values of `data.json`, and sentences on the data and the chosen settings.

    Raises:
        ValueError: if a label does not fit its image, or has a negative value or one that is not listed. If images are
            of several kinds, no training case shows a class, or `classes` are more or fewer than those of the labels.
    """
    said: list[str] = []
    colours = _colours_of_labels(layout)
    seen = {
        name: [
            _look(item, layout, colours)
            for item in tqdm(
                layout.lists.get(name, []), desc=f"Reading {name}", disable=None if layout.lists.get(name) else True
            )
        ]
        for name in SUBSETS
    }
    cases = [case for items in seen.values() for case in items]
    channels = _only(cases, "channels", lambda value: _COLOURS[value])
    pictures = _only(cases, "is_picture", lambda value: "2D pictures" if value else "3D volumes")
    ignore_label = _ignore_label(layout)
    values = sorted({value for case in cases for value in case["values"]} - {ignore_label})
    label_values, class_names = _classes(layout, values, cases, classes, said)
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
    if ignore_label is not None:
        said.append(
            f"voxels of the value {ignore_label}, `{IGNORE}`, count in neither training nor scores (`ignore_label` of "
            "data.json)"
        )
    if colours:
        said.append(
            f"the palettes of the labels differ from file to file, so colours are the classes, and {colours[0]} the "
            "background (`label_values` of data.json)"
        )
    axes = Counter(case["slice_axis"] for case in cases)
    if turned is None:
        is_named = classes is not None or layout.class_names is not None
        turned, why = _is_turned(class_names, label_values[1:], seen["training"], is_named=is_named)
        said.append(why)
    said.append(_size_in_training(cases, dict(zip(label_values[1:], class_names, strict=True))))
    in_files = colours or label_values
    description = {
        "dataset_dir": str(data),
        "class_names": class_names,
        "label_values": in_files,
        "ignore_label": ignore_label,
        "channels": channels,
        "pictures": pictures,
        "modality": modality,
        "slice_axis": next(iter(axes)) if len(axes) == 1 else None,
        "turned_views": turned,
        **{name: [_relative(item, data) for item in layout.lists.get(name, [])] for name in SUBSETS},
        "unlabelled": [_relative(item, data) for item in layout.lists.get("unlabelled", [])],
    }
    sizes = np.array([case["size"] for case in cases])
    said[:0] = [
        f"{len(cases)} labelled cases in the layout {layout.kind}: "
        + ", ".join(f"{len(seen[n])} {n}" for n in SUBSETS),
        f"{'2D pictures' if pictures else '3D volumes'} of {_COLOURS[channels]}, {_range(sizes)}"
        + ("" if pictures else f", slices across axis {description['slice_axis']}"),
        "classes: " + ", ".join(f"{name} ({value})" for value, name in zip(in_files[1:], class_names, strict=True)),
    ]
    if not description["validation"] and not description["test"]:
        said.append("validation and test are split off training, 70:15:15 (`split_seed`)")
    elif not description["test"]:
        said.append("there is no test list: training works, evaluation stops with an error")
    return description, said


def _look(item: Item, layout: Layout, colours: list[str] | None) -> dict[str, Any]:
    """Return the properties of one case."""
    of_pictures = {"image": PictureReader(), "label": PictureReader(is_label=True, colours=colours)}
    image, label = (
        load_volume(item[role], of_pictures[role] if is_picture(item[role]) else VolumeReader())
        for role in ("image", "label")
    )
    label = on_grid_of(image, label)
    values = np.unique(label.numpy())
    if values[0] < -ROUNDING_ERROR:
        raise ValueError(
            f"{item['label']} has the value {values[0]:g}: expected 0 for the background and a whole number from 1 for "
            "each class; set it to 0, or, if nobody has annotated these voxels, to a number that is no class, and list "
            f"that in a dataset.json as `{IGNORE}`"
        )
    is_too_many = layout.class_names is None and len(values) > MOST_CLASSES
    if is_too_many or (np.abs(values - values.round()) > ROUNDING_ERROR).any():
        raise ValueError(
            f"{item['label']} has {len(values)} values from {values[0]:g}: expected a whole number for each class"
        )
    values, label = np.unique(values.round()), slices_last(label.round())[0].numpy()
    spacing = affine_to_spacing(image.affine.numpy(), r=3).tolist()
    return {
        "image": item["image"],
        "channels": len(image),
        "is_picture": is_picture(item["image"]),
        "size": tuple(image.shape[1:]),
        "values": {int(value) for value in values},
        "centres": _centres(label, values),
        "side": max(label.shape[:2]),
        "widths": class_widths(label),
        "slice_axis": 2 if is_picture(item["image"]) else find_slice_axis(spacing),
        "is_like_ct": np.percentile(image.numpy(), 0.5) < AIR_HU,
    }


def _centres(label: np.ndarray, values: np.ndarray) -> dict[int, np.ndarray]:
    """Return the mean place of each class within its slices, which follow each other along the last axis."""
    return {int(value): np.argwhere((label == value).any(axis=2)).mean(axis=0) for value in values if value > 0}


def _size_in_training(cases: list[dict[str, Any]], class_names: dict[int, str]) -> str:
    """Return a sentence on the thinnest of the classes, by value, and the size of images that follows."""
    widths = [{value: case["widths"][value] for value in case["widths"].keys() & class_names} for case in cases]
    thinnest, width = thinnest_class(widths)
    side = float(np.median([case["side"] for case in cases]))
    canvas = canvas_side(side, width)
    patch = patch_side(canvas, pictures=cases[0]["is_picture"])
    seen = f"seen in patches of {patch}x{patch} (`patch_size`)" if patch < canvas else "seen whole"
    return (
        f"{class_names[thinnest]} is thinnest, about {width * side:.0f} of {side:.0f} pixels wide: labelled cases like "
        f"these give a canvas of {canvas}x{canvas} (`canvas_size`), {seen}"
    )


def _is_turned(
    class_names: list[str], values: list[int], cases: list[dict[str, Any]], *, is_named: bool
) -> tuple[bool, str]:
    """Return whether images are mirrored and turned, and a sentence that says why."""
    sided = [name for name in class_names if any(SIDES.fullmatch(word) for word in re.split(r"[^A-Za-z]+", name))]
    if sided:
        return False, (
            f"{', '.join(sided)} name sides, so images are neither mirrored nor turned (`turned_views` of data.json)"
        )
    if len(class_names) == 1 or (is_named and not any(NAMELESS.fullmatch(name) for name in class_names)):
        return True, "no class names a side, so images are mirrored and turned (`turned_views` of data.json: true)"
    if all(_lie_anyhow(cases, pair) for pair in combinations(values, 2)):
        return True, (
            "the classes have no names, but lie in changing directions from each other, so images are mirrored and "
            "turned (`turned_views` of data.json: true)"
        )
    return False, (
        "the classes have no names and may be sides, such as left and right, so images are neither mirrored nor turned "
        "(`turned_views` of data.json); name them by --classes NAME,NAME, or give --turned True if they are none"
    )


def _lie_anyhow(cases: list[dict[str, Any]], pair: tuple[int, int]) -> bool:
    """Return whether the direction from one class to another changes from case to case, in enough cases."""
    both = [case["centres"] for case in cases if all(value in case["centres"] for value in pair)]
    steps = np.array([centres[pair[1]] - centres[pair[0]] for centres in both]).reshape(-1, 2)
    lengths = np.linalg.norm(steps, axis=1, keepdims=True)
    units = np.divide(steps, lengths, out=np.zeros_like(steps), where=lengths > 0)
    return len(units) >= FEWEST_PAIRS and float(np.linalg.norm(units.mean(axis=0))) < SAME_DIRECTION


def _colours_of_labels(layout: Layout) -> list[str] | None:
    """Return the colours of all label pictures, background first, if their palettes contradict each other; else None.

    A `dataset.json` names the indices, so that colours do not count.
    """
    files = [item["label"] for name in SUBSETS for item in layout.lists.get(name, []) if is_picture(item["label"])]
    if layout.class_names is not None or not files:
        return None
    of_files = {file: used_colours(file) for file in files}
    palettes = [colours for colours in of_files.values() if colours]
    pairs = {pair for colours in palettes for pair in colours.items()}
    indices, colours = Counter(index for index, _ in pairs), Counter(colour for _, colour in pairs)
    has_twins = any(len(set(each.values())) < len(each) for each in palettes)
    if max(indices.values(), default=0) < 2 and (has_twins or max(colours.values(), default=0) < 2):
        return None
    if grey := [file for file, found in of_files.items() if found is None]:
        raise ValueError(
            f"the palettes of the labels differ from file to file, and {grey[0]} has none: expected indices of one "
            "palette, or grey values, in all files; convert them"
        )
    frequent = Counter(colour for found in palettes for colour in found.values()).most_common(1)[0][0]
    background = BLACK if BLACK in colours else frequent
    return [background, *sorted(set(colours) - {background})]


def _ignore_label(layout: Layout) -> int | None:
    """Return the value of voxels that nobody has annotated, as nnU-Net's `dataset.json` names it."""
    return next((value for value, name in (layout.class_names or {}).items() if value and name.lower() == IGNORE), None)


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
    layout: Layout,
    values: list[int],
    cases: list[dict[str, Any]],
    given: Sequence[str] | None,
    said: list[str],
) -> tuple[list[int], list[str]]:
    """Return the value of each class in the files, background first, and the names of the other classes."""
    if layout.class_names is None:
        label_values = [0, *(value for value in values if value != 0)]
        names = [f"class_{index}" for index in range(1, len(label_values))] if len(label_values) > 2 else ["foreground"]
    else:
        label_values = [0, *sorted(set(layout.class_names) - {0, _ignore_label(layout)})]
        names = [layout.class_names[value] for value in label_values[1:]]
        if unknown := [value for value in values if value not in label_values]:
            path = next(case["image"] for case in cases if unknown[0] in case["values"])
            raise ValueError(
                f"the label of {path} has the value {unknown[0]}: expected one of those in dataset.json, "
                f"{label_values}; add it there"
            )
    if given is not None:
        if len(given) != len(names):
            raise ValueError(
                f"--classes gives {len(given)} names, {', '.join(given)}: expected {len(names)}, one for each of the "
                f"labels' values {label_values[1:]}"
            )
        names = list(given)
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
