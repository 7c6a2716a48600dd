"""Painting: from a subject's shape at a level to the tissues of a slice, in the conventions of the package."""

import torch
from torch import Tensor

from components.phantom.draws import Draw
from components.phantom.tissues import Tissue


def _paint(tissues: Tensor, mask: Tensor, tissue: Tissue) -> None:
    """Write a tissue where the mask is set; on a CPU byte arithmetic is about ten times as fast as `masked_fill_`."""
    tissues.mul_((~mask).view(torch.uint8)).add_(mask.view(torch.uint8) * int(tissue))


def _ellipse(x: Tensor, y: Tensor, centre: tuple, radii: tuple) -> Tensor:
    """Return the squared distance from a centre in units of the radii: below 1 inside."""
    along_x = (x - centre[0]).mul_(1 / radii[0]).square_()
    return along_x.add_((y - centre[1]).mul_(1 / radii[1]).square_())


def paint_chest(tissues: Tensor, x: Tensor, y: Tensor, shape: Draw, noise: Draw) -> Tensor:
    """Paint arm, fat, chest wall and lung; return the cavity. Below its widest level the trunk keeps its width."""
    inside = shape["inside"]
    rv_side = -torch.deg2rad(shape["rv_angle_deg"]).cos().clamp_max(0)
    front = -(shape["epi_ed"] + rv_side * 0.8 * shape["rv_width_mm"] * (1 - inside) + shape["chest_gap_mm"] + 10)
    half_width = shape["chest_width_mm"] / 2
    half_height = 115 - 25 * inside
    top = -(shape["epi_ed"] + shape["lung_above_mm"] * (1 - 0.7 * shape["level"].clamp(0, 1.3)))
    leaning = x + shape["chest_lean"] * y
    up = (y - (top + half_height)).mul_(1 / half_height).clamp_max_(0)
    depth = _ellipse(leaning, up, (front + half_width, 0), (half_width, 1))
    depth = depth.sqrt_().sub_(1).mul_(half_width)  # in about mm, below 0 in the cavity

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


def paint_abdomen(tissues: Tensor, x: Tensor, y: Tensor, shape: Draw, noise: Draw, cavity: Tensor) -> None:
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


def paint_round_things(tissues: Tensor, x: Tensor, y: Tensor, things: Tensor, cavity: Tensor) -> None:
    """Paint discs and rings (B, things, 5) that look like ventricles but carry no label."""
    kinds = ((Tissue.DISC_A, Tissue.RING_A), (Tissue.DISC_B, Tissue.RING_B))
    for number, thing in enumerate(things.unbind(1)):
        across, down, radius_x, radius_y, wall = (value.view(-1, 1, 1) for value in thing.unbind(1))
        if not (radius_x > 0).any():
            continue
        disc, ring = kinds[number % len(kinds)]
        there = cavity & (radius_x > 0)
        wall = wall.clamp_min(0)
        outline = _ellipse(x, y, (across, down), (radius_x + wall, radius_y + wall))
        _paint(tissues, (outline < 1) & there, ring)
        inside = _ellipse(x, y, (across, down), (radius_x.clamp_min(0.1), radius_y.clamp_min(0.1)))
        _paint(tissues, (inside < 1) & there, disc)


def paint_heart(tissues: Tensor, x: Tensor, y: Tensor, shape: Draw, noise: Draw) -> None:
    """Paint the pericardium and both ventricles with their contents; above the base, atria instead of ventricles."""
    angle = torch.deg2rad(shape["rv_angle_deg"])
    along = (x * angle.cos()).add_(y * angle.sin())  # towards the RV
    across = (y * angle.cos()).sub_(x * angle.sin())
    rough = noise["contour"] * shape["wall_roughness_mm"]
    endo, epi, aspect = shape["endo"], shape["epi"], shape["lv_aspect"]
    thickness = epi - endo
    thickest = torch.deg2rad(shape["wall_asymmetry_deg"])
    shift = shape["wall_asymmetry"] * thickness / 2
    centre = (shift * thickest.cos(), shift * thickest.sin())
    outer = _ellipse(along, across, centre, (aspect, 1 / aspect)).sqrt_().sub_(epi)
    inner = _ellipse(along, across, (0, 0), (aspect, 1 / aspect)).sqrt_()
    right, atrium = _rv_distance(along, across, shape)
    right.add_(rough)
    rough_inner = rough * (endo / 10).clamp_max(1)  # 0 where the cavity has no radius, or it would be painted there

    ventricles = ~shape["in_atria"]
    fat = (shape["pericardial_fat_mm"] * (1 + 1.5 * noise["organs"])).clamp_min_(0)
    pericardium = torch.minimum(right, outer).sub_(fat).add_((epi <= 0) * 999.0)
    _paint(tissues, pericardium < 1.5, Tissue.VESSEL_WALL)
    _paint(tissues, pericardium < 0, Tissue.PERICARDIAL_FAT)
    around = (outer < shape["epicardial_mm"]) & ventricles  # an atrium with such a layer would look like a ventricle
    _paint(tissues, around, Tissue.RV_WALL)
    outer.add_(rough * (epi / 20).clamp_max(0.5))
    myo = outer < 0
    lv = (outer < -0.35 * thickness).logical_and_(inner + rough_inner < endo)
    rv = right < 0
    _paint(tissues, right < shape["rv_wall"], Tissue.RV_WALL)
    _paint(tissues, rv, Tissue.GREAT_VESSEL)
    _paint(tissues, myo, Tissue.VESSEL_WALL)
    _paint(tissues, lv, Tissue.GREAT_VESSEL)
    _paint(tissues, rv & (atrium < 0), Tissue.RIGHT_ATRIUM)
    _paint(tissues, rv & (atrium.abs() < 0.8), Tissue.VESSEL_WALL)
    rv, myo, lv = rv & ventricles & (atrium > 0), myo & ventricles, lv & ventricles
    myo &= ~_paint_basal_gap(tissues, along, across, inner, myo, shape)
    _paint(tissues, rv, Tissue.RV_POOL)
    layer = 1 + 0.7 * noise["vessels"] + shape["inside"]  # thicker towards the apex
    dark = noise["vessels"] > 2.6 - 1.2 * shape["trabeculation"]
    dark.logical_or_(torch.maximum(right, -outer) > -layer * shape["rv_trabecular_mm"])  # at the free wall and septum
    _paint(tissues, rv & dark, Tissue.RV_TRABECULA)
    _paint(tissues, myo, Tissue.MYO)
    _paint(tissues, lv, Tissue.LV_POOL)
    rim = (inner * (1 / endo.clamp_min(1))).square_().mul_(1.3).add_(noise["vessels"])
    dark = rim > 3.6 - 1.2 * shape["trabeculation"]
    dark.logical_or_(inner + rough_inner > endo - layer * shape["trabecular_mm"])
    _paint(tissues, lv & dark, Tissue.LV_PAPILLARY)
    middle = (8 * (shape["inside"] - 0.15) * (0.9 - shape["inside"])).clamp(0, 1).sqrt()
    size = (shape["papillary_size"] * shape["endo_ed"] * middle).clamp_min(0.1)
    for side in (-0.6, 0.6):
        papillary = _ellipse(along, across, (-0.35 * endo, side * endo), (size, size))
        _paint(tissues, lv & (papillary < 1), Tissue.LV_PAPILLARY)


def _paint_basal_gap(tissues: Tensor, along: Tensor, across: Tensor, inner: Tensor, myo: Tensor, shape: Draw) -> Tensor:
    """Paint the atrium behind the opening of the Myo at the base; return the mask of the opening."""
    gap, towards = shape["gap"], torch.deg2rad(shape["basal_gap_towards_deg"])
    if not (gap > 0).any():
        return torch.zeros_like(myo)
    facing = (along * towards.cos()).add_(across * towards.sin())
    opening = (facing > inner * gap.cos()).logical_and_(gap > 0)
    size = shape["atrium_radius_mm"]
    distance = 0.5 * shape["epi"] + 0.8 * size
    atrium = _ellipse(along, across, (distance * towards.cos(), distance * towards.sin()), (size, size))
    atrium = (atrium < 1).logical_and_(opening)
    opening &= myo
    _paint(tissues, opening, Tissue.VESSEL_WALL)
    _paint(tissues, atrium, Tissue.GREAT_VESSEL)
    return opening


def _rv_distance(along: Tensor, across: Tensor, shape: Draw) -> tuple[Tensor, Tensor]:
    """Return mm to the RV pool's outline, negative inside, and to the tricuspid valve, negative in the right atrium.

    The outline is an egg on the septum's chord with the outflow tract. The atrium is on the diaphragm's side.
    """
    epi, outflow = shape["epi"], shape["outflow"]
    reach = along - shape["rv_chord"]
    length = shape["rv_along"].clamp_min(1)
    slant = (across - shape["rv_skew"] * reach).div_((1 - shape["rv_egg"] / length * reach).clamp_(0.4, 1.3))
    crescent = _ellipse(reach, slant, (0, 0), (length, shape["rv_across"].clamp_min(1)))
    crescent = crescent.sqrt_().sub_(1).mul_(length)
    tract = (0.55 * (epi + outflow), 0.85 * (epi + outflow))
    distance = torch.minimum(crescent, _ellipse(along, across, tract, (1.0, 1.0)).sqrt_().sub_(outflow))
    behind = (reach < -0.2 * epi).logical_or_(~shape["rv_on"])
    valve = across + (shape["rv_across"] + 2) - shape["atrial"] * (2 * shape["rv_across"] + outflow.clamp_min(0) + 4)
    return distance.add_(behind, alpha=999.0), valve.add_((shape["atrial"] <= 0) * 999.0)
