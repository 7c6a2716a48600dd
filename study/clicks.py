"""Simulated clicks on volumes with a truth, and the Dice after each click."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Transform

import autosam
from autosam import Segmenter
from autosam.folders import CORRECT, find_bundle
from components.base.masks import innermost_pixel, largest_piece
from components.base.volume_metadata import case_name
from components.data import list_cases
from components.data.clicks import BACKGROUND

logger = logging.getLogger("study")

_SUBSETS = ("training", "validation", "test")


def clicks(
    bundle: str,
    output_dir: str,
    dataset_dir: str = "",
    count: int = 15,
    cases: int | None = None,
    seed: int = 0,
    labelled: int = 0,
) -> None:
    """Correct volumes by simulated clicks, and compare with drawing the same slices anew.

    Each click lies where its volume is worst: inside the largest connected error that a class has in a slice. It says
    the true class of its voxel. All clicks so far correct the network's answer. For comparison, each step also copies
    one class of the worst slice from the truth.

    Args:
        bundle: a bundle's folder, or the name of one that comes with the package.
        output_dir: folder of `clicks.csv`, a row for each volume, number of clicks and class.
        dataset_dir: folder of the cases; by default that of the bundle's own.
        count: clicks on each volume.
        cases: number of volumes; all by default.
        seed: of the order in which volumes are taken.
        labelled: number of cases on which the bundle was trained with `split_seed` 0; they are left out.
    """
    folder = find_bundle(Path(bundle), CORRECT).absolute()
    training = _training_config(folder, dataset_dir)
    chosen = _cases(training.get_parsed_content("data"), labelled)
    chosen = [chosen[number] for number in np.random.default_rng(seed).permutation(len(chosen))[:cases]]
    table = pd.DataFrame()
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    segmenter, load = autosam.load(folder), training.get_parsed_content("load")
    for case in chosen:
        table = pd.concat([table, pd.DataFrame(_rows(case, load, segmenter, count))])
        table.to_csv(output / "clicks.csv", index=False)
        logger.info("%s", case_name(case["image"]))
    logger.info("%s", table.groupby("clicks")[["corrected", "redrawn"]].mean().mul(100).round(2).to_string())
    gain = table[table.clicks > 0].drop_duplicates(["case", "clicks"])["gain"]
    logger.info(
        "Dice of the class in the slice: a click changes it by %.3f, %.2f of the clicks lower it, the worst by %.2f",
        gain.mean(),
        (gain < 0).mean(),
        -gain.min(),
    )


def _training_config(folder: Path, dataset_dir: str) -> ConfigParser:
    config = ConfigParser()
    config.read_config(str(folder / "configs/train.json"))
    config["bundle_root"] = str(folder)
    if dataset_dir:
        config["dataset_dir"] = str(Path(dataset_dir).resolve())
    return config


def _cases(data: dict[str, Any], labelled: int) -> list[dict[str, Any]]:
    """Return all cases of a data description that have a truth, without those that a training has seen."""
    seen = list_cases(data, "training", labelled_cases=labelled)
    return [case for subset in _SUBSETS for case in list_cases(data, subset) if case not in seen]


def _rows(case: dict[str, Any], load: Transform, segmenter: Segmenter, count: int) -> Iterator[dict[str, Any]]:
    """Yield the Dice of each class of a volume after 0 to `count` clicks."""
    truth = load(case)["label"][0].numpy().astype(np.uint8)
    correction = segmenter.correction(case["image"])
    plain = correction({})
    to_canvas = torch.linalg.inv(correction.image.affine) @ plain.affine
    labels, axis = _as_array(plain), int(to_canvas[2, :3].abs().argmax())
    redrawn = labels.copy()
    given: dict[str, list[list[int]]] = {}
    gain = 0.0
    for number in range(count + 1):
        for label, name in enumerate(segmenter.class_names, start=1):
            scores = {
                key: _dice(each == label, truth == label) for key, each in (("corrected", labels), ("redrawn", redrawn))
            }
            yield {"case": case_name(case["image"]), "clicks": number, "class": name, **scores, "gain": gain}
        label, slice_, place = _worst(labels, truth, axis)
        if label:
            clicked = np.insert(place, axis, slice_)
            name = [BACKGROUND, *segmenter.class_names][truth[tuple(clicked)]]
            given.setdefault(name, []).append(clicked.tolist())
            after = _as_array(correction(given))
            parts = [each.take(slice_, axis) == label for each in (labels, after, truth)]
            gain, labels = _dice(parts[1], parts[2]) - _dice(parts[0], parts[2]), after
        label, slice_, _ = _worst(redrawn, truth, axis)
        if label:
            part, right = (np.moveaxis(each, axis, 0)[slice_] for each in (redrawn, truth))
            part[part == label] = 0
            part[right == label] = label


def _as_array(labels: MetaTensor) -> np.ndarray:
    return labels[0].numpy()


def _worst(labels: np.ndarray, truth: np.ndarray, axis: int) -> tuple[int, int, np.ndarray]:
    """Return the class and the slice with the largest connected error, and its innermost pixel; class 0 if none."""
    found, error = (0, 0), np.zeros((0, 0), bool)
    for label in range(1, int(max(labels.max(), truth.max())) + 1):
        for number, wrong in enumerate(np.moveaxis((labels == label) != (truth == label), axis, 0)):
            piece = largest_piece(wrong)
            if np.count_nonzero(piece) > np.count_nonzero(error):
                found, error = (label, number), piece
    return *found, np.array(innermost_pixel(error) if found[0] else (0, 0))


def _dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the Dice of masks; 1 if both are empty."""
    size = np.count_nonzero(mask) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(mask & truth) / size if size else 1.0
