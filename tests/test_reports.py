import csv
import logging
import math

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import MetricsSaver, from_engine
from monai.transforms import AsDiscreted

from components.base.atomic_write import write_atomically
from components.base.volume_metadata import case_name
from components.evaluation.metrics import VolumeAssdHandler, VolumeDiceHandler
from components.evaluation.reports import SUMMARY_COLUMNS, EvaluationReport, summarise

DIAGONAL_MM = math.hypot(4 * 2, 4, 10)


class CopyImage(torch.nn.Module):
    """Network that predicts at every voxel the class that is the image's value."""

    def forward(self, x):
        return torch.cat([(x == c).float() for c in range(4)], dim=1)


def volume(labels, path):
    """(1,4,4,1), a single slice of 2 x 1 x 10 mm."""
    affine = torch.diag(torch.tensor([-2.0, -1.0, 10.0, 1.0], dtype=torch.float64))
    return MetaTensor(torch.tensor(labels).float()[None, :, :, None], affine=affine, meta={"filename_or_obj": path})


# RV one voxel of 2 mm off, Myo found exactly, LV missed.
FIRST = {
    "image": volume([[0, 0, 0, 2], [1, 1, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]], "data/patient001_frame01.nii.gz"),
    "label": volume([[1, 1, 0, 2], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 3, 0]], "data/patient001_frame01_gt.nii.gz"),
}
# RV a false alarm, Myo half found, LV absent from both.
SECOND = {
    "image": volume([[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 2], [0, 0, 0, 0]], "data/patient002_frame12.nii"),
    "label": volume([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 2]], "data/patient002_frame12_gt.nii"),
}


def run_evaluator(data, handlers, batch_size=1, **kwargs):
    take = from_engine(["pred", "label"])
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(data), batch_size=batch_size),
        network=CopyImage(),
        postprocessing=AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=4),
        key_val_metric={"val_mean_dice": VolumeDiceHandler(output_transform=take)},
        additional_metrics={"val_assd_mm": VolumeAssdHandler(output_transform=take)},
        val_handlers=handlers,
        **kwargs,
    )
    evaluator.run()
    return evaluator


def read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_metrics_csv_of_an_evaluation(tmp_path, batch_size):
    run_evaluator([FIRST, SECOND], [EvaluationReport(tmp_path)], batch_size)
    diagonal = f"{DIAGONAL_MM:.6f}"
    assert read(tmp_path / "metrics.csv") == [
        ["case", "class", "dice", "assd_mm"],
        ["patient001_frame01", "RV", "0.000000", "2.000000"],
        ["patient001_frame01", "Myo", "1.000000", "0.000000"],
        ["patient001_frame01", "LV", "0.000000", diagonal],
        ["patient002_frame12", "RV", "0.000000", diagonal],
        # One voxel predicted, two true: 2/3. Distances 0, 0 and 2 mm.
        ["patient002_frame12", "Myo", "0.666667", "0.666667"],
        ["patient002_frame12", "LV", "nan", "nan"],
    ]


def test_reports_of_pictures_say_pixels(tmp_path, caplog):
    case = {
        key: MetaTensor(item.as_tensor(), affine=torch.diag(torch.tensor([-1.0, -1, 1, 1])))
        for key, item in FIRST.items()
    }
    for key, item in case.items():
        item.meta["filename_or_obj"] = f"{key}s/cell.png"
    logging.getLogger("ignite.engine").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        run_evaluator([case], [EvaluationReport(tmp_path)])
    assert read(tmp_path / "metrics.csv")[:2] == [
        ["case", "class", "dice", "assd_mm", "assd_unit"],
        ["cell", "RV", "0.000000", "1.000000", "pixels"],
    ]
    assert {row[-1] for row in read(tmp_path / "summary.csv")[1:]} == {"pixels"}
    assert "ASSD pixels" in caplog.text
    assert "1 pictures, mean" in caplog.text
    assert "volumes" not in caplog.text


def test_table_shows_the_dice_of_trivial_answers(tmp_path):
    report = EvaluationReport(tmp_path)
    run_evaluator([FIRST, SECOND], [report])
    _, head, *rows = (line.split() for line in report.table.splitlines())
    assert head[:6] == ["class", "Dice", "if", "all", "if", "none"]
    trivial = {row[0]: row[4:7] for row in rows}
    # RV 2 of 16 voxels, then none; all of the first as RV: 2 * 2 / (16 + 2)
    assert trivial["RV"] == ["0.111", "0.000", "6.2%"]
    assert trivial["Myo"] == ["0.222", "0.000", "12.5%"]
    assert (report.n_cases, report.mean_dice) == (2, pytest.approx((0 + 5 / 6 + 0) / 3))


def test_summary_csv_of_an_evaluation(tmp_path):
    evaluator = run_evaluator([FIRST, SECOND], [EvaluationReport(tmp_path)])
    header, *lines = read(tmp_path / "summary.csv")
    assert tuple(header) == SUMMARY_COLUMNS
    rows = {line[0]: dict(zip(header[1:], map(float, line[1:]), strict=True)) for line in lines}
    assert list(rows) == ["RV", "Myo", "LV", "mean"]
    assert rows["RV"] == pytest.approx(
        {
            "n_volumes": 2,
            "dice_mean": 0,
            "dice_std_ddof1": 0,
            "dice_n_undefined": 0,
            "assd_mm_mean": (2 + DIAGONAL_MM) / 2,
            "assd_mm_std_ddof1": (DIAGONAL_MM - 2) / math.sqrt(2),
            "assd_mm_n_undefined": 0,
            "n_misses": 0,
            "n_false_alarms": 1,
            "assd_mm_mean_detected": 2,
        }
    )
    assert rows["LV"] == pytest.approx(
        {
            "n_volumes": 2,
            "dice_mean": 0,
            "dice_std_ddof1": math.nan,
            "dice_n_undefined": 1,
            "assd_mm_mean": DIAGONAL_MM,
            "assd_mm_std_ddof1": math.nan,
            "assd_mm_n_undefined": 1,
            "n_misses": 1,
            "n_false_alarms": 0,
            "assd_mm_mean_detected": math.nan,
        },
        nan_ok=True,
    )
    total = rows["mean"]
    assert total["dice_mean"] == pytest.approx(evaluator.state.metrics["val_mean_dice"])
    assert total["dice_mean"] == pytest.approx((0 + 5 / 6 + 0) / 3)
    assert total["assd_mm_mean"] == pytest.approx(evaluator.state.metrics["val_assd_mm"])
    assert total["assd_mm_mean_detected"] == pytest.approx((2 + 1 / 3) / 2)
    assert (total["n_volumes"], total["n_misses"], total["n_false_alarms"], total["dice_n_undefined"]) == (2, 1, 1, 1)


def test_order_of_evaluation_does_not_matter(tmp_path):
    for name, cases in {"one": [FIRST, SECOND], "other": [SECOND, FIRST]}.items():
        run_evaluator(cases, [EvaluationReport(tmp_path / name)])
    for file in ("metrics.csv", "summary.csv"):
        assert read(tmp_path / "one" / file) == read(tmp_path / "other" / file)


def test_batches_that_stay_collated_are_named_too(tmp_path):
    label = {
        "label": torch.cat([(FIRST["label"] == c).float() for c in range(4)])
    }  # no postprocessing without decollation
    metric = {"output_transform": lambda output: (output["pred"], output["label"])}
    SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset([{**FIRST, **label}]), batch_size=1),
        network=CopyImage(),
        key_val_metric={"val_mean_dice": VolumeDiceHandler(**metric)},
        additional_metrics={"val_assd_mm": VolumeAssdHandler(**metric)},
        val_handlers=[EvaluationReport(tmp_path)],
        decollate=False,
    ).run()
    assert read(tmp_path / "metrics.csv")[1] == ["patient001_frame01", "RV", "0.000000", "2.000000"]


def test_second_run_replaces_the_first_and_leaves_no_temporary_file(tmp_path):
    report = EvaluationReport(tmp_path)
    evaluator = run_evaluator([FIRST], [report])
    evaluator.run()
    assert len(read(tmp_path / "metrics.csv")) == 1 + 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "summary.csv"]


def test_log_says_where_the_files_are_and_shows_the_summary(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.getLogger("ignite.engine").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        run_evaluator([FIRST, SECOND], [EvaluationReport("eval")])
    assert str(tmp_path / "eval" / "metrics.csv") in caplog.text
    assert str(tmp_path / "eval" / "summary.csv") in caplog.text
    assert "0.833 +- 0.236" in caplog.text  # Myo: 1 and 2/3


def test_monai_metrics_saver_takes_the_same_details(tmp_path):
    saver = MetricsSaver(
        str(tmp_path),
        metric_details="*",
        batch_transform=lambda batch: [b["image"].meta for b in batch],
        summary_ops="*",
    )
    run_evaluator([FIRST, SECOND], [saver])
    assert (tmp_path / "val_assd_mm_in_truth_raw.csv").exists()


def test_metric_under_another_name_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'val_dice'"):
        run_evaluator([FIRST], [EvaluationReport(tmp_path, dice="val_dice")])


def test_image_without_file_name_is_an_error(tmp_path):
    nameless = {**FIRST, "image": MetaTensor(FIRST["image"].as_tensor(), affine=FIRST["image"].affine)}
    with pytest.raises(ValueError, match="filename_or_obj"):
        run_evaluator([nameless], [EvaluationReport(tmp_path)])


def test_summary_of_classes_that_no_volume_holds_is_undefined():
    nothing, absent = np.full((2, 1), np.nan), np.zeros((2, 1), dtype=bool)
    rows = summarise(dice=nothing, assd_mm=nothing, in_pred=absent, in_truth=absent, class_names=["RV"])
    assert [row["class"] for row in rows] == ["RV", "mean"]
    assert all(math.isnan(row["dice_mean"]) and row["dice_n_undefined"] == 2 for row in rows)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("training/patient001/patient001_frame01.nii.gz", "patient001_frame01"),
        ("patient001_frame01.nii", "patient001_frame01"),
        ("scan.v2.nii.gz", "scan.v2"),
        ("notes.gz", "notes.gz"),
    ],
)
def test_case_name_drops_folder_and_nifti_suffix(path, name):
    assert case_name(path) == name


def test_failed_writing_keeps_the_old_file(tmp_path):
    target = tmp_path / "metrics.csv"
    target.write_text("old")

    def fail_while_writing():
        with write_atomically(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_while_writing()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_temporary_file_keeps_the_suffix(tmp_path):
    with write_atomically(tmp_path / "new_folder" / "labels.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("labels")
    assert (tmp_path / "new_folder" / "labels.nii.gz").read_text() == "labels"
