"""2D pictures: read as volumes one slice deep, with label maps written as indexed PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import NdarrayOrTensor, PathLike
from monai.data import ImageWriter
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple
from PIL import Image, ImageColor, ImageOps, TiffImagePlugin, UnidentifiedImageError

from components.base.atomic_write import write_atomically
from components.data.reader import UNIT_MM, ContentReader

# Okabe and Ito's colour-blind-safe palette, starting with the colours that stand out on grey; reused beyond 7 classes.
CLASS_COLOURS = ("#56B4E9", "#F0E442", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2")

_COLOURS_OF_PREDICTION = ["#000000", *(CLASS_COLOURS[index % len(CLASS_COLOURS)].lower() for index in range(255))]
_TIFF_BITS = 258  # the tag BitsPerSample
_LOSSY = ("JPEG", "MPO")
_GREY = ("1", "L", "LA", "La")
_DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_COLOURS = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA")
_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # columns to the patient's left, rows down, as on a screen; a pixel is 1 mm


class PictureReader(ContentReader):
    """Read one picture as a volume one slice deep with Pillow: (W, H, 1), or (W, H, 1, 3) for colours.

    Grey values have 8, 16 or 32 bits, colours 8; transparency is dropped. A colour picture stays one even if all its
    pixels are grey. A photograph is turned as its EXIF orientation says, like in any viewer.

    A label map may have indexed colours; the indices are its values. With `colours` they are not: a value is the place
    of the pixel's colour in that list, whatever the order of the file's palette. Files with the palette of
    `PictureWriter` keep their indices, which are classes.

    Args:
        is_label: whether pictures are label maps.
        colours: colours of a label map's values, such as `#ff0000`; None for indices.
    """

    def __init__(self, *, is_label: bool = False, colours: Sequence[str] | None = None) -> None:
        super().__init__()
        self.is_label = is_label
        self.colours = colours

    def read(self, data: Sequence[PathLike] | PathLike, **_: Any) -> Any:
        """Read a file.

        Args:
            data: one path.
            _: MONAI's options for readers, ignored.

        Returns:
            what `get_data` takes.

        Raises:
            ValueError: if the file is not a picture, has several pages, or has colours of more than 8 bits. If a label
                map has lossy compression, or colours that are neither indices nor listed.
        """
        (path,) = (Path(name) for name in ensure_tuple(data))
        try:
            # as a file, since Pillow maps a path into memory, where it scrambles a turned TIFF without compression
            with path.open("rb") as file, Image.open(file) as picture:
                self._refuse_unfit(picture, path)
                picture.load()  # Pillow turns a TIFF by itself, and takes its EXIF orientation away
                return np.asarray(self._plain(ImageOps.exif_transpose(picture), path))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(
                f"{path} cannot be read: expected a complete picture, grey or with colours of 8 bits; this one is "
                f"damaged or of another kind ({error})"
            ) from error

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the picture and its metadata.

        Args:
            img: as `read` returns it.

        Returns:
            float64 (W, H, 1) or (W, H, 1, 3), and metadata with keys of MONAI's readers.
        """
        volume = np.swapaxes(img, 0, 1)[:, :, None].astype(np.float64)
        metadata = {
            MetaKeys.AFFINE: _AFFINE,
            MetaKeys.ORIGINAL_AFFINE: _AFFINE.copy(),
            MetaKeys.SPATIAL_SHAPE: np.asarray(volume.shape[:3]),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan") if volume.ndim == 3 else -1,
            UNIT_MM: 1.0,
        }
        return volume, metadata

    def _refuse_unfit(self, picture: Image.Image, path: Path) -> None:
        if getattr(picture, "n_frames", 1) > 1:
            raise ValueError(f"{path} has {getattr(picture, 'n_frames', 1)} pages: expected one; save them one by one")
        if (bits := _bits(picture, path)) > 8 and picture.mode not in _DEEP_GREY:
            raise ValueError(
                f"{path} has colours or transparency of {bits} bits: expected 8; convert it, or give grey values of 16 "
                "bits"
            )
        if self.is_label and picture.format in _LOSSY:
            raise ValueError(
                f"{path} is a label map as JPEG, which changes labels at every border: expected PNG, TIFF or BMP; "
                "export the labels again"
            )

    def _plain(self, picture: Image.Image, path: Path) -> Image.Image:
        """Return a picture in a mode whose array has the wanted values."""
        if self.is_label and picture.mode == "P" and self.colours is not None and not _is_prediction(picture):
            return _by_colour(picture, self.colours, path)
        if picture.mode in _DEEP_GREY or (self.is_label and picture.mode == "P"):
            return picture.copy()
        if picture.mode in _GREY:
            return picture.convert("L")
        if picture.mode not in _COLOURS:
            raise ValueError(f"{path} is of the mode {picture.mode}: expected grey values or RGB; convert it")
        colours = picture.convert("RGBA").convert("RGB")
        if not self.is_label:
            return colours
        red, green, blue = (np.asarray(band) for band in colours.split())
        if (red != green).any() or (red != blue).any():
            raise ValueError(
                f"{path} is a label map with colours: expected a grey value or an index for each class; convert it"
            )
        return colours.getchannel(0)


def _bits(picture: Image.Image, path: Path) -> int:
    """Return the bits of a channel in a PNG or TIFF file, 0 for others: Pillow makes colours 8-bit as it reads them."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return max(picture.tag_v2.get(_TIFF_BITS, (0,)))
    with path.open("rb") as file:
        head = file.read(25)
    return head[24] if head.startswith(b"\x89PNG") else 0


def used_colours(path: PathLike) -> dict[int, str] | None:
    """Return the colours of the indices that occur in a picture, such as `#ff0000`; None if its colours have none.

    Args:
        path: the file; one of a prediction, whose indices are classes, has none either.
    """
    with Image.open(path) as picture:
        if picture.mode != "P" or _is_prediction(picture):
            return None
        colours = _palette(picture)
        return {int(index): colours[index] for index in np.unique(np.asarray(picture))}


def _palette(picture: Image.Image) -> list[str]:
    """Return the colours of a picture's 256 indices; those beyond its palette are black."""
    palette = np.zeros((256, 3), np.uint8)
    stored = np.reshape(picture.getpalette() or [], (-1, 3))
    palette[: len(stored)] = stored
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in palette]


def _is_prediction(picture: Image.Image) -> bool:
    """Return whether an indexed picture has the palette of predictions."""
    return _palette(picture)[: len(_COLOURS_OF_PREDICTION)] == _COLOURS_OF_PREDICTION


def _by_colour(picture: Image.Image, colours: Sequence[str], path: Path) -> Image.Image:
    """Return a label map whose values are the places of its colours in a list."""
    indices = np.asarray(picture)
    value_of = np.zeros(256, np.uint8)
    palette = _palette(picture)
    for index in np.unique(indices):
        if palette[index] not in colours:
            raise ValueError(
                f"{path} has the colour {palette[index]}: expected one of {', '.join(colours)}, the `label_values` of "
                "data.json; recolour it, or describe the data again with `autosam new`"
            )
        value_of[index] = list(colours).index(palette[index])
    return Image.fromarray(value_of[indices])


class PictureWriter(ImageWriter):
    """Write a label map of a picture as a PNG file, atomically: each pixel's value is the index of its class.

    Differs: MONAI's `PILWriter` rescales values and has no palette.
    """

    def set_data_array(self, data_array: NdarrayOrTensor, channel_dim: int | None = 0, **_: Any) -> None:
        """Set the label map.

        Args:
            data_array: 1xWxHx1, as `PictureReader` orders axes.
            channel_dim: must be 0.
            _: MONAI's other options, ignored.

        Raises:
            ValueError: if the number of axes, channels or slices differs.
        """
        if channel_dim != 0 or data_array.ndim != 4 or (data_array.shape[0], data_array.shape[3]) != (1, 1):
            raise ValueError(f"expected a label map (1, W, H, 1) of a picture, received {tuple(data_array.shape)}")
        self.data_obj = data_array[0, :, :, 0]

    def set_metadata(self, meta_dict: Mapping | None, **_: Any) -> None:
        """Check that the label map has the size of its picture.

        Args:
            meta_dict: metadata of the picture as `PictureReader` sets them.
            _: MONAI's options for resampling, ignored.

        Raises:
            ValueError: if the sizes differ.
        """
        expected = tuple(int(size) for size in (meta_dict or {}).get("spatial_shape", ()))[:2]
        if tuple(self.data_obj.shape) != expected:
            raise ValueError(
                f"expected a label map of its picture's size {expected}, received {tuple(self.data_obj.shape)}: "
                "invert the preprocessing first"
            )

    def write(self, filename: PathLike, verbose: bool = False, **_: Any) -> None:
        """Write the file atomically.

        Args:
            filename: the file to create or replace.
            verbose: ignored.
            _: MONAI's other options, ignored.
        """
        del verbose
        picture = Image.fromarray(np.asarray(self.data_obj).astype(np.uint8).T.copy())
        picture.putpalette([value for colour in _COLOURS_OF_PREDICTION for value in ImageColor.getrgb(colour)])
        with write_atomically(filename) as temporary:
            picture.save(temporary, format="PNG")
