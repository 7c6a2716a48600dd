"""2D pictures: read as volumes one slice deep, with label maps written as indexed PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import NdarrayOrTensor, PathLike
from monai.data import ImageWriter
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple
from PIL import Image, ImageColor, UnidentifiedImageError

from components.base.atomic_write import write_atomically
from components.data.reader import UNIT_MM, ContentReader

# Okabe and Ito's colour-blind-safe palette, starting with the colours that stand out on grey; reused beyond 7 classes.
CLASS_COLOURS = ("#56B4E9", "#F0E442", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2")

_LOSSY = ("JPEG", "MPO")
_GREY = ("1", "L", "LA", "La")
_DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_COLOURS = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA")
_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # columns to the patient's left, rows down, as on a screen; a pixel is 1 mm


class PictureReader(ContentReader):
    """Read one picture as a volume one slice deep with Pillow: (W, H, 1), or (W, H, 1, 3) for colours.

    Grey values have 8, 16 or 32 bits, colours 8; transparency is dropped. A colour picture stays one even if all its
    pixels are grey. A label map may have indexed colours; the indices are its values.

    Args:
        is_label: whether pictures are label maps.
    """

    def __init__(self, *, is_label: bool = False) -> None:
        super().__init__()
        self.is_label = is_label

    def read(self, data: Sequence[PathLike] | PathLike, **_: Any) -> Any:
        """Read a file.

        Args:
            data: one path.
            _: MONAI's options for readers, ignored.

        Returns:
            what `get_data` takes.

        Raises:
            ValueError: if the file is not a picture, has several pages, or has colours of more than 8 bits. If a label
                map has lossy compression, or colours that are not indices.
        """
        (path,) = (Path(name) for name in ensure_tuple(data))
        try:
            with Image.open(path) as picture:
                self._refuse_unfit(picture, path)
                return np.asarray(self._plain(picture, path))
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
        if _bits_of_png(path) == 16 and picture.mode in _COLOURS:
            raise ValueError(f"{path} has colours of 16 bits: expected 8; convert it, or give grey values of 16 bits")
        if self.is_label and picture.format in _LOSSY:
            raise ValueError(
                f"{path} is a label map as JPEG, which changes labels at every border: expected PNG, TIFF or BMP; "
                "export the labels again"
            )

    def _plain(self, picture: Image.Image, path: Path) -> Image.Image:
        """Return a picture in a mode whose array has the wanted values."""
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


def _bits_of_png(path: Path) -> int:
    """Return the bits per channel in a PNG file's header, 0 for other files: Pillow makes 16-bit colours 8-bit."""
    with path.open("rb") as file:
        head = file.read(25)
    return head[24] if head.startswith(b"\x89PNG") else 0


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
        colours = [ImageColor.getrgb(CLASS_COLOURS[index % len(CLASS_COLOURS)]) for index in range(255)]
        picture.putpalette([0, 0, 0, *(value for colour in colours for value in colour)])
        with write_atomically(filename) as temporary:
            picture.save(temporary, format="PNG")
