"""Pictures of synthetic patients, segmented by the models that come with the package."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from monai.bundle import run
from monai.transforms import LoadImage

import autosam
from components.base.masks import innermost_pixel, largest_piece
from components.data.clicks import BACKGROUND
from components.data.pictures import CLASS_COLOURS
from components.evaluation.overlays import draw_overlay
from components.phantom.dataset import write_phantom_dataset
from components.phantom.degraded import SPACING_MM, degraded_phantom
from release.bundles import BUNDLES

CORRECTION = Path(__file__).parents[1] / "docs/correction.png"
_SIZE = (256, 216, 6)  # six slices fit in one row
_DPI, _JPEG_QUALITY = 80, 80  # some 45 kB
_TITLE = "a synthetic patient, from base to apex"
_CORRECTED = (1, 21)  # seed and number of a degraded phantom
_CLICKS = 2
_STAR_SIZE = 120


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


def draw_correction(path: Path) -> Path:
    """Draw a slice of a synthetic patient before and after clicks, as a PNG file.

    The clicks are those of a person who looks at the slice with the most wrong pixels. Each lies inside the largest
    error that the earlier ones left.

    Args:
        path: the picture, replaced if it exists.

    Returns:
        `path`.
    """
    voxels, truth = degraded_phantom(*_CORRECTED)
    affine = np.diag([*SPACING_MM, 1.0])
    segmenter = autosam.load("linearhead_acdc", precision="fp32", device=torch.device("cpu"))
    names = [BACKGROUND, "RV", "Myo", "LV"]
    clicks: dict[str, list[list[int]]] = {}
    before = after = segmenter(voxels, affine=affine)[0].numpy()
    number = int((before != truth).sum((0, 1)).argmax())
    for _ in range(_CLICKS):
        errors = [largest_piece((after == label)[..., number] != (truth == label)[..., number]) for label in (1, 2, 3)]
        voxel = [*innermost_pixel(max(errors, key=np.count_nonzero)), number]
        clicks.setdefault(names[truth[tuple(voxel)]], []).append(voxel)
        after = segmenter.correct(voxels, clicks, affine=affine)[0].numpy()
    image, label = (np.stack([each[..., number]] * 2, axis=-1) for each in (voxels, truth))
    pred = np.stack([before[..., number], after[..., number]], axis=-1)
    figure = draw_overlay(image, label, pred, spacing_mm=SPACING_MM, title="a slice of a synthetic patient")
    for name, places in clicks.items():
        colour = "white" if name == BACKGROUND else CLASS_COLOURS[names.index(name) - 1]
        columns, rows, _ = zip(*places, strict=True)
        figure.axes[0].scatter(columns, rows, s=_STAR_SIZE, marker="*", color=colour, edgecolors="black")
    for axes, heading in zip(figure.axes, ("before, with the clicks", "after"), strict=False):
        axes.set_title(heading, fontsize=8)
    figure.savefig(path, dpi=_DPI)
    return path
