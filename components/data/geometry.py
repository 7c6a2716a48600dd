"""Voxel geometry: labels on the grid of their image, and slices along the last axis."""

from collections.abc import Sequence
from typing import cast

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import Orientation
from monai.utils import ImageMetaKey

from components.data.reader import UNIT_MM, scaled

RAS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))
AXIAL_POSE = "LPS"  # orientation of ACDC's volumes
THICK_SLICES = 2.0  # least ratio of the spacing across slices to that within them, to find the slice axis
SAME_PLACE_VOXELS = 1e-3  # largest distance at which voxels of a label and its image count as equal


def on_grid_of(image: MetaTensor, label: MetaTensor) -> MetaTensor:
    """Reorder the axes of a label map to those of its image, if they differ in order or direction.

    Args:
        image: 1xHxWxD, as `VolumeReader` reads it.
        label: its label map, read in the same way.

    Returns:
        the label map on the image's grid, with its affine.

    Raises:
        ValueError: if label and image have different voxels; `SAME_PLACE_VOXELS` is the tolerance.
    """
    path, size = label.meta[ImageMetaKey.FILENAME_OR_OBJ], np.asarray(image.shape[1:])
    affine = label.affine.numpy()
    if np.isnan(label.meta[UNIT_MM]) and not np.isnan(image.meta[UNIT_MM]):
        affine = scaled(affine, image.meta[UNIT_MM])  # a header without a unit uses its image's
    to_image = np.linalg.inv(image.affine) @ affine  # from indices of the label to those of the image
    axes = np.abs(to_image[:3, :3]).argmax(axis=1)  # axes of the label, in the order of the image's
    if sorted(axes) != [0, 1, 2]:
        axes = np.arange(3)
    turned = label.numpy().transpose(0, *axes + 1)
    if turned.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"{path} does not belong to its image: expected the image's shape {tuple(image.shape[1:])}, "
            f"received {tuple(label.shape[1:])}"
        )
    mirrored = np.flatnonzero(to_image[range(3), axes] < 0)
    order = np.zeros((4, 4))
    order[range(3), axes] = 1
    order[3, 3] = 1
    order[mirrored] *= -1
    order[mirrored, 3] = size[mirrored] - 1
    corners = np.stack([*np.meshgrid(*[(0, n - 1) for n in label.shape[1:]], indexing="ij"), np.ones((2, 2, 2))])
    if np.abs((to_image - order) @ corners.reshape(4, -1)).max() > SAME_PLACE_VOXELS:
        raise ValueError(
            f"{path} is not on the grid of its image: expected the affine {_as_rows(image.affine.numpy())}, or one "
            f"with its axes in another order or direction, received {_as_rows(affine)}; resample the label to "
            "its image's grid, or copy the image's header to it if only the header is wrong"
        )
    turned = np.flip(turned, tuple(mirrored + 1))
    on_grid = MetaTensor(turned.copy(), meta=label.meta)
    on_grid.affine = image.affine
    on_grid.meta.update({key: image.meta[key] for key in ("original_affine", "spatial_shape")})
    return on_grid


def find_slice_axis(spacing: Sequence[float]) -> int:
    """Return the axis of a volume that runs across its slices.

    Args:
        spacing: voxel spacing along the file's three axes, in any unit.

    Returns:
        the axis whose spacing is at least twice that of both others, else the last.
    """
    for axis, across in enumerate(spacing):  # the tolerance is for rounding errors
        if all(across >= (1 - 1e-3) * THICK_SLICES * other for n, other in enumerate(spacing) if n != axis):
            return axis
    return len(spacing) - 1


def slices_last(volume: torch.Tensor, slice_axis: int | None = None) -> torch.Tensor:
    """Reorient one volume as `components.data.transforms.SlicesLastd` does.

    Args:
        volume: MetaTensor 1xHxWxD.
        slice_axis: as for `SlicesLastd`.

    Returns:
        the reoriented volume, with its affine.
    """
    return Orientation(axcodes=pose(volume, slice_axis), labels=RAS_LABELS)(volume)


def pose(volume: torch.Tensor, slice_axis: int | None) -> str:
    """Return the axis codes of a volume after it is reoriented, in nibabel's letters."""
    affine = cast(MetaTensor, volume).affine.double().cpu().numpy()
    across = find_slice_axis(affine_to_spacing(affine, r=3).tolist()) if slice_axis is None else slice_axis
    world = [int(axis) for axis in nib.io_orientation(affine)[:, 0]]  # world axis of each of the file's axes
    in_plane = sorted(axis for n, axis in enumerate(world) if n != across)
    return "".join(["LPI"[axis] for axis in in_plane] + ["LPS"[world[across]]])


def _as_rows(affine: np.ndarray) -> str:
    return str(np.round(affine[:3], 4).tolist())
