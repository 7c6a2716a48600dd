"""Where not to trust a segmentation: the predicted Dice, anatomy that cannot be, and how a case's row says so."""

import json
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from test_cine import segment
from test_function import GreyIsClass, beat

from components.function.plausibility import faults_of_curve, faults_of_labels, faults_of_measures
from components.function.quality import CALIBRATION, FLAG_BELOW, POOR_BELOW, Dice, expected_dice, predicted_dice
from components.function.report import FunctionReport
from components.phantom.degraded import degraded_phantom
from study.calibration import calibrate

CLASSES = {"RV": 1, "Myo": 2, "LV": 3}


def probabilities(labels, sure):
    """Probabilities CxHxWxD: `sure` for the class of each voxel, the rest in equal parts for the others."""
    chosen = torch.nn.functional.one_hot(torch.as_tensor(labels).long(), 4).movedim(-1, 0).float()
    return chosen * sure + (1 - chosen) * (1 - sure) / 3


def heart(slices=5, *, contraction=0):
    """Labels (H, W, D) of rings around a cavity, with a right ventricle beside them; the base is first."""
    x, y = np.meshgrid(np.arange(60), np.arange(60), indexing="ij")
    labels = np.zeros((60, 60, slices), np.uint8)
    for depth in range(slices):
        radius = np.hypot(x - 35, y - 30)
        size = 12 - depth - contraction
        labels[..., depth][np.hypot(x - 18, y - 30) < size] = 1
        labels[..., depth][radius < size + 4] = 2
        labels[..., depth][radius < size] = 3
    return labels


def test_a_network_that_is_sure_expects_a_dice_of_one():
    expected = expected_dice(probabilities(heart(), 1.0))
    assert expected.volume == pytest.approx(1)
    assert expected.slices == pytest.approx(1)


def test_the_expected_dice_is_that_of_the_labels_with_the_probabilities():
    labels = np.zeros((2, 2, 3))
    labels[0, 0, 0], labels[0, 1, 0], labels[1, :, 0] = 1, 2, 3
    expected = expected_dice(probabilities(labels, 0.7))
    rv = 2 * 0.7 / (0.7 + 0.1 * 11 + 1)
    lv = 2 * 1.4 / (1.4 + 0.1 * 10 + 2)
    assert expected.volume == pytest.approx((2 * rv + lv) / 3)
    assert expected.slices[0] == pytest.approx((0.7 + 0.7 + 2 * 1.4 / (1.4 + 0.1 * 2 + 2)) / 3)
    assert np.isnan(expected.slices[1:]).all()


def test_a_slice_counts_the_classes_that_it_shows():
    labels = np.zeros((1, 2, 1))
    labels[0, 0, 0] = 2
    assert expected_dice(probabilities(labels, 0.7)).slices[0] == pytest.approx(2 * 0.7 / (0.7 + 0.1 + 1))


def test_a_missing_class_costs_a_third():
    labels = heart()
    labels[labels == 1] = 0
    assert expected_dice(probabilities(labels, 1.0)).volume == pytest.approx(2 / 3)


def test_the_less_sure_a_network_is_the_lower_is_the_predicted_dice():
    volumes = [predicted_dice(expected_dice(probabilities(heart(), sure))) for sure in (0.99, 0.9, 0.7)]
    assert volumes[0].volume > volumes[1].volume > volumes[2].volume
    assert (volumes[0].slices > volumes[2].slices).all()


def test_the_predicted_dice_follows_the_lines_of_its_file_and_stays_within_0_and_1():
    lines = json.loads(CALIBRATION.read_text())
    found = predicted_dice(Dice(0.9, np.array([0.85, np.nan, 0.0])))
    assert found.volume == pytest.approx(lines["volume"]["intercept"] + 0.9 * lines["volume"]["slope"])
    assert found.slices[0] == pytest.approx(lines["slice"]["intercept"] + 0.85 * lines["slice"]["slope"])
    assert np.isnan(found.slices[1])
    assert found.slices[2] == 0


def test_a_heart_as_it_should_be_has_no_fault_from_either_end():
    assert faults_of_labels(heart(), CLASSES) == []
    assert faults_of_labels(heart()[..., ::-1], CLASSES) == []


def test_a_wall_that_is_open_below_the_base_is_a_fault_and_at_the_base_none():
    labels = heart()
    labels[35:, :, 0][labels[35:, :, 0] == 2] = 0
    assert faults_of_labels(labels, CLASSES) == []
    labels[35:, :, 2:4][labels[35:, :, 2:4] == 2] = 0
    assert faults_of_labels(labels, CLASSES) == ["the myocardium is open around the left ventricle in slices 3, 4"]


def test_papillary_muscles_do_not_open_the_wall():
    labels = heart()
    labels[33:37, 28:32] = 0
    assert faults_of_labels(labels, CLASSES) == []


def test_ventricles_in_pieces_are_a_fault():
    labels = heart()
    labels[5:15, :, 1:3] = np.where(labels[5:15, :, 1:3] == 1, 0, labels[5:15, :, 1:3])
    labels[1:9, 1:9, 1:3] = 1
    assert faults_of_labels(labels, CLASSES) == ["the right ventricle is in pieces in slices 2, 3"]


def test_what_is_missing_is_a_fault():
    labels = heart()
    labels[..., 2] = 0
    assert faults_of_labels(labels, CLASSES) == ["no left ventricle in slice 3, between others that show it"]
    assert faults_of_labels(np.zeros_like(labels), CLASSES) == [
        "no right ventricle",
        "no myocardium",
        "no left ventricle",
    ]


@pytest.mark.parametrize(
    ("lv", "rv", "faults"),
    [
        (60, 50, []),
        (float("nan"), float("nan"), []),
        (90, 3, ["left ventricle of 90%, outside 5 to 85%", "right ventricle of 3%, outside 5 to 85%"]),
        (60, -1, ["the right ventricle is larger at ES than at ED"]),
    ],
)
def test_ejection_fractions_that_nobody_has(lv, rv, faults):
    found = faults_of_measures({"lv_ef_percent": lv, "rv_ef_percent": rv})
    assert len(found) == len(faults)
    assert all(text.endswith(end) for text, end in zip(found, faults, strict=True))


def test_a_volume_that_jumps_in_a_frame_is_a_fault():
    curve = beat(25)
    assert faults_of_curve({"LV": curve, "RV": curve}) == []
    jumping = curve.copy()
    jumping[[6, 20]] += [30, -30]
    assert faults_of_curve({"LV": jumping, "RV": curve}) == ["the volume of the left ventricle jumps in frames 7, 21"]
    assert faults_of_curve({"LV": jumping[:8], "RV": curve[:8]}) == []


def test_degraded_phantoms_are_the_same_every_time_and_of_one_heart_each():
    image, labels = degraded_phantom(1, 3)
    again, _ = degraded_phantom(1, 3)
    other, _ = degraded_phantom(1, 4)
    assert np.array_equal(image, again)
    assert image.shape == labels.shape
    assert image.shape != other.shape or not np.array_equal(image, other)
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    areas = np.count_nonzero(labels == 3, axis=(0, 1))
    assert areas[: len(areas) // 2].sum() > areas[(len(areas) + 1) // 2 :].sum()  # from base to apex


class Scaled(GreyIsClass):
    """The same classes from logits that are multiplied by a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, images):
        return self.factor * super().forward(images)


def measured(frames, network, folder):
    """The row and the pages of a cine whose grey values are its labels."""
    image = nib.Nifti1Image(np.stack(frames, axis=-1).astype(np.int16), np.diag([1.5, 1.5, 8, 1]))
    nib.save(image, folder / "cine.nii.gz")
    handlers = [FunctionReport(str(folder))]
    segment(folder / "cine.nii.gz", folder, network=network, smoothing=0, handlers=handlers)
    (row,) = pd.read_csv(folder / "function.csv", keep_default_na=False).to_dict("records")
    return row, (folder / "cine.html").read_text(), (folder / "function.html").read_text()


def test_a_case_that_a_sure_network_segments_is_not_flagged(tmp_path):
    row, page, summary = measured([heart(), heart(contraction=3)], Scaled(10), tmp_path)
    best = predicted_dice(Dice(1.0, np.empty(0))).volume
    assert (row["predicted_dice"], row["flag"], row["reason"]) == (pytest.approx(best, abs=0.01), "", "")
    assert "Check this case" not in page
    assert page.count(f"<td>{predicted_dice(Dice(1.0, np.ones(1))).slices[0]:.2f}</td>") == 10
    assert "0 of 1 cases to check" in summary


def test_a_case_that_a_doubtful_network_segments_is_flagged(tmp_path):
    row, page, summary = measured([heart(), heart(contraction=3)], Scaled(0.3), tmp_path)
    assert row["flag"] == "check"
    assert row["predicted_dice"] < FLAG_BELOW
    assert row["reason"].startswith("ED: the predicted Dice of 0.")
    assert f"<li>{row['reason'].split('; ')[0]}</li>" in page
    assert page.count("<td class=check>0.") == 10
    assert "1 of 1 cases to check" in summary
    assert row["reason"].replace("; ", "<br>") in summary


def test_a_case_of_odd_anatomy_is_flagged_whatever_its_predicted_dice(tmp_path):
    without_rv = np.where(heart(contraction=3) == 1, 0, heart(contraction=3))
    row, page, _ = measured([heart(), without_rv], Scaled(10), tmp_path)
    assert row["flag"] == "check"
    reasons = row["reason"].split("; ")
    assert "ES: no right ventricle" in reasons
    assert "an ejection fraction of the right ventricle of 100%, outside 5 to 85%" in reasons
    assert "<li>ES: no right ventricle</li>" in page


def test_a_volume_of_one_slice_is_flagged_since_it_is_no_ventricles(tmp_path):
    row, page, _ = measured([heart(1), heart(1, contraction=3)], Scaled(10), tmp_path)
    assert (row["flag"], row["reason"].split("; ")[0]) == ("check", "one slice: no volume")
    assert "<li>one slice: no volume</li>" in page


def test_cases_with_a_low_predicted_dice_are_named_at_the_end(tmp_path, caplog):
    for patient, labels in (("p1", np.zeros_like(heart())), ("p2", heart())):
        shown = labels + np.random.default_rng(0).uniform(-0.2, 0.2, labels.shape)
        (tmp_path / patient).mkdir()
        nib.save(nib.Nifti1Image(shown.astype(np.float32), np.diag([1.5, 1.5, 8, 1])), tmp_path / patient / "sa.nii.gz")
    segment(tmp_path, tmp_path / "out", network=Scaled(10), handlers=[FunctionReport(str(tmp_path / "out"))])
    table = pd.read_csv(tmp_path / "out/function.csv").set_index("case")["predicted_dice"]
    assert list(table.index) == ["p1_sa", "p2_sa"]
    assert table["p1_sa"] < POOR_BELOW < table["p2_sa"]
    assert f"the predicted Dice is below 0.5 in 1: p1_sa ({table['p1_sa']:.2f}); do not use" in caplog.text
    assert {"p1_sa.html", "p1_sa_pred.nii.gz"} < {path.name for path in (tmp_path / "out").iterdir()}


def test_flagged_cases_come_first_in_the_summary(tmp_path):
    for name, labels in (("a_good", heart()), ("z_odd", np.where(heart() == 1, 0, heart()))):
        shown = labels + np.float32(0.125)  # whole values would be taken for labels
        nib.save(nib.Nifti1Image(shown.astype(np.float32), np.diag([1.5, 1.5, 8, 1])), tmp_path / f"{name}.nii.gz")
    segment(tmp_path, tmp_path / "out", network=Scaled(10), handlers=[FunctionReport(str(tmp_path / "out"))])
    assert re.findall('href="(.*?)"', (tmp_path / "out/function.html").read_text()) == ["z_odd.html", "a_good.html"]
    assert list(pd.read_csv(tmp_path / "out/function.csv")["case"]) == ["a_good", "z_odd"]


@pytest.mark.slow
def test_the_calibration_is_made_by_one_command(tmp_path):
    calibrate(str(tmp_path), volumes=6, bundles="linearhead_acdc", path=str(tmp_path / "lines.json"))
    lines = json.loads((tmp_path / "lines.json").read_text())
    assert lines.keys() == json.loads(CALIBRATION.read_text()).keys() == {"volume", "slice"}
    assert all(line["slope"] > 0.5 for line in lines.values())
    table = pd.read_csv(tmp_path / "phantoms.csv")
    assert sorted(table.loc[table["slice"] == -1, "case"]) == [f"phantom{n:03d}" for n in range(6)]
    assert table["true"].between(0, 1).all()
