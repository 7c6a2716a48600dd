"""Implausible anatomy: faults of a segmentation that labels, volumes and measures show without a truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.ndimage import binary_dilation, binary_fill_holes, label

from components.inference.cycle import FEWEST_OF_A_CURVE, covers_cycle

NAMES = {"RV": "right ventricle", "Myo": "myocardium", "LV": "left ventricle"}
EJECTION_PERCENT = (5, 85)  # plausible ejection fractions
# In ACDC's contours, which have no such faults, both shares are at most a thirtieth; a single slice is not reported.
_OPEN_SHARE = 0.1  # share of the cavity's border in a slice above which the wall counts as open
_APART_SHARE = 0.1  # share of a class in a slice outside its largest piece above which it counts as in pieces
_FEWEST_SLICES = 2
_JUMP_SHARE = 0.1  # share of the largest volume by which a frame may differ from its neighbours


def faults_of_labels(labels: np.ndarray, classes: Mapping[str, int]) -> list[str]:
    """Describe the implausible anatomy in the labels of one frame.

    Faults are a missing class, and a slice without left ventricle between others. A ventricle in pieces, and an open
    wall around the cavity below the most basal slice, count in two slices or more. Slices are counted from 1.

    Args:
        labels: `(H,W,D)`, slices last.
        classes: label of `RV`, `Myo` and `LV`.

    Returns:
        a phrase for each fault.
    """
    masks = {name: labels == classes[name] for name in NAMES}
    faults = [f"no {NAMES[name]}" for name, mask in masks.items() if not mask.any()]
    shown = np.flatnonzero(masks["LV"].any((0, 1)))
    if shown.size:
        gaps = np.setdiff1d(np.arange(shown[0], shown[-1]), shown)
        if gaps.size:
            faults.append(f"no left ventricle in {_slices(gaps)}, between others that show it")
        size = (masks["LV"] | masks["RV"]).sum((0, 1))[shown]
        below_base = shown[1:] if size[: len(size) // 2].sum() >= size[(len(size) + 1) // 2 :].sum() else shown[:-1]
        is_open = [n for n in below_base if _open_share(masks["LV"][..., n], masks["Myo"][..., n]) > _OPEN_SHARE]
        if len(is_open) >= _FEWEST_SLICES:
            faults.append(f"the myocardium is open around the left ventricle in {_slices(is_open)}")
    for name in ("RV", "LV"):
        apart = [n for n in range(labels.shape[2]) if _apart_share(masks[name][..., n]) > _APART_SHARE]
        if len(apart) >= _FEWEST_SLICES:
            faults.append(f"the {NAMES[name]} is in pieces in {_slices(apart)}")
    return faults


def faults_of_measures(measures: Mapping[str, float]) -> list[str]:
    """Describe the ejection fractions of `measure_function` that are outside `EJECTION_PERCENT`."""
    low, high = EJECTION_PERCENT
    faults = []
    for name in ("LV", "RV"):
        fraction = measures[f"{name.lower()}_ef_percent"]
        if fraction < 0:
            faults.append(f"the {NAMES[name]} is larger at ES than at ED")
        elif fraction < low or fraction > high:
            faults.append(f"an ejection fraction of the {NAMES[name]} of {fraction:.0f}%, outside {low} to {high}%")
    return faults


def faults_of_curve(volumes_ml: Mapping[str, Sequence[float]]) -> list[str]:
    """Describe the frames of a cine in which a ventricle's volume jumps beyond those before and after it.

    Args:
        volumes_ml: volumes of `RV` and `LV` in each frame.

    Returns:
        a phrase for each ventricle; none for fewer than 10 frames, which are too far apart.
    """
    faults = []
    for name in ("LV", "RV"):
        curve = np.asarray(volumes_ml[name], np.float64)
        if len(curve) < FEWEST_OF_A_CURVE:
            continue
        around = np.pad(curve, 1, mode="wrap" if covers_cycle(volumes_ml[name]) else "edge")
        middle = np.median([around[:-2], curve, around[2:]], axis=0)
        frames = np.flatnonzero(np.abs(curve - middle) > _JUMP_SHARE * curve.max()) + 1
        if frames.size:
            faults.append(f"the volume of the {NAMES[name]} jumps in {_listed('frame', frames)}")
    return faults


def _open_share(cavity: np.ndarray, wall: np.ndarray) -> float:
    """Return the share of pixels around a cavity that are not wall; holes, such as papillary muscles, are filled."""
    cavity = binary_fill_holes(cavity)
    border = binary_dilation(cavity) & ~cavity
    return float((border & ~wall).sum() / max(border.sum(), 1))


def _apart_share(mask: np.ndarray) -> float:
    """Return the share of a mask outside its largest piece; pixels that touch at a corner are connected."""
    pieces = np.bincount(label(mask, np.ones((3, 3)))[0].ravel())[1:]
    return float(1 - pieces.max() / pieces.sum()) if pieces.size else 0.0


def _slices(indices: Sequence[int] | np.ndarray) -> str:
    return _listed("slice", np.asarray(indices) + 1)


def _listed(what: str, numbers: np.ndarray) -> str:
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
