"""The quick study as a command, up to its report: run on local workers, and killed and continued."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import REPOSITORY, run_in_this_process

from study.__main__ import run
from study.cells import is_finished, read_record
from study.execution import with_preparations
from study.grid import read_grid

GRID = REPOSITORY / "study/quick.json"
FIGURES = ("bland_altman", "contours", "dice_by_patients", "embeddings")
TABLES = ("ablation_depth", "clinical", "significance", "table_1")
KILLS = 12


def command(output, *options):
    arguments = ("run", "--config", str(GRID), "--output_dir", str(output), "--threads", "1", *options)
    return [sys.executable, "-m", "study", *arguments]


def finish(output, *options):
    done = subprocess.run(command(output, *options), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def report_of(output):
    """The content of all files of a report, by file name."""
    files = sorted(path for path in output.iterdir() if path.is_file())
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished quick study: a few cells on two local workers, the others in this process, which has started."""
    output = tmp_path_factory.mktemp("quick")
    finish(output, "--workers", "2", "--only", "cnn/patients_0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("study.cells._run", run_in_this_process)
        run(str(GRID), str(output))
    return output


def test_every_method_ends_in_every_part_of_the_report(study):
    grid = read_grid(GRID)
    assert all(is_finished(study / task.name) for task in with_preparations(grid.cells))
    expected = {f"{name}{suffix}" for name in FIGURES for suffix in (".png", ".svg")}
    expected |= {f"{name}{suffix}" for name in TABLES for suffix in (".csv", ".md", ".tex")}
    assert expected | {"report.html", "scores.csv", "measurements.csv"} == report_of(study).keys()
    table = pd.read_csv(study / "table_1.csv")
    assert set(table["method"]) == {method.title for method in grid.methods}
    assert (table["splits"] == 2).all()
    page = (study / "report.html").read_text()
    assert page.count("<img") == len(FIGURES)
    assert f"{len(grid.cells)} of {len(grid.cells)} cells are finished." in page


def test_a_cells_folder_says_what_was_run(study):
    folder = study / "cnn/patients_0/split_1"
    record = read_record(folder)
    assert record["bundle"] == "cnnhead_acdc"
    assert record["versions"].keys() == {"autosam-bundles", "monai", "torch", "numpy"}
    assert record["commands"].keys() == record["seconds"].keys() == {"evaluating"}
    assert json.loads((folder / "evaluating.json").read_text())["split_seed"] == 1
    assert re.search("Restored all variables from .*cnn_head.pt", (folder / "log.txt").read_text())
    assert "starts from" in (study / "unet_phantoms/patients_1/split_0/log.txt").read_text()


def test_each_volume_of_a_finished_study_is_scored_once_by_each_cell(study):
    scores = pd.read_csv(study / "scores.csv")
    cells = read_grid(GRID).cells
    assert len(scores) == len(cells) * 6 * 3  # 3 test patients of 20, two frames each, three classes
    assert not scores.duplicated(["method", "ablation", "value", "labelled_patients", "split", "case", "class"]).any()


def test_finished_study_runs_nothing_and_reports_the_same(study):
    before = report_of(study)
    assert "0 of " in finish(study)
    assert report_of(study) == before


@pytest.mark.slow
def test_study_killed_at_any_moment_and_run_serially_reports_the_same(study, tmp_path):
    chance = random.Random(0)
    for _ in range(KILLS):
        running = subprocess.Popen(command(tmp_path), cwd=REPOSITORY, start_new_session=True, stderr=subprocess.PIPE)
        time.sleep(chance.uniform(5, 45))
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    finish(tmp_path)
    assert report_of(tmp_path) == report_of(study)
