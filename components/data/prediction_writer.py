"""Writing of label maps with the geometry of their images."""

import logging
import os
from collections.abc import Hashable, Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor, PathLike
from monai.data import ITKWriter, MetaTensor, NibabelWriter
from monai.transforms import SaveImaged

from components.base.atomic_write import write_atomically
from components.base.volume_metadata import (
    CASE,
    FRAME,
    FRAMES,
    ITK_SUFFIXES,
    case_name,
    case_name_of_item,
    files_of,
    is_picture,
    volume_suffix,
)
from components.data.pictures import PictureWriter
from components.data.reader import NIFTI_HEADER, STORED_SHAPE

logger = logging.getLogger(__name__)

PREDICTION_POSTFIX = "pred"
GEOMETRY_FIELDS = (
    "pixdim",
    "xyzt_units",
    "toffset",
    "qform_code",
    "sform_code",
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)
_ITK_EXTENSIONS = {".mha": ".mha", ".mhd": ".mha", ".nrrd": ".nrrd", ".nhdr": ".nrrd"}  # of the prediction, by image


class VolumeWriter(NibabelWriter):
    """Write a label map atomically as NIfTI, MetaImage or NRRD, with the shape and geometry of its image.

    In NIfTI, sform, qform, their codes, voxel sizes and units equal those of the image's header, bit for bit. Differs:
    MONAI's writer sets both forms from one affine. It drops a last axis of length 1, so that a volume of one slice
    becomes a 2D image. It leaves a partial file if the run is killed while writing.
    """

    header: bytes | None = None

    def set_data_array(  # type: ignore[override]
        self, data_array: NdarrayOrTensor, channel_dim: int | None = 0, **_: Any
    ) -> None:
        """Set the label map from a channel-first array with one channel.

        Args:
            data_array: 1xHxWxD, or 1xHxWxDxT for a series.
            channel_dim: must be 0.
            _: MONAI's other options, ignored: all three spatial axes are kept.

        Raises:
            ValueError: if the array has another number of axes or channels.
        """
        if channel_dim != 0 or data_array.ndim not in (4, 5) or data_array.shape[0] != 1:
            raise ValueError(
                f"expected a label map (1, H, W, D) or (1, H, W, D, T), received {tuple(data_array.shape)}"
            )
        self.data_obj = data_array[0]

    def set_metadata(self, meta_dict: Mapping | None, **_: Any) -> None:  # type: ignore[override]
        """Take the geometry of the image's file, and reshape the label map to the file's array.

        Args:
            meta_dict: metadata of the image as `VolumeReader` sets them: `original_affine` and `spatial_shape`, and for
                a NIfTI file its header.
            _: MONAI's options for resampling, ignored: the label map must already be on the image's grid.

        Raises:
            ValueError: if the label map is on another grid.
        """
        meta = meta_dict or {}
        expected = tuple(int(size) for size in meta.get("spatial_shape", ()))
        if FRAMES in meta:
            expected += (int(meta[FRAMES]),)
        if tuple(self.data_obj.shape) != expected or "original_affine" not in meta:
            raise ValueError(
                f"expected a label map on its image's grid {expected}, received {tuple(self.data_obj.shape)}: "
                "invert the preprocessing first, and keep the metadata of LoadVolumed"
            )
        super().set_metadata({"affine": meta["original_affine"]}, resample=False)
        self.data_obj = self.data_obj.reshape([int(size) for size in meta.get(STORED_SHAPE, expected)])
        self.header = bytes(np.asarray(meta[NIFTI_HEADER], np.uint8)) if NIFTI_HEADER in meta else None

    def write(self, filename: PathLike, verbose: bool = False, **_: Any) -> None:
        """Write the file atomically.

        Args:
            filename: the file to create or replace, ending in `.nii.gz`, `.nii`, `.mha` or `.nrrd`.
            verbose: whether to log the file's name.
            _: MONAI's options for nibabel, ignored.
        """
        labels = np.asarray(self.data_obj).astype(self.output_dtype, copy=False)
        with write_atomically(filename) as temporary:
            if volume_suffix(filename) in ITK_SUFFIXES:
                writer = ITKWriter(output_dtype=self.output_dtype)
                writer.set_data_array(labels, channel_dim=None, squeeze_end_dims=False)
                writer.set_metadata({"affine": self.affine}, resample=False)
                writer.write(str(temporary), compression=True)
            else:
                nib.save(_with_geometry(labels, self.affine, self.header), temporary)
        if verbose:
            logger.info("Saved %s", filename)


def _with_geometry(labels: np.ndarray, affine: np.ndarray, header: bytes | None) -> nib.Nifti1Image:
    """Return an image with the geometry of a NIfTI header, bit for bit, or with an affine if there is none."""
    if header is None:
        image = nib.Nifti1Image(labels, affine)
        image.set_qform(affine, code=1)
        image.set_sform(affine, code=1)
        return image
    image_class = nib.Nifti1Image if len(header) == nib.Nifti1Header.sizeof_hdr else nib.Nifti2Image
    of_image = image_class.header_class(header, check=False).as_byteswapped("<")
    image = image_class(labels, None)
    for field in GEOMETRY_FIELDS:  # set one by one, since nibabel repairs unusual values in a whole header
        image.header[field] = of_image[field]
    return image


def prediction_name(case: Mapping[str, Any]) -> str:
    """Return the file name under which `SavePredictiond` saves the label map of a case.

    Args:
        case: dictionary with the path `image`, and the name `CASE` if it has one.
    """
    return f"{case_name_of_item(case)}_{PREDICTION_POSTFIX}{_other_extension(case['image']) or '.nii.gz'}"


def _other_extension(image: str | os.PathLike[str]) -> str | None:
    """Return the suffix of an image's prediction if it is not NIfTI, else None."""
    return ".png" if is_picture(image) else _ITK_EXTENSIONS.get(volume_suffix(image))


class SavePredictiond(SaveImaged):
    """Save label maps as `<case>_pred.nii.gz`, 8 bits a voxel, by `VolumeWriter`; those of pictures as indexed PNG.

    The case is named by `case_name_of`.

    Those of MetaImages become `.mha`, and those of NRRD files `.nrrd`, with header and voxels in one file. The frames
    of a series, given one after the other, are saved as one file after the last frame.
    Differs: MONAI's file name keeps a part of a suffix such as that of `X.NII.GZ`.

    Args:
        keys: item 1xHxWxD on its image's grid, with its metadata.
        output_dir: folder of the files, made if missing.
    """

    def __init__(self, keys: KeysCollection, output_dir: str) -> None:
        options: dict[str, Any] = {
            "output_dir": output_dir,
            "output_postfix": PREDICTION_POSTFIX,
            "output_dtype": "uint8",
            "resample": False,
            "separate_folder": False,
            "output_name_formatter": _named_by_case,
        }
        super().__init__(keys, writer=VolumeWriter, **options)
        self._others = {
            extension: SaveImaged(keys, output_ext=extension, writer=writer, **options)
            for extension, writer in ((".mha", VolumeWriter), (".nrrd", VolumeWriter), (".png", PictureWriter))
        }
        self._frames: list[torch.Tensor] = []

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save the item of one dictionary and return the dictionary."""
        key = next(self.key_iterator(data))
        labels = data[key]
        file = files_of(labels)[0]
        if extension := _other_extension(file):
            return self._others[extension](data)
        if FRAMES not in labels.meta:
            return super().__call__(data)
        if int(labels.meta[FRAME]) == 0:
            self._frames = []
        self._frames.append(labels.as_tensor().byte().cpu())
        if len(self._frames) == int(labels.meta[FRAMES]):
            super().__call__({key: MetaTensor(torch.stack(self._frames, dim=-1), meta=labels.meta)})
            self._frames = []
        return dict(data)


def _named_by_case(metadata: Mapping[str, Any], _: Any) -> dict[str, Any]:
    """Return the arguments of MONAI's `FolderLayout.filename` for a volume's metadata."""
    return {"subject": f"{metadata.get(CASE) or case_name(metadata['filename_or_obj'])}.nii.gz"}
