"""Quality of a segmentation without truth: the Dice that the network's own probabilities predict."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.base.layers import largest_channel

FLAG = "check"
FLAG_BELOW = 0.8  # volumes below it are flagged: with a mean error of 0.04, few with a true Dice below 0.7 escape
POOR_BELOW = 0.5  # volumes below it are named at the end of a run
SLICE_BELOW = 0.7  # the same for a slice; those at the ends are small and have lower Dice in any case
CALIBRATION = Path(__file__).with_name("predicted_dice.json")  # `python -m study calibrate` makes it


class Dice(NamedTuple):
    """Mean Dice over the foreground classes of a volume, and of each slice (D,); nan if a slice shows none."""

    volume: float
    slices: np.ndarray


def expected_dice(probabilities: Tensor) -> Dice:
    """Return the Dice that would result if each voxel's probabilities were right.

    It compares the most probable class of every voxel with the probabilities, which take the truth's place. Test-time
    views are averaged, so their disagreement lowers it. Networks are overconfident on hard cases, so these values only
    rank cases; `predicted_dice` rescales them.

    Source: soft Dice, Milletari et al., "V-Net", 3DV 2016, with the prediction as its own truth.

    Args:
        probabilities: CxHxWxD, background first, slices last.

    Returns:
        the mean over foreground classes, 0 for a class without voxels; for a slice, the mean over classes it shows.
    """
    classes = largest_channel(probabilities, 0, keepdim=True)
    chosen = torch.zeros_like(probabilities).scatter_(0, classes, 1)[1:]
    both = (probabilities[1:] * chosen).sum((1, 2))  # CxD
    total = (probabilities[1:] + chosen).sum((1, 2))
    volume = (2 * both.sum(1) / total.sum(1).clamp_min(1e-6)).mean()
    shown = (chosen.sum((1, 2)) > 0).float()
    slices = (2 * both / total.clamp_min(1e-6) * shown).sum(0) / shown.sum(0)  # 0 / 0 is nan
    return Dice(float(volume), slices.cpu().numpy())


def predicted_dice(expected: Dice) -> Dice:
    """Rescale an expected Dice to the true one by the two lines of `CALIBRATION`."""
    lines = _lines()
    volume, slices = (
        np.clip(lines[name]["intercept"] + lines[name]["slope"] * value, 0, 1)
        for name, value in (("volume", expected.volume), ("slice", expected.slices))
    )
    return Dice(float(volume), slices)


@functools.cache
def _lines() -> dict[str, dict[str, float]]:
    return json.loads(CALIBRATION.read_text())
