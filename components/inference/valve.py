"""The end of the right ventricle at the tricuspid valve, beyond which networks label atrium and outflow tract."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import takewhile

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

from components.base.layers import largest_channel
from components.inference.heart_rules import BACKGROUND, checked_fraction, label_of, swap_with_background

_DESCENT = 5  # the valve descends by one in so many slices of the heart from end-diastole to end-systole


class EndAtValved(MapTransform):
    """Clear the right ventricle (RV) from slices at the base in which the network is unsure of it.

    Slices beyond the valve show the right atrium and the outflow tract. Networks often label these two pools, but less
    surely than a ventricle. Slices are judged from the base on, by the mean probability of their RV pixels. The search
    ends at the first slice with a sure RV, or after a fifth of the heart's slices. The last slice with an RV always
    stays. In cleared slices, the outputs of RV and background are swapped.

    The base is the end of the stack towards which the RV widens. Outputs are judged before they are smoothed across
    slices, since smoothing makes each end of the ventricle unsure.

    Args:
        keys: item with a network's outputs CxHxWxD, background first, slices last.
        class_names: names of the foreground classes, in the order of their labels; RV is among them.
        minimum_probability: smallest mean probability of a sure RV in a slice; 0 to 1.
        is_probability: whether the outputs are probabilities, else they are logits.
        unsmoothed_key: item with the outputs before smoothing; it is removed.

    Raises:
        ValueError: if RV is missing, or the probability is out of range.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        class_names: Sequence[str],
        minimum_probability: float,
        is_probability: bool,
        unsmoothed_key: str = "unsmoothed",
    ) -> None:
        super().__init__(keys)
        self.ventricle = label_of("RV", class_names, knob="minimum_rv_probability")
        self.minimum_probability = checked_fraction(minimum_probability, knob="minimum_rv_probability", example=0.93)
        self.is_probability = is_probability
        self.unsmoothed_key = unsmoothed_key

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Clear the slices.

        Args:
            data: the outputs and those before smoothing.

        Returns:
            the data with new outputs of the same shape and type, without those before smoothing.
        """
        items = dict(data)
        beyond = self._beyond(items.pop(self.unsmoothed_key))
        for key in self.key_iterator(items):
            items[key] = self._cleared(items[key], beyond)
        return items

    def _beyond(self, outputs: Tensor) -> list[int]:
        """Return the slices that lie beyond the valve."""
        labels = largest_channel(outputs, 0)  # HxWxD
        heart_slices = int((labels != BACKGROUND).any(0).any(0).sum())
        mask = labels == self.ventricle
        area = mask.sum((0, 1))
        stack = area.nonzero()[:, 0]
        if (stack * area[stack]).sum() / area.sum() > stack.double().mean():  # 0 / 0 is nan, which is not larger
            stack = stack.flip(0)
        judged = stack[:-1][: max(1, heart_slices // _DESCENT)]
        probability = (outputs if self.is_probability else outputs.softmax(0))[self.ventricle]
        means = [probability[..., number][mask[..., number]].mean() for number in judged.tolist()]
        unsure = takewhile(lambda mean: mean < self.minimum_probability, means)
        return stack[: len(list(unsure))].tolist()

    def _cleared(self, outputs: Tensor, beyond: list[int]) -> Tensor:
        is_cleared = torch.zeros_like(outputs[0], dtype=torch.bool)
        is_cleared[..., beyond] = largest_channel(outputs[..., beyond], 0) == self.ventricle
        return swap_with_background(outputs, self.ventricle, is_cleared)
