"""Clicks that correct a segmentation: their file, their checks, and the slices that they lie in."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BACKGROUND = "background"
_FORM = 'one list of voxels per class, such as {"LV": [[60, 71, 4]], "background": [[20, 33, 4]]}'

Voxel = tuple[int, ...]  # indices (i, j, k) of the image's array
Clicks = dict[Voxel, int]  # the class of each voxel that was clicked, 0 for the background


def read_clicks(source: str | Mapping[str, Any] | None, class_names: Sequence[str], shape: Sequence[int]) -> Clicks:
    """Read the clicks on one image.

    Args:
        source: a JSON file, or what it holds: for each class that has clicks, a list of voxels `[i, j, k]`. Names may
            be in upper or lower case. Voxels of `background` belong to no class. A picture's voxels are `[x, y]`. This
            is the form in which MONAI Label sends clicks.
        class_names: the classes without the background, in the order of their labels.
        shape: the image's shape HxWxD, that of a picture WxHx1.

    Returns:
        the clicks.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has another form, a class is unknown, a voxel is outside the image or belongs to two classes.
    """
    labels = {name.lower(): label for label, name in enumerate([BACKGROUND, *class_names])}
    clicks: Clicks = {}
    for name, voxels in _content(source).items():
        if name.lower() not in labels:
            raise ValueError(
                f"there is no class {name!r} to click: expected some of {', '.join([*class_names, BACKGROUND])}"
            )
        for given in voxels if isinstance(voxels, list | tuple) else [voxels]:
            voxel, label = _voxel(given, name, shape), labels[name.lower()]
            if (first := clicks.setdefault(voxel, label)) != label:
                both = " and ".join([BACKGROUND, *class_names][each] for each in (first, label))
                raise ValueError(
                    f"the voxel {list(voxel)} is clicked as {both}: expected one of them; take the other out"
                )
    return clicks


def clicks_by_slice(
    clicks: Clicks, labels: np.ndarray, slice_axis: int
) -> dict[int, dict[int, list[tuple[Voxel, bool]]]]:
    """Return what the clicks correct in each slice.

    A click on a class corrects this class. A click on the background corrects the class that its voxel has so far. It
    also takes its voxel from every other class that is corrected in the slice.

    Args:
        clicks: as `read_clicks` returns them.
        labels: the label map so far HxWxD.
        slice_axis: its axis across the slices.

    Returns:
        the voxels of each class to correct, and whether they belong to it, by slice and class. A click that changes
        nothing is left out.
    """
    by_slice: dict[int, Clicks] = defaultdict(dict)
    for voxel, label in clicks.items():
        by_slice[voxel[slice_axis]][voxel] = label
    corrected = {}
    for number, of_slice in by_slice.items():
        classes = sorted({label or int(labels[voxel]) for voxel, label in of_slice.items()} - {0})
        signs = {
            each: [(voxel, label == each) for voxel, label in of_slice.items() if label in (0, each)]
            for each in classes
        }
        if signs:
            corrected[number] = signs
    return corrected


def _content(source: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return what a file of clicks holds."""
    if isinstance(source, Mapping):
        return source
    if source is None:
        raise ValueError(f"there are no clicks: give --clicks FILE, a JSON file of {_FORM}")
    if not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source}: expected a JSON file of clicks, {_FORM}")
    try:
        content = json.loads(Path(source).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source} is no JSON file ({error}): expected {_FORM}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds a {type(content).__name__}: expected {_FORM}")
    return content


def _voxel(given: Any, name: str, shape: Sequence[int]) -> Voxel:
    """Return a voxel of an image HxWxD, or raise if it is none."""
    is_picture = shape[2] == 1 and isinstance(given, list | tuple) and len(given) == 2
    indices = [*given, 0] if is_picture else given
    try:
        voxel = tuple(int(index) for index in indices)
        is_whole = len(voxel) == 3 and all(index == whole for index, whole in zip(indices, voxel, strict=True))
    except (TypeError, ValueError, OverflowError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{given!r} of {name} is no voxel: expected three whole numbers; the form is {_FORM}")
    if not all(0 <= index < size for index, size in zip(voxel, shape, strict=True)):
        last = ", ".join(str(size - 1) for size in shape)
        raise ValueError(
            f"the click {list(voxel)} on {name} is outside the image: expected [0, 0, 0] to [{last}], indices of its "
            "array"
        )
    return voxel
