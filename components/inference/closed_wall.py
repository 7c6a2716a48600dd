"""Closing of the myocardium around the left ventricle, where a network leaves gaps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import MapTransform
from scipy.ndimage import binary_fill_holes, distance_transform_edt
from torch import Tensor

from components.base.layers import largest_channel
from components.inference.heart_rules import BACKGROUND, swap_with_background


class CloseWalld(MapTransform):
    """Give the left ventricle a wall of a minimum thickness in each slice, unless the network sees something else.

    Networks miss thin walls, mostly at end-diastole. A pixel of the background becomes myocardium if it is near the
    cavity and myocardium is its second most probable class. Its two outputs are swapped. Normal walls are thicker than
    the minimum and stay as they are.

    Args:
        keys: items with a network's outputs CxHxWxD, logits or probabilities, background first, slices last.
        class_names: names of the foreground classes, in the order of their labels; Myo and LV are among them.
        minimum_mm: thickness up to which the wall is closed.
        image_key: item with the image 1xHxWxD, whose affine gives the size of a pixel.

    Raises:
        ValueError: if Myo or LV is missing, or the thickness is negative.
    """

    def __init__(
        self, keys: KeysCollection, *, class_names: Sequence[str], minimum_mm: float, image_key: str = "image"
    ) -> None:
        super().__init__(keys)
        if missing := [name for name in ("Myo", "LV") if name not in class_names]:
            raise ValueError(
                f"expected the classes Myo and LV, without {' and '.join(missing)} received {', '.join(class_names)}: "
                "there is no wall to close, set minimum_wall_mm to 0"
            )
        if minimum_mm < 0:
            raise ValueError(f"expected minimum_wall_mm of 0 or more, received {minimum_mm}: give for example 6")
        self.wall, self.cavity = (list(class_names).index(name) + 1 for name in ("Myo", "LV"))
        self.minimum_mm = minimum_mm
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Close the walls of each item.

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
                f"the voxels of {self.image_key!r} have no size: expected a MetaTensor with an affine, received a "
                f"{type(image).__name__}; load the image by LoadVolumed, or set minimum_wall_mm to 0"
            )
        pixel_mm = affine_to_spacing(image.affine, r=3).tolist()[:2]
        for key in self.key_iterator(items):
            items[key] = self._closed(items[key], pixel_mm)
        return items

    def _closed(self, outputs: Tensor, pixel_mm: Sequence[float]) -> Tensor:
        labels = largest_channel(outputs, 0).cpu().numpy()
        near = np.zeros(labels.shape, dtype=bool)
        for number in np.flatnonzero((labels == self.cavity).any((0, 1))):
            cavity = binary_fill_holes(labels[..., number] == self.cavity)
            near[..., number] = distance_transform_edt(~cavity, sampling=pixel_mm) <= self.minimum_mm
        near &= labels == BACKGROUND
        second = largest_channel(outputs[1:], 0) + 1
        gap = torch.as_tensor(near, device=outputs.device) & (second == self.wall)
        return swap_with_background(outputs, self.wall, gap)
