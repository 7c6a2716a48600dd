"""Inference on volumes slice by slice, with test-time augmentation by rotation and mirroring."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from monai.inferers import SliceInferer
from torch import Tensor

from components.base.layers import largest_channel
from components.base.volume_metadata import files_of
from components.data.planes import check_planes, in_plane, with_neighbours

VIEWS = (1, 2, 4, 8)
_QUARTER_TURNS = (0, 2, 1, 3)

# Of 8 views, 2 come first. The others follow where these disagree on more than this share of a slice's foreground.
# Measured on both frames of 24 real patients, for the UNet and the linear head: 0.42 and 0.47 of the views are run, and
# mean Dice changes by -0.02 and +0.03 points. At 0.1 it is 0.51 and 0.56 of the views.
_FIRST_VIEWS = 2
_UNSURE_ABOVE = 0.15


class TestTimeAugmentationInferer(SliceInferer):
    """MONAI's `SliceInferer` that averages class probabilities over rotated and mirrored views of each slice.

    The views are the symmetries of a square. The slice itself and its rotations by 180, 90 and 270 degrees come first,
    then its mirror image and the same rotations of that. Two views are the identity and the half turn, four are
    all rotations, eight all symmetries. Each of these sets is a group, so the prediction is equivariant to it, if the
    window `roi_size` covers the slice. Smaller windows are seen one by one, and their predictions are averaged.

    With eight views, a slice or window whose first two views agree gets no others. The half turn alone is then exact. A
    quarter turn or mirroring of the volume may change which slices get eight views, and those that get two.

    With three planes, the volume is also cut into slices in the two perpendicular planes, and the probabilities of the
    three results are averaged. Source: Perslev et al., "One network to segment them all", MICCAI 2019. Differs: the
    planes are the volume's own three, and all have the same weight.

    Args:
        args: as `SliceInferer`.
        test_time_views: number of views: 1, 2, 4 or 8. With 1 view and 1 plane this is `SliceInferer`, which returns
            logits.
        planes: 1 or 3.
        neighbours: whether each slice gets the ones before and after it as channels.
        kwargs: as `SliceInferer`.

    Raises:
        ValueError: for another number of views or planes.
    """

    def __init__(
        self, *args: Any, test_time_views: int = 1, planes: int = 1, neighbours: bool = False, **kwargs: Any
    ) -> None:
        if test_time_views not in VIEWS:
            raise ValueError(
                f"expected {', '.join(map(str, VIEWS))} test-time views, received {test_time_views!r}: "
                "give for example --test_time_views 8"
            )
        check_planes(planes)
        super().__init__(*args, **kwargs)
        self.test_time_views = test_time_views
        self.planes = planes
        self.neighbours = neighbours

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the network on volumes, slice by slice.

        Args:
            inputs: volumes BxNxHxWxD, N being 1 with `neighbours`; an error names the files of MetaTensors.
            network: as for `network_wrapper`.
            args: passed on to the network.
            kwargs: passed on to the network.

        Returns:
            logits BxCxHxWxD, or probabilities if there are several views or planes.

        Raises:
            ValueError: if the network's output is not finite.
        """
        outputs: Any = self._segment(inputs, network, *args, **kwargs)
        unusable = int((~torch.isfinite(outputs)).sum())
        if unusable:
            raise ValueError(
                f"{', '.join(files_of(inputs)) or 'a volume'} has no segmentation: expected finite values from the "
                f"network, received {unusable} NaN or infinite ones; the weights or the image are damaged: try another "
                "volume, and if that fails too, copy or train the weights again"
            )
        return outputs

    def _segment(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `__call__` does, without its check."""
        results = []
        for plane in range(self.planes):
            turned = in_plane(inputs, plane)
            outputs: Any = super().__call__(
                with_neighbours(turned) if self.neighbours else turned, network, *args, **kwargs
            )
            if self.planes > 1 and self.test_time_views == 1:
                outputs = outputs.softmax(dim=1)
            results.append(in_plane(outputs, plane))
        return results[0] if self.planes == 1 else torch.stack(results).mean(dim=0)

    def network_wrapper(
        self, network: Callable[..., Any], x: Tensor, condition: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the network on windows of slices.

        Args:
            network: maps slices BxNxHxW (and `condition`, if given) to logits BxCxHxW.
            x: windows BxNxHxWx1, the axis of size 1 being `spatial_dim`.
            condition: for networks that take one, of the same shape; allowed with one view only.
            args: passed on to the network.
            kwargs: passed on to the network.

        Returns:
            with one view what `SliceInferer` returns, else probabilities BxCxHxWx1.

        Raises:
            ValueError: if there is a condition and several views.
        """
        if self.test_time_views > 1:
            if condition is not None:
                raise ValueError("a condition is not turned along with the slices: give --test_time_views 1")
            network = partial(_mean_probabilities, network, self.test_time_views)
        return super().network_wrapper(network, x, condition, *args, **kwargs)


def _mean_probabilities(
    network: Callable[..., Tensor], views: int, slices: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Average the class probabilities BxCxHxW over the first `views` of slices BxNxHxW.

    With eight views, slices whose first two agree get only these.
    """
    first = _FIRST_VIEWS if views == max(VIEWS) else views
    probabilities = _in_views(network, range(first), slices, *args, **kwargs)
    mean = probabilities.mean(dim=0)
    if first < views:
        unsure = _disagreement(probabilities) > _UNSURE_ABOVE
        if unsure.any():
            others = _in_views(network, range(first, views), slices[unsure], *args, **kwargs)
            mean[unsure] = torch.cat([probabilities[:, unsure], others]).mean(dim=0)
    return mean


def _in_views(
    network: Callable[..., Tensor], views: Iterable[int], slices: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Return the class probabilities VxBxCxHxW in views of slices BxNxHxW, each rotated back."""
    probabilities = []
    for view in views:
        turns = _QUARTER_TURNS[view % 4]
        mirrored = slices.flip(3) if view >= 4 else slices
        logits = network(mirrored.rot90(turns, (2, 3)), *args, **kwargs)
        turned_back = logits.softmax(dim=1).rot90(-turns, (2, 3))
        probabilities.append(turned_back.flip(3) if view >= 4 else turned_back)
    return torch.stack(probabilities)


def _disagreement(probabilities: Tensor) -> Tensor:
    """Return the share (B,) of each slice's foreground whose class differs between two views 2xBxCxHxW.

    The foreground is that of either view; a slice without any has the share 0.
    """
    one, other = largest_channel(probabilities, dim=2)
    foreground = ((one > 0) | (other > 0)).sum((1, 2))
    return (one != other).sum((1, 2)) / foreground.clamp_min(1)
