"""Whether the frames of a cine cover the heart's cycle, and from how many frames on they make a curve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FEWEST_OF_A_CURVE = 10  # frames; fewer lie too far apart to be smoothed or compared with those before and after


def is_cycle(steps: Sequence[float], back_to_first: float) -> bool:
    """Return whether frames cover the heart's cycle: the last is as like the first as some two that follow each other.

    Args:
        steps: how much each frame differs from the one before it, 0 or more; without the first frame.
        back_to_first: how much the last frame differs from the first.
    """
    return back_to_first <= max(steps, default=0.0)


def covers_cycle(curve: Sequence[float]) -> bool:
    """Return whether a curve covers the heart's cycle, as `is_cycle` tells.

    Args:
        curve: a volume in each frame, at least one.
    """
    return is_cycle(np.abs(np.diff(curve)).tolist(), abs(curve[-1] - curve[0]))
