"""Independent phantom slices, each of another subject: what an encoder is trained on and a head is reminded of."""

import numpy as np
import torch
from torch import Tensor

from components.phantom.anatomy import AnatomyRanges, anatomy, draw_anatomy
from components.phantom.appearance import AppearanceRanges, appearance, draw_appearance


def phantom_slices(
    count: int, *, seed: int, index: int = 0, device: torch.device | str = "cpu", size: int = 256
) -> tuple[Tensor, Tensor]:
    """Draw one batch of an endless stream; equal arguments give equal slices on one kind of device.

    Args:
        count: slices in the batch.
        seed: which stream, 0 or more.
        index: which batch of it, 0 or more.
        device: where the slices are drawn, and stay.
        size: side of the square canvas in pixels.

    Returns:
        Images (B, 1, `size`, `size`) float32, whole grey values 0..255, and labels (B, 1, `size`, `size`) uint8:
        0 background, 1 RV, 2 Myo, 3 LV.
    """
    entropy = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device)
    generator.manual_seed(int(entropy >> np.uint64(1)))
    body = draw_anatomy(count, AnatomyRanges(), generator)
    look = draw_appearance(count, AppearanceRanges(), generator)
    level = torch.rand(count, generator=generator, device=generator.device) * 1.2 - 0.1
    phase = torch.rand(count, generator=generator, device=generator.device)
    tissues, labels = anatomy(body, level=level, phase=phase, size_hw=(size, size), spacing_mm=1.5)
    return appearance(tissues, look, generator)[:, None], labels[:, None]
