"""The layouts in which labelled images come: the Medical Segmentation Decathlon's, nnU-Net's, ACDC's, plain folders.

TotalSegmentator's has a mask for each organ; `combine_masks` makes the Decathlon's of it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from monai.data import load_decathlon_datalist

from components.base.volume_metadata import NO_WEBP, case_name, is_picture, volume_suffix
from components.data.acdc import CLASS_NAMES, INFO, read_acdc
from components.data.cases import SUBSETS, check_no_leakage, named_cases

IMAGES = ("images", "imagesTr", "image")
LABELS = ("labels", "masks", "labelsTr", "label", "mask")
LABEL_POSTFIX = re.compile("(.+)_(mask|label|seg|segmentation|gt)", re.IGNORECASE)  # of a label beside its image
MASKS = "segmentations"  # TotalSegmentator's folder in that of a case
MOST_MASKS = 253  # larger labels of the training's slices are no classes

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
            (nnU-Net). Or it has folders of images and labels with equal names, or labels such as `0_mask.png` beside
            `0.png`. Or it has a folder for each patient, whose `Info.cfg` names the ED and ES frames (ACDC).

    Returns:
        the labelled cases, class names and modality.

    Raises:
        FileNotFoundError: if the folder, or a file that it lists, is missing.
        ValueError: if there are no cases, `dataset.json` is invalid or an image has several channels. If an image or a
            label has no counterpart. If a case is listed twice, a group is in two lists, or two cases have one name.
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
    """Return the images of a folder, each with the label of the same name, or of its name and a postfix."""
    images_dir, labels_dir = (
        next((root / name for name in names if (root / name).is_dir()), None) for names in (IMAGES, LABELS)
    )
    beside = {} if labels_dir else _files(images_dir or root)
    images = {name: path for name, path in beside.items() if not LABEL_POSTFIX.fullmatch(name)}
    labels = {name: path for name, path in beside.items() if name not in images}
    if any(_stem(name, images) in images for name in labels):
        images_dir = labels_dir = images_dir or root
    if images_dir is None or labels_dir is None:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{root} has no images and labels: expected a dataset.json that lists them, or folders images and labels "
            f"(or masks) with equal names in both, or labels such as 0_mask.png beside 0.png; found {found}"
        )
    if not beside:
        images, labels = _files(images_dir), _files(labels_dir)
    if by_channel:
        if several := sorted(name for name in images if re.search(r"_(?!0000)\d{4}$", name)):
            raise ValueError(f"{images_dir} has several channels of a case, such as {several[0]}: expected _0000 alone")
        images = {re.sub("_0000$", "", name): path for name, path in images.items()}
    labels = {_stem(name, images): path for name, path in labels.items()}
    if not images or set(images) != set(labels):
        for webp in root.rglob("*.webp"):
            raise ValueError(f"{webp} is {NO_WEBP}")
    for names, others, role, where in ((labels, images, "image", images_dir), (images, labels, "label", labels_dir)):
        if alone := sorted(set(names) - set(others)):
            raise ValueError(
                f"{len(alone)} files have no {role}, such as {names[alone[0]]}: expected a file of the same name in "
                f"{where}; add it or remove the file without a counterpart"
            )
    if not images:
        raise ValueError(f"{images_dir} is empty: expected volumes or pictures")
    return [{"image": str(images[name]), "label": str(labels[name])} for name in sorted(images)]


def _stem(name: str, images: Mapping[str, Path]) -> str:
    """Return the name of a label without a postfix, if there is an image of that name and none of its own."""
    match = LABEL_POSTFIX.fullmatch(name)
    return match[1] if match and name not in images and match[1] in images else name


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


def combine_masks(root: Path, target: Path) -> str:
    """Write a label map for each case that has a mask for each organ, as in TotalSegmentator's layout.

    A case is a folder with a volume, such as `s0001/ct.nii.gz`, and masks `s0001/segmentations/<organ>.nii.gz`. The
    classes are the masks that hold a voxel in some case.

    Args:
        root: folder of the cases; nothing is written into it.
        target: folder to make, in the Decathlon's layout. Its images are links to the cases' volumes, which alone
            tells them apart by name.

    Returns:
        a sentence on what was written; an empty one if there is no such case.

    Raises:
        FileExistsError: if the folder to make exists.
        ValueError: if a case has no volume or several. If a mask has another shape or place than the others, or there
            are more than `MOST_MASKS` classes.
    """
    nifti: Any = nib.load
    masks = {
        folder.parent: {path.name.removesuffix(".nii.gz"): path for path in sorted(folder.glob("[!.]*.nii.gz"))}
        for folder in sorted(root.glob(f"*/{MASKS}"))
    }
    if (root / "dataset.json").is_file() or not any(masks.values()):
        return ""
    if target.exists():
        raise FileExistsError(f"{target} already exists, where label maps would be written: remove it")
    volumes = {case: [path for path in sorted(case.glob("[!.]*")) if volume_suffix(path)] for case in masks}
    if odd := [case for case, found in volumes.items() if len(found) != 1]:
        raise ValueError(f"{odd[0]} has {len(volumes[odd[0]])} volumes: expected one beside {MASKS}, such as ct.nii.gz")
    present = {name for found in masks.values() for name, path in found.items() if np.any(nifti(path).dataobj)}
    if not 0 < len(present) <= MOST_MASKS:
        raise ValueError(f"{root} has {len(present)} organs with a voxel: expected 1 to {MOST_MASKS}; remove others")
    value_of = {name: value for value, name in enumerate(sorted(present), start=1)}
    items, overlapping = [], 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}_") as folder_of_parts:
        partial = Path(folder_of_parts) / target.name
        for folder in ("imagesTr", "labelsTr"):
            (partial / folder).mkdir(parents=True)
        for case, found in masks.items():
            first = next((path for name, path in found.items() if name in present), None)
            if first is None:
                raise ValueError(f"{case / MASKS} has none of the masks {', '.join(value_of)}: take the case out")
            affine, label = nifti(first).affine, np.zeros(nifti(first).shape, np.uint8)
            for name in sorted(present & found.keys()):
                mask = nifti(found[name])
                if mask.shape != label.shape or not np.allclose(mask.affine, affine, atol=1e-3):
                    raise ValueError(f"{found[name]} is not on the grid of {first}: expected one grid; resample it")
                inside = np.asarray(mask.dataobj) > 0
                overlapping += int(np.count_nonzero(label[inside]))
                label[inside] = value_of[name]
            (volume,) = volumes[case]
            item = {"image": f"imagesTr/{case.name}{volume_suffix(volume)}", "label": f"labelsTr/{case.name}.nii.gz"}
            (partial / item["image"]).symlink_to(volume)
            nib.save(nib.Nifti1Image(label, affine, nifti(first).header, dtype=np.uint8), partial / item["label"])
            items.append(item)
        names = {"background": 0} | value_of
        modality = "CT" if all(path.name.startswith("ct.") for (path,) in volumes.values()) else ""
        (partial / "dataset.json").write_text(
            json.dumps({"modality": {"0": modality}, "labels": names, "training": items}, indent=1)
        )
        partial.rename(target)
    return (
        f"a mask for each organ: label maps and links to the volumes are written to {target}"
        + f"; {overlapping} voxels are in several masks, of which the last by name counts" * bool(overlapping)
    )


def _check(lists: dict[str, list[Item]]) -> None:
    """Check that all files exist, that no case is listed twice, no group is in two lists and no name has two cases."""
    for name, items in lists.items():
        for item in items:
            for role in ("image", "label") if name in SUBSETS else ("image",):
                if not Path(item[role]).is_file():
                    raise FileNotFoundError(f"the {role} {item[role]} in the list `{name}` is missing: add it")
    check_no_leakage(lists)
    named_cases(lists)
