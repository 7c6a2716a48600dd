"""NIfTI files: finding the volumes to segment and writing their predictions."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import NdarrayOrTensor, PathLike
from monai.data import NibabelWriter

from components.base.atomic_write import write_atomically
from components.data.reader import NIFTI_HEADER, STORED_SHAPE
from components.data.volume_metadata import NIFTI_SUFFIXES, case_name

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
NOT_IMAGES = ("_gt", "_" + PREDICTION_POSTFIX)  # postfixes of labels and predictions


def find_volumes(dataset_dir: str) -> list[dict[str, str]]:
    """List the volumes to segment.

    Args:
        dataset_dir: one NIfTI file, or a folder searched recursively, in which labels (`*_gt`), predictions (`*_pred`),
            hidden files and files that are not 3D are left out.

    Returns:
        one dictionary per volume with its path as `image`, sorted by path.

    Raises:
        ValueError: when `dataset_dir` is empty or has no volume, or two predictions would have the same name.
        FileNotFoundError: when the file or folder is not there.
    """
    if not dataset_dir:
        raise ValueError("dataset_dir is not set: expected a NIfTI file or a folder of them; give --dataset_dir PATH")
    root = Path(dataset_dir)
    if not root.exists():
        raise FileNotFoundError(f"dataset_dir {root} is not there: expected a NIfTI file or a folder of them")
    if root.is_file():
        return [{"image": str(root)}]
    volumes = [path for path in sorted(root.rglob("*")) if path.is_file() and _is_image(path)]
    if not volumes:
        raise ValueError(
            f"no volume found under {root}: expected 3D files {' or '.join(NIFTI_SUFFIXES)} whose names do not end in "
            f"{' or '.join(NOT_IMAGES)}"
        )
    by_case = defaultdict(list)
    for path in volumes:
        by_case[case_name(path)].append(str(path))
    for case, paths in by_case.items():
        if len(paths) > 1:
            raise ValueError(
                f"{' and '.join(paths)} would both be saved as {case}_{PREDICTION_POSTFIX}.nii.gz: "
                "rename one, or segment their folders one by one into different --output_dir"
            )
    return [{"image": str(path)} for path in volumes]


def _is_image(path: Path) -> bool:
    """Return whether a file is a NIfTI image and 3D, as far as it can be read."""
    if not path.name.endswith(NIFTI_SUFFIXES) or path.name.startswith("."):
        return False
    if case_name(path).endswith(NOT_IMAGES):
        return False
    try:
        return len(nib.load(path).shape) == 3  # type: ignore[attr-defined]
    except Exception:  # a damaged file must not be skipped silently: the loader reports it
        return True


class VolumeWriter(NibabelWriter):
    """Write a label map atomically as a NIfTI file with the shape and the geometry of its image's.

    Both forms, their codes, voxel sizes and units are those of the image's header, bit for bit. Differs: MONAI's writer
    makes both forms of one affine, drops a last axis of length 1, so that a volume of a single slice becomes a 2D
    image, and leaves a partial file when the run is killed while writing.
    """

    header: bytes | None = None

    def set_data_array(  # type: ignore[override]
        self, data_array: NdarrayOrTensor, channel_dim: int | None = 0, **_: Any
    ) -> None:
        """Set the label map from a channel-first array with one channel.

        Args:
            data_array: 1xHxWxD.
            channel_dim: must be 0.
            _: MONAI's other options, ignored: all three spatial axes are kept.

        Raises:
            ValueError: when the array has another number of axes or channels.
        """
        if channel_dim != 0 or data_array.ndim != 4 or data_array.shape[0] != 1:
            raise ValueError(f"expected a label map (1, H, W, D), received {tuple(data_array.shape)}")
        self.data_obj = data_array[0]

    def set_metadata(self, meta_dict: Mapping | None, **_: Any) -> None:  # type: ignore[override]
        """Take the geometry of the image's file, and give the label map the shape of its array.

        Args:
            meta_dict: metadata of the image as `VolumeReader` sets them: `original_affine` and `spatial_shape`, and for
                a NIfTI file its header.
            _: MONAI's options for resampling, ignored: the label map must already be on the image's grid.

        Raises:
            ValueError: when the label map is on another grid.
        """
        meta = meta_dict or {}
        expected = tuple(int(size) for size in meta.get("spatial_shape", ()))
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
            filename: the file to create or replace, ending in `.nii.gz` or `.nii`.
            verbose: whether to log the file's name.
            _: MONAI's options for nibabel, ignored.
        """
        labels = np.asarray(self.data_obj).astype(self.output_dtype, copy=False)
        with write_atomically(filename) as temporary:
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
    for field in GEOMETRY_FIELDS:  # set one by one, since nibabel mends what it finds unusual in a whole header
        image.header[field] = of_image[field]
    return image
