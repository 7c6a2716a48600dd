"""Volumes, ejection fractions and mass from label maps, and the agreement of predicted with true ones."""

import json
import math
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import labels_of, mark_finished

from components.base.volume_metadata import case_name
from components.data.acdc import read_acdc
from components.data.cases import list_cases
from study.grid import BUNDLES, Cell, Method
from study.report.clinical import agreement, agreement_table, measure, patient_pairs, read_measurements, read_volumes_ml
from study.report.scores import count_training_cases

NAN = float("nan")
CNN = Method("cnn", "CNN head", "cnnhead_acdc")
ONE_ML_MM = (10.0, 10.0, 10.0)
ED_FRAME, ES_FRAME = 12, 1  # a series may begin at ES


def write_labels(path, *, rv=0, myo=0, lv=0, spacing_mm=ONE_ML_MM):
    """A label map 10x10x10 with that many voxels of each class."""
    labels = np.zeros(1000, dtype=np.uint8)
    labels[: rv + myo + lv] = np.repeat([1, 2, 3], [rv, myo, lv])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels.reshape(10, 10, 10), np.diag([*spacing_mm, 1.0])), path)
    return path


def write_patients(root, count=4, folder="training", first=1):
    """Patient N: LV 100 + 2 N ml at ED, RV 80 ml at ED, both half as large at ES; myocardium 50 ml in both frames."""
    for number in range(first, first + count):
        patient = root / folder / f"patient{number:03d}"
        for frame, share in ((ED_FRAME, 1), (ES_FRAME, 2)):
            stem = f"{patient.name}_frame{frame:02d}"
            write_labels(patient / f"{stem}_gt.nii.gz", rv=80 // share, myo=50, lv=2 * (50 + number) // share)
            write_labels(patient / f"{stem}.nii.gz")
        (patient / "Info.cfg").write_text(f"ED: {ED_FRAME}\nES: {ES_FRAME}\n")
    return str(root)


def finish(cell, output_dir):
    (output_dir / cell.name / "eval").mkdir(parents=True)
    mark_finished(output_dir / cell.name)
    return output_dir / cell.name / "eval"


def measurements(*pairs, quantity="LV EF (%)", method=CNN, labelled_patients=1, split=0, value=""):
    """A row for each pair of a true and a predicted value, of patient1, patient2, ..."""
    return pd.DataFrame(
        labels_of(method, labelled_patients, split, value)
        | {"patient": f"patient{number}", "quantity": quantity, "truth": float(truth), "predicted": float(predicted)}
        for number, (truth, predicted) in enumerate(pairs, start=1)
    )


def agreement_of(*tables):
    (row,) = agreement(pd.concat(tables)).to_dict("records")
    return row


def test_volume_is_voxels_times_the_voxel_of_the_header(tmp_path):
    # A voxel of 1.5 x 2 x 8 mm has 24 mm3, so 250 voxels have 6 ml.
    path = write_labels(tmp_path / "labels.nii.gz", myo=125, lv=250, spacing_mm=(1.5, 2.0, 8.0))
    assert read_volumes_ml(path) == pytest.approx({"RV": 0, "Myo": 3, "LV": 6})


def test_the_measures_of_a_patient():
    found = measure({"RV": 100, "Myo": 100, "LV": 120}, {"RV": 75, "Myo": 80, "LV": 60})
    assert found == pytest.approx(
        {
            "LV EF (%)": 50,
            "RV EF (%)": 25,
            "LV EDV (ml)": 120,
            "RV EDV (ml)": 100,
            "myocardial mass, ED (g)": 105,
            "myocardial mass, ES (g)": 84,
        }
    )


def test_a_ventricle_that_grows_has_a_negative_ejection_fraction():
    assert measure({"RV": 10, "Myo": 0, "LV": 50}, {"RV": 10, "Myo": 0, "LV": 75})["LV EF (%)"] == -50


def test_a_ventricle_missing_at_ed_has_no_ejection_fraction():
    found = measure({"RV": 0, "Myo": 10, "LV": 50}, {"RV": 20, "Myo": 10, "LV": 25})
    assert math.isnan(found["RV EF (%)"])
    assert found["RV EDV (ml)"] == 0
    assert found["LV EF (%)"] == 50


def test_every_test_patient_is_measured_on_truth_and_prediction(tmp_path):
    data = write_patients(tmp_path / "data", count=10)
    cell = Cell(CNN, None, 0)
    folder = finish(cell, tmp_path / "study")
    cases = list_cases(read_acdc(data), "test", split_seed=0)
    for case in cases:
        ed = f"_frame{ED_FRAME}" in case["image"]
        write_labels(folder / f"{case_name(case['image'])}_pred.nii.gz", rv=0, myo=60, lv=100 if ed else 70)
    table = read_measurements([cell], tmp_path / "study", dataset_dir=data, training_cases=6)
    patients = {case_name(case["image"])[:10] for case in cases}
    assert len(patients) == 2
    assert set(table["patient"]) == patients
    assert len(table) == 6 * len(patients)
    assert table[["method", "title", "ablation", "labelled_patients", "split"]].drop_duplicates().values.tolist() == [
        ["cnn", "CNN head", "", 6, 0]
    ]
    for patient in patients:
        rows = table[table["patient"] == patient].set_index("quantity")
        assert rows.loc["LV EF (%)", ["truth", "predicted"]].tolist() == [50, 30]
        assert rows.loc["LV EDV (ml)", ["truth", "predicted"]].tolist() == [100 + 2 * int(patient[-3:]), 100]
        assert rows.loc["RV EF (%)", "truth"] == 50
        assert math.isnan(rows.loc["RV EF (%)", "predicted"])
        assert rows.loc["myocardial mass, ES (g)", ["truth", "predicted"]].tolist() == pytest.approx([52.5, 63])


@pytest.mark.parametrize("by", ["knob", "overlay"])
def test_patients_of_the_testing_folder_are_measured_if_they_take_part(tmp_path, monkeypatch, by):
    data = write_patients(tmp_path / "data", count=10)
    write_patients(tmp_path / "data", count=10, folder="testing", first=101)
    everyone = {"include_testing": True}
    shutil.copytree(BUNDLES / CNN.bundle / "configs", tmp_path / CNN.bundle / "configs")
    (tmp_path / CNN.bundle / "configs/everyone.json").write_text(json.dumps(everyone))
    monkeypatch.setattr("study.grid.BUNDLES", tmp_path)
    cell = Cell(replace(CNN, **{"knob": {"knobs": everyone}, "overlay": {"overlays": ("everyone",)}}[by]), None, 0)
    cases = list_cases(read_acdc(data, include_testing=True), "test", split_seed=0)
    patients = {case_name(case["image"])[:10] for case in cases}
    assert any(patient > "patient100" for patient in patients)
    folder = finish(cell, tmp_path / "study")
    for case in cases:
        write_labels(folder / f"{case_name(case['image'])}_pred.nii.gz", rv=10, myo=60, lv=100)
    table = read_measurements([cell], tmp_path / "study", dataset_dir=data, training_cases=14)
    assert set(table["patient"]) == patients
    assert count_training_cases([cell], data) == 14


def test_bias_and_limits_of_agreement():
    row = agreement_of(measurements((50, 51), (60, 63)))  # errors 1 and 3
    assert row == pytest.approx(
        {
            "method": "cnn",
            "title": "CNN head",
            "labelled_patients": 1,
            "quantity": "LV EF (%)",
            "n": 2,
            "mean_error": 2,
            "sd_of_error": math.sqrt(2),
            "lower_limit": 2 - 1.96 * math.sqrt(2),
            "upper_limit": 2 + 1.96 * math.sqrt(2),
            "mean_absolute_error": 2,
            "pearson_r": 1,
            "n_undefined": 0,
        }
    )


def test_errors_in_both_directions_cancel_in_the_bias_alone():
    row = agreement_of(measurements((50, 40), (60, 70)))
    assert (row["mean_error"], row["mean_absolute_error"]) == (0, 10)


def test_a_patient_of_two_splits_counts_once_with_its_mean_prediction():
    row = agreement_of(measurements((50, 40), (60, 62)), measurements((50, 64), split=1))
    assert row["n"] == 2
    assert (row["mean_error"], row["mean_absolute_error"]) == (2, 2)  # predicted 52 and 62, true 50 and 60


def test_undefined_pairs_are_left_out_and_counted():
    row = agreement_of(measurements((50, 51), (60, NAN), (NAN, 40)), measurements((50, NAN), split=1))
    assert (row["n"], row["n_undefined"], row["mean_error"]) == (1, 3, 1)


def test_a_method_without_any_defined_pair_still_has_its_row():
    row = agreement_of(measurements((50, NAN)))
    assert (row["n"], row["n_undefined"]) == (0, 1)
    assert math.isnan(row["mean_error"])
    assert math.isnan(row["mean_absolute_error"])


def test_one_patient_has_a_bias_but_no_spread():
    row = agreement_of(measurements((50, 51)))
    assert (row["n"], row["mean_error"]) == (1, 1)
    assert all(math.isnan(row[name]) for name in ("sd_of_error", "lower_limit", "upper_limit", "pearson_r"))


def test_same_prediction_for_everyone_has_no_correlation():
    assert math.isnan(agreement_of(measurements((50, 55), (60, 55)))["pearson_r"])


def test_ablations_are_left_out():
    varied = measurements((50, 99), value="2")
    assert agreement_of(measurements((50, 51)), varied)["mean_error"] == 1
    assert patient_pairs(varied).empty


def test_numbers_of_labelled_patients_are_rows_of_their_own_fewest_first():
    five, one = measurements((50, 50), labelled_patients=5), measurements((50, 53), (60, 65), (70, NAN))
    table = agreement_table(agreement(pd.concat([five, one])))
    assert table.to_dict("records") == [
        {
            "labelled patients": "1",
            "method": "CNN head",
            "quantity": "LV EF (%)",
            "patients": "2",
            "undefined": "1",
            "bias": "+4.0",
            "limits of agreement": "+1.2 to +6.8",  # 4 ± 1.96 * sqrt(2)
            "mean absolute error": "4.0",
            "Pearson's r": "1.00",
        },
        {
            "labelled patients": "5",
            "method": "CNN head",
            "quantity": "LV EF (%)",
            "patients": "1",
            "undefined": "0",
            "bias": "+0.0",
            "limits of agreement": "",
            "mean absolute error": "0.0",
            "Pearson's r": "",
        },
    ]
