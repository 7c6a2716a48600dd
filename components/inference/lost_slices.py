"""Filling of slices in which a network lost the heart, although the slices on both sides show it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

from components.base.layers import largest_channel
from components.inference.heart_rules import BACKGROUND, checked_fraction, label_of


class FillLostSlicesd(MapTransform):
    """Fill slices in which the left ventricle (LV) is lost, from the nearest slices on both sides.

    A ventricle has no gap along the stack. A slice is lost if its LV is much smaller than an LV on each side of it. In
    lost slices, the background takes the outputs interpolated linearly between the nearest other slices. Pixels of
    other classes stay. Slices whose LV do not overlap are not joined.

    Args:
        keys: items with a network's outputs CxHxWxD, logits or probabilities, background first, slices last.
        class_names: names of the foreground classes, in the order of their labels; LV is among them.
        minimum_share: smallest area of the LV in a slice, as a share of the largest area on each side; 0 to 1.

    Raises:
        ValueError: if LV is missing, or the share is out of range.
    """

    def __init__(self, keys: KeysCollection, *, class_names: Sequence[str], minimum_share: float) -> None:
        super().__init__(keys)
        self.cavity = label_of("LV", class_names, knob="minimum_lv_share")
        self.minimum_share = checked_fraction(minimum_share, knob="minimum_lv_share", example=0.25)

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Fill the lost slices of each item.

        Args:
            data: the items.

        Returns:
            the data with new outputs of the same shape and type.
        """
        items = dict(data)
        for key in self.key_iterator(items):
            items[key] = self._filled(items[key])
        return items

    def _filled(self, outputs: Tensor) -> Tensor:
        labels = largest_channel(outputs, 0)  # HxWxD
        cavity = labels == self.cavity
        area = cavity.sum((0, 1))
        before, after = area.cummax(0).values, area.flip(0).cummax(0).values.flip(0)
        is_lost = area < self.minimum_share * torch.minimum(before, after)
        kept = (~is_lost & (area > 0)).nonzero()[:, 0].tolist()
        filled = outputs.clone()
        for number in is_lost.nonzero()[:, 0].tolist():
            first = max(other for other in kept if other < number)
            last = min(other for other in kept if other > number)
            if (cavity[..., first] & cavity[..., last]).any():
                between = torch.lerp(outputs[..., first], outputs[..., last], (number - first) / (last - first))
                filled[..., number] = torch.where(labels[..., number] == BACKGROUND, between, outputs[..., number])
        return filled
