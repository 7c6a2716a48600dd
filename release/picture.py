"""The picture on a bundle's card: a synthetic patient, segmented by the model that comes with the package."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from monai.bundle import run
from monai.transforms import LoadImage

from components.evaluation.overlays import draw_overlay
from components.phantom.dataset import write_phantom_dataset
from release.bundles import BUNDLES

_SIZE = (256, 216, 6)  # six slices fit in one row
_DPI, _JPEG_QUALITY = 80, 80  # some 45 kB
_TITLE = "a synthetic patient, from base to apex"


def draw_picture(bundle: str, path: Path) -> Path:
    """Draw all slices of a synthetic patient, with truth and prediction, as a JPEG file.

    Args:
        bundle: name of a bundle for ACDC with a model in the package, which segments in fp32.
        path: the picture, replaced if it exists.

    Returns:
        `path`.
    """
    root = BUNDLES / bundle
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_phantom_dataset(f"{folder}/phantom", patients=1, size_hw_d=_SIZE)
        (volume,) = Path(dataset).rglob("*frame01.nii.gz")
        run(
            "inferring",
            config_file=str(root / "configs/inference.json"),
            bundle_root=str(root),
            dataset_dir=str(volume),
            output_dir=f"{folder}/eval",
            ckpt_path="@start_checkpoint",
            precision="fp32",
            device="cpu",
        )
        (prediction,) = Path(folder, "eval").glob("*_pred.nii.gz")
        truth = volume.with_name(volume.name.replace(".nii.gz", "_gt.nii.gz"))
        image, *labels = (LoadImage()(file) for file in (volume, truth, prediction))
        figure = draw_overlay(*map(np.asarray, (image, *labels)), spacing_mm=image.pixdim.tolist(), title=_TITLE)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="jpeg", dpi=_DPI, pil_kwargs={"quality": _JPEG_QUALITY})
    return path
