"""Dictionary transforms that MONAI lacks: loading with checks, padding to a square, rounding to 8-bit values."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImaged, MapTransform, Pad, Padd, SpatialPad
from monai.utils import ImageMetaKey

PERCENTILES = (0.5, 99.5)


class LoadVolumed(LoadImaged):
    """Load 3D NIfTI volumes as 1xHxWxD and reject those that are unfit for segmentation or training.

    With `image_only` cleared, as MONAI Label does, the metadata are also in `<key>_meta_dict`, as for any `LoadImaged`.

    Args:
        keys: items with paths.
        label_key: the item with the label, whose shape must be that of the item `image_key` if both are present.
        image_key: the item with the image.
        num_classes: labels must be integers from 0 to `num_classes` - 1.
        allow_missing_keys: whether an item may be absent.

    Raises:
        ValueError: for a file that is damaged or not 3D; an image with NaN or infinite values or without contrast;
            a label of another shape or with values out of range.
        FileNotFoundError: when a file is not there.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        label_key: str = "label",
        image_key: str = "image",
        num_classes: int = 4,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(
            keys,
            reader="NibabelReader",
            image_only=True,
            ensure_channel_first=True,
            allow_missing_keys=allow_missing_keys,
        )
        self.label_key = label_key
        self.image_key = image_key
        self.num_classes = num_classes

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        """Load and check the items of one dictionary.

        Args:
            data: paths by key.
            reader: a MONAI image reader instead of nibabel's.

        Returns:
            the dictionary with MetaTensors 1xHxWxD in place of the paths.
        """
        loaded = dict(data)
        for key, meta_key, postfix in self.key_iterator(loaded, self.meta_keys, self.meta_key_postfix):
            path = str(data[key])
            try:
                loaded[key] = self._loader(path, reader)
            except Exception as error:
                if not Path(path).is_file():
                    raise FileNotFoundError(f"there is no {key} {path}") from error
                raise ValueError(f"{path} cannot be read: expected a complete NIfTI file; copy it again") from error
            if not self._loader.image_only:
                loaded[key], loaded[meta_key or f"{key}_{postfix}"] = loaded[key]
            if loaded[key].ndim != 4 or loaded[key].shape[0] != 1:
                received = (*loaded[key].shape[1:], *loaded[key].shape[:1])
                raise ValueError(
                    f"{path} is not one 3D volume: expected (H, W, D), received {received} with the channels last; "
                    "give single frames of a series"
                )
        if self.image_key in self.keys and self.image_key in loaded:
            self._check_image(loaded[self.image_key])
        if self.label_key in self.keys and self.label_key in loaded:
            self._check_label(loaded[self.label_key], loaded.get(self.image_key))
        return loaded

    @staticmethod
    def _check_image(image: MetaTensor) -> None:
        path = image.meta[ImageMetaKey.FILENAME_OR_OBJ]
        values = np.asarray(image)
        unusable = int((~np.isfinite(values)).sum())
        if unusable:
            raise ValueError(f"{path} holds {unusable} NaN or infinite voxels: expected finite grey values")
        low, high = np.percentile(values, PERCENTILES)
        if low == high:
            raise ValueError(
                f"{path} has no contrast: expected grey values that differ, received {low:g} from the "
                f"{PERCENTILES[0]}th to the {PERCENTILES[1]}th percentile"
            )

    def _check_label(self, label: MetaTensor, image: MetaTensor | None) -> None:
        path = label.meta[ImageMetaKey.FILENAME_OR_OBJ]
        if image is not None and label.shape != image.shape:
            raise ValueError(
                f"{path} does not belong to its image: expected the image's shape {tuple(image.shape[1:])}, "
                f"received {tuple(label.shape[1:])}"
            )
        allowed = set(range(self.num_classes))
        unexpected = sorted(set(np.unique(np.asarray(label)).tolist()) - allowed)
        if unexpected:
            raise ValueError(
                f"{path} holds labels {unexpected[:5]}: expected whole numbers 0..{self.num_classes - 1}; "
                "map them to the classes in the bundle's metadata.json"
            )


class PadInPlaneToSquare(Pad):
    """Pad the shorter of the first two spatial axes to the longer one, evenly on both sides, with zeros."""

    def compute_pad_width(self, spatial_shape: Sequence[int]) -> tuple[tuple[int, int]]:
        """Return the padding before and after each axis, channels first."""
        side = max(spatial_shape[:2])
        return SpatialPad(spatial_size=[side, side, *spatial_shape[2:]]).compute_pad_width(spatial_shape)


class PadInPlaneToSquared(Padd):
    """Dictionary form of `PadInPlaneToSquare`; traced and invertible.

    Args:
        keys: items CxHxW[xD] to pad.
        allow_missing_keys: whether an item may be absent.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, padder=PadInPlaneToSquare(), allow_missing_keys=allow_missing_keys)


class RoundIntensityd(MapTransform):
    """Clip to 0..255 and round, to the values of 8-bit images.

    Args:
        keys: items to round.
        allow_missing_keys: whether an item may be absent.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Round the items of one dictionary.

        Args:
            data: tensors of any shape by key.

        Returns:
            the dictionary with rounded tensors in their place.
        """
        rounded = dict(data)
        for key in self.key_iterator(rounded):
            rounded[key] = rounded[key].clip(0, 255).round()
        return rounded
