"""The layouts in which labelled images come: ACDC's, the Medical Segmentation Decathlon's, nnU-Net's, plain folders."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from monai.data import load_decathlon_datalist

from components.base.volume_metadata import case_name, is_picture, volume_suffix
from components.data.acdc import CLASS_NAMES, INFO, read_acdc
from components.data.cases import SUBSETS, check_no_leakage

IMAGES = ("images", "imagesTr")
LABELS = ("labels", "masks", "labelsTr")

Item = dict[str, Any]  # paths of an `image` and its `label`, and a `group` where one is given


class Layout(NamedTuple):
    """The data that a folder describes.

    Attributes:
        kind: name of the layout, for messages.
        lists: labelled cases by subset, and the images of the list `unlabelled` of a `dataset.json`. Paths are absolute
            if the folder's is.
        class_names: names by value in the label files, background included; None if unknown.
        modality: imaging modality, or an empty string.
    """

    kind: str
    lists: dict[str, list[Item]]
    class_names: dict[int, str] | None
    modality: str


def read_layout(folder: str | os.PathLike[str]) -> Layout:
    """Read the layout of a folder of labelled images.

    Args:
        folder: it has a `dataset.json` that lists its cases (Medical Segmentation Decathlon, Auto3DSeg) or does not
            (nnU-Net). Or it has folders of images and labels with equal names. Or it has a folder for each patient,
            whose `Info.cfg` names the ED and ES frames (ACDC).

    Returns:
        the labelled cases, class names and modality.

    Raises:
        FileNotFoundError: if the folder, or a file that it lists, is missing.
        ValueError: if there are no cases, `dataset.json` is invalid or an image has several channels. If an image or a
            label has no counterpart. If a case is listed twice, or a group is in two lists.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"--data {root} is not a folder: expected a folder of labelled images")
    file = root / "dataset.json"
    described = _described(file) if file.is_file() else {}
    if described.get("training"):
        layout = Layout("Medical Segmentation Decathlon", _listed(file, described), *_classes(described))
    elif any(root.glob(f"*/{INFO}")) or any(root.glob(f"training/*/{INFO}")):
        classes = dict(enumerate(["background", *CLASS_NAMES]))
        layout = Layout("ACDC", {"training": read_acdc(str(root))["training"]}, classes, "MR")
    elif described:
        layout = Layout("nnU-Net", {"training": _pairs(root, by_channel=True)}, *_classes(described))
    else:
        layout = Layout("folders of images and labels", {"training": _pairs(root, by_channel=False)}, None, "")
    _check(layout.lists)
    return layout


def _described(file: Path) -> Item:
    """Return the content of a `dataset.json`."""
    try:
        described = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: expected JSON ({error})") from error
    if not isinstance(described, dict) or not isinstance(described.get("labels"), dict):
        raise ValueError(f"{file} has no `labels`: expected an object with a name for each value, background included")
    for name in SUBSETS:
        unnamed = name != "test" and [item for item in described.get(name) or [] if not isinstance(item, dict)]
        if unnamed:
            raise ValueError(f"{file} lists {unnamed[0]!r} in `{name}`: expected an `image` and its `label`")
    return described


def _classes(described: Item) -> tuple[dict[int, str], str]:
    """Return the classes' names by value, and the modality."""
    labels = described["labels"]
    pairs = [(value, name) if str(value).isdigit() else (name, value) for value, name in labels.items()]
    regions = [name for value, name in pairs if not str(value).isdigit()]
    if regions or not pairs:
        raise ValueError(
            f"`labels` of dataset.json is {labels}: expected a whole number and a name for each class; regions of "
            "several values are not supported"
        )
    channels = described.get("modality") or described.get("channel_names") or {}
    names = list(channels.values()) if isinstance(channels, dict) else [str(channels)]
    return {int(value): str(name) for value, name in pairs}, names[0] if names else ""


def _listed(file: Path, described: Item) -> dict[str, list[Item]]:
    """Return the labelled cases of the lists of a `dataset.json`, and the images of its list `unlabelled`."""
    lists: dict[str, list[Item]] = {}
    for name in SUBSETS:
        items = load_decathlon_datalist(file, data_list_key=name) if described.get(name) else []
        if any(isinstance(item["image"], list) for item in items):
            raise ValueError(f"{file} lists several images for a case, one for each channel: expected one image")
        lists[name] = [item for item in items if "label" in item]
    if unlabelled := len(described["training"]) - len(lists["training"]):
        raise ValueError(
            f"{file} lists {unlabelled} images without a label in `training`: list them in `test`, or in `unlabelled` "
            "to learn from them"
        )
    if described.get("unlabelled"):
        images = [item["image"] if isinstance(item, dict) else item for item in described["unlabelled"]]
        lists["unlabelled"] = [{"image": os.path.normpath(file.parent / image)} for image in images]
    folded = [item for item in lists["training"] if item.get("fold") == 0]
    if folded and not lists["validation"]:
        lists["validation"] = folded
        lists["training"] = [item for item in lists["training"] if item not in folded]
    return lists


def _pairs(root: Path, *, by_channel: bool) -> list[Item]:
    """Return the images of a folder, each with the label of the same name."""
    images_dir, labels_dir = (
        next((root / name for name in names if (root / name).is_dir()), None) for names in (IMAGES, LABELS)
    )
    if images_dir is None or labels_dir is None:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{root} has no images and labels: expected a dataset.json that lists them, or folders images and labels "
            f"(or masks) with equal names in both; found {found}"
        )
    images, labels = _files(images_dir), _files(labels_dir)
    if by_channel:
        if several := sorted(name for name in images if re.search(r"_(?!0000)\d{4}$", name)):
            raise ValueError(f"{images_dir} has several channels of a case, such as {several[0]}: expected _0000 alone")
        images = {re.sub("_0000$", "", name): path for name, path in images.items()}
    for names, others, role, where in ((labels, images, "image", images_dir), (images, labels, "label", labels_dir)):
        if alone := sorted(set(names) - set(others)):
            raise ValueError(
                f"{len(alone)} files have no {role}, such as {names[alone[0]]}: expected a file of the same name in "
                f"{where}; add it or remove the file without a counterpart"
            )
    if not images:
        raise ValueError(f"{images_dir} is empty: expected volumes or pictures")
    return [{"image": str(images[name]), "label": str(labels[name])} for name in sorted(images)]


def _files(folder: Path) -> dict[str, Path]:
    """Return the images below a folder, by sub-folder and case name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or not (is_picture(path) or volume_suffix(path)) or path.suffix.lower() == ".img":
            continue
        name = path.parent.relative_to(folder) / case_name(path)
        if (other := found.setdefault(str(name), path)) != path:
            raise ValueError(f"{path} and {other} have the same name: expected one file for each case")
    return found


def _check(lists: dict[str, list[Item]]) -> None:
    """Check that all files exist, that no case is listed twice and that no group is in two lists."""
    for name, items in lists.items():
        for item in items:
            for role in ("image", "label") if name in SUBSETS else ("image",):
                if not Path(item[role]).is_file():
                    raise FileNotFoundError(f"the {role} {item[role]} in the list `{name}` is missing: add it")
    check_no_leakage(lists)
