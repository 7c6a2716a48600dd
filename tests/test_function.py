"""Ventricular function: from label maps to volumes, ED and ES, ejection fractions; and the tables of a folder."""

import logging
import math
import re
import shutil

import monai.bundle
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image, ImageSequence
from test_cine import segment

from components.function.measures import (
    body_surface_m2,
    find_phases,
    heart_rate_per_min,
    measure_function,
    volumes_ml,
)
from components.function.page import draw_bulls_eyes, draw_frames
from components.function.report import FunctionReport
from components.phantom.dataset import write_phantom_dataset

NAN = float("nan")
ASKED_FOR = (
    "case,lv_edv_ml,lv_esv_ml,lv_ef_percent,rv_edv_ml,rv_esv_ml,rv_ef_percent,lv_mass_g,predicted_dice,flag,reason"
)


class GreyIsClass(torch.nn.Module):
    """Segment images whose grey values are their labels."""

    def forward(self, images):
        return -torch.cat([(images - label) ** 2 for label in range(4)], dim=1)


def beat(frames, ed=0, systole=10, share=1.0):
    """The left ventricle's volume in frames that cover a share of the cycle: 120 ml at ED, 50 ml at ES."""
    since = (np.arange(frames) - ed) % round(frames / share)
    rest = round(frames / share) - systole
    progress = np.where(since <= systole, since / systole, 1 - (since - systole) / rest)
    return 85 + 35 * np.cos(np.pi * progress)


def test_volumes_are_voxels_times_their_size():
    labels = np.repeat([0, 1, 2, 3], [10, 20, 30, 40]).reshape(10, 10, 1)
    assert volumes_ml(labels, (2, 5, 10)) == pytest.approx({"RV": 2, "Myo": 3, "LV": 4})


@pytest.mark.parametrize(("ed", "systole"), [(0, 10), (3, 9), (24, 8)])
def test_ed_and_es_are_found_on_a_curve_with_errors(ed, systole):
    curve = beat(25, ed, systole) + np.random.default_rng(0).normal(0, 1, 25)
    found = find_phases(curve)
    distances = [abs((frame - true + 12) % 25 - 12) for frame, true in zip(found, (ed, ed + systole), strict=True)]
    assert max(distances) <= 1


def test_a_curve_of_systole_alone_ends_at_es():
    assert find_phases(beat(15, systole=14, share=0.5)) == (0, 14)


def test_two_frames_are_ed_and_es_in_either_order():
    assert find_phases([50, 120]) == (1, 0)


def test_the_heart_rate_follows_from_the_frame_time_of_a_whole_cycle():
    assert heart_rate_per_min(0.04, beat(25)) == pytest.approx(60)
    assert math.isnan(heart_rate_per_min(0.04, beat(15, systole=14, share=0.5)))  # systole only
    assert math.isnan(heart_rate_per_min(1.0, beat(25)))  # no heart takes 25 s
    assert math.isnan(heart_rate_per_min(NAN, beat(25)))
    assert math.isnan(heart_rate_per_min(0.0, beat(25)))


def test_the_measures_of_a_patient():
    found = measure_function(
        {"RV": 100, "Myo": 100, "LV": 120}, {"RV": 75, "Myo": 80, "LV": 60}, heart_rate=70, surface_m2=2.0
    )
    assert found == pytest.approx(
        {
            "lv_edv_ml": 120,
            "lv_esv_ml": 60,
            "lv_sv_ml": 60,
            "lv_ef_percent": 50,
            "rv_edv_ml": 100,
            "rv_esv_ml": 75,
            "rv_sv_ml": 25,
            "rv_ef_percent": 25,
            "lv_mass_g": 105,
            "heart_rate_per_min": 70,
            "lv_output_l_per_min": 4.2,
            "body_surface_m2": 2,
            "lv_edv_ml_per_m2": 60,
            "lv_esv_ml_per_m2": 30,
            "lv_sv_ml_per_m2": 30,
            "rv_edv_ml_per_m2": 50,
            "rv_esv_ml_per_m2": 37.5,
            "rv_sv_ml_per_m2": 12.5,
            "lv_mass_g_per_m2": 52.5,
        }
    )


def test_what_is_not_known_is_not_measured():
    only_ed = measure_function({"RV": 100, "Myo": 100, "LV": 120}, None)
    assert {name for name, value in only_ed.items() if not math.isnan(value)} == {"lv_edv_ml", "rv_edv_ml", "lv_mass_g"}
    empty = measure_function({"RV": 0, "Myo": 0, "LV": 0}, {"RV": 0, "Myo": 0, "LV": 0})
    assert math.isnan(empty["lv_ef_percent"])
    assert empty["lv_edv_ml"] == 0


def test_the_surface_of_a_body():
    assert body_surface_m2(180, 80) == 2
    assert math.isnan(body_surface_m2(NAN, 80))
    assert math.isnan(body_surface_m2(0, 80))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two patients and their cines, whose images show their labels; the labels' own files are damaged."""
    root = tmp_path_factory.mktemp("data") / "study"
    write_phantom_dataset(str(root), patients=2, size_hw_d=(48, 40, 4), series=True)
    truth = {}
    for path in sorted(root.rglob("*_gt.nii.gz")):
        labels = nib.load(path)
        image = path.with_name(path.name.replace("_gt", ""))
        voxel_ml = math.prod(labels.header.get_zooms()[:3]) / 1000
        counts = [np.count_nonzero(np.asarray(labels.dataobj) == label, axis=(0, 1, 2)) for label in (1, 2, 3)]
        truth[image.name.removesuffix(".nii.gz")] = np.stack(counts) * voxel_ml
        shown = np.asarray(labels.dataobj) + np.float32(0.125)  # whole values would be taken for labels
        nib.save(nib.Nifti1Image(shown, labels.affine, labels.header, dtype=np.float32), image)
        path.write_bytes(b"never to be read")
    return root, truth


def test_every_patient_and_every_cine_has_its_row(study, tmp_path, caplog):
    root, truth = study
    alone = next(root.rglob("patient001_frame01.nii.gz"))
    (root / "other").mkdir(exist_ok=True)
    (root / "other" / "volume.nii.gz").write_bytes(alone.read_bytes())
    caplog.set_level(logging.INFO)
    segment(root, tmp_path, network=GreyIsClass(), smoothing=0, handlers=[FunctionReport(str(tmp_path))])
    table = pd.read_csv(tmp_path / "function.csv").set_index("case")
    assert list(table.index) == ["patient001", "patient001_4d", "patient002", "patient002_4d", "volume"]
    assert set(ASKED_FOR.split(",")) <= {"case", *table.columns}
    assert "Ventricular function of 5 cases" in caplog.text
    walls = pd.read_csv(tmp_path / "wall_thickness.csv").set_index("case")
    assert walls.groupby("case").size().to_dict() == dict.fromkeys(table.index, 16)
    for name in ("patient001", "patient002"):
        info = (root / "training" / name / "Info.cfg").read_text().split()
        frames = {key: int(info[info.index(f"{key}:") + 1]) for key in ("ED", "ES")}
        ed, es = (truth[f"{name}_frame{frames[key]:02d}"] for key in ("ED", "ES"))
        for case in (name, f"{name}_4d"):
            row = table.loc[case]
            assert (row["ed_frame"], row["es_frame"], row["ed_es_by"]) == (frames["ED"], frames["ES"], "Info.cfg")
            assert row["lv_edv_ml"] == pytest.approx(ed[2], abs=0.01)
            assert row["rv_esv_ml"] == pytest.approx(es[0], abs=0.01)
            assert row["lv_ef_percent"] == pytest.approx(100 * (1 - es[2] / ed[2]), abs=0.01)
            assert row["lv_mass_g"] == pytest.approx(1.05 * ed[1], abs=0.01)
            assert walls.loc[case, "ed_mm"].mean() == pytest.approx(9, abs=2)
            assert walls.loc[case, "thickening_percent"].median() > 20
            assert row["lv_edv_ml_per_m2"] == pytest.approx(ed[2] / row["body_surface_m2"], abs=0.1)
        assert 50 <= table.loc[f"{name}_4d", "heart_rate_per_min"] <= 90
        assert math.isnan(table.loc[name, "lv_output_l_per_min"])
        assert (tmp_path / f"{name}_frame{frames['ES']:02d}_pred.nii.gz").is_file()
        with Image.open(tmp_path / f"{name}_4d_cine.webp") as cine:
            lasts_ms = [frame.convert("L").info["duration"] for frame in ImageSequence.Iterator(cine)]
            beat_ms = 6e4 / table.loc[f"{name}_4d", "heart_rate_per_min"]
            assert sum(lasts_ms) == pytest.approx(beat_ms, abs=5 * len(truth[f"{name}_4d"][0]))
        curve = pd.read_csv(tmp_path / f"{name}_4d_volumes.csv")
        assert list(curve.columns) == ["frame", "time_ms", "lv_ml", "rv_ml", "myo_ml"]
        found = curve[["rv_ml", "myo_ml", "lv_ml"]].to_numpy().T
        assert found == pytest.approx(truth[f"{name}_4d"], abs=0.01)
        assert curve["time_ms"][1] == pytest.approx(
            6e4 / table.loc[f"{name}_4d", "heart_rate_per_min"] / len(curve), abs=0.1
        )
    volume = table.loc["volume"]
    assert (volume["ed_frame"], volume["ed_es_by"]) == (1, "only frame")
    assert volume["lv_edv_ml"] == table.loc["patient001", "lv_edv_ml"]
    assert math.isnan(volume["lv_ef_percent"])
    assert walls.loc["volume", "ed_mm"].tolist() == walls.loc["patient001", "ed_mm"].tolist()
    assert walls.loc["volume", "es_mm"].isna().all()


def test_a_page_for_each_case_shows_what_was_measured_without_any_network(study, tmp_path):
    root, _ = study
    segment(root / "training/patient002", tmp_path, network=GreyIsClass(), handlers=[FunctionReport(str(tmp_path))])
    summary = (tmp_path / "function.html").read_text()
    assert re.findall(r'href="(.*?)"', summary) == ["patient002.html", "patient002_4d.html"]
    table = pd.read_csv(tmp_path / "function.csv").set_index("case")
    for case, headings in {"patient002": [], "patient002_4d": ["Cine", "Volumes over time"]}.items():
        page = (tmp_path / f"{case}.html").read_text()
        sections = ["Predicted Dice of each slice", *headings, "Contours at ED", "Contours at ES", "Wall thickness"]
        assert re.findall("<h2>(.*?)</h2>", page) == sections
        assert f"{table.loc[case, 'lv_ef_percent']:.2f}" in page
        assert f"{table.loc[case, 'lv_ef_percent']:.2f}" in summary
        sources = re.findall(r'src="(.*?)[,"]', page)
        assert set(sources) <= {"data:image/webp;base64", "patient002_4d_cine.webp"}
        assert "http" not in page
        assert len(page) < 400_000
    with Image.open(tmp_path / "patient002_4d_cine.webp") as cine:
        assert 1 < cine.n_frames <= table.loc["patient002_4d", "frames"]  # equal frames become one


def test_frames_are_drawn_at_the_size_shown_with_the_voxels_shape_and_outlines():
    labels = np.zeros((40, 20, 7), dtype=np.uint8)
    labels[10:30, 5:15, 6] = 2
    image = np.full(labels.shape, 50.0)
    image[0, 0] = 0
    extent = (0, 40), (0, 20)
    (picture,) = draw_frames([(image, labels)], extent, spacing_mm=(1, 1.5), classes={"RV": 1, "Myo": 2, "LV": 3})
    assert picture.size == (5 * 200, 2 * 150)  # a tile of 40 by 30 mm is 200 pixels wide
    pixels = np.asarray(picture)[150:, 200:400]  # the seventh slice: second row and column
    coloured = np.argwhere(np.ptp(pixels.astype(int), axis=2) > 0)
    assert (coloured.min(axis=0), coloured.max(axis=0)) == (pytest.approx((37, 50), abs=1), pytest.approx((112, 149)))
    assert not np.ptp(np.asarray(picture)[:150], axis=2).any()  # slices without labels are grey
    assert np.ptp(pixels[60:90, 80:120]) == 0  # so is the inside of an outline


def test_the_bulls_eye_has_the_anterior_wall_on_top_and_the_septum_left():
    thickness = np.arange(1.0, 17)
    thickness[4] = NAN
    (axes,) = draw_bulls_eyes({"ED, mm": thickness}).axes
    places = {text.get_text(): text.get_position() for text in axes.texts}
    assert places["1"][0] == places["7"][0] == places["13"][0] == pytest.approx(np.pi / 2)
    assert places["14"][0] == pytest.approx(np.pi)  # counter-clockwise from the right
    assert places["4"][0] == pytest.approx(1.5 * np.pi)
    assert places["1"][1] > places["7"][1] > places["13"][1]
    assert "5" not in places


def test_patients_of_one_name_in_two_folders_are_told_apart_by_these(study, tmp_path):
    root, truth = study
    for folder in ("one", "two"):
        shutil.copytree(
            root / "training/patient001", tmp_path / folder / "patient001", ignore=shutil.ignore_patterns("*_4d*")
        )
    segment(tmp_path, tmp_path / "out", network=GreyIsClass(), handlers=[FunctionReport(str(tmp_path / "out"))])
    table = pd.read_csv(tmp_path / "out/function.csv").set_index("case")
    assert list(table.index) == ["one_patient001_patient001", "two_patient001_patient001"]
    assert table["lv_edv_ml"].tolist() == pytest.approx(2 * [truth["patient001_4d"][2].max()], rel=0.05)
    assert (tmp_path / "out/two_patient001_patient001.html").is_file()


def test_a_cine_alone_is_measured_at_the_extremes_of_its_curve(study, tmp_path):
    root, truth = study
    path = tmp_path / "in" / "cine.nii.gz"
    path.parent.mkdir()
    path.write_bytes((root / "training/patient002/patient002_4d.nii.gz").read_bytes())
    report = FunctionReport(str(tmp_path), heart_rate=60)
    segment(path, tmp_path, network=GreyIsClass(), smoothing=0, handlers=[report])
    (row,) = pd.read_csv(tmp_path / "function.csv").to_dict("records")
    lv = truth["patient002_4d"][2]
    assert row["ed_es_by"] == "LV volume"
    assert abs(row["ed_frame"] - 1 - lv.argmax()) <= 1
    assert abs(row["es_frame"] - 1 - lv.argmin()) <= 1
    assert row["lv_edv_ml"] == pytest.approx(lv.max(), rel=0.02)
    assert row["lv_output_l_per_min"] == pytest.approx(row["lv_sv_ml"] * 0.06, abs=0.01)


def test_cases_that_were_segmented_are_measured_where_another_fails(study, tmp_path):
    root, _ = study
    (tmp_path / "in").mkdir()
    source = root / "training/patient001/patient001_frame01.nii.gz"
    (tmp_path / "in" / "good.nii.gz").write_bytes(source.read_bytes())
    (tmp_path / "in" / "damaged.nii.gz").write_bytes(source.read_bytes()[:100])
    with pytest.raises(RuntimeError, match="1 of 2 volumes failed"):
        segment(tmp_path / "in", tmp_path, network=GreyIsClass(), handlers=[FunctionReport(str(tmp_path))])
    assert list(pd.read_csv(tmp_path / "function.csv")["case"]) == ["good"]


def test_a_model_of_other_classes_and_a_heart_that_stands_still_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a model of the classes RV, Myo, LV, received one of liver"):
        FunctionReport(str(tmp_path), class_names=["liver"])
    with pytest.raises(ValueError, match="expected heart_rate in beats per minute"):
        FunctionReport(str(tmp_path), heart_rate=0)


@pytest.mark.parametrize(
    "bundle",
    [
        pytest.param("autosam_acdc", marks=pytest.mark.slow),
        pytest.param("cnnhead_acdc", marks=pytest.mark.slow),
        "linearhead_acdc",
        "unet_acdc",
    ],
)
def test_every_bundle_measures_a_cine_by_one_command(bundle, tmp_path):
    write_phantom_dataset(str(tmp_path / "data"), patients=1, size_hw_d=(64, 56, 2))
    frames = [nib.load(path) for path in sorted((tmp_path / "data/training/patient001").glob("*_frame??.nii.gz"))]
    voxels = np.stack([frame.dataobj for frame in frames], axis=-1)
    nib.save(nib.Nifti1Image(voxels, frames[0].affine), tmp_path / "cine.nii.gz")
    configs = REPOSITORY / "bundles" / bundle / "configs"
    monai.bundle.run(
        "measuring",
        config_file=[str(configs / f"{name}.json") for name in ("inference", "function")],
        logging_file=False,
        dataset_dir=str(tmp_path / "cine.nii.gz"),
        output_dir=str(tmp_path / "out"),
        test_time_views=1,
    )
    assert nib.load(tmp_path / "out/cine_pred.nii.gz").shape == (64, 56, 2, 2)
    (row,) = pd.read_csv(tmp_path / "out/function.csv").to_dict("records")
    assert {row["ed_frame"], row["es_frame"]} == {1, 2}
    assert row["lv_edv_ml"] > row["lv_esv_ml"] > 0
