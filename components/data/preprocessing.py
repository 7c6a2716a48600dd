"""Preprocessing of all workflows: grey values are scaled to 0..255, slices are brought to a square canvas."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from monai.config import KeysCollection
from monai.transforms import (
    Compose,
    Resized,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Transform,
)
from monai.utils import ensure_tuple

from components.data.transforms import (
    CentralCropd,
    PadInPlaneToSquared,
    RoundIntensityd,
    SlicesLastd,
)

IMAGE = "image"
_LIMITS = {"b_min": 0, "b_max": 255, "clip": True}


def scaled_grey_values(keys: KeysCollection, normalisation: Sequence[float | str]) -> Transform:
    """Return the transform that scales grey values, or colours, to 0..255.

    Args:
        keys: the items with images.
        normalisation: `[lower, upper]`, percentiles of each image, such as `[0.5, 99.5]`; or
            `["values", lowest, highest]`, equal for all images, as for CT. Values outside are clipped.

    Returns:
        a dictionary transform of MONAI.

    Raises:
        ValueError: if `normalisation` has another form.
    """
    *kind, low, high = normalisation if len(normalisation) > 1 else ("", "", "")
    if isinstance(low, Real) and isinstance(high, Real):
        if not kind:
            return ScaleIntensityRangePercentilesd(keys, float(low), float(high), **_LIMITS)
        if kind == ["values"]:
            return ScaleIntensityRanged(keys, float(low), float(high), **_LIMITS)
    raise ValueError(
        'expected normalisation [0.5, 99.5], which are percentiles, or ["values", low, high], received '
        f"{list(normalisation)}"
    )


def square_canvas(
    keys: KeysCollection,
    *,
    canvas_size: int,
    crop_size: int,
    slice_axis: int | None = None,
) -> Compose:
    """Return the transform of volumes to slices on a square canvas, cropped to its central square.

    Slices become the last axis and are padded to squares, resized to the canvas and cropped; grey values are rounded.
    An absent item, such as the label of an unlabelled case, is skipped. `Invertd` undoes all but the rounding.

    Args:
        keys: `image`, or `image` and `label`, which is resized by nearest neighbours: MetaTensors CxHxWxD with affine.
        canvas_size: side of the canvas, in pixels.
        crop_size: side of the central square that is kept, in pixels.
        slice_axis: as for `components.data.transforms.SlicesLastd`.

    Returns:
        a dictionary transform; its items are CxSxSxD, where S is `crop_size`.

    Raises:
        ValueError: if `slice_axis` is invalid.
    """
    keys = ensure_tuple(keys)
    is_image = [key == IMAGE for key in keys]
    steps = [
        SlicesLastd(keys, slice_axis=slice_axis, allow_missing_keys=True),
        PadInPlaneToSquared(keys, allow_missing_keys=True),
        Resized(
            keys,
            spatial_size=[canvas_size, canvas_size, -1],
            mode=["trilinear" if each else "nearest-exact" for each in is_image],
            anti_aliasing=is_image,
            allow_missing_keys=True,
        ),
        CentralCropd(keys, roi_size=[crop_size, crop_size, -1], allow_missing_keys=True),
        RoundIntensityd(IMAGE, allow_missing_keys=True),
    ]
    return Compose(steps)
