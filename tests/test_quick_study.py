"""A study as a command, up to its report: on local workers, in small from end to end, and killed and continued."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, run_in_this_process
from monai.bundle import ConfigParser

from study.__main__ import run
from study.cells import is_finished, read_record
from study.execution import with_preparations
from study.grid import read_grid

GRID = REPOSITORY / "study/quick.json"
FIGURES = ("bland_altman", "contours", "dice_by_patients", "embeddings")
TABLES = ("ablation_depth", "clinical", "significance", "table_1")
KILLS = 12
# For a study of the same kinds of methods in half a minute: those left out are trained like the CNN head.
LEFT_OUT = ("linear", "autosam", "autosam_along")
SMALL_IMAGES = {"canvas_size": 64, "crop_size": 64}
SMALL_KNOBS = {
    "unet_acdc": {**SMALL_IMAGES, "width": 2, "steps": 2},
    "cnnhead_acdc": {**SMALL_IMAGES, "image_size": 64},
    "sambox_acdc": {"image_size": 64},
}
SMALL_START = {**SMALL_IMAGES, "width": 2, "epochs": 1}


@dataclass(frozen=True)
class Study:
    """A finished study, and how many volumes of its test patients each cell scores."""

    grid: Path
    output: Path
    n_volumes: int


def command(output, *options):
    return [sys.executable, "-m", "study", "run", "--output_dir", str(output), "--threads", "1", *options]


def finish(output, *options):
    done = subprocess.run(command(output, *options), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def report_of(output):
    """The content of all files of a report, by file name."""
    files = sorted(path for path in output.iterdir() if path.is_file())
    return {path.name: path.read_bytes() for path in files}


def tables_of(output):
    """Those of them that hold numbers."""
    return {name: content for name, content in report_of(output).items() if name.endswith((".csv", ".md", ".tex"))}


def write_small_grid(folder):
    """Write the quick study with smaller images, networks and trainings; its CNN head starts from random weights."""
    grid = json.loads(GRID.read_text())
    grid["dataset"] = {"patients": 4, "size_hw_d": [64, 56, 4]}
    for key in LEFT_OUT:
        del grid["methods"][key]
    del grid["methods"]["unet"]["labelled_cases"]
    for method in grid["methods"].values():
        method["knobs"] |= SMALL_KNOBS[method["bundle"]]
        if "start" in method:
            steps = {"steps_per_epoch": 2} if "steps_per_epoch" in method["start"]["knobs"] else {}
            method["start"]["knobs"] |= SMALL_START | steps
    knobs = grid["methods"]["cnn"]["knobs"]
    parser = ConfigParser()
    parser.read_config(str(REPOSITORY / "bundles/cnnhead_acdc/configs/train.json"))
    parser.update(knobs | {"start_checkpoint": None})
    knobs["start_checkpoint"] = str(folder / "cnn_head.pt")
    torch.save(parser.get_parsed_content("network_def").state_dict(), knobs["start_checkpoint"])
    file = folder / "grid.json"
    file.write_text(json.dumps(grid))
    return file


@pytest.fixture(scope="module", params=["small", pytest.param("quick", marks=pytest.mark.slow)])
def study(request, tmp_path_factory):
    """A finished study, run in this process, which has started."""
    folder = tmp_path_factory.mktemp(request.param)
    grid, n_volumes = (GRID, 6) if request.param == "quick" else (write_small_grid(folder), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("study.cells._run", run_in_this_process)
        if request.param == "small":  # the pictures of a cell, of which a report has none, take half of its time
            patch.setattr("components.evaluation.SaveOverlayd.__call__", lambda _self, data: data)
        run(str(grid), str(folder / "study"))
    return Study(grid, folder / "study", n_volumes)


def test_every_method_ends_in_every_part_of_the_report(study):
    grid = read_grid(study.grid)
    assert all(is_finished(study.output / task.name) for task in with_preparations(grid.cells))
    expected = {f"{name}{suffix}" for name in FIGURES for suffix in (".png", ".svg")}
    expected |= {f"{name}{suffix}" for name in TABLES for suffix in (".csv", ".md", ".tex")}
    assert expected | {"report.html", "scores.csv", "measurements.csv"} == report_of(study.output).keys()
    table = pd.read_csv(study.output / "table_1.csv")
    assert set(table["method"]) == {method.title for method in grid.methods}
    assert (table["splits"] == 2).all()
    page = (study.output / "report.html").read_text()
    assert page.count("<img") == len(FIGURES)
    assert f"{len(grid.cells)} of {len(grid.cells)} cells are finished." in page


def test_a_training_starts_from_its_preparation(study):
    preparation = study.output / "unet_phantoms/start/models/model.pt"
    log = (study.output / "unet_phantoms/patients_1/split_0/log.txt").read_text()
    assert f"starts from {preparation}" in log


def test_each_volume_of_a_finished_study_is_scored_once_by_each_cell(study):
    scores = pd.read_csv(study.output / "scores.csv")
    cells = read_grid(study.grid).cells
    assert len(scores) == len(cells) * study.n_volumes * 3  # three classes
    assert not scores.duplicated(["method", "ablation", "value", "labelled_patients", "split", "case", "class"]).any()


def test_finished_study_runs_nothing_and_reports_the_same(study, caplog):
    before = report_of(study.output)
    run(str(study.grid), str(study.output))
    assert "0 of " in caplog.text
    assert report_of(study.output) == before


@pytest.mark.slow
def test_the_command_runs_a_cell_of_the_quick_study_whose_folder_says_what_was_run(tmp_path, caplog):
    name = "cnn/patients_0/split_1"
    finish(tmp_path, "--config", str(GRID), "--workers", "2", "--only", name)
    folder = tmp_path / name
    record = read_record(folder)
    assert record["bundle"] == "cnnhead_acdc"
    assert record["versions"].keys() == {"autosam-bundles", "monai", "torch", "numpy"}
    assert record["commands"].keys() == record["seconds"].keys() == {"evaluating"}
    assert json.loads((folder / "evaluating.json").read_text())["split_seed"] == 1
    assert re.search("Restored all variables from .*cnn_head.pt", (folder / "log.txt").read_text())
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert len(scores) == 6 * 3  # of 3 test patients of 20 two frames each, three classes
    before = tables_of(tmp_path)
    run(str(GRID), str(tmp_path), only=name)
    assert "0 of 1 runs to do" in caplog.text
    assert tables_of(tmp_path) == before  # which another process wrote


@pytest.mark.slow
@pytest.mark.parametrize("study", ["quick"], indirect=True)
def test_study_killed_at_any_moment_and_run_serially_reports_the_same(study, tmp_path):
    chance = random.Random(0)
    for _ in range(KILLS):
        arguments = command(tmp_path, "--config", str(study.grid))
        running = subprocess.Popen(arguments, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.PIPE)
        time.sleep(chance.uniform(5, 45))
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    finish(tmp_path, "--config", str(study.grid))
    assert report_of(tmp_path) == report_of(study.output)
