"""Wall thickness of the left ventricle by the segments of the American Heart Association."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.ndimage import binary_dilation, map_coordinates

_AROUND = ("anterior", "anteroseptal", "inferoseptal", "inferior", "inferolateral", "anterolateral")
_AROUND_APEX = ("anterior", "septal", "inferior", "lateral")
SEGMENTS = (
    *(f"basal {name}" for name in _AROUND),
    *(f"mid {name}" for name in _AROUND),
    *(f"apical {name}" for name in _AROUND_APEX),
)
# Direction of the anterior wall, in RAS: towards the head, since the inferior wall lies on the diaphragm. Files such as
# ACDC's have lost the orientation and appear axial; there it is the front, which screens show on top.
_HEAD, _FRONT = np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0])
_LEANS = 0.2  # cosine above which a direction counts as one towards the head
_RAYS = 120
_STEP_MM, _FARTHEST_MM = 0.5, 90.0
_SEPTUM_VOXELS = 2  # distance from the right ventricle within which the wall counts as septum


def wall_thickness_mm(labels: np.ndarray, affine: np.ndarray, classes: Mapping[str, int]) -> np.ndarray:
    """Measure the wall along rays from the middle of the cavity, and average them by segment.

    The slices that show cavity and wall are divided in thirds: basal, mid and apical. The middle of the septum is the
    middle of the wall that touches the right ventricle, in all slices together. Each segment spans 60 degrees from
    there, or 90 near the apex. The anterior wall lies on the side of the patient's head, or of the front if the
    affine says that slices are axial. The apex, segment 17, and rays through an open wall are not measured.

    Source: Cerqueira et al., "Standardized myocardial segmentation and nomenclature for tomographic imaging of the
    heart", Circulation 2002.

    Args:
        labels: `(H,W,D)`, slices last.
        affine: 4x4, from voxels to mm in RAS.
        classes: label of `RV`, `Myo` and `LV`.

    Returns:
        mean thickness in mm of the 16 `SEGMENTS`; nan for a segment that is not seen, all nan without a septum.
    """
    cavity, wall, right = (labels == classes[name] for name in ("LV", "Myo", "RV"))
    spacing = np.linalg.norm(affine[:3, :2], axis=0)
    slices = np.flatnonzero(cavity.any((0, 1)) & wall.any((0, 1)))
    thickness = np.full(len(SEGMENTS), np.nan)
    septal = sum((_septal_direction(cavity[..., n], wall[..., n], right[..., n], spacing) for n in slices), np.zeros(2))
    if not np.linalg.norm(septal) > 0:
        return thickness
    septal /= np.linalg.norm(septal)
    anterior = np.array([-septal[1], septal[0]])
    direction = (affine[:3, :2] / spacing) @ anterior
    towards = _HEAD if abs(direction @ _HEAD) > _LEANS else _FRONT
    anterior *= np.sign(direction @ towards) or 1
    pool = (cavity | right).sum((0, 1))[slices]
    if pool[len(slices) // 2 :].sum() > pool[: (len(slices) + 1) // 2].sum():
        slices = slices[::-1]  # the base, where the ventricles are wide, comes first
    from_septum = (np.arange(_RAYS) + 0.5) * 360 / _RAYS  # degrees, towards the anterior wall; none on a border
    rays = np.outer(np.cos(np.radians(from_septum)), septal) + np.outer(np.sin(np.radians(from_septum)), anterior)
    first = 0
    for third, count in zip(np.array_split(slices, 3), (6, 6, 4), strict=True):
        found = [_along_rays(cavity[..., n], wall[..., n], rays, spacing) for n in third]
        segment = _segments(from_septum, count)
        for number in range(count):
            values = np.concatenate([of_slice[segment == number] for of_slice in found]) if found else np.empty(0)
            values = values[~np.isnan(values)]
            if values.size:
                thickness[first + number] = values.mean()
        first += count
    return thickness


def _septal_direction(cavity: np.ndarray, wall: np.ndarray, right: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Return the sum (2,) of the unit directions from the middle of the cavity to the wall beside the RV."""
    septum = wall & binary_dilation(right, iterations=_SEPTUM_VOXELS)
    towards = (np.argwhere(septum) - np.argwhere(cavity).mean(axis=0)) * spacing
    return (towards / np.linalg.norm(towards, axis=1, keepdims=True).clip(1e-6)).sum(axis=0)


def _along_rays(cavity: np.ndarray, wall: np.ndarray, rays: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Return the thickness in mm on each ray (N, 2) of one slice; nan if no wall follows the cavity."""
    centre = np.argwhere(cavity).mean(axis=0)
    radii = np.arange(0, _FARTHEST_MM, _STEP_MM)
    points = centre[:, None, None] + (rays.T[:, :, None] * radii) / spacing[:, None, None]
    inner, outer = (_leaving(map_coordinates(mask.astype(float), points, order=1)) for mask in (cavity, cavity | wall))
    thickness = (outer - inner) * _STEP_MM
    thickness[thickness < _STEP_MM] = np.nan
    return thickness


def _leaving(inside: np.ndarray) -> np.ndarray:
    """Return the fractional index at which values (N, R) first fall below a half; nan if they begin or stay below."""
    below = inside < 0.5
    index = below.argmax(axis=1)
    rows = np.arange(len(inside))
    after, before = inside[rows, index], inside[rows, np.maximum(index - 1, 0)]
    place = index - (0.5 - after) / np.maximum(before - after, 1e-6)
    return np.where(index > 0, place, np.nan)


def _segments(from_septum: np.ndarray, count: int) -> np.ndarray:
    """Return the index of each ray's segment, from 0, in the order of `SEGMENTS`, by its angle in degrees."""
    width = 360 / count
    start = 120 if count == 6 else 135  # end of the anterior segment on the side of the free wall
    return ((start - from_septum) % 360 // width).astype(int)


def thickening_percent(ed_mm: np.ndarray, es_mm: np.ndarray) -> np.ndarray:
    """Return the increase in thickness of each segment from end-diastole to end-systole, in percent."""
    return 100 * (es_mm - ed_mm) / ed_mm
