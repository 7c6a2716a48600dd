"""Anatomy: from a draw of subjects to tissue maps and labels. Conventions are the package's."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from components.phantom.draws import Draw, Range, draw_uniform, smooth_field


class Tissue(IntEnum):
    """Codes of a tissue map."""

    AIR = 0
    FAT = 1
    MUSCLE = 2
    LUNG = 3
    LUNG_VESSEL = 4
    ABDOMINAL_FAT = 5
    LIVER = 6
    LIVER_VESSEL = 7
    ORGAN = 8
    STOMACH = 9
    STOMACH_WALL = 10
    BONE = 11
    GREAT_VESSEL = 12
    VESSEL_WALL = 13
    PERICARDIAL_FAT = 14
    RV_WALL = 15
    RV_POOL = 16
    RV_TRABECULA = 17
    MYO = 18
    LV_POOL = 19
    LV_PAPILLARY = 20
    BOWEL = 21


_LABELS = {"RV_POOL": 1, "RV_TRABECULA": 1, "MYO": 2, "LV_POOL": 3, "LV_PAPILLARY": 3}
TISSUE_LABELS = tuple(_LABELS.get(tissue.name, 0) for tissue in Tissue)


@dataclass(frozen=True)
class AnatomyRanges:
    """Ranges (low, high) a subject's anatomy is drawn from, uniformly; the default is one orientation of normal hearts.

    A `_chance` is drawn like the rest and is then the probability that the subject has the thing.
    """

    # the whole picture
    rotation_deg: Range = (-10, 10)  # clockwise
    scale: Range = (0.95, 1.05)  # everything's size
    mirror_chance: Range = (0, 0)  # left and right swapped
    warp_mm: Range = (2, 4)  # smooth deformation, standard deviation
    heart_x_mm: Range = (-16, 8)  # centre of the left ventricle at mid level
    heart_y_mm: Range = (-22, 8)
    drift_x_mm: Range = (-6, 10)  # that centre's way from base to apex
    drift_y_mm: Range = (-8, 4)
    # left ventricle
    lv_radius_mm: Range = (22, 30)  # of the cavity at the base at ED
    lv_aspect: Range = (0.93, 1.07)  # square root of the cavity's extent towards the RV over that across
    lv_taper: Range = (2.3, 3.6)  # exponent of the narrowing; higher stays wide for longer
    lv_end_level: Range = (0.92, 0.985)  # where the cavity ends; the Myo goes on to level 1
    lv_contraction: Range = (0.24, 0.42)  # loss of cavity radius from ED to ES, fraction
    wall_mm: Range = (7, 10.5)  # Myo thickness at the base at ED
    wall_asymmetry: Range = (-0.2, 0.2)  # fraction by which the septum is thicker than the free wall
    wall_roughness_mm: Range = (0.4, 1.0)  # irregularity of the contours, standard deviation
    papillary_size: Range = (0.15, 0.28)  # papillary radius over cavity radius at ED
    trabeculation: Range = (0.2, 0.9)  # 0 smooth pools, 1 many trabeculae
    # right ventricle
    rv_chance: Range = (1, 1)
    rv_angle_deg: Range = (132, 172)  # direction from the LV, clockwise from the right: 180 left, 90 below
    rv_width_mm: Range = (33, 48)  # septum to free wall at the base at ED
    rv_span_deg: Range = (60, 80)  # half the arc of the septum
    rv_skew: Range = (-0.45, 0.25)  # slant of the crescent; positive leans clockwise, to the outflow tract
    rv_egg: Range = (0.0, 0.3)  # narrowing towards the free wall: 0 ellipse, 0.5 nearly a triangle
    rv_end_level: Range = (0.82, 0.98)
    rv_contraction: Range = (0.22, 0.45)  # loss of width from ED to ES, fraction
    rv_wall_mm: Range = (1.8, 3.2)
    outflow_radius_mm: Range = (8, 15)  # outflow tract at the base
    # around the heart
    pericardial_fat_mm: Range = (0, 3.5)
    chest_gap_mm: Range = (2, 12)  # RV to chest wall
    chest_width_mm: Range = (190, 250)  # inner width
    chest_lean: Range = (0.0, 0.25)  # how far the chest leans, mm right for each mm up
    lung_above_mm: Range = (50, 85)  # heart to the top of the lung at the base
    fat_mm: Range = (6, 22)  # subcutaneous
    muscle_mm: Range = (8, 14)  # chest wall
    shoulder: Range = (0.6, 2.0)  # how much thicker both are above the lung, fraction
    diaphragm_gap_mm: Range = (1, 6)  # below the heart
    diaphragm_drop_mm: Range = (15, 50)  # behind the heart at the base
    liver_edge_mm: Range = (5, 40)  # right edge of the liver from the heart's centre
    stomach_radius_mm: Range = (13, 28)
    organ_radius_mm: Range = (18, 30)  # spleen and kidney
    aorta_radius_mm: Range = (8, 12)
    spine_radius_mm: Range = (14, 20)
    vessel_density: Range = (0.4, 1.0)  # in lung and liver: 0 none, 1 many
    arm_chance: Range = (0.6, 0.6)


_KNOTS = 4  # levels at which an organ field is drawn; between them it is interpolated
_ORGAN_FIELDS = {"contour": 18, "organs": 25, "vessels": 75}  # coefficients along a side: one every 32, 22 and 7 mm
_FIELD_MM = 480.0  # side of the square that the smooth fields cover; they are constant outside


def draw_anatomy(count: int, ranges: AnatomyRanges, generator: torch.Generator) -> Draw:
    """Draw the anatomy of subjects.

    Args:
        count: number of subjects.
        ranges: what to draw from.
        generator: source of every draw; its device is the result's.

    Returns:
        A tensor (count,) for each field of `ranges`, and coefficients of smooth fields (count, ...).
    """
    draw = draw_uniform(count, ranges, generator)
    device = generator.device
    draw["warp_field"] = torch.randn(count, 2, 11, 11, generator=generator, device=device)
    for name, side in _ORGAN_FIELDS.items():
        draw[f"{name}_field"] = torch.randn(count, _KNOTS, side, side, generator=generator, device=device)
    return draw


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
        draw: subjects of `draw_anatomy`, one a slice.
        level: 0 base to 1 apex, (B,) or one for all; outside it the slice has organs (and atria, below 0) but no label.
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
    cavity = _paint_chest(tissues, x, y, shape, noise)
    _paint_abdomen(tissues, x, y, shape, noise, cavity)
    _paint_heart(tissues, x, y, shape, noise)
    table = torch.tensor(TISSUE_LABELS, dtype=torch.uint8, device=x.device)
    return tissues, table.index_select(0, tissues.flatten().int()).view(tissues.shape)


def _extent(size_hw: tuple[int, int], spacing_mm: float) -> tuple[float, float]:
    return size_hw[0] * spacing_mm / _FIELD_MM, size_hw[1] * spacing_mm / _FIELD_MM


def _field_at(coefficients: Tensor, level: Tensor, size_hw: tuple[int, int], spacing_mm: float) -> Tensor:
    """Interpolate an organ field (B, knots, n, n) at each slice's level: (B, H, W)."""
    position = ((level + 0.3) / 1.6).clamp(0, 1) * (_KNOTS - 1)
    weight = (1 - (position[:, None] - torch.arange(_KNOTS, device=level.device)).abs()).clamp_min(0)
    weight = weight / weight.norm(dim=1, keepdim=True)  # keeps the variance between knots
    return smooth_field(torch.einsum("bk,bkij->bij", weight, coefficients), size_hw, _extent(size_hw, spacing_mm))


def _heart_shape(shape: Draw, level: Tensor, phase: Tensor) -> Draw:
    """Sizes of the heart at a level and phase, each (B, 1, 1): lengths in mm, angles in radians."""
    inside = level.clamp(0, 1)
    narrowing = (1 - (inside / shape["lv_end_level"].clamp_min(1e-3)).clamp_max(1) ** shape["lv_taper"]).sqrt()
    endo_ed = shape["lv_radius_mm"] * narrowing
    epi_ed = (shape["lv_radius_mm"] + shape["wall_mm"]) * (1 - inside ** shape["lv_taper"]).sqrt()
    endo = endo_ed * (1 - shape["lv_contraction"] * phase * (1 + 0.5 * inside)).clamp_min(0)
    muscle = (epi_ed**2 - endo_ed**2) * (1 + 0.1 * phase)  # Myo keeps its volume and gets shorter, so its area grows
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
        "rv_on": (shape["rv_chance"] > 0) & (rv_left > 0),
        "rv_along": epi * (1 - span.cos()) + width,
        "rv_across": 1.15 * epi * span.sin(),
        "rv_chord": epi * span.cos(),
        "outflow": torch.where(tract > 0, shape["outflow_radius_mm"] * tract.sqrt(), -99.0),  # -99: nothing is near
    }


def _heart_coordinates(draw: Draw, shape: Draw, size_hw: tuple[int, int], spacing_mm: float) -> tuple[Tensor, Tensor]:
    """Millimetres right of and below the slice's LV centre in the subject's own frame, each (B, H, W)."""
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


def _paint(tissues: Tensor, mask: Tensor, tissue: Tissue) -> None:
    """Write a tissue where the mask is set; byte arithmetic is some ten times as fast as `masked_fill_` on a CPU."""
    tissues.mul_((~mask).view(torch.uint8)).add_(mask.view(torch.uint8) * int(tissue))


def _ellipse(x: Tensor, y: Tensor, centre: tuple, radii: tuple) -> Tensor:
    """Squared distance from a centre in units of the radii: below 1 inside."""
    along_x = (x - centre[0]).mul_(1 / radii[0]).square_()
    return along_x.add_((y - centre[1]).mul_(1 / radii[1]).square_())


def _paint_chest(tissues: Tensor, x: Tensor, y: Tensor, shape: Draw, noise: Draw) -> Tensor:
    """Paint arm, fat, chest wall and lung (the trunk goes straight down from its widest place); return the cavity."""
    inside = shape["inside"]
    rv_side = -torch.deg2rad(shape["rv_angle_deg"]).cos().clamp_max(0)
    front = -(shape["epi_ed"] + rv_side * 0.8 * shape["rv_width_mm"] * (1 - inside) + shape["chest_gap_mm"] + 10)
    half_width = shape["chest_width_mm"] / 2
    half_height = 115 - 25 * inside
    top = -(shape["epi_ed"] + shape["lung_above_mm"] * (1 - 0.7 * shape["level"].clamp(0, 1.3)))
    leaning = x + shape["chest_lean"] * y
    up = (y - (top + half_height)).mul_(1 / half_height).clamp_max_(0)
    depth = _ellipse(leaning, up, (front + half_width, 0), (half_width, 1))
    depth = depth.sqrt_().sub_(1).mul_(half_width)  # below 0 in the cavity, about mm

    arm = _ellipse(leaning, y, (front + 2.3 * half_width, top - 40), (55, 40)) + 9 * (1 - shape["arm_chance"])
    _paint(tissues, arm < 1, Tissue.FAT)
    _paint(tissues, arm < 0.5, Tissue.MUSCLE)
    height = up.square()
    shoulder = 1 + shape["shoulder"] * height.div_(1 + 0.5 * height)  # the wall is thickest above the lung
    muscle = shape["muscle_mm"] * shoulder
    _paint(tissues, depth < muscle + shape["fat_mm"] * (1 + 0.8 * inside) * shoulder, Tissue.FAT)
    _paint(tissues, depth + 5 * (shoulder - 0.5) * noise["organs"] < muscle, Tissue.MUSCLE)
    _paint(tissues, (depth - 5).abs_() + 2 * noise["vessels"] < 0, Tissue.ABDOMINAL_FAT)  # between the ribs
    lung = depth < 0
    _paint(tissues, lung, Tissue.LUNG)
    _paint(tissues, lung & (noise["vessels"] > 2.8 - 1.2 * shape["vessel_density"]), Tissue.LUNG_VESSEL)
    return lung


def _paint_abdomen(tissues: Tensor, x: Tensor, y: Tensor, shape: Draw, noise: Draw, cavity: Tensor) -> None:
    """Paint everything below the diaphragm, and the aorta and spine behind the heart."""
    inside, edge = shape["inside"], shape["liver_edge_mm"]
    bottom = 0.7 * shape["epi_ed"] + 0.3 * shape["lv_radius_mm"] + shape["diaphragm_gap_mm"]
    drop = shape["diaphragm_drop_mm"] * (1 - 1.6 * inside)
    diaphragm = bottom + drop * ((x - 20) * (1 / 60)).clamp_(0, 1) + 3 * noise["contour"] + 0.0025 * x * x
    below = y - diaphragm
    abdomen = (below > 0) & cavity
    _paint(tissues, abdomen, Tissue.ABDOMINAL_FAT)
    _paint(tissues, abdomen & (noise["organs"] > -0.3), Tissue.ORGAN)
    _paint(tissues, abdomen & (noise["organs"] > 0.7), Tissue.BOWEL)
    size = shape["organ_radius_mm"]
    organ = _ellipse(x, y, (edge + 65, bottom + drop + 50), (0.9 * size, 1.4 * size))
    _paint(tissues, abdomen & (organ < 1.3), Tissue.ABDOMINAL_FAT)
    _paint(tissues, abdomen & (organ < 1), Tissue.ORGAN)
    liver = _ellipse(x, y, (edge - 110, bottom + 75), (110, 130)) + 0.1 * noise["contour"]
    _paint(tissues, abdomen & (liver < 1.08), Tissue.ABDOMINAL_FAT)
    liver = (liver < 1) & (below > 2.5) & cavity
    _paint(tissues, liver, Tissue.LIVER)
    vessels = 0.5 * noise["organs"] + 0.8 * noise["vessels"] > 2.4 - 0.9 * shape["vessel_density"]
    _paint(tissues, liver & vessels, Tissue.LIVER_VESSEL)
    size = shape["stomach_radius_mm"]
    stomach = _ellipse(x, y, (edge + 20 + 0.9 * size, bottom + 0.3 * drop + size), (size, 1.2 * size))
    _paint(tissues, abdomen & (stomach < 1.3), Tissue.ABDOMINAL_FAT)
    _paint(tissues, abdomen & (stomach < 1.1), Tissue.STOMACH_WALL)
    _paint(tissues, abdomen & (stomach < 0.75), Tissue.STOMACH)
    size = shape["spine_radius_mm"]
    spine = _ellipse(x, y, (edge + 35, bottom + 65), (size, 1.2 * size))
    _paint(tissues, cavity & (spine < 1) & (inside < 0.4), Tissue.BONE)
    size = shape["aorta_radius_mm"]
    aorta = _ellipse(x, y, (edge + 8, bottom + 16 + 40 * inside), (size, 1.5 * size))
    _paint(tissues, aorta < 1.3, Tissue.VESSEL_WALL)
    _paint(tissues, aorta < 1, Tissue.GREAT_VESSEL)


def _paint_heart(tissues: Tensor, x: Tensor, y: Tensor, shape: Draw, noise: Draw) -> None:
    """Paint pericardium and both ventricles with what is in them; above the base atria take their place."""
    angle = torch.deg2rad(shape["rv_angle_deg"])
    along = (x * angle.cos()).add_(y * angle.sin())  # towards the RV
    across = (y * angle.cos()).sub_(x * angle.sin())
    rough = noise["contour"] * shape["wall_roughness_mm"]
    endo, epi, aspect = shape["endo"], shape["epi"], shape["lv_aspect"]
    thickness = epi - endo
    septal = shape["wall_asymmetry"] * thickness / 2
    outer = _ellipse(along, across, (septal, 0), (aspect, 1 / aspect)).sqrt_().sub_(epi)
    inner = _ellipse(along, across, (0, 0), (aspect, 1 / aspect)).sqrt_()
    right = _rv_distance(along, across, shape).add_(rough)
    rough_inner = rough * (endo / 10).clamp_max(1)  # none at a point, else it would be drawn where there is no heart

    fat = (shape["pericardial_fat_mm"] * (1 + 1.5 * noise["organs"])).clamp_min_(0)
    pericardium = torch.minimum(right, outer).sub_(fat).add_((epi <= 0) * 999.0)
    _paint(tissues, pericardium < 3.5, Tissue.VESSEL_WALL)
    _paint(tissues, pericardium < 2, Tissue.PERICARDIAL_FAT)
    outer.add_(rough * (epi / 20).clamp_max(0.5))
    myo = outer < 0
    lv = (outer < -0.35 * thickness).logical_and_(inner + rough_inner < endo)
    rv = right < 0
    _paint(tissues, right < shape["rv_wall_mm"], Tissue.RV_WALL)
    ventricles = ~shape["in_atria"]
    _paint(tissues, rv, Tissue.GREAT_VESSEL)
    _paint(tissues, myo, Tissue.VESSEL_WALL)
    _paint(tissues, lv, Tissue.GREAT_VESSEL)
    rv, myo, lv = rv & ventricles, myo & ventricles, lv & ventricles
    _paint(tissues, rv, Tissue.RV_POOL)
    _paint(tissues, rv & (noise["vessels"] > 2.6 - 1.2 * shape["trabeculation"]), Tissue.RV_TRABECULA)
    _paint(tissues, myo, Tissue.MYO)
    _paint(tissues, lv, Tissue.LV_POOL)
    rim = (inner * (1 / endo.clamp_min(1))).square_().mul_(1.3).add_(noise["vessels"])
    _paint(tissues, lv & (rim > 3.6 - 1.2 * shape["trabeculation"]), Tissue.LV_PAPILLARY)
    middle = (8 * (shape["inside"] - 0.15) * (0.9 - shape["inside"])).clamp(0, 1).sqrt()
    size = (shape["papillary_size"] * shape["endo_ed"] * middle).clamp_min(0.1)
    for side in (-0.6, 0.6):
        papillary = _ellipse(along, across, (-0.35 * endo, side * endo), (size, size))
        _paint(tissues, lv & (papillary < 1), Tissue.LV_PAPILLARY)


def _rv_distance(along: Tensor, across: Tensor, shape: Draw) -> Tensor:
    """Distance to the RV pool's outline in mm, below 0 inside: an egg on the septum's chord, and the outflow tract."""
    epi, outflow = shape["epi"], shape["outflow"]
    reach = along - shape["rv_chord"]
    length = shape["rv_along"].clamp_min(1)
    slant = (across - shape["rv_skew"] * reach).div_((1 - shape["rv_egg"] / length * reach).clamp_(0.4, 1.3))
    crescent = _ellipse(reach, slant, (0, 0), (length, shape["rv_across"].clamp_min(1)))
    crescent = crescent.sqrt_().sub_(1).mul_(length)
    tract = (0.55 * (epi + outflow), 0.85 * (epi + outflow))
    distance = torch.minimum(crescent, _ellipse(along, across, tract, (1.0, 1.0)).sqrt_().sub_(outflow))
    behind = (reach < -0.2 * epi).logical_or_(~shape["rv_on"])
    return distance.add_(behind, alpha=999.0)
