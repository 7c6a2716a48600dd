"""Clinical measures from the predicted and the true masks: ejection fractions, volumes and myocardial mass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from components.base.volume_metadata import case_name
from components.data.acdc import patient_of
from components.function.measures import MYOCARDIAL_DENSITY_G_PER_ML, ejection_fraction_percent, volumes_ml
from study.grid import Cell
from study.report.scores import cell_labels, list_test_cases, prediction_file

CLINICAL_CAPTION = (
    "Clinical measures of the predicted masks compared with those of the true ones. Bias: mean of predicted minus true "
    "over the patients; limits of agreement: bias ± 1.96 standard deviations (ddof 1). A patient who is tested in "
    "several splits counts once, with the mean of its predictions. Undefined: patients of a split without an ejection "
    "fraction, because the predicted or the true mask has no ventricle at ED; they are excluded from all other columns."
)
_BY = ["method", "title", "labelled_patients", "quantity"]
_PAIR = ["truth", "predicted"]
_COLUMNS = ["method", "title", "ablation", "value", "labelled_patients", "split", "patient", "quantity", *_PAIR]
_LIMIT = 1.96


def read_volumes_ml(path: str | Path) -> dict[str, float]:
    """Return the volume in ml of every class: its number of voxels times the voxel volume of the header, in mm.

    Args:
        path: NIfTI file of a label map `(H,W,D)`: 1 RV, 2 Myo, 3 LV.
    """
    image = nib.Nifti1Image.from_filename(path)
    return volumes_ml(np.asarray(image.dataobj), [float(mm) for mm in image.header.get_zooms()[:3]])


def measure(ed_ml: Mapping[str, float], es_ml: Mapping[str, float]) -> dict[str, float]:
    """Compute the clinical quantities of a patient.

    Source: Schulz-Menger et al., "Standardized image interpretation and post-processing in cardiovascular magnetic
    resonance - 2020 update", Journal of Cardiovascular Magnetic Resonance 2020, also for the myocardium's density.

    Args:
        ed_ml: volume in ml of every class at end-diastole, as `read_volumes_ml` returns them.
        es_ml: the same at end-systole.

    Returns:
        each quantity by its name, which ends with its unit; an ejection fraction is nan if the volume at ED is 0.
    """
    return {
        "LV EF (%)": ejection_fraction_percent(ed_ml["LV"], es_ml["LV"]),
        "RV EF (%)": ejection_fraction_percent(ed_ml["RV"], es_ml["RV"]),
        "LV EDV (ml)": ed_ml["LV"],
        "RV EDV (ml)": ed_ml["RV"],
        "myocardial mass, ED (g)": MYOCARDIAL_DENSITY_G_PER_ML * ed_ml["Myo"],
        "myocardial mass, ES (g)": MYOCARDIAL_DENSITY_G_PER_ML * es_ml["Myo"],
    }


def read_measurements(
    cells: Iterable[Cell], output_dir: Path, *, dataset_dir: str, training_cases: int
) -> pd.DataFrame:
    """Measure the test patients of finished cells, on the true and on the predicted masks.

    Args:
        cells: finished cells.
        output_dir: folder of the study.
        dataset_dir: folder of ACDC, or of a data set in its layout.
        training_cases: the number of labelled cases that null stands for.

    Returns:
        a row for each cell, patient and quantity, in the order of the cells. Columns are the first ones of
        `read_scores` up to `split`, then `patient`, `quantity`, `truth` and `predicted`, both nan if undefined.
    """
    rows: list[dict[str, Any]] = []
    truths: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for cell in cells:
        cases = list_test_cases(cell, dataset_dir)
        labels = tuple(case["label"] for case in cases)
        if labels not in truths:
            truths[labels] = _measure_all(labels)
        predictions = _measure_all([prediction_file(cell, case, output_dir) for case in cases])
        patients = [patient_of(case_name(case["image"])) for case in cases[::2]]
        of_cell = cell_labels(cell, training_cases)
        for patient, truth, predicted in zip(patients, truths[labels], predictions, strict=True):
            of_patient = of_cell | {"patient": patient}
            rows += [
                of_patient | {"quantity": quantity, "truth": truth[quantity], "predicted": predicted[quantity]}
                for quantity in truth
            ]
    return pd.DataFrame(rows, columns=_COLUMNS)


def patient_pairs(measurements: pd.DataFrame) -> pd.DataFrame:
    """Average the measurements of each patient and method over the splits that test this patient.

    Args:
        measurements: as `read_measurements` returns them; ablations and undefined pairs are ignored.

    Returns:
        a row for each `method`, `title`, `labelled_patients`, `quantity` and `patient`, with `truth` and `predicted`.
    """
    defined = measurements[measurements["ablation"] == ""].dropna(subset=_PAIR)
    return defined.groupby([*_BY, "patient"], sort=False)[_PAIR].mean().reset_index()


def agreement(measurements: pd.DataFrame) -> pd.DataFrame:
    """Compare predicted with true measurements over patients.

    Source: Bland and Altman, "Statistical methods for assessing agreement between two methods of clinical measurement",
    Lancet 1986.

    Args:
        measurements: as `read_measurements` returns them; ablations are ignored.

    Returns:
        a row for each `method`, `title`, `labelled_patients` and `quantity`, in the quantity's unit. `n` counts
        patients, averaged over splits as in `patient_pairs`. `mean_error` (bias), `sd_of_error` (ddof 1),
        `lower_limit` and `upper_limit` (bias ± 1.96 sd) and `mean_absolute_error` are of predicted minus true. They and
        `pearson_r` are nan if there are too few patients. `n_undefined` counts undefined pairs of patient and split.
    """
    own = measurements[measurements["ablation"] == ""]
    undefined = own[_PAIR].isna().any(axis=1).groupby([own[name] for name in _BY], sort=False).sum()
    pairs = dict(list(patient_pairs(measurements).groupby(_BY)))
    rows = [
        dict(zip(_BY, keys, strict=True)) | _agreement_of(pairs.get(keys)) | {"n_undefined": count}
        for keys, count in undefined.items()
    ]
    return pd.DataFrame(rows)


def agreement_table(agreements: pd.DataFrame) -> pd.DataFrame:
    """Format the result of `agreement` as text, fewest labelled patients first; `CLINICAL_CAPTION` explains it."""
    ordered = agreements.sort_values("labelled_patients", kind="stable")
    limits = zip(ordered["lower_limit"], ordered["upper_limit"], strict=True)
    return pd.DataFrame(
        {
            "labelled patients": ordered["labelled_patients"].astype(str),
            "method": ordered["title"],
            "quantity": ordered["quantity"],
            "patients": ordered["n"].astype(str),
            "undefined": ordered["n_undefined"].astype(str),
            "bias": ordered["mean_error"].map(lambda error: _format_number(error, "+z.1f")),
            "limits of agreement": [
                "" if np.isnan(lower) else f"{lower:+z.1f} to {upper:+z.1f}" for lower, upper in limits
            ],
            "mean absolute error": ordered["mean_absolute_error"].map(lambda error: _format_number(error, ".1f")),
            "Pearson's r": ordered["pearson_r"].map(lambda r: _format_number(r, "z.2f")),
        }
    ).reset_index(drop=True)


def _measure_all(files: Sequence[str | Path]) -> list[dict[str, float]]:
    """Measure every patient from a list of label maps in which ED and ES alternate."""
    volumes = [read_volumes_ml(file) for file in files]
    return [measure(ed_ml, es_ml) for ed_ml, es_ml in zip(volumes[::2], volumes[1::2], strict=True)]


def _agreement_of(pairs: pd.DataFrame | None) -> dict[str, float]:
    """Compute the columns of `agreement` from one row per patient, or None if there are no patients."""
    nan = float("nan")
    truth, predicted = ([], []) if pairs is None else (pairs[name] for name in _PAIR)
    errors = np.subtract(predicted, truth)
    spread = float(np.std(errors, ddof=1)) if len(errors) > 1 else nan
    bias = float(np.mean(errors)) if len(errors) else nan
    varies = len(errors) > 1 and np.ptp(truth) > 0 and np.ptp(predicted) > 0
    return {
        "n": len(errors),
        "mean_error": bias,
        "sd_of_error": spread,
        "lower_limit": bias - _LIMIT * spread,
        "upper_limit": bias + _LIMIT * spread,
        "mean_absolute_error": float(np.mean(np.abs(errors))) if len(errors) else nan,
        "pearson_r": float(np.corrcoef(truth, predicted)[0, 1]) if varies else nan,
    }


def _format_number(number: float, form: str) -> str:
    """Format a number, nan as an empty string."""
    return "" if np.isnan(number) else format(number, form)
