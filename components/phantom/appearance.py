"""Appearance: from tissue maps to cine MR images, in the conventions of the package."""

from dataclasses import dataclass

import torch
from torch import Tensor

from components.phantom.draws import Draw, Range, draw_uniform, smooth_field
from components.phantom.tissues import Tissue


@dataclass(frozen=True)
class AppearanceRanges:
    """Ranges (low, high) of a uniformly drawn appearance; by default that of cine bSSFP.

    A tissue's value is its signal relative to that of the blood in the LV.
    """

    arbitrary_chance: Range = (0, 0)  # of drawing all signals from 0..1
    arbitrary_trunk_chance: Range = (0, 0)  # the same for all tissues except the heart's
    opposed_phase_chance: Range = (0.8, 0.8)  # of water and fat cancelling: dark lines between them
    rv_pool: Range = (0.6, 0.95)
    great_vessel: Range = (0.75, 1.3)
    myo: Range = (0.28, 0.42)
    wall: Range = (0.15, 0.4)  # thin walls
    muscle: Range = (0.2, 0.38)
    lung: Range = (0.03, 0.12)
    lung_vessel: Range = (0.4, 0.8)
    liver: Range = (0.25, 0.4)
    liver_vessel: Range = (0.5, 0.9)
    organ: Range = (0.25, 0.5)
    stomach: Range = (0.3, 1.2)
    bowel: Range = (0.2, 0.9)
    bone: Range = (0.3, 0.6)
    fat: Range = (0.8, 1.4)  # subcutaneous
    inner_fat: Range = (0.75, 1.25)  # around the heart and in the abdomen
    round_disc: Range = (0.2, 1.2)  # round structures other than the heart
    round_ring: Range = (0.1, 0.6)
    air: Range = (0.0, 0.01)
    texture: Range = (0.04, 0.1)  # variation of the signal within a tissue, fraction
    patchiness: Range = (0, 0)  # the same at the scale of an organ
    flow_void: Range = (0, 0)  # loss of signal in patches of the blood pools, fraction
    blur_px: Range = (0.5, 0.95)  # partial volume, standard deviation
    coil_log: Range = (0.5, 1.2)  # fall-off of the coils' sensitivity across the image, natural logarithm
    coil_angle_deg: Range = (170, 250)  # where the coils are, clockwise from the right
    bias_log: Range = (0.05, 0.15)  # smooth variation of the sensitivity, natural logarithm, standard deviation
    ghost: Range = (0, 0)  # intensity of a shifted copy of the image, fraction
    ghost_shift: Range = (0.2, 0.5)  # its shift, fraction of a side
    banding: Range = (0, 0)  # depth of the dark bands of bSSFP, fraction
    banding_turns: Range = (0.5, 8)  # number of bands
    noise: Range = (0.008, 0.03)  # Rician, relative to the signal of the blood in the LV
    gamma: Range = (0.9, 1.15)
    black_percentile: Range = (0.2, 0.8)
    white_percentile: Range = (98.8, 99.7)


_SIGNAL_OF_TISSUE = {  # of tissues whose signal has another name
    Tissue.ABDOMINAL_FAT: "inner_fat",
    Tissue.PERICARDIAL_FAT: "inner_fat",
    Tissue.STOMACH_WALL: "wall",
    Tissue.VESSEL_WALL: "wall",
    Tissue.RV_WALL: "myo",
    Tissue.RV_TRABECULA: "myo",
    Tissue.LV_PAPILLARY: "myo",
    Tissue.RIGHT_ATRIUM: "rv_pool",
    Tissue.DISC_A: "round_disc",
    Tissue.DISC_B: "lv_pool",
    Tissue.RING_A: "round_ring",
    Tissue.RING_B: "myo",
}
_HEART = (
    Tissue.RV_WALL,
    Tissue.RV_POOL,
    Tissue.RV_TRABECULA,
    Tissue.RIGHT_ATRIUM,
    Tissue.MYO,
    Tissue.LV_POOL,
    Tissue.LV_PAPILLARY,
)
_POOLS = (Tissue.RV_POOL, Tissue.RIGHT_ATRIUM, Tissue.LV_POOL, Tissue.GREAT_VESSEL)
_FATS = (Tissue.FAT, Tissue.ABDOMINAL_FAT, Tissue.PERICARDIAL_FAT)
_TEXTURE_FACTORS = {"LUNG": 4.0, "ORGAN": 2.0, "BOWEL": 4.0, "STOMACH": 2.0, "FAT": 0.3, "AIR": 0.0}


def draw_appearance(count: int, ranges: AppearanceRanges, generator: torch.Generator) -> Draw:
    """Draw the contrast, coil sensitivity and noise of subjects.

    Args:
        count: number of subjects.
        ranges: ranges to draw from.
        generator: source of all random numbers; the draw is on its device.

    Returns:
        A tensor (count,) for each field of `ranges`, and further ones (count, ...) for `signal`.
    """
    draw = draw_uniform(count, ranges, generator)
    device = generator.device
    signals = draw | {"lv_pool": torch.ones(count, device=device)}
    table = torch.stack([signals[_SIGNAL_OF_TISSUE.get(tissue, tissue.name.lower())] for tissue in Tissue], dim=1)
    arbitrary = torch.rand(table.shape, generator=generator, device=device)
    in_trunk = torch.ones(len(Tissue), dtype=torch.bool, device=device)
    in_trunk[[*_HEART, Tissue.AIR]] = False
    everything, trunk = (draw[name][:, None] > 0 for name in ("arbitrary_chance", "arbitrary_trunk_chance"))
    draw["tissue_signal"] = torch.where(everything | (trunk & in_trunk), arbitrary, table)
    draw["banding_field"] = torch.randn(count, 5, 5, generator=generator, device=device)
    draw["bias_field"] = torch.randn(count, 6, 6, generator=generator, device=device)
    return draw


def signal(tissues: Tensor, draw: Draw, generator: torch.Generator) -> Tensor:
    """Turn tissue maps into signals with texture, blur, coil sensitivity, artefacts and noise.

    Args:
        tissues: codes (B, H, W).
        draw: subjects of `draw_appearance`, one per slice.
        generator: source of all random numbers, on the tissues' device.

    Returns:
        Signals (B, H, W), float, 0 or more; about 1 for the blood in the LV before the coils' sensitivity.
    """
    size_hw = (tissues.shape[1], tissues.shape[2])
    device = tissues.device
    one = {name: value.view(-1, 1, 1) for name, value in draw.items() if value.dim() == 1}
    sign = torch.ones(len(Tissue), device=device)
    sign[list(_FATS)] = -1
    uneven = torch.tensor([_TEXTURE_FACTORS.get(tissue.name, 1.0) for tissue in Tissue], device=device)
    table = torch.where(draw["opposed_phase_chance"][:, None] > 0, sign, 1.0) * draw["tissue_signal"]
    codes = tissues.flatten(1).long()
    image = table.gather(1, codes).view(tissues.shape)
    spread = (table * uneven * draw["texture"][:, None]).gather(1, codes).view(tissues.shape)
    grain = torch.randn(len(tissues), 120, 120, generator=generator, device=device)
    image.addcmul_(spread, smooth_field(grain, size_hw))
    if (one["patchiness"] > 0).any() or (one["flow_void"] > 0).any():
        patches = smooth_field(torch.randn(len(tissues), 20, 20, generator=generator, device=device), size_hw)
        image.mul_(1 + one["patchiness"] * patches)
        pools = torch.zeros(len(Tissue), device=device)
        pools[list(_POOLS)] = 1
        image.mul_(1 - (one["flow_void"] * (patches - 0.5).clamp_(0, 1)).mul_(pools[codes].view(tissues.shape)))
    image = _blur(image, draw["blur_px"]).abs_()
    image *= _coil_bias(draw, size_hw)
    image = _artefacts(image, draw)
    noise = torch.randn(2, *tissues.shape, generator=generator, device=device) * one["noise"]
    return torch.hypot(image.add_(noise[0]), noise[1])


def appearance(tissues: Tensor, draw: Draw, generator: torch.Generator) -> Tensor:
    """Turn tissue maps into images: `signal`, then gamma and scaling between percentiles.

    Args:
        tissues: codes (B, H, W).
        draw: subjects of `draw_appearance`, one per slice.
        generator: source of all random numbers, on the tissues' device.

    Returns:
        Images (B, H, W), float, whole numbers 0..255.
    """
    image = signal(tissues, draw, generator)
    sample = image[:, 1::4, 1::4].flatten(1).sort(dim=1).values  # a sixteenth of the pixels suffices for percentiles
    limits = []
    for name in ("black_percentile", "white_percentile"):
        position = (draw[name] / 100 * (sample.shape[1] - 1)).round().long()
        limits.append(sample.gather(1, position[:, None])[:, :, None])
    black, white = limits
    image = ((image - black) / (white - black).clamp_min(1e-6)).clamp_(0, 1)
    return image.pow_(draw["gamma"].view(-1, 1, 1)).mul_(255).round_()


def _blur(image: Tensor, sigma_px: Tensor, reach: int = 3) -> Tensor:
    """Blur each image (B, H, W) by a Gaussian of its own standard deviation (B,), truncated at `reach` pixels."""
    offsets = torch.arange(-reach, reach + 1, device=image.device)
    weights = torch.exp(-0.5 * (offsets / sigma_px.clamp_min(0.05)[:, None]) ** 2)
    weights = (weights / weights.sum(dim=1, keepdim=True))[:, :, None, None]
    for dim in (1, 2):
        length = image.shape[dim]
        inside = torch.arange(-reach, length + reach, device=image.device).clamp_(0, length - 1)
        padded = image.index_select(dim, inside)
        image = torch.zeros_like(image)
        for position in range(2 * reach + 1):
            image.addcmul_(padded.narrow(dim, position, length), weights[:, position])
    return image


def _artefacts(image: Tensor, draw: Draw) -> Tensor:
    """Add a ghost, shifted along the rows' axis, and the dark bands of bSSFP, denser towards the image's edges."""
    ghost, depth = (draw[name].view(-1, 1, 1) for name in ("ghost", "banding"))
    if (ghost > 0).any():
        height, width = image.shape[1:]
        shift = (draw["ghost_shift"] * height).long()
        rows = (torch.arange(height, device=image.device) - shift[:, None]) % height
        image = image.addcmul(image.gather(1, rows[:, :, None].expand(-1, -1, width)), ghost)
    if (depth > 0).any():
        down, right = (torch.linspace(-1, 1, size, device=image.device) for size in image.shape[1:])
        turns = smooth_field(draw["banding_field"], (image.shape[1], image.shape[2])).mul_(0.15)
        turns.add_((down.abs() ** 3)[:, None] + right.abs() ** 3).mul_(draw["banding_turns"].view(-1, 1, 1))
        dark = turns.mul_(2 * torch.pi).cos_().add_(1).mul_(0.5).square_()
        image = image * (1 - depth * dark)
    return image


def _coil_bias(draw: Draw, size_hw: tuple[int, int]) -> Tensor:
    """Return the sensitivity of the surface coils (B, H, W), about 1 in the centre."""
    angle = torch.deg2rad(draw["coil_angle_deg"]).view(-1, 1, 1)
    coarse = torch.linspace(-0.5, 0.5, 24, device=angle.device)
    towards = coarse * angle.cos() + coarse[:, None] * angle.sin()
    uneven = draw["bias_log"].view(-1, 1, 1) * smooth_field(draw["bias_field"], (24, 24))
    log = draw["coil_log"].view(-1, 1, 1) * towards + uneven
    return torch.nn.functional.interpolate(log.exp()[:, None], size=size_hw, mode="bilinear", align_corners=True)[:, 0]
