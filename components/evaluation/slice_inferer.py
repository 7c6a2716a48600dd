"""Inference on volumes slice by slice, each slice seen from several sides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from monai.inferers import SliceInferer
from torch import Tensor

VIEWS = (1, 2, 4, 8)
_QUARTER_TURNS = (0, 2, 1, 3)


class TurnedSliceInferer(SliceInferer):
    """MONAI's `SliceInferer` that averages class probabilities over turned and mirrored views of each slice.

    The views are the symmetries of a square, in this order: as it is, turned by 180, 90 and 270 degrees, then the
    mirror image turned likewise. So 2 views are the half turn, 4 all turns without a mirror, 8 all there are: each
    time a group, so that turning the input turns the prediction and changes nothing else.

    Args:
        args: as `SliceInferer`.
        test_time_views: how many of the views, 1, 2, 4 or 8. With 1 this is `SliceInferer`, logits and all.
        kwargs: as `SliceInferer`.

    Raises:
        ValueError: for another number of views.
    """

    def __init__(self, *args: Any, test_time_views: int = 1, **kwargs: Any) -> None:
        if test_time_views not in VIEWS:
            raise ValueError(
                f"expected {', '.join(map(str, VIEWS))} test-time views, received {test_time_views!r}: "
                "give for example --test_time_views 8"
            )
        super().__init__(*args, **kwargs)
        self.test_time_views = test_time_views

    def network_wrapper(
        self, network: Callable[..., Any], x: Tensor, condition: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the network on windows of slices.

        Args:
            network: from slices BxNxHxW (and `condition`, if given) to logits BxCxHxW.
            x: windows BxNxHxWx1, the axis of size 1 being `spatial_dim`.
            condition: of the same shape, for networks that take one; with one view only.
            args: passed on to the network.
            kwargs: passed on to the network.

        Returns:
            with one view what `SliceInferer` returns, else probabilities BxCxHxWx1.

        Raises:
            ValueError: for a condition beside several views.
        """
        if self.test_time_views > 1:
            if condition is not None:
                raise ValueError("a condition is not turned along with the slices: give --test_time_views 1")
            network = partial(_mean_probabilities, network, self.test_time_views)
        return super().network_wrapper(network, x, condition, *args, **kwargs)


def _mean_probabilities(
    network: Callable[..., Tensor], views: int, slices: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Average a network's probabilities BxCxHxW over the first views of slices BxNxHxW, turned back."""
    probabilities = []
    for view in range(views):
        turns = _QUARTER_TURNS[view % 4]
        seen = slices.flip(3) if view >= 4 else slices
        logits = network(seen.rot90(turns, (2, 3)), *args, **kwargs)
        back = logits.softmax(dim=1).rot90(-turns, (2, 3))
        probabilities.append(back.flip(3) if view >= 4 else back)
    return torch.stack(probabilities).mean(dim=0)
