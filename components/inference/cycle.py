"""Detection of a whole cardiac cycle in the frames of a cine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FEWEST_OF_A_CURVE = 10  # frames; fewer lie too far apart in time to be smoothed


def is_cycle(steps: Sequence[float], back_to_first: float) -> bool:
    """Return whether frames cover the cardiac cycle.

    They do if the last frame differs from the first no more than some two successive frames differ.

    Args:
        steps: difference of each frame but the first to the frame before it, 0 or more.
        back_to_first: difference of the last frame to the first.
    """
    return back_to_first <= max(steps, default=0.0)


def covers_cycle(curve: Sequence[float]) -> bool:
    """Return whether a curve covers the cardiac cycle; see `is_cycle`.

    Args:
        curve: the volume of each frame, one or more.
    """
    return is_cycle(np.abs(np.diff(curve)).tolist(), abs(curve[-1] - curve[0]))
