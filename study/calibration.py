"""Calibration of the predicted Dice: the lines from the Dice that a network expects to its true Dice."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from monai.bundle import ConfigParser
from monai.engines.utils import IterationEvents
from scipy.stats import spearmanr, theilslopes

from components.base.atomic_write import write_atomically
from components.base.volume_metadata import case_name
from components.function.quality import CALIBRATION, expected_dice
from components.phantom.degraded import SPACING_MM, degraded_phantom

logger = logging.getLogger("study")

BUNDLES = ("linearhead_acdc", "unet_acdc")  # one with the encoder, one without
_FOLDER = Path(__file__).parents[1] / "bundles"
_SEED = 1
_DECIMALS = 3
_OF_WHOLE = -1  # slice number of the whole volume

Case = tuple[Path, Path]  # files of an image and of its labels


def calibrate(
    output_dir: str,
    volumes: int = 60,
    dataset_dir: str = "",
    bundles: str = ",".join(BUNDLES),
    path: str = str(CALIBRATION),
) -> None:
    """Fit the lines of `components/function/predicted_dice.json` to segmentations of degraded phantoms.

    Every bundle segments the same volumes with its shipped weights. One line is fitted to the volumes of all bundles,
    and one to their slices, by Theil and Sen's estimator, which is robust to outliers.

    Args:
        output_dir: folder of the volumes, of the label maps, and of `phantoms.csv` with every volume and slice.
        volumes: number of phantoms.
        dataset_dir: folder of real volumes with their truth beside them as `<name>_gt.nii.gz`, such as ACDC. They are
            not part of the fit; `real.csv` shows how well the lines hold for them.
        bundles: names of the bundles, separated by commas.
        path: the file to write.
    """
    output = Path(output_dir).resolve()
    phantoms = [_written(output / "phantoms", number) for number in range(volumes)]
    table = pd.concat([_segmented(name, phantoms, output / name) for name in bundles.split(",")])
    table.to_csv(output / "phantoms.csv", index=False)
    lines = {"volume": _line(table[table["slice"] == _OF_WHOLE]), "slice": _line(table[table["slice"] != _OF_WHOLE])}
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(lines) + "\n")
    logger.info("%s: %s", path, lines)
    _describe(table, lines)
    if dataset_dir:
        truths = sorted(Path(dataset_dir).resolve().rglob("*_frame??_gt.nii.gz"))
        cases = [(truth.with_name(truth.name.replace("_gt", "")), truth) for truth in truths]
        table = pd.concat([_segmented(name, cases, output / f"{name}_real") for name in bundles.split(",")])
        table.to_csv(output / "real.csv", index=False)
        _describe(table, lines)


def _written(folder: Path, number: int) -> Case:
    """Write a degraded phantom, and return its files."""
    case = folder / "images" / f"phantom{number:03d}.nii.gz", folder / "labels" / f"phantom{number:03d}.nii.gz"
    for file, voxels in zip(case, degraded_phantom(_SEED, number), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1])), file)
    return case


def _voxels(path: Path) -> np.ndarray:
    image: Any = nib.load(path)
    return np.asarray(image.dataobj)


def _segmented(bundle: str, cases: Iterable[Case], output: Path) -> pd.DataFrame:
    """Segment volumes with a bundle, and return the expected and the true Dice of each and of its slices."""
    truths = dict(cases)
    config = ConfigParser()
    config.read_config(str(_FOLDER / bundle / "configs/inference.json"))
    config["bundle_root"] = str(_FOLDER / bundle)
    config["output_dir"] = str(output)
    config["ckpt_path"] = "@start_checkpoint"  # the shipped weights, whatever was trained in the bundle's folder
    config["dataset"]["data"] = [{"image": str(image)} for image in truths]
    evaluator: Any = config.get_parsed_content("evaluator")
    rows: list[dict[str, Any]] = []
    expected: list[Any] = []

    @evaluator.on(IterationEvents.FORWARD_COMPLETED)
    def expect(engine: Any) -> None:
        (prediction,) = engine.state.output["pred"]
        expected.append(expected_dice(prediction if engine.inferer.test_time_views > 1 else prediction.softmax(dim=0)))

    @evaluator.on(IterationEvents.MODEL_COMPLETED)
    def compare(engine: Any) -> None:
        (item,) = engine.state.output
        image = Path(item["pred"].meta["filename_or_obj"])
        labels, truth = item["pred"][0].cpu().numpy(), _voxels(truths[image])
        whole, slices = expected[-1]
        for number, value in enumerate([whole, *slices], start=_OF_WHOLE):
            part = slice(None) if number == _OF_WHOLE else slice(number, number + 1)
            dice = _true_dice(labels[..., part], truth[..., part], only_shown=number != _OF_WHOLE)
            rows.append({"bundle": bundle, "case": case_name(image), "slice": number, "expected": value, "true": dice})

    evaluator.run()
    return pd.DataFrame(rows).dropna()


def _true_dice(labels: np.ndarray, truth: np.ndarray, *, only_shown: bool) -> float:
    """Return the mean Dice over all classes, or over those in either map; 1 for a class in neither."""
    sizes = {label: np.count_nonzero(labels == label) + np.count_nonzero(truth == label) for label in (1, 2, 3)}
    both = {label: np.count_nonzero((labels == label) & (truth == label)) for label in sizes}
    dice = [2 * both[label] / size if size else 1.0 for label, size in sizes.items() if size or not only_shown]
    return float(np.mean(dice)) if dice else float("nan")


def _line(table: pd.DataFrame) -> dict[str, float]:
    slope, intercept, *_ = theilslopes(table["true"], table["expected"])
    return {"intercept": round(float(intercept), _DECIMALS), "slope": round(float(slope), _DECIMALS)}


def _describe(table: pd.DataFrame, lines: Mapping[str, Mapping[str, float]]) -> None:
    """Log each bundle's rank correlation, and the errors of its predicted Dice, for volumes and slices."""
    for bundle, of_bundle in table.groupby("bundle"):
        for name, line in lines.items():
            part = of_bundle[(of_bundle["slice"] == _OF_WHOLE) == (name == "volume")]
            error = (line["intercept"] + line["slope"] * part["expected"]).clip(0, 1) - part["true"]
            rank = spearmanr(part["expected"], part["true"]).statistic
            logger.info(
                "%s, %d %ss: rank correlation %.2f, bias %+.3f, mean absolute error %.3f",
                bundle,
                len(part),
                name,
                rank,
                error.mean(),
                error.abs().mean(),
            )
