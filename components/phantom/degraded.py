"""Short-axis volumes that are hard to segment: wide anatomy, and images degraded by a random amount."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from components.phantom.anatomy import anatomy, draw_anatomy
from components.phantom.appearance import draw_appearance, signal
from components.phantom.draws import between, select
from components.phantom.slices import (
    NARROW_ANATOMY,
    NARROW_APPEARANCE,
    WIDE_ANATOMY,
    WIDE_APPEARANCE,
    widened,
)
from components.phantom.tissues import Tissue

SPACING_MM = (1.5, 1.5, 10.0)
_SIZE = 256
_SLICES = (6, 12)
_FIRST_LEVEL, _LAST_LEVEL = (-0.15, 0.1), (0.8, 1.1)  # so some stacks reach beyond the ventricles and some miss a part
# The chance of each degradation, and its largest amount.
_CHANCE = 0.4
_CONTRAST = 0.9  # share of its contrast to blood that the myocardium loses
_BLUR_PX = 4.0
_NOISE = 0.4  # relative to the signal of blood
_SHIFT_MM = 12.0  # of each slice, as by breathing


def degraded_phantom(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a volume of one subject, whose difficulty ranges from that of training phantoms to hopeless.

    There are four degradations: myocardium like blood, blur, noise, and slices shifted as by breathing. Each takes part
    with a chance, by an amount that a common severity sets.

    Args:
        seed: seed of the set of volumes, 0 or more.
        index: number of the volume, 0 or more.

    Returns:
        image (256, 256, D) int16, and labels uint8 of the same shape: 0 background, 1 RV, 2 Myo, 3 LV. The axes are
        columns, rows and slices from base to apex, `SPACING_MM` apart.
    """
    entropy = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    generator = torch.Generator()
    generator.manual_seed(int(entropy >> np.uint64(1)))
    unit = torch.rand(10, generator=generator)
    width, severity = unit[:1], float(unit[1])
    amounts = (severity * (torch.rand(4, generator=generator) < _CHANCE)).tolist()
    body = draw_anatomy(1, widened(NARROW_ANATOMY, WIDE_ANATOMY, width), generator)
    look = draw_appearance(1, widened(NARROW_APPEARANCE, WIDE_APPEARANCE, width), generator)
    for name in ("flow_void", "ghost", "banding"):  # their ranges begin below 0, so that some volumes have none
        look[name].clamp_min_(0)
    myocardium = look["tissue_signal"][:, Tissue.MYO]
    look["tissue_signal"][:, Tissue.MYO] += amounts[0] * _CONTRAST * (1 - myocardium)
    depth = int(between(_SLICES, unit[2]))
    levels = torch.linspace(float(between(_FIRST_LEVEL, unit[3])), float(between(_LAST_LEVEL, unit[4])), depth)
    repeat = torch.zeros(depth, dtype=torch.long)
    tissues, labels = anatomy(
        select(body, repeat), level=levels, phase=float(unit[5]), size_hw=(_SIZE, _SIZE), spacing_mm=SPACING_MM[0]
    )
    image = signal(tissues, select(look, repeat), generator)
    image, labels = _shifted(image, labels, amounts[3] * _SHIFT_MM / SPACING_MM[0], generator)
    image = _blurred(image, amounts[1] * _BLUR_PX)
    noise = torch.randn(2, *image.shape, generator=generator) * amounts[2] * _NOISE
    image = torch.hypot(image + noise[0], noise[1]) * 300
    return image.round().clamp(0, 32767).permute(2, 1, 0).short().numpy(), labels.permute(2, 1, 0).numpy()


def _shifted(image: Tensor, labels: Tensor, deviation_px: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shift each slice with its labels by a random number of pixels, cyclically."""
    steps = (torch.randn(len(image), 2, generator=generator) * deviation_px).round().int().tolist()
    moved = [
        torch.stack([slice_.roll(step, (0, 1)) for slice_, step in zip(stack, steps, strict=True)])
        for stack in (image, labels)
    ]
    return moved[0], moved[1]


def _blurred(image: Tensor, sigma_px: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(image.numpy(), (0, sigma_px, sigma_px)))
