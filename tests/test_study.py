import json
import logging
import re

import pytest
from conftest import REPOSITORY

from components.phantom.dataset import write_phantom_dataset
from study.__main__ import run
from study.cells import CellError, finished, read_record, run_cell
from study.grid import Cell, read_grid
from study.report import to_markdown

SMALL = {
    "canvas_size": 64,
    "image_size": 64,
    "test_time_views": 1,
    "epochs": 1,
    "views": 1,
    "train#trainer#prepare_batch#pool_size": 4,
}
METHODS = {
    "as_it_comes": {
        "title": "as it comes",
        "bundle": "linearhead_acdc",
        "overlays": ["tiny"],
        "labelled_patients": [0],
    },
    "adapted": {"title": "adapted", "bundle": "linearhead_acdc", "overlays": ["tiny"]},
}


def write_grid(path, **changes):
    grid = {"methods": METHODS, "labelled_patients": [1, 2], "splits": [0, 3]} | changes
    path.write_text(json.dumps(grid))
    return path


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_phantom_dataset(str(tmp_path_factory.mktemp("data") / "phantoms"), patients=4, size_hw_d=(64, 48, 3))


def write_finished(folder, dice, seconds=60.0, interrupted=False):
    (folder / "eval").mkdir(parents=True)
    rows = [f"{name},{value}" for name, value in zip(("RV", "Myo", "LV", "mean"), dice, strict=True)]
    (folder / "eval" / "summary.csv").write_text("\n".join(["class,dice_mean", *rows]))
    record = {"commands": {"training": []}, "seconds": {"training": seconds}, "interrupted": interrupted}
    (folder / "cell.json").write_text(json.dumps(record))


def test_a_grid_lists_every_method_and_count_split_by_split(tmp_path):
    names = [cell.name for cell in read_grid(write_grid(tmp_path / "grid.json"))]
    first = ["as_it_comes/patients_0/split_0", "adapted/patients_1/split_0", "adapted/patients_2/split_0"]
    assert names == [*first, *(name.replace("split_0", "split_3") for name in first)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, "unknown method; expected some of .*methods"),
        ({"methods": {"m": {"title": "m", "bundle": "cnnhead_acdc", "knob": {}}}}, "method m of .*unknown knob;"),
        ({"methods": {"m": {"title": "m"}}}, "method m of .*bundle missing"),
        ({"methods": {"m": {"title": "m", "bundle": "cnn"}}}, "needs .*cnn.configs.train.json, which does not exist"),
        ({"methods": {"m": {"title": "m", "bundle": "cnnhead_acdc", "overlays": ["huge"]}}}, "huge.json"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_grid(write_grid(tmp_path / "grid.json", **changes))


def test_the_shipped_grids_are_readable():
    for path in (REPOSITORY / "study").glob("*.json"):
        assert read_grid(path)


def test_the_table_has_mean_and_spread_over_the_finished_splits(tmp_path):
    cells = read_grid(write_grid(tmp_path / "grid.json", splits=[0, 1, 2]))
    write_finished(tmp_path / "adapted/patients_1/split_0", (0.5, 0.6, 0.7, 0.6), seconds=60)
    write_finished(tmp_path / "adapted/patients_1/split_1", (0.7, 0.6, 0.8, 0.7), seconds=9000, interrupted=True)
    lines = to_markdown(cells, tmp_path).splitlines()
    assert lines[2:] == ["| adapted | 1 | 60.0 ± 14.1 | 60.0 ± 0.0 | 75.0 ± 7.1 | 65.0 ± 7.1 | 2 | 60 |"]


def test_a_study_runs_its_cells_once_and_writes_their_table(phantoms, tmp_path, caplog):
    methods = {name: method | {"knobs": SMALL} for name, method in METHODS.items()}
    grid = write_grid(tmp_path / "grid.json", methods=methods, splits=[0], labelled_patients=[1])
    output = tmp_path / "study"
    with caplog.at_level(logging.INFO):
        run(str(grid), phantoms, str(output))
    table = (output / "table.md").read_text()
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:]] == [["| as it comes", "0"], ["| adapted", "1"]]
    for cell in read_grid(grid):
        assert finished(read_record(output / cell.name))
        assert not run_cell(cell, dataset_dir=phantoms, output_dir=output.resolve())
    log = (output / "as_it_comes/patients_0/split_0/log.txt").read_text()
    assert re.search("Restored all variables from .*linear_head.pt", log)


def test_a_cell_with_other_settings_is_not_taken_for_this_one(tmp_path):
    cell = Cell("m", "m", "linearhead_acdc", labelled_patients=1, split=0)
    write_finished(tmp_path / cell.name, (0.5, 0.6, 0.7, 0.6))
    with pytest.raises(ValueError, match="other settings"):
        run_cell(cell, dataset_dir="/data", output_dir=tmp_path)


def test_a_cell_that_fails_says_why_and_is_not_finished(tmp_path):
    cell = Cell("m", "m", "linearhead_acdc", labelled_patients=1, split=0)
    with pytest.raises(CellError, match=r"exit status 1: FileNotFoundError: .*nowhere is not a folder"):
        run_cell(cell, dataset_dir=str(tmp_path / "nowhere"), output_dir=tmp_path)
    assert read_record(tmp_path / cell.name) is None
