"""The end of the right ventricle at the tricuspid valve, beyond which a network labels atrium and outflow tract."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import MapTransform
from skimage.morphology import convex_hull_image
from torch import Tensor

from components.base.layers import largest_channel

_BACKGROUND = 0
_DESCENT_MM = 15.0  # of the valve from end-diastole to end-systole


class EndAtValved(MapTransform):
    """Clear the right ventricle (RV) in slices at the base that show its atrium and outflow tract instead.

    A slice through the ventricle shows one convex pool beside the left ventricle, and networks are sure of it. A slice
    beyond the valve shows two pools with fat between them, and networks are unsure. So the RV of a slice is judged by
    its solidity times its mean probability. The solidity is its area over that of its convex hull, without the left
    ventricle and its wall. Slices are judged from the base on, up to the first one that is a ventricle's. One
    slice with an RV stays in any case. In slices that are cleared, the outputs of RV and background are swapped.

    The base is the end of the stack towards which the RV widens.

    Args:
        keys: items with a network's outputs CxHxWxD, background first, slices last.
        class_names: names of the foreground classes, in the order of their labels; RV, Myo and LV are among them.
        minimum_score: solidity times mean probability that a ventricle has at least; 0 to 1.
        is_probability: whether the outputs are probabilities, of any sum, else they are logits.
        image_key: item with the image 1xHxWxD, whose affine gives the distance between slices.

    Raises:
        ValueError: if RV, Myo or LV is missing, or `minimum_score` is out of range.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        class_names: Sequence[str],
        minimum_score: float,
        is_probability: bool,
        image_key: str = "image",
    ) -> None:
        super().__init__(keys)
        if missing := [name for name in ("RV", "Myo", "LV") if name not in class_names]:
            raise ValueError(
                f"expected the classes RV, Myo and LV, without {' and '.join(missing)} received "
                f"{', '.join(class_names)}: no valve can be found, set minimum_rv_score to 0"
            )
        if not 0 <= minimum_score <= 1:
            raise ValueError(f"expected minimum_rv_score from 0 to 1, received {minimum_score}: give for example 0.8")
        self.ventricle, *left = (list(class_names).index(name) + 1 for name in ("RV", "Myo", "LV"))
        self.left = left
        self.minimum_score = minimum_score
        self.is_probability = is_probability
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Clear the slices of each item.

        Args:
            data: the items and the image.

        Returns:
            the data with new outputs of the same shape and type.

        Raises:
            ValueError: if the image has no affine.
        """
        items = dict(data)
        image = items[self.image_key]
        if not isinstance(image, MetaTensor):
            raise ValueError(
                f"the slices of {self.image_key!r} have no distance: expected a MetaTensor with an affine, received a "
                f"{type(image).__name__}; load the image by LoadVolumed, or set minimum_rv_score to 0"
            )
        slice_mm = float(affine_to_spacing(image.affine, r=3)[2])
        for key in self.key_iterator(items):
            items[key] = self._cleared(items[key], slice_mm)
        return items

    def _cleared(self, outputs: Tensor, slice_mm: float) -> Tensor:
        labels = largest_channel(outputs, 0).cpu().numpy()
        area = (labels == self.ventricle).sum((0, 1))
        stack = np.flatnonzero(area)
        if len(stack) < 2:
            return outputs
        if np.average(stack, weights=area[stack]) > stack.mean():
            stack = stack[::-1]
        cleared = outputs.clone()
        judged = max(1, int(_DESCENT_MM / slice_mm))
        for number in stack[:-1][:judged].tolist():  # one slice with an RV stays
            of_slice = outputs[..., number]
            if self._score(of_slice, labels[..., number]) >= self.minimum_score:
                break
            mask = torch.as_tensor(labels[..., number] == self.ventricle, device=outputs.device)
            for of, by in ((_BACKGROUND, self.ventricle), (self.ventricle, _BACKGROUND)):
                cleared[of, ..., number] = torch.where(mask, of_slice[by], of_slice[of])
        return cleared

    def _score(self, outputs: Tensor, labels: np.ndarray) -> float:
        """Return the solidity times the mean probability of the RV in a slice, of outputs CxHxW and labels HxW."""
        mask = labels == self.ventricle
        hull = convex_hull_image(mask) & ~np.isin(labels, self.left)
        sums_to_1 = outputs / outputs.sum(0) if self.is_probability else outputs.softmax(0)
        probability = sums_to_1[self.ventricle].cpu().numpy()
        return float(probability[mask].mean() * mask.sum() / hull.sum())
