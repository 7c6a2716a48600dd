"""Anatomy: from a draw of subjects to tissue maps and labels, in the conventions of the package."""

from dataclasses import dataclass

import torch
from torch import Tensor

from components.phantom.draws import Draw, Range, between, draw_uniform, smooth_field
from components.phantom.painting import paint_abdomen, paint_chest, paint_heart, paint_round_things
from components.phantom.tissues import TISSUE_LABELS


@dataclass(frozen=True)
class AnatomyRanges:
    """Ranges (low, high) of a uniformly drawn anatomy; by default normal hearts in one orientation.

    A `_chance` is drawn like every other field. It is the probability that the subject has the feature.
    """

    # the whole image
    rotation_deg: Range = (-10, 10)  # clockwise
    scale: Range = (0.95, 1.05)  # of the whole anatomy
    mirror_chance: Range = (0, 0)  # left and right swapped
    warp_mm: Range = (2, 4)  # smooth deformation, standard deviation
    heart_x_mm: Range = (-16, 8)  # centre of the left ventricle at mid level
    heart_y_mm: Range = (-22, 8)
    drift_x_mm: Range = (-6, 10)  # displacement of that centre from base to apex
    drift_y_mm: Range = (-8, 4)
    # left ventricle
    lv_radius_mm: Range = (22, 30)  # of the cavity at the base at ED
    lv_aspect: Range = (0.93, 1.07)  # square root of the ratio of the cavity's extent towards the RV to that across
    lv_taper: Range = (2.3, 3.6)  # exponent of the narrowing; the higher, the longer the cavity stays wide
    lv_end_level: Range = (0.92, 0.985)  # where the cavity ends; the Myo continues to level 1
    lv_contraction: Range = (0.24, 0.42)  # loss of cavity radius from ED to ES, fraction
    wall_mm: Range = (7, 10.5)  # Myo thickness at the base at ED
    wall_asymmetry: Range = (-0.2, 0.2)  # fraction by which the septum is thicker than the free wall
    wall_asymmetry_deg: Range = (0, 0)  # where the wall is thickest, clockwise from the septum
    wall_roughness_mm: Range = (0.4, 1.0)  # irregularity of the contours, standard deviation
    epicardial_mm: Range = (0, 0)  # dark layer outside the Myo, counted as none of it
    papillary_size: Range = (0.15, 0.28)  # papillary radius over cavity radius at ED
    trabeculation: Range = (0.2, 0.9)  # 0 smooth pools, 1 many trabeculae
    trabecular_mm: Range = (0, 0)  # dark layer between pool and Myo, counted as LV as SCMR's contours do
    basal_gap_deg: Range = (0, 0)  # arc in which the Myo is open at the base; below 0 there is none
    basal_gap_towards_deg: Range = (180, 180)  # direction of the opening, clockwise from the septum
    basal_gap_level: Range = (0.2, 0.2)  # level at which the opening has closed
    atrium_radius_mm: Range = (15, 15)  # of the blood pool behind the opening
    # right ventricle
    rv_chance: Range = (1, 1)
    rv_angle_deg: Range = (132, 172)  # direction from the LV, clockwise from the right: 180 left, 90 below
    rv_width_mm: Range = (33, 48)  # septum to free wall at the base at ED
    rv_breadth: Range = (1.15, 1.15)  # its extent along the septum over the septum's length
    rv_span_deg: Range = (60, 80)  # half the arc of the septum
    rv_skew: Range = (-0.45, 0.25)  # slant of the crescent; positive leans clockwise, to the outflow tract
    rv_egg: Range = (0.0, 0.3)  # narrowing towards the free wall: 0 ellipse, 0.5 nearly a triangle
    rv_end_level: Range = (0.82, 0.98)
    rv_contraction: Range = (0.22, 0.45)  # loss of width from ED to ES, fraction
    rv_wall_mm: Range = (1.8, 3.2)
    rv_trabecular_mm: Range = (0, 0)  # dark layer within the RV's outline, counted as RV
    rv_base_level: Range = (-1, -1)  # level of the tricuspid valve at ED; above it lies the right atrium
    rv_descent: Range = (0, 0)  # by how many levels the valve descends until ES
    outflow_radius_mm: Range = (8, 15)  # outflow tract at the base
    # around the heart
    pericardial_fat_mm: Range = (0, 5)
    chest_gap_mm: Range = (2, 12)  # RV to chest wall
    chest_width_mm: Range = (190, 250)  # inner width
    chest_lean: Range = (0.0, 0.25)  # slant of the chest, mm to the right per mm upwards
    lung_above_mm: Range = (50, 85)  # heart to the top of the lung at the base
    fat_mm: Range = (6, 22)  # subcutaneous
    muscle_mm: Range = (8, 14)  # chest wall
    shoulder: Range = (0.6, 2.0)  # by how much both are thicker above the lung, fraction
    diaphragm_gap_mm: Range = (1, 6)  # below the heart
    diaphragm_drop_mm: Range = (15, 50)  # behind the heart at the base
    liver_edge_mm: Range = (5, 40)  # right edge of the liver from the heart's centre
    stomach_radius_mm: Range = (13, 28)
    organ_radius_mm: Range = (18, 30)  # spleen and kidney
    aorta_radius_mm: Range = (8, 12)
    spine_radius_mm: Range = (14, 20)
    vessel_density: Range = (0.4, 1.0)  # in lung and liver: 0 none, 1 many
    arm_chance: Range = (0.6, 0.6)
    # round structures other than the heart, anywhere in the trunk: discs, some of them inside a ring
    round_thing_chance: Range = (0, 0)  # of each structure
    round_thing_radius_mm: Range = (4, 32)
    round_thing_wall_mm: Range = (-4, 9)  # of the ring; below 0 there is none


_KNOTS = 4  # levels at which a field for the organs is drawn; between them it is interpolated
_ORGAN_FIELDS = {"contour": 18, "organs": 25, "vessels": 75}  # coefficients per side: one every 32, 22 and 7 mm
_ROUND_THINGS = 4
_VALVE_LEVELS = 0.2  # levels from the first sight of the right atrium to the last of the ventricle
_FIELD_MM = 480.0  # side of the square covered by the smooth fields; they are constant outside


def draw_anatomy(count: int, ranges: AnatomyRanges, generator: torch.Generator) -> Draw:
    """Draw the anatomy of subjects.

    Args:
        count: number of subjects.
        ranges: ranges to draw from.
        generator: source of all random numbers; the draw is on its device.

    Returns:
        A tensor (count,) for each field of `ranges`, and coefficients of smooth fields (count, ...).
    """
    draw = draw_uniform(count, ranges, generator)
    device = generator.device
    draw["warp_field"] = torch.randn(count, 2, 11, 11, generator=generator, device=device)
    for name, side in _ORGAN_FIELDS.items():
        draw[f"{name}_field"] = torch.randn(count, _KNOTS, side, side, generator=generator, device=device)
    draw["round_things"] = _draw_round_things(count, ranges, generator)
    return draw


def _draw_round_things(count: int, ranges: AnatomyRanges, generator: torch.Generator) -> Tensor:
    """Draw each one's position from the heart (x, y), radii along both axes and wall in mm, (count, things, 5)."""
    place = torch.rand(count, _ROUND_THINGS, 2, generator=generator, device=generator.device) * 300 - 150
    names = ("round_thing_chance", "round_thing_radius_mm", "round_thing_wall_mm")
    unit = torch.rand(count, _ROUND_THINGS, 5, generator=generator, device=generator.device)
    chance, radius, wall = (between(getattr(ranges, name), unit[..., n].T).T for n, name in enumerate(names))
    aspect = 2 ** (unit[..., 3] - 0.5)
    radius = torch.where(unit[..., 4] < chance, radius, 0)
    return torch.stack([place[..., 0], place[..., 1], radius * aspect, radius / aspect, wall], dim=-1)


def anatomy(
    draw: Draw,
    *,
    level: Tensor | float,
    phase: Tensor | float,
    size_hw: tuple[int, int] = (256, 256),
    spacing_mm: float = 1.5,
) -> tuple[Tensor, Tensor]:
    """Cut one slice through each subject.

    Args:
        draw: subjects of `draw_anatomy`, one per slice.
        level: 0 base to 1 apex, (B,) or one for all. Slices outside have organs, and atria below 0, but no labels.
        phase: 0 ED to 1 ES, (B,) or one for all.
        size_hw: rows and columns.
        spacing_mm: side of a pixel.

    Returns:
        Tissue codes (B, H, W) uint8, and labels (B, H, W) uint8: 0 background, 1 RV, 2 Myo, 3 LV.
    """
    like = draw["scale"]
    level = torch.as_tensor(level, dtype=like.dtype, device=like.device).expand(like.shape)
    phase = torch.as_tensor(phase, dtype=like.dtype, device=like.device).expand(like.shape)
    shape = {name: value.view(-1, 1, 1) for name, value in draw.items() if value.dim() == 1}
    shape |= _heart_shape(shape, level.view(-1, 1, 1), phase.view(-1, 1, 1))
    x, y = _heart_coordinates(draw, shape, size_hw, spacing_mm)
    noise = {name: _field_at(draw[f"{name}_field"], level, size_hw, spacing_mm) for name in _ORGAN_FIELDS}
    tissues = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    cavity = paint_chest(tissues, x, y, shape, noise)
    paint_abdomen(tissues, x, y, shape, noise, cavity)
    paint_round_things(tissues, x, y, draw["round_things"], cavity)
    paint_heart(tissues, x, y, shape, noise)
    table = torch.tensor(TISSUE_LABELS, dtype=torch.uint8, device=x.device)
    return tissues, table.index_select(0, tissues.flatten().int()).view(tissues.shape)


def _extent(size_hw: tuple[int, int], spacing_mm: float) -> tuple[float, float]:
    return size_hw[0] * spacing_mm / _FIELD_MM, size_hw[1] * spacing_mm / _FIELD_MM


def _field_at(coefficients: Tensor, level: Tensor, size_hw: tuple[int, int], spacing_mm: float) -> Tensor:
    """Interpolate a field for the organs (B, knots, n, n) at each slice's level: (B, H, W)."""
    position = ((level + 0.3) / 1.6).clamp(0, 1) * (_KNOTS - 1)
    weight = (1 - (position[:, None] - torch.arange(_KNOTS, device=level.device)).abs()).clamp_min(0)
    weight = weight / weight.norm(dim=1, keepdim=True)  # makes the variance between knots equal to that at knots
    return smooth_field(torch.einsum("bk,bkij->bij", weight, coefficients), size_hw, _extent(size_hw, spacing_mm))


def _heart_shape(shape: Draw, level: Tensor, phase: Tensor) -> Draw:
    """Return the sizes of the heart at a level and phase, each (B, 1, 1): lengths in mm, angles in radians."""
    inside = level.clamp(0, 1)
    narrowing = (1 - (inside / shape["lv_end_level"].clamp_min(1e-3)).clamp_max(1) ** shape["lv_taper"]).sqrt()
    endo_ed = shape["lv_radius_mm"] * narrowing
    epi_ed = (shape["lv_radius_mm"] + shape["wall_mm"]) * (1 - inside ** shape["lv_taper"]).sqrt()
    endo = endo_ed * (1 - shape["lv_contraction"] * phase * (1 + 0.5 * inside)).clamp_min(0)
    muscle = (epi_ed**2 - endo_ed**2) * (1 + 0.1 * phase)  # the Myo shortens at a constant volume, so its area grows
    epi = (endo**2 + muscle).clamp_min(0).sqrt()
    in_atria = level < 0
    epi = torch.where(in_atria, endo * 0.9 + 2.5, epi)  # atria are thin-walled

    rv_left = (1 - inside / shape["rv_end_level"].clamp_min(1e-3)).clamp_min(0)
    span = torch.deg2rad(shape["rv_span_deg"]) * (0.45 + 0.55 * rv_left.sqrt())
    tract = (1 - inside / 0.3).clamp_min(0)
    width = shape["rv_width_mm"] * rv_left.sqrt() * (1 - shape["rv_contraction"] * phase)
    return {
        "level": level,
        "inside": inside,
        "in_atria": in_atria,
        "endo": endo,
        "endo_ed": endo_ed,
        "epi": epi,
        "epi_ed": epi_ed,
        "gap": torch.deg2rad(shape["basal_gap_deg"]) / 2 * (1 - inside / shape["basal_gap_level"]).clamp_min(0),
        "atrial": ((shape["rv_base_level"] + shape["rv_descent"] * phase - inside) / _VALVE_LEVELS).clamp(0, 1),
        "rv_wall": shape["rv_wall_mm"] * (1 + phase),
        "rv_on": (shape["rv_chance"] > 0) & (rv_left > 0),
        "rv_along": epi * (1 - span.cos()) + width,
        "rv_across": shape["rv_breadth"] * epi * span.sin(),
        "rv_chord": epi * span.cos(),
        "outflow": torch.where(tract > 0, shape["outflow_radius_mm"] * tract.sqrt(), -99.0),  # -99: nowhere
    }


def _heart_coordinates(draw: Draw, shape: Draw, size_hw: tuple[int, int], spacing_mm: float) -> tuple[Tensor, Tensor]:
    """Return coordinates in mm right of and below the slice's LV centre in the subject's frame, (B, H, W) each."""
    device = shape["scale"].device
    down, right = ((torch.arange(size, device=device) + 0.5 - size / 2) * spacing_mm for size in size_hw)
    turn = torch.deg2rad(shape["rotation_deg"])
    cosine, sine = turn.cos() / shape["scale"], turn.sin() / shape["scale"]
    right, down = right * (1 - 2 * shape["mirror_chance"]), down[:, None]
    warp = smooth_field(draw["warp_field"] * draw["warp_mm"].view(-1, 1, 1, 1), size_hw, _extent(size_hw, spacing_mm))
    drift = shape["level"].clamp(-0.3, 1.3) - 0.5
    x = warp[:, 0] + (cosine * right - shape["heart_x_mm"] - shape["drift_x_mm"] * drift) + sine * down
    y = warp[:, 1] - sine * right + (cosine * down - shape["heart_y_mm"] - shape["drift_y_mm"] * drift)
    return x, y
