"""How good a segmentation probably is, without truth: the Dice that the network's own probabilities let expect."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FLAG = "check"
FLAG_BELOW = 0.8  # predicted Dice of a volume to look at: with errors of 0.04 on average, few below 0.7 escape
SLICE_BELOW = 0.7  # the same of a slice; those at the ends are small, and lower in any case
CALIBRATION = Path(__file__).with_name("predicted_dice.json")  # `python -m study calibrate` makes it


class Dice(NamedTuple):
    """Mean Dice over the foreground classes of a volume, and of each of its slices (D,), nan where one shows none."""

    volume: float
    slices: np.ndarray


def expected_dice(probabilities: Tensor) -> Dice:
    """Return the Dice that would result if each voxel's probabilities were right.

    Between the most probable class of every voxel and the probabilities themselves, which take the truth's place. The
    test-time views' disagreement is in it: their probabilities are averaged. On hard cases a network is surer than
    right, so these values rank, and `predicted_dice` brings them to scale.

    Source: soft Dice, Milletari et al., "V-Net", 3DV 2016, with the prediction as its own truth.

    Args:
        probabilities: CxHxWxD, background first, slices last.

    Returns:
        0 for a class that no voxel is of; in a slice over those classes that it shows.
    """
    chosen = torch.zeros_like(probabilities).scatter_(0, probabilities.argmax(dim=0, keepdim=True), 1)[1:]
    both = (probabilities[1:] * chosen).sum((1, 2))  # CxD
    total = (probabilities[1:] + chosen).sum((1, 2))
    volume = (2 * both.sum(1) / total.sum(1).clamp_min(1e-6)).mean()
    shown = (chosen.sum((1, 2)) > 0).float()
    slices = (2 * both / total.clamp_min(1e-6) * shown).sum(0) / shown.sum(0)  # 0 / 0 is nan
    return Dice(float(volume), slices.cpu().numpy())


def predicted_dice(expected: Dice) -> Dice:
    """Bring the Dice that the probabilities let expect to the scale of true ones, by the two lines of `CALIBRATION`."""
    lines = _lines()
    volume, slices = (
        np.clip(lines[name]["intercept"] + lines[name]["slope"] * value, 0, 1)
        for name, value in (("volume", expected.volume), ("slice", expected.slices))
    )
    return Dice(float(volume), slices)


@functools.cache
def _lines() -> dict[str, dict[str, float]]:
    return json.loads(CALIBRATION.read_text())
