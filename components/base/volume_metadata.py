"""A volume's metadata: its file, case name, axes and voxel spacing."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing

ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")  # formats that MONAI's `ITKReader` reads
VOLUME_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img", *ITK_SUFFIXES)
PICTURE_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
NO_WEBP = f"a WebP picture, which is not read: expected {', '.join(PICTURE_SUFFIXES)}; convert it to PNG"
FRAME, FRAMES = "frame", "frames"  # keys of a frame of a series: its index, and the number of frames
CASE = "case_name"  # key of the name of a case, where it is not that of its file
DEAD_LINK = "a link whose target is missing: fetch it (git annex get, datalad get) or repair the link"


def is_volume(shape: Sequence[int]) -> bool:
    """Return whether a file's array is one volume: three axes, and no later axis longer than 1.

    Args:
        shape: shape of the array as stored.
    """
    return len(shape) >= 3 and all(size == 1 for size in shape[3:])


def time_axis(shape: Sequence[int]) -> int | None:
    """Return the axis of a file's array that counts the frames of a series.

    NIfTI's first three axes are those of space, even where one has length 1, as in a cine of one slice.

    Args:
        shape: shape of the array as stored.

    Returns:
        the fourth axis, or a later one that takes its place because all others beyond the third have length 1. None
        for a single volume, a flat image, and several values for each voxel and time.
    """
    later = [axis for axis in range(3, len(shape)) if shape[axis] != 1]
    return later[0] if len(later) == 1 and shape[later[0]] > 1 else None


def volume_suffix(path: str | os.PathLike[str]) -> str:
    """Return the suffix in `VOLUME_SUFFIXES` that a file name ends with, in any case, or an empty string."""
    name = Path(path).name.lower()
    return next((suffix for suffix in VOLUME_SUFFIXES if name.endswith(suffix)), "")


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Return whether a file name ends with one of `PICTURE_SUFFIXES`, in any case."""
    return Path(path).suffix.lower() in PICTURE_SUFFIXES


def other_of_pair(path: Path) -> Path | None:
    """Return where the `.img` of a `.hdr` is expected, or the `.hdr` of an `.img`; None for any other file."""
    other = {".hdr": ".img", ".img": ".hdr"}.get(path.suffix.lower())
    return path.with_suffix(other.upper() if path.suffix.isupper() else other) if other else None


def is_dead_link(path: Path) -> bool:
    """Return whether a path is a link to a missing target, such as a file that git-annex has not fetched."""
    return path.is_symlink() and not path.exists()


def case_name(path: str | os.PathLike[str]) -> str:
    """Return the name of a case: the name of its image file without folder and suffix.

    Args:
        path: image file, such as `patient001/patient001_frame01.nii.gz`.

    Returns:
        The file name without its volume or picture suffix; any other suffix is kept.
    """
    name = Path(path).name
    return Path(name).stem if is_picture(name) else name[: len(name) - len(volume_suffix(name))]


def case_names(images: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return a name for each case of a data set, by which its results are told apart.

    It is `case_name`. Where several files have the same one, the names of as many folders as needed precede it, such as
    `p01_t2` for `p01/t2.nii.gz` beside `p02/t2.nii.gz`. The folder that holds them all is not named.

    Args:
        images: image files, or folders of DICOM studies.

    Raises:
        ValueError: if two cases still have the same name.
    """
    paths = [Path(os.path.abspath(image)) for image in images]  # noqa: PTH100  # symbolic links stay in the path
    alike: dict[str, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        alike[case_name(path)].append(path)
    named: dict[Path, str] = {}
    for name, group in alike.items():
        above = os.path.commonpath([path.parent for path in group])
        folders = [path.parent.relative_to(above).parts for path in group]
        for depth in range(max(map(len, folders)) + 1):
            joined = ["_".join((*parts[max(len(parts) - depth, 0) :], name)) for parts in folders]
            if len(set(joined)) == len(joined):
                break
        named |= zip(group, joined, strict=True)
    if twice := [name for name, count in Counter(named.values()).items() if count > 1]:
        same = " and ".join(str(path) for path, name in named.items() if name == twice[0])
        raise ValueError(
            f"{same} would both have the case name {twice[0]}, so that their results cannot be told apart: rename one"
        )
    return [named[path] for path in paths]


def with_case_names(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the items of a data list, each with its case name as `CASE` where that is not the name of its `image`.

    Raises:
        ValueError: as `case_names`.
    """
    names = case_names([item["image"] for item in items])
    return [
        dict(item) if name == case_name(item["image"]) else {**item, CASE: name}
        for item, name in zip(items, names, strict=True)
    ]


def case_name_of_item(item: Mapping[str, Any]) -> str:
    """Return the case name of an item of a data list: its `CASE`, else the name of its `image`."""
    return str(item.get(CASE) or case_name(item["image"]))


def files_of(volumes: object) -> list[str]:
    """Return the files of loaded volumes.

    Args:
        volumes: MetaTensor of one volume, or of a batch in whose metadata a data loader lists the files.

    Returns:
        the path of each volume; an empty list if the metadata have none.
    """
    files = volumes.meta.get("filename_or_obj", []) if isinstance(volumes, MetaTensor) else []
    return [os.fspath(file) for file in ([files] if isinstance(files, str | os.PathLike) else files)]


def case_name_of(volume: torch.Tensor) -> str:
    """Return the name of the case a loaded volume belongs to.

    Args:
        volume: MetaTensor of one volume, or of a batch of one, with `meta["filename_or_obj"]` as set by `LoadImaged`.

    Returns:
        The name that `LoadVolumed` has kept as `meta[CASE]`, else that of the file; see `case_names`.

    Raises:
        ValueError: if the volume's metadata have no file name.
    """
    files = files_of(volume)
    if len(files) != 1:
        raise ValueError(
            "Expected a MetaTensor of one volume with its file's name in meta['filename_or_obj'], received "
            f"{type(volume).__name__} with {files}: load the volume with LoadImaged and keep its metadata."
        )
    name = volume.meta.get(CASE)  # type: ignore[attr-defined]  # a MetaTensor, since it has files
    return case_name(files[0]) if name is None else name if isinstance(name, str) else str(name[0])


def header_spacing_mm(volume: torch.Tensor) -> tuple[float, ...]:
    """Return a volume's voxel spacing according to its affine.

    Args:
        volume: channel-first MetaTensor `(C,spatial...)` of one volume, with 1 to 3 spatial axes.

    Returns:
        One spacing in mm per spatial axis, in array order.

    Raises:
        ValueError: if there is no affine, or only the identity that MONAI sets for a tensor without a header.
    """
    if isinstance(volume, MetaTensor):
        affine = volume.affine.double().cpu()
        from_file = "original_affine" in volume.meta or "filename_or_obj" in volume.meta
        if from_file or not torch.equal(affine, torch.eye(len(affine), dtype=affine.dtype)):
            return tuple(affine_to_spacing(affine, r=volume.ndim - 1).tolist())
    raise ValueError(
        "Expected a voxel spacing: a MetaTensor with the affine of its file. Received "
        f"{type(volume).__name__} without a header's affine: keep the metadata of LoadImaged."
    )


def checked_spacing_mm(spacing_mm: Sequence[float], spatial_dims: int) -> list[float]:
    """Return a voxel spacing as floats after checking it.

    Args:
        spacing_mm: one number per spatial axis, in array order.
        spatial_dims: number of spatial axes.

    Returns:
        The spacing in mm.

    Raises:
        ValueError: if it is not one finite positive number per axis.
    """
    spacing = [float(mm) for mm in spacing_mm]
    if len(spacing) != spatial_dims or not all(math.isfinite(mm) and mm > 0 for mm in spacing):
        raise ValueError(
            f"Expected {spatial_dims} positive spacings in mm, one per spatial axis in array order, received "
            f"{spacing}: take them from the image's header."
        )
    return spacing
