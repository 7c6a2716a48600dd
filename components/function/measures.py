"""Ventricular function from label maps: volumes, ED and ES, ejection fractions, output, mass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter1d

from components.data.acdc import CLASS_NAMES
from components.inference.cycle import FEWEST_OF_A_CURVE, covers_cycle

MYOCARDIAL_DENSITY_G_PER_ML = 1.05
HEART_RATES_PER_MIN = (20.0, 250.0)  # frame times of other rates are ignored: many headers hold 0 or 1 s
FRAMES_PER_SIGMA = 30  # smooths a curve before its extremes are found

NAN = float("nan")


def volumes_ml(
    labels: np.ndarray, spacing_mm: Sequence[float], class_names: Sequence[str] = CLASS_NAMES
) -> dict[str, float]:
    """Return the volume of every class in ml: its number of voxels times their size.

    Papillary muscles and trabeculae belong to the cavity if the labels include them, as ACDC's do.

    Args:
        labels: `(H,W,D)`, 0 for the background and n for the n-th class.
        spacing_mm: voxel spacing, one number for each axis.
        class_names: names of the foreground classes, in the order of the labels.
    """
    voxel_ml = math.prod(spacing_mm) / 1000
    return {name: np.count_nonzero(labels == label) * voxel_ml for label, name in enumerate(class_names, start=1)}


def ejection_fraction_percent(edv_ml: float, esv_ml: float) -> float:
    """Return the share of the end-diastolic volume that is ejected, in percent; nan if that volume is 0."""
    return 100 * (edv_ml - esv_ml) / edv_ml if edv_ml > 0 else NAN


def find_phases(lv_ml: Sequence[float]) -> tuple[int, int]:
    """Find end-diastole and end-systole: the frames in which the left ventricle is largest and smallest.

    Curves of 10 frames or more are smoothed first, cyclically if they cover the cycle. Near an extreme, neighbouring
    frames differ by less than their errors.

    Args:
        lv_ml: volume of the left ventricle in each frame, at least one.

    Returns:
        indices of the ED and the ES frame.
    """
    curve = np.asarray(lv_ml, np.float64)
    if len(curve) >= FEWEST_OF_A_CURVE:
        mode = "wrap" if covers_cycle(lv_ml) else "nearest"
        curve = gaussian_filter1d(curve, len(curve) / FRAMES_PER_SIGMA, mode=mode)
    return int(curve.argmax()), int(curve.argmin())


def heart_rate_per_min(frame_seconds: float, lv_ml: Sequence[float]) -> float:
    """Return the heart rate from the duration of a cycle's frames.

    Args:
        frame_seconds: time from frame to frame, nan if unknown.
        lv_ml: volume of the left ventricle in each frame.

    Returns:
        beats per minute; nan if the frames do not cover the cycle, or the rate is outside `HEART_RATES_PER_MIN`.
    """
    cycle = frame_seconds * len(lv_ml)
    rate = 60 / cycle if cycle > 0 else NAN
    low, high = HEART_RATES_PER_MIN
    return rate if low <= rate <= high and covers_cycle(lv_ml) else NAN


def body_surface_m2(height_cm: float, weight_kg: float) -> float:
    """Estimate the body surface area in m2; nan if height or weight is not positive.

    Source: Mosteller, "Simplified calculation of body-surface area", New England Journal of Medicine 1987.
    """
    return math.sqrt(height_cm * weight_kg / 3600) if height_cm > 0 and weight_kg > 0 else NAN


def measure_function(
    ed_ml: Mapping[str, float] | None,
    es_ml: Mapping[str, float] | None,
    *,
    heart_rate: float = NAN,
    surface_m2: float = NAN,
) -> dict[str, float]:
    """Compute the functional measures of both ventricles.

    Source: Schulz-Menger et al., "Standardized image interpretation and post-processing in cardiovascular magnetic
    resonance - 2020 update", Journal of Cardiovascular Magnetic Resonance 2020.

    Args:
        ed_ml: volumes of RV, Myo and LV at end-diastole, as `volumes_ml` returns them; None if unknown.
        es_ml: the same at end-systole.
        heart_rate: beats per minute, nan if unknown.
        surface_m2: body surface area, nan if unknown.

    Returns:
        each measure by its name, which ends with its unit; nan if an input is unknown.
    """
    found: dict[str, float] = {}
    for name in ("LV", "RV"):
        edv, esv = (NAN if volumes is None else volumes[name] for volumes in (ed_ml, es_ml))
        side = name.lower()
        found |= {
            f"{side}_edv_ml": edv,
            f"{side}_esv_ml": esv,
            f"{side}_sv_ml": edv - esv,
            f"{side}_ef_percent": ejection_fraction_percent(edv, esv),
        }
    found["lv_mass_g"] = NAN if ed_ml is None else MYOCARDIAL_DENSITY_G_PER_ML * ed_ml["Myo"]
    found["heart_rate_per_min"] = heart_rate
    found["lv_output_l_per_min"] = found["lv_sv_ml"] * heart_rate / 1000
    found["body_surface_m2"] = surface_m2
    for name in ("lv_edv_ml", "lv_esv_ml", "lv_sv_ml", "rv_edv_ml", "rv_esv_ml", "rv_sv_ml", "lv_mass_g"):
        found[f"{name}_per_m2"] = found[name] / surface_m2
    return found
