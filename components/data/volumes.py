"""NIfTI volumes on disk: finding those to segment and writing predictions beside them."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
from monai.config import NdarrayOrTensor, PathLike
from monai.data import NibabelWriter

from components.base.atomic_write import write_atomically
from components.data.volume_metadata import NIFTI_SUFFIXES, case_name

logger = logging.getLogger(__name__)

PREDICTION_POSTFIX = "pred"
NOT_IMAGES = ("_gt", "_" + PREDICTION_POSTFIX)  # names of labels and predictions end in these


def find_volumes(dataset_dir: str) -> list[dict[str, str]]:
    """List the volumes to segment.

    Args:
        dataset_dir: one NIfTI file, or a folder searched recursively, in which labels (`*_gt`), predictions (`*_pred`),
            hidden files and files that are not 3D are left out.

    Returns:
        one dictionary with the path `image` a volume, in order of path.

    Raises:
        ValueError: when none is given, none is found, or two would be saved under one name.
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
    """Tell whether a file is a NIfTI image that is not known to be something else than a 3D volume."""
    if not path.name.endswith(NIFTI_SUFFIXES) or path.name.startswith("."):
        return False
    if case_name(path).endswith(NOT_IMAGES):
        return False
    try:
        return len(nib.load(path).shape) == 3  # type: ignore[attr-defined]
    except Exception:  # a damaged file must not drop out unseen: the loader names it and stops
        return True


class VolumeWriter(NibabelWriter):
    """Write a label map as a 3D NIfTI file with its image's shape and affine, whole or not at all.

    Differs: MONAI's writer drops a last axis of length 1, so that a volume of a single slice comes back as an image,
    and a run killed while writing leaves half a file.
    """

    def set_data_array(  # type: ignore[override]
        self, data_array: NdarrayOrTensor, channel_dim: int | None = 0, **_: Any
    ) -> None:
        """Take the only channel of a channel-first array.

        Args:
            data_array: 1xHxWxD.
            channel_dim: must be 0.
            _: MONAI's other options, of which none applies: all three spatial axes are kept.

        Raises:
            ValueError: when the array has another number of axes or channels.
        """
        if channel_dim != 0 or data_array.ndim != 4 or data_array.shape[0] != 1:
            raise ValueError(f"expected a label map (1, H, W, D), received {tuple(data_array.shape)}")
        self.data_obj = data_array[0]

    def set_metadata(self, meta_dict: Mapping | None, **_: Any) -> None:  # type: ignore[override]
        """Take the affine of the image's file, to the last bit.

        Args:
            meta_dict: metadata of the image, with the `original_affine` and `spatial_shape` of its file.
            _: MONAI's options of resampling: the label map must be on the image's grid already.

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

    def write(self, filename: PathLike, verbose: bool = False, **kwargs: Any) -> None:
        """Write to a temporary file in the same folder and move it into place.

        Args:
            filename: the file to create or replace, ending in `.nii.gz` or `.nii`.
            verbose: whether to log the file's name.
            kwargs: passed on to MONAI's writer.
        """
        with write_atomically(filename) as temporary:
            super().write(temporary, verbose=False, **kwargs)
        if verbose:
            logger.info("Saved %s", filename)
