"""Dictionary transforms that MONAI lacks: loading with checks, padding to a square, rounding to 8-bit values."""

import logging
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCropd,
    InvertibleTransform,
    LoadImaged,
    MapTransform,
    Orientation,
    Pad,
    Padd,
    SpatialPad,
)
from monai.utils import ImageMetaKey, MetaKeys

from components.base.volume_metadata import CASE, DEAD_LINK, FRAME, is_dead_link, is_picture
from components.data.geometry import AXIAL_POSE, RAS_LABELS, on_grid_of, pose
from components.data.pictures import PictureReader
from components.data.reader import VolumeReader
from components.data.slices import IGNORED

logger = logging.getLogger(__name__)

PERCENTILES = (0.5, 99.5)
NO_DATA_BEYOND = 1e9  # scanners give no such grey values, but 1e20 and the largest float32 mean "no data"
ROUNDING_ERROR = 1e-3  # tolerance for labels that are stored as fractions
# With pydicom, MONAI's `LoadImaged` also makes a reader for GPUs, which is unused here and warns without a GPU.
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*nvImageCodec")
_COLOURS = {1: "grey values", 3: "colours"}  # by number of channels


class LoadVolumed(LoadImaged):
    """Load 3D volumes as 1xHxWxD and reject those that are unfit for segmentation or training.

    One frame of a series is loaded, with the index in the item `frame`; a series without that item is rejected. A name
    of the case in the item `CASE` is kept in the metadata.

    A 2D picture is a volume one slice deep, 1xWxHx1, or 3xWxHx1 if it has colours; see `PictureReader`.

    An item may already be an image in memory, a MetaTensor HxWxD as from MONAI Deploy; it is checked like a file.

    Grey values beyond `NO_DATA_BEYOND` count as no data and become the darkest of the others. A negative minimum such
    as -9999 is no data too, if its distance from the other values is more than their range. A label whose axes differ
    in order or direction from its image's is brought to the image's grid.

    With `image_only` cleared, as by MONAI Label, the metadata are also in `<key>_meta_dict`, as for any `LoadImaged`.

    Args:
        keys: items with paths, or images in memory.
        label_key: item with the label, whose shape must be that of `image_key` if both are present.
        image_key: item with the image.
        num_classes: labels must be integers from 0 to `num_classes` - 1.
        label_values: the labels' values in the files if they differ, one for each class, background first. Or their
            colours, such as `#ff0000`, if palettes differ from file to file; see `PictureReader`.
        ignore_label: value of voxels that nobody has annotated; it becomes `IGNORED` of `components.data.slices`.
        channels: channels of an image, 1 for grey values, 3 for colours.
        allow_missing_keys: whether an item may be absent.

    Raises:
        ValueError: if `VolumeReader` cannot read a file, or an image has no contrast, or NaN or infinite values. If a
            label has another shape or place than its image, or values out of range.
        FileNotFoundError: if a file is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        label_key: str = "label",
        image_key: str = "image",
        num_classes: int = 4,
        label_values: Sequence[int] | Sequence[str] | None = None,
        ignore_label: int | None = None,
        channels: int = 1,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(
            keys,
            reader=VolumeReader,
            dtype=np.float64,
            image_only=True,
            ensure_channel_first=True,
            allow_missing_keys=allow_missing_keys,
        )
        self.label_key = label_key
        self.image_key = image_key
        values: Sequence[int | str] = range(num_classes) if label_values is None else label_values
        self.colours = [value for value in values if isinstance(value, str)] or None
        self.label_values = [n if isinstance(value, str) else value for n, value in enumerate(values)]
        self.ignore_label = ignore_label
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        """Load and check the items of one dictionary.

        Args:
            data: paths by key.
            reader: a MONAI image reader instead of this project's.

        Returns:
            the dictionary with MetaTensors 1xHxWxD in place of the paths.
        """
        loaded = dict(data)
        for key, meta_key, postfix in self.key_iterator(loaded, self.meta_keys, self.meta_key_postfix):
            if isinstance(data[key], MetaTensor):
                loaded[key] = _in_memory(data[key], key)
                continue
            path = str(data[key])
            if is_dead_link(Path(path)):
                raise FileNotFoundError(f"{path} is {DEAD_LINK}")
            if not Path(path).exists():
                raise FileNotFoundError(f"there is no {key} {path}")
            of_pictures = PictureReader(is_label=key == self.label_key, colours=self.colours)
            own = of_pictures if is_picture(path) else VolumeReader(loaded.get(FRAME))
            loaded[key] = self._loader(path, reader or own)
            if not self._loader.image_only:
                loaded[key], loaded[meta_key or f"{key}_{postfix}"] = loaded[key]
            if CASE in loaded:
                loaded[key].meta[CASE] = loaded[CASE]
        image, label = (loaded.get(key) if key in self.keys else None for key in (self.image_key, self.label_key))
        if image is not None:
            if len(image) != self.channels:
                raise ValueError(
                    f"{_path_of(image)} has {_COLOURS[len(image)]}: expected {_COLOURS[self.channels]}, for which the "
                    "bundle is made; convert it, or take it out"
                )
            loaded[self.image_key] = _with_grey_values(image)
        if label is not None:
            label = label if image is None else on_grid_of(image, label)
            loaded[self.label_key] = _with_classes(label, self.label_values, self.ignore_label)
        return loaded


def _in_memory(image: MetaTensor, key: Hashable) -> MetaTensor:
    """Return an image in memory as float64 1xHxWxD, with a name for messages, or raise if it is not a volume."""
    if image.ndim != 3 or min(image.shape) == 0:
        raise ValueError(f"expected {key} in memory as HxWxD, received the shape {tuple(image.shape)}")
    volume = cast(MetaTensor, image[None].double())
    volume.meta[ImageMetaKey.FILENAME_OR_OBJ] = f"the {key} in memory"
    volume.meta[MetaKeys.ORIGINAL_CHANNEL_DIM] = 0
    return volume


def _with_grey_values(image: torch.Tensor) -> torch.Tensor:
    """Return an image as float32, with no-data values replaced, or raise if it is unfit for segmentation."""
    path, values = _path_of(image), image.numpy()
    unusable = int((~np.isfinite(values)).sum())
    if unusable:
        raise ValueError(f"{path} holds {unusable} NaN or infinite voxels: expected finite grey values")
    no_data = _no_data(values)
    if no_data.any() and not no_data.all():
        darkest = values[~no_data].min()
        logger.warning(
            "%s: %d voxels hold %g, which counts as no data: they are set to the darkest of the others, %g",
            path,
            no_data.sum(),
            values[no_data][0],
            darkest,
        )
        image = image.masked_fill(torch.from_numpy(no_data), float(darkest))
        values = image.numpy()
    low, high = np.percentile(values, PERCENTILES)
    if low == high:
        raise ValueError(
            f"{path} has no contrast: expected grey values that differ, received {low:g} from the "
            f"{PERCENTILES[0]}th to the {PERCENTILES[1]}th percentile"
        )
    return image.float()


def _no_data(values: np.ndarray) -> np.ndarray:
    """Return a mask of the grey values that count as no data."""
    beyond = np.abs(values) > NO_DATA_BEYOND
    rest = values[~beyond]
    lowest = rest.min(initial=0)
    others = rest[rest > lowest]
    if lowest < 0 and others.size:
        next_lowest = others.min()
        if next_lowest - lowest > others.max() - next_lowest > 0:
            return beyond | (values == lowest)
    return beyond


def _with_classes(label: torch.Tensor, label_values: Sequence[int], ignore_label: int | None) -> torch.Tensor:
    """Return a label map as float32 with the class index of each voxel, or raise if a value has no class."""
    if ignore_label is not None and (ignored := label == ignore_label).any():
        known = label.masked_fill(ignored, label_values[0])
        return _with_classes(known, label_values, None).masked_fill(ignored, IGNORED)
    num_classes, whole = len(label_values), label.round()
    is_range = list(label_values) == list(range(num_classes))
    known = torch.as_tensor(label_values, dtype=whole.dtype)
    unexpected = ~torch.isin(whole, known) | ((label - whole).abs() > ROUNDING_ERROR)
    if unexpected.any():
        raise ValueError(
            f"{_path_of(label)} holds labels {label[unexpected].unique().tolist()[:5]}: expected whole numbers "
            f"{f'0..{num_classes - 1}' if is_range else list(label_values)}; map them to the classes in the bundle's "
            "metadata.json"
        )
    if not is_range:
        order = known.argsort()
        whole[:] = order[torch.searchsorted(known[order], whole.contiguous())].to(whole.dtype)
    return whole.float()


def _path_of(volume: torch.Tensor) -> str:
    return cast(MetaTensor, volume).meta[ImageMetaKey.FILENAME_OR_OBJ]


class SlicesLastd(MapTransform, InvertibleTransform):
    """Reorient volumes so that slices follow each other along the last axis and lie as on a radiologist's screen.

    The slice axis is the file's third, or another one whose spacing is at least twice that of both others. The two
    axes within a slice run to the patient's left, back or feet, in this order of precedence. Scanners store and screens
    show slices in this way, ACDC's included. So the axes of a file make no difference to the network. The
    inverse restores the file's order.

    Args:
        keys: items 1xHxWxD, MetaTensors with an affine.
        slice_axis: the file's axis across the slices, 0, 1 or 2; None to find it by the spacing.
        allow_missing_keys: whether an item may be absent.

    Raises:
        ValueError: if `slice_axis` is invalid.
    """

    def __init__(
        self, keys: KeysCollection, *, slice_axis: int | None = None, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if slice_axis not in (None, 0, 1, 2) or isinstance(slice_axis, bool):
            raise ValueError(
                f"expected slice_axis 0, 1 or 2, the file's axis across the slices, received {slice_axis!r}: "
                "give for example --slice_axis 0, or leave it out to find it by the spacing"
            )
        self.slice_axis = slice_axis
        self.orientation = Orientation(axcodes=AXIAL_POSE, labels=RAS_LABELS)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Reorient the items of one dictionary.

        Args:
            data: MetaTensors 1xHxWxD by key.

        Returns:
            the dictionary with reoriented MetaTensors.
        """
        turned = dict(data)
        for key in self.key_iterator(turned):
            self.orientation.axcodes = pose(turned[key], self.slice_axis)
            turned[key] = self.orientation(turned[key])
        return turned

    def inverse(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Restore the axes of the files in the items of one dictionary.

        Args:
            data: as `__call__` returns it, with any number of channels.

        Returns:
            the dictionary with the restored items.
        """
        turned_back = dict(data)
        for key in self.key_iterator(turned_back):
            turned_back[key] = self.orientation.inverse(turned_back[key])
        return turned_back


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


class CentralCropd(CenterSpatialCropd):
    """MONAI's `CenterSpatialCropd`, which warns if it cuts away some of a label.

    Args:
        keys: items CxHxWxD.
        roi_size: as for `CenterSpatialCropd`.
        label_key: the item with the label.
        allow_missing_keys: whether an item may be absent.
    """

    def __init__(
        self,
        keys: KeysCollection,
        roi_size: Sequence[int],
        *,
        label_key: str = "label",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, roi_size, allow_missing_keys)
        self.label_key = label_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        """Crop the items of one dictionary.

        Args:
            data: MetaTensors by key.
            lazy: as for `CenterSpatialCropd`.

        Returns:
            the dictionary with the central parts in their place.
        """
        cropped = super().__call__(data, lazy)
        if self.label_key in self.keys and self.label_key in data:
            labels = (item[self.label_key] for item in (data, cropped))
            before, after = (int(((label > 0) & (label != IGNORED)).sum()) for label in labels)
            if after < before:
                logger.warning(
                    "%s: crop_size %d cuts away %.1f%% of its labelled pixels, which the network never sees: give a "
                    "larger one",
                    _path_of(data[self.label_key]),
                    cropped[self.label_key].shape[1],
                    100 * (before - after) / before,
                )
        return cropped


class LeaveOutIgnoredd(MapTransform):
    """Set unannotated voxels to background in prediction and truth, so that no score counts them.

    Args:
        keys: items 1xHxWxD with class indices, the prediction.
        label_key: item with the truth on the same grid, in which these voxels are `IGNORED`.
    """

    def __init__(self, keys: KeysCollection, *, label_key: str = "label") -> None:
        super().__init__(keys)
        self.label_key = label_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Leave the voxels out of the items of one dictionary.

        Args:
            data: tensors by key.

        Returns:
            the dictionary, with new tensors in their place if the truth has such voxels.
        """
        known = dict(data)
        ignored = torch.as_tensor(known[self.label_key]).as_subclass(torch.Tensor) == IGNORED
        for key in (*self.key_iterator(known), self.label_key) if ignored.any() else ():
            known[key] = known[key].masked_fill(ignored.to(known[key].device), 0)
        return known


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
