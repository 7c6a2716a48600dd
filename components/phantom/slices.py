"""Independent phantom slices, each of another subject, for training an encoder and for mixing into batches.

The ranges are deliberately wide (domain randomisation as in SynthSeg: Billot et al., Medical Image Analysis 2023): any
orientation, hearts and trunks beyond the normal, contrasts similar to cine MR, sometimes arbitrary ones.
"""

from dataclasses import fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from components.phantom.anatomy import AnatomyRanges, anatomy, draw_anatomy
from components.phantom.appearance import AppearanceRanges, appearance, draw_appearance
from components.phantom.draws import between

NARROW_ANATOMY = AnatomyRanges(
    rotation_deg=(-180, 180),
    scale=(0.85, 1.5),
    mirror_chance=(0.5, 0.5),
    lv_radius_mm=(20, 34),
    lv_aspect=(0.85, 1.07),
    lv_contraction=(0.15, 0.55),
    wall_mm=(4.5, 12),
    epicardial_mm=(0, 2),
    trabecular_mm=(0.2, 2),
    rv_angle_deg=(135, 212),
    rv_width_mm=(24, 66),
    rv_breadth=(1.0, 1.4),
    rv_trabecular_mm=(0, 1.5),
    rv_base_level=(-0.3, -0.05),
    rv_descent=(0.1, 0.4),
    fat_mm=(4, 20),
)
NARROW_APPEARANCE = AppearanceRanges(rv_pool=(0.6, 1.1), fat=(0.5, 1.3), white_percentile=(95.5, 99.7))
WIDE_ANATOMY = AnatomyRanges(
    rotation_deg=(-180, 180),
    scale=(0.7, 1.65),
    mirror_chance=(0.5, 0.5),
    warp_mm=(2, 7),
    heart_x_mm=(-50, 40),
    heart_y_mm=(-50, 40),
    drift_x_mm=(-15, 15),
    drift_y_mm=(-15, 15),
    lv_radius_mm=(15, 38),
    lv_aspect=(0.68, 1.2),
    lv_taper=(1.8, 4.5),
    lv_end_level=(0.85, 0.99),
    lv_contraction=(0.05, 0.65),
    wall_mm=(2.5, 15),
    wall_asymmetry=(-0.5, 0.5),
    wall_asymmetry_deg=(-180, 180),
    wall_roughness_mm=(0.3, 1.8),
    papillary_size=(0.05, 0.35),
    trabeculation=(0, 1.5),
    epicardial_mm=(0, 3),
    trabecular_mm=(0, 3),
    basal_gap_deg=(-150, 200),
    basal_gap_towards_deg=(90, 300),
    basal_gap_level=(0.1, 0.3),
    atrium_radius_mm=(5, 30),
    rv_chance=(0.95, 0.95),
    rv_angle_deg=(95, 255),
    rv_width_mm=(14, 95),
    rv_breadth=(0.8, 1.9),
    rv_span_deg=(42, 95),
    rv_skew=(-0.5, 0.5),
    rv_egg=(0, 0.35),
    rv_end_level=(0.6, 1),
    rv_contraction=(0.05, 0.6),
    rv_wall_mm=(0.5, 5),
    rv_trabecular_mm=(0, 3),
    rv_base_level=(-0.4, 0),
    rv_descent=(0, 0.5),
    outflow_radius_mm=(0, 20),
    pericardial_fat_mm=(0, 14),
    chest_gap_mm=(-8, 30),
    chest_width_mm=(150, 310),
    chest_lean=(-0.3, 0.5),
    lung_above_mm=(20, 110),
    fat_mm=(2, 28),
    muscle_mm=(4, 22),
    shoulder=(0.1, 2.0),
    diaphragm_gap_mm=(-6, 25),
    diaphragm_drop_mm=(-20, 70),
    liver_edge_mm=(-70, 90),
    stomach_radius_mm=(6, 40),
    organ_radius_mm=(10, 42),
    aorta_radius_mm=(5, 17),
    spine_radius_mm=(10, 28),
    vessel_density=(0, 1.5),
    round_thing_chance=(0.3, 0.3),
)
WIDE_APPEARANCE = AppearanceRanges(
    arbitrary_chance=(0.08, 0.08),
    arbitrary_trunk_chance=(0.15, 0.15),
    opposed_phase_chance=(0.6, 0.6),
    rv_pool=(0.6, 1.2),
    great_vessel=(0.5, 1.5),
    myo=(0.15, 0.7),
    wall=(0.1, 0.7),
    muscle=(0.1, 0.7),
    lung=(0.0, 0.2),
    lung_vessel=(0.2, 1.2),
    liver=(0.1, 0.8),
    liver_vessel=(0.3, 1.2),
    organ=(0.1, 0.9),
    stomach=(0.05, 1.5),
    bowel=(0.1, 1.3),
    bone=(0.1, 0.9),
    fat=(0.3, 2),
    inner_fat=(0.2, 1.8),
    round_disc=(0.05, 1.4),
    round_ring=(0.05, 1.2),
    air=(0.0, 0.03),
    texture=(0.02, 0.12),
    patchiness=(0, 0.2),
    flow_void=(-0.5, 0.7),
    blur_px=(0.3, 1.5),
    coil_log=(0, 1.8),
    coil_angle_deg=(120, 300),
    bias_log=(0, 0.35),
    ghost=(-0.2, 0.15),
    banding=(-1.8, 0.7),
    noise=(0.002, 0.06),
    gamma=(0.65, 1.5),
    black_percentile=(0.1, 3),
    white_percentile=(95, 99.8),
)
Ranges = TypeVar("Ranges", AnatomyRanges, AppearanceRanges)

FIELD_MM = 384.0  # side of the usual canvas
_LEVELS = (-0.05, 1.03)
_NO_HEART_CHANCE = 0.04
_NO_HEART_LEVEL = 1.3
_BAR_CHANCE = 0.6  # of black bars along two sides, as left by padding to a square
_BAR_MM = 77.0  # largest width on the usual canvas; a smaller field of view crops the bars first


def phantom_slices(
    count: int,
    *,
    seed: int,
    index: int = 0,
    device: torch.device | str = "cpu",
    size: int = 256,
    field_mm: float = FIELD_MM,
    width: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Draw one batch of an endless stream; equal arguments give equal slices on the same type of device.

    Args:
        count: number of slices in the batch.
        seed: seed of the stream, 0 or more.
        index: number of the batch, 0 or more.
        device: device on which the slices are drawn and returned.
        size: side of the square canvas in pixels.
        field_mm: side of the canvas in mm.
        width: width of the ranges, from 0 (normal hearts with the contrast of cine MR, in any orientation) to 1 (wide).
            Every slice has its own ranges, whose width is drawn uniformly from 0 to this value.

    Returns:
        Images (B, 1, `size`, `size`) float32, whole grey values 0..255, and labels (B, 1, `size`, `size`) uint8:
        0 background, 1 RV, 2 Myo, 3 LV.
    """
    if not 0 <= width <= 1:
        raise ValueError(f"Expected width from 0 (narrow) to 1 (wide), received {width}.")
    entropy = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device)
    generator.manual_seed(int(entropy >> np.uint64(1)))
    own = width * torch.rand(count, generator=generator, device=generator.device)
    body = draw_anatomy(count, widened(NARROW_ANATOMY, WIDE_ANATOMY, own), generator)
    look = draw_appearance(count, widened(NARROW_APPEARANCE, WIDE_APPEARANCE, own), generator)
    for name in ("flow_void", "ghost", "banding"):  # their ranges begin below 0, so that some slices have none
        look[name].clamp_min_(0)
    unit = torch.rand(4, count, generator=generator, device=generator.device)
    level = between(_LEVELS, unit[0])
    level = torch.where(unit[1] < _NO_HEART_CHANCE, _NO_HEART_LEVEL, level)
    tissues, labels = anatomy(body, level=level, phase=unit[2], size_hw=(size, size), spacing_mm=field_mm / size)
    images = appearance(tissues, look, generator)
    visible = _between_bars(unit[3], size, field_mm)
    return (images * visible)[:, None], (labels * visible)[:, None]


def widened(narrow: Ranges, wide: Ranges, width: Tensor) -> Ranges:
    """Return the ranges of each slice, interpolated by its `width` from the narrow (0) to the wide ones (1)."""
    ends = {}
    for name in (field.name for field in fields(narrow)):
        low, high = zip(getattr(narrow, name), getattr(wide, name), strict=True)
        ends[name] = (between(low, width), between(high, width))
    return replace(narrow, **ends)


def _between_bars(unit: Tensor, size: int, field_mm: float) -> Tensor:
    """Return a mask (B, 1, size) of the columns without black bars; it is the same for all rows."""
    width_mm = (unit / _BAR_CHANCE * _BAR_MM).where(unit < _BAR_CHANCE, 0) - (FIELD_MM - field_mm) / 2
    width = (width_mm * size / field_mm)[:, None, None]
    column = torch.arange(size, device=unit.device)
    return (column >= width) & (column < size - width)
