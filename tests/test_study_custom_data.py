"""Studies of a user's own data: grids over bundles that `python -m adapt new` wrote, their cells and their report."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import mark_finished, run_in_this_process
from PIL import Image
from test_custom_data import HIPPOCAMPUS, SHORT_EPOCHS, decathlon, plain, same_names, write_volume
from test_custom_data import organ as block
from test_custom_labels import volumes as ignored_volumes
from test_custom_labels import with_ignored

from adapt.new import new_bundle
from components.base.volume_metadata import case_name_of_item
from components.data.cases import list_cases
from components.data.custom_data import read_data
from components.data.prediction_writer import prediction_name
from components.data.slices import IGNORED
from components.data.transforms import LoadVolumed
from components.networks.unet import GreyUNet
from components.phantom.dataset import write_phantom_dataset
from components.pretrained import pretrained_file
from study.__main__ import run
from study.cells import is_finished, list_stages
from study.grid import read_grid
from study.report import write_report
from study.report.contours import draw_contours
from study.report.significance import compare_methods

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"width": 2, "steps": 1, "val_interval": 1, "canvas_size": 64, "crop_size": 64, "test_time_views": 1}
QUICK |= {"start_checkpoint": None, **SHORT_EPOCHS}


def write_grid(folder: Path, bundle: str = "./organ", **changes) -> Path:
    """A grid over one bundle: from scratch, and from there on with cases without labels."""
    methods = {
        "unet": {"title": "UNet", "bundle": bundle, "knobs": QUICK},
        "more": {
            "title": "UNet, then unlabelled",
            "bundle": bundle,
            "overlays": ["unlabelled"],
            "continues": "unet",
            "knobs": QUICK | {"unlabelled_cases": 2},
        },
    }
    grid = {"methods": methods, "labelled_cases": [1, 2], "splits": [0]} | changes
    file = folder / "grid.json"
    file.write_text(json.dumps(grid))
    return file


@pytest.fixture(params=[decathlon, plain], ids=["volumes", "pictures"])
def organ(request, tmp_path) -> Path:
    """A folder with data and, beside them, their bundle `organ`."""
    new_bundle("organ", request.param(tmp_path / "data"), tmp_path)
    return tmp_path


@pytest.fixture
def volumes(tmp_path) -> Path:
    new_bundle("organ", decathlon(tmp_path / "data"), tmp_path)
    return tmp_path


def cases_of(folder: Path, subset: str, split: int = 0) -> list[dict[str, str]]:
    return list_cases(read_data(folder / "organ/configs/data.json"), subset, split_seed=split)


def test_a_bundle_is_named_by_a_path_from_the_grids_folder(volumes, monkeypatch):
    monkeypatch.chdir("/")
    grid = read_grid(write_grid(volumes))
    assert [cell.name for cell in grid.cells] == [
        f"{method}/cases_{count}/split_0" for method in ("unet", "more") for count in (1, 2)
    ]
    assert {method.config("train") for method in grid.methods} == {volumes / "organ/configs/train.json"}
    assert grid.data.title == "Study of organ"


def test_the_number_is_handed_over_by_the_bundles_knob_and_the_data_lie_where_it_says(volumes):
    cells = {cell.name: cell for cell in read_grid(write_grid(volumes)).cells}
    training, evaluating = list_stages(cells["more/cases_2/split_0"], dataset_dir="", output_dir=volumes)
    for stage in (training, evaluating):
        assert stage.knobs["labelled_cases"] == 2
        assert "dataset_dir" not in stage.knobs
    assert training.knobs["start_checkpoint"] == str(volumes / "unet/cases_2/split_0/models/model.pt")
    moved, _ = list_stages(cells["unet/cases_1/split_0"], dataset_dir="/moved", output_dir=volumes)
    assert moved.knobs["dataset_dir"] == "/moved"


def method(bundle: str, **settings) -> dict:
    return {"title": bundle, "bundle": bundle} | settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": {"a": method("./organ"), "b": method("unet_acdc")}},
            r"expected one data set for all methods, received those of a \(.*organ/configs/data.json\) and b \(ACDC\)",
        ),
        (
            {"methods": {"a": method("./organ"), "b": method("./other")}},
            r"one data set for all methods, .* b \(.*other/configs/data.json\), which differ in dataset_dir.*: write a",
        ),
        ({"methods": {"a": method("./organs")}}, "needs .*organs/configs/evaluate.json, which does not exist"),
        (
            {"labelled_cases": [0]},
            "has 0 in labelled_cases, but no weights to start from: set start_check",
        ),
        (
            {"methods": {"a": method("./organ", overlays=["unlabelled"], labelled_cases=[0])}},
            "a user's data, which needs a labelled case: leave out labelled_cases 0",
        ),
        ({"dataset": {"patients": 4}}, "unknown dataset; expected no phantoms"),
        ({"methods": {"a": method("./organ", paper="UNET")}}, "has paper 'UNET', whose scores are of hearts: leave it"),
    ],
)
def test_a_grid_of_ones_own_data_that_makes_no_sense_is_refused(volumes, changes, message):
    new_bundle("other", plain(volumes / "more", side=20), volumes)
    with pytest.raises(ValueError, match=message):
        read_grid(write_grid(volumes, **changes))


def test_bundles_of_the_same_data_can_be_compared_and_a_file_evaluated_without_training(volumes):
    shutil.copytree(volumes / "organ", volumes / "changed")
    start = str(volumes / "start.pt")
    methods = {"a": method("./organ"), "b": method("./changed", knobs={"start_checkpoint": start}, labelled_cases=[0])}
    *_, cell = read_grid(write_grid(volumes, methods=methods)).cells
    (evaluating,) = list_stages(cell, dataset_dir="", output_dir=volumes)
    assert evaluating.parser().get_parsed_content("ckpt_path") == start


def test_hearts_of_ones_own_can_be_scored_with_the_weights_that_come_with_the_package(tmp_path):
    labels = {"0": "background", "1": "RV", "2": "Myo", "3": "LV"}
    data = decathlon(tmp_path / "data", real=False, labels=labels)
    _, label = block(0)
    label[5, 11] = 3
    write_volume(data / "labelsTr/case_0.nii.gz", label)
    new_bundle("organ", data, tmp_path)
    methods = {"as_it_comes": method("./organ"), "more": method("./organ", title="more", overlays=["unlabelled"])}
    grid = read_grid(write_grid(tmp_path, methods=methods, labelled_cases=[0]))
    as_it_comes, more = (list_stages(cell, dataset_dir="", output_dir=tmp_path) for cell in grid.cells)
    assert [stage.name for stage in as_it_comes] == ["evaluating"]
    assert as_it_comes[0].parser().get_parsed_content("ckpt_path") == pretrained_file("unet.pt")
    assert [stage.name for stage in more] == ["training", "evaluating"]


def test_a_study_of_ones_own_data_runs_up_to_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr("study.cells._run", run_in_this_process)
    new_bundle("organ", plain(tmp_path / "data"), tmp_path)
    grid, output = write_grid(tmp_path, labelled_cases=[1]), tmp_path / "study"
    run(str(grid), str(output))
    assert all(is_finished(output / cell.name) for cell in read_grid(grid).cells)
    started = json.loads((output / "more/cases_1/split_0/training.json").read_text())["start_checkpoint"]
    assert started == str(output / "unet/cases_1/split_0/models/model.pt")
    table = pd.read_csv(output / "table_1.csv")
    assert list(table["method"]) == ["UNet", "UNet, then unlabelled"]
    assert "ASSD in pixels" in table
    assert set(pd.read_csv(output / "scores.csv")["assd_unit"]) == {"pixels"}
    assert (output / "contours.png").is_file()


def test_a_head_and_a_unet_are_compared_on_ones_own_data_and_the_heads_encoder_is_shown(volumes, monkeypatch):
    monkeypatch.setattr("study.cells._run", run_in_this_process)
    new_bundle("head", volumes / "data", volumes, network="linearhead")
    of_head = {name: value for name, value in QUICK.items() if name != "width"}
    methods = {"unet": method("./organ", knobs=QUICK), "head": method("./head", knobs=of_head)}
    grid, output = write_grid(volumes, methods=methods, labelled_cases=[1]), volumes / "study"
    run(str(grid), str(output))
    assert set(pd.read_csv(output / "table_1.csv")["method"]) == {"./organ", "./head"}
    page = re.sub(r"data:image/[^\"]*", "", (output / "report.html").read_text())
    has_picture = HIPPOCAMPUS.is_dir()  # phantoms of volumes have too few slices for one
    assert (output / "embeddings.png").is_file() == has_picture
    assert ("slices of the test cases of split 0." in page) == has_picture
    assert not re.search(r"patient|phantom", page)


def finish(folder: Path, cell, dice: float) -> None:
    """A finished cell that predicts the truth of every test case and is scored with some Dice."""
    output = folder / "study" / cell.name / "eval"
    output.mkdir(parents=True)
    mark_finished(output.parent)
    (output.parent / "cell.json").write_text(
        json.dumps(json.loads((output.parent / "cell.json").read_text()) | {"versions": {"monai": "1"}})
    )
    data = json.loads((folder / "organ/configs/data.json").read_text())
    names = data["class_names"]
    cases = cases_of(folder, "test", cell.split)
    for case in cases:
        load = LoadVolumed("label", label_values=data["label_values"], ignore_label=data["ignore_label"])
        label = load({"label": case["label"]})["label"]
        label[label == IGNORED] = 0
        array, file = label[0].numpy().astype(np.uint8), output / prediction_name(case)
        if data["pictures"]:
            picture = Image.fromarray(array[..., 0].T)
            picture.putpalette([0, 0, 0, 9, 9, 9])
            picture.save(file)
        else:
            write_volume(file, array, label.affine.numpy())
    rows = [(case_name_of_item(case), name, dice, 1.5) for case in cases for name in names]
    pd.DataFrame(rows, columns=["case", "class", "dice", "assd_mm"]).to_csv(output / "metrics.csv", index=False)
    summary = [(name, len(cases), 0, 0) for name in (*names, "mean")]
    columns = ["class", "n_volumes", "n_misses", "n_false_alarms"]
    pd.DataFrame(summary, columns=columns).to_csv(output / "summary.csv", index=False)


def test_the_report_is_of_the_bundles_classes_and_says_nothing_of_hearts(organ):
    grid = read_grid(write_grid(organ, splits=[0, 1], labelled_cases=[1, 2, None]))
    for number, cell in enumerate(grid.cells):
        finish(organ, cell, 0.5 + number / 100)
    output = organ / "study"
    page = write_report(grid, output, dataset_dir="").read_text()
    pictures = (organ / "data/images").is_dir()
    names, length = (["foreground"], "pixels") if pictures else (["Anterior", "Posterior"], "mm")
    table = pd.read_csv(output / "table_1.csv")
    columns = ["labelled cases", "method", *names, "mean", f"ASSD in {length}", "misses", "splits"]
    assert list(table) == columns
    assert list(table["labelled cases"]) == [1, 1, 2, 2, 6, 6]  # 6 of 8 cases train
    assert {path.stem for path in output.glob("*.png")} == {"dice_by_cases", "contours"}
    assert "labelled_cases" in pd.read_csv(output / "scores.csv")
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page) == ["Methods", "Significance", "State"]
    assert "<title>Study of organ</title>" in page
    text = re.sub(r"data:image/[^\"]*", "", page)
    assert not re.search(r"patient|cardiac|ACDC|paper|frame", text)
    assert pictures == ("voxel" not in text)


def test_contours_lie_on_the_image_as_the_network_sees_it(organ):
    grid = read_grid(write_grid(organ, labelled_cases=[1]))
    for cell in grid.cells:
        finish(organ, cell, 0.5)
    figure = draw_contours(grid.cells, organ / "study", dataset_dir="", labelled_cases=1)
    rows = [axes for axes in figure.axes if axes.get_ylabel()]
    assert len(rows) == 2 - (len(cases_of(organ, "test")) == 1)
    pictures = (organ / "data/images").is_dir()
    assert pictures == ("slice" not in rows[0].get_ylabel())
    truth, prediction = figure.axes[0], figure.axes[1]
    shapes = [
        [path.get_extents().extents.tolist() for path in axes.collections[0].get_paths()]
        for axes in (truth, prediction)
    ]
    assert shapes[0] == shapes[1]
    if pictures:
        case = rows[0].get_ylabel().splitlines()[1]
        width, height = Image.open(organ / f"data/images/{case}.png").size
        assert truth.images[0].get_array().shape == (height, width)
        mask = np.argwhere(np.asarray(Image.open(organ / f"data/masks/{case}.png")))
        top, left = mask.min(axis=0)
        bottom, right = mask.max(axis=0)
        assert shapes[0] == [[left - 0.5, top - 0.5, right + 0.5, bottom + 0.5]]


def test_cases_of_one_group_are_one_in_the_tests_of_significance(volumes):
    data = json.loads((volumes / "organ/configs/data.json").read_text())
    for number, case in enumerate(data["training"]):
        case["group"] = f"person_{number // 2}"
    (volumes / "organ/configs/data.json").write_text(json.dumps(data))
    grid = read_grid(write_grid(volumes))
    rows = [
        {"method": key, "title": key, "ablation": "", "labelled_patients": 1, "split": 0, "class": "A"}
        | {"case": case_name_of_item(case), "dice": 0.5 + 0.1 * (key == "unet")}
        for key in ("unet", "more")
        for case in data["training"]
    ]
    (pair,) = compare_methods(pd.DataFrame(rows), grid.methods, grid.data).to_dict("records")
    assert pair["n_patients"] == len(data["training"]) / 2
    data["training"].append(data["training"][0] | {"image": "elsewhere/case_0.nii.gz"})
    (volumes / "organ/configs/data.json").write_text(json.dumps(data))
    groups = read_grid(write_grid(volumes)).data.groups
    assert {"imagesTr_case_0", "elsewhere_case_0", "case_1"} < set(groups)
    assert groups["elsewhere_case_0"] == groups["imagesTr_case_0"] == groups["case_1"] == "person_0"
    data["training"].append(data["training"][0] | {"image": "elsewhere/case_0.nii"})
    (volumes / "organ/configs/data.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"would both have the case name elsewhere_case_0, .* rename one"):
        read_grid(write_grid(volumes))


def test_a_study_of_volumes_of_one_name_reports_them_by_their_folders(tmp_path):
    data = same_names(tmp_path / "data")
    new_bundle("organ", data, tmp_path)
    grid = read_grid(write_grid(tmp_path, labelled_cases=[1]))
    for cell in grid.cells:
        finish(tmp_path, cell, 0.5)
    write_report(grid, tmp_path / "study", dataset_dir="")
    shown = set(pd.read_csv(tmp_path / "study/scores.csv")["case"])
    assert shown == {case_name_of_item(case) for case in cases_of(tmp_path, "test")}
    assert all(re.fullmatch(r"p\d\d_t2", name) for name in shown)
    figure = draw_contours(grid.cells, tmp_path / "study", dataset_dir="", labelled_cases=1)
    assert {axes.get_ylabel().splitlines()[1] for axes in figure.axes if axes.get_ylabel()} <= shown


def test_voxels_that_nobody_annotated_are_not_drawn_and_do_not_choose_the_slice(tmp_path):
    names = {"background": 0, "top": 1, "bottom": 2, "ignore": 3}
    data = ignored_volumes(tmp_path / "data", [with_ignored(number) for number in range(8)], names)
    new_bundle("organ", data, tmp_path)
    grid = read_grid(write_grid(tmp_path, labelled_cases=[1]))
    for cell in grid.cells:
        finish(tmp_path, cell, 0.5)
    figure = draw_contours(grid.cells, tmp_path / "study", dataset_dir="", labelled_cases=1)
    truth = figure.axes[0]
    assert truth.get_ylabel().endswith("slice 1 of 6")  # slices 2 and 3 are not annotated
    assert len(truth.collections) == 2
    right, down = np.ptp(truth.get_xlim()), np.ptp(truth.get_ylim())
    assert (right, down) == (40, 36)  # squares from 8 to 32 and 17 to 23, a margin of 15, the border at 0 and 40


def test_with_unlabelled_patients_alone_the_trained_network_is_scored(tmp_path, monkeypatch):
    monkeypatch.setattr("study.cells._run", run_in_this_process)
    data = write_phantom_dataset(str(tmp_path / "phantoms"), patients=4, size_hw_d=(64, 48, 3))
    torch.manual_seed(0)
    start = tmp_path / "start.pt"
    torch.save(GreyUNet(out_channels=4, width=2).state_dict(), start)
    knobs = {"start_checkpoint": str(start), "canvas_size": 32, "crop_size": 32, "epochs": 1, "phantom_share": 0}
    knobs |= {"width": 2, "val_interval": 1, "test_time_views": 2}
    of_both = {"bundle": "unet_acdc", "knobs": knobs}
    methods = {
        "unet": of_both | {"title": "UNet"},
        "more": of_both | {"title": "then unlabelled", "overlays": ["unlabelled"], "continues": "unet"},
    }
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps({"methods": methods, "labelled_cases": [0, 1], "splits": [0]}))
    run(str(grid), str(tmp_path / "study"), dataset_dir=data)
    assert not (tmp_path / "study/unet/patients_0/split_0/models").exists()
    assert (tmp_path / "study/more/patients_0/split_0/models/model.pt").is_file()
    scored = [tmp_path / f"study/{key}/patients_0/split_0/eval/metrics.csv" for key in methods]
    assert len({file.read_text() for file in scored}) == 2
    started = json.loads((tmp_path / "study/more/patients_1/split_0/training.json").read_text())["start_checkpoint"]
    assert started == str(tmp_path / "study/unet/patients_1/split_0/models/model.pt")
    assert "paper's Dice" not in pd.read_csv(tmp_path / "study/table_1.csv")
