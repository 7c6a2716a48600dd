"""Studies: grids, cells and their execution."""

import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_in_this_process
from distributed import LocalCluster
from test_custom_data import decathlon

import study
from adapt.new import new_bundle
from components.phantom.dataset import write_phantom_dataset
from components.pretrained import pretrained_file
from study import execution
from study.__main__ import _waiting, run
from study.cells import CellError, has_failed, is_finished, list_stages, run_cell
from study.execution import chosen_tasks, run_locally, run_on_dask, with_preparations, worker_environments
from study.grid import Cell, Method, Preparation, Start, read_grid
from study.progress import measured_seconds, progress_table, remaining_seconds

SMALL = {
    "test_time_views": 1,
    "epochs": 1,
    "views": 1,
    "train#prepare_batch#pool_size": 4,
}
METHODS = {
    "as_it_comes": {
        "title": "as it comes",
        "bundle": "linearhead_acdc",
        "labelled_cases": [0],
    },
    "adapted": {"title": "adapted", "bundle": "linearhead_acdc"},
}
LINEAR = Method("m", "m", "linearhead_acdc")
STARTED = Method("s", "s", "unet_acdc", start=Start(("pretrain",)))
STARTED_AND_CONTINUED = {
    "title": "m",
    "bundle": "unet_acdc",
    "start": {"overlays": ["pretrain"]},
    "continues": "adapted",
}
UNLABELLED = Method("u", "u", "linearhead_acdc", ("unlabelled",), continues="m")


def write_grid(path, **changes):
    grid = {"methods": METHODS, "labelled_cases": [1, 2], "splits": [0, 3]} | changes
    path.write_text(json.dumps(grid))
    return path


def names_of(grid):
    return [cell.name for cell in grid.cells]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_phantom_dataset(str(tmp_path_factory.mktemp("data") / "phantoms"), patients=4, size_hw_d=(64, 48, 3))


def write_record(folder, seconds, *, commands=("training",), interrupted=False, **others):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"commands": {name: [] for name in commands}, "seconds": seconds, "interrupted": interrupted}
    (folder / "cell.json").write_text(json.dumps(record | others))


def test_a_grid_lists_every_method_and_number_of_patients_by_split(tmp_path):
    first = ["as_it_comes/patients_0/split_0", "adapted/patients_1/split_0", "adapted/patients_2/split_0"]
    expected = [*first, *(name.replace("split_0", "split_3") for name in first)]
    assert names_of(read_grid(write_grid(tmp_path / "grid.json"))) == expected


def test_an_ablation_adds_a_cell_for_every_value_that_changes_something(tmp_path):
    values = {"4": {}, "5": {"depth": 5}}
    ablations = {"depth": {"title": "Depth", "methods": ["adapted"], "labelled_cases": [2], "values": values}}
    grid = read_grid(write_grid(tmp_path / "grid.json", splits=[0], labelled_cases=[1, None], ablations=ablations))
    assert names_of(grid)[1:] == [
        "adapted/patients_1/split_0",
        "adapted/patients_all/split_0",
        "adapted/patients_2/split_0",
        "adapted/depth_5/patients_2/split_0",
    ]
    assert [cell.method.knobs for cell in grid.cells][1:] == [{}, {}, {}, {"depth": 5}]
    assert grid.ablations[0].values == ("4", "5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, "unknown method; expected some of .*methods"),
        ({"methods": {"m": {"title": "m", "bundle": "cnnhead_acdc", "knob": {}}}}, "method m of .*unknown knob;"),
        ({"methods": {"m": {"title": "m"}}}, "method m of .*bundle missing"),
        ({"methods": {"m": {"title": "m", "bundle": "cnn"}}}, "needs .*cnn.configs.*json, which does not exist"),
        ({"methods": {"m": {"title": "m", "bundle": "cnnhead_acdc", "overlays": ["huge"]}}}, "huge.json"),
        (
            {"methods": {"m": {"title": "m", "bundle": "unet_acdc", "paper": "UNet"}}},
            "method m of .*no row 'UNet', expected one of UNET, ",
        ),
        (
            {"methods": {"m": {"title": "m", "bundle": "unet_acdc", "start": {}}}},
            "start of method m .*overlays missing",
        ),
        (
            {"ablations": {"a": {"title": "a", "methods": ["b"], "values": {}}}},
            "ablation a of .* names b, expected some",
        ),
        (
            {"methods": {"m": {"title": "m", "bundle": "unet_acdc", "continues": "n"}}},
            "method m of .* continues n, expected a method that the grid lists before it",
        ),
        (
            {"methods": METHODS | {"m": {"title": "m", "bundle": "linearhead_acdc", "continues": "as_it_comes"}}},
            "m/patients_1/split_0 starts from as_it_comes/patients_1/split_0, which is not a cell of the study: give "
            "method as_it_comes the same labelled_cases",
        ),
        (
            {"methods": METHODS | {"m": STARTED_AND_CONTINUED}},
            "method m of .* has both start and continues: expected one of them",
        ),
        (
            {
                "methods": {
                    "m": {"title": "m", "bundle": "unet_acdc", "overlays": ["from_scratch"], "labelled_cases": [0]}
                }
            },
            "has 0 in labelled_cases, but no weights to start from: set start_checkpoint",
        ),
        (
            {"methods": {"m": {**METHODS["as_it_comes"], "knobs": {"model_type": "vit_b"}}}},
            "has 0 in labelled_cases, but no weights to start from",
        ),
        ({"labelled_patients": [1]}, "unknown labelled_patients; expected some of .*labelled_cases"),
    ],
)
def test_an_invalid_grid_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_grid(write_grid(tmp_path / "grid.json", **changes))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "study").glob("*.json")), ids=lambda path: path.stem)
def test_every_run_of_a_shipped_grid_has_configs_that_know_its_knobs(path, tmp_path, monkeypatch):
    if path.stem == "custom_data":
        new_bundle("hippocampus", decathlon(tmp_path / "data"), tmp_path)
        monkeypatch.setattr("study.grid.BUNDLES", tmp_path)
    for task in with_preparations(read_grid(path).cells):
        for stage in list_stages(task, dataset_dir="/data", output_dir=tmp_path, sam_dir="/weights"):
            config = stage.parser().get()
            known = {name for name in stage.knobs if name.partition("#")[0] in config}
            assert known == set(stage.knobs)
            assert stage.name in config


def test_stages_set_data_split_and_folders_of_a_cell(tmp_path):
    training, evaluating = list_stages(Cell(LINEAR, 5, 2), dataset_dir="/data", output_dir=tmp_path, sam_dir="/weights")
    folder = tmp_path / "m/patients_5/split_2"
    assert training.knobs == {
        "dataset_dir": "/data",
        "output_dir": str(folder / "eval"),
        "split_seed": 2,
        "cache_dir": str(tmp_path / "embeddings"),
        "sam_checkpoint#models_dir": "/weights",
        "ckpt_dir": str(folder / "models"),
        "labelled_cases": 5,
        "resume": True,
    }
    assert training.arguments[:4] == ["run", "training", "--config_file", "['configs/train.json']"]
    assert evaluating.arguments[1] == "evaluating"
    assert "['configs/train.json','configs/evaluate.json']" in evaluating.arguments
    everyone = list_stages(Cell(LINEAR, None, 2), dataset_dir="/data", output_dir=tmp_path)[0]
    assert everyone.arguments[everyone.arguments.index("--labelled_cases") + 1] == "$None"


def test_no_embedding_is_kept_where_the_encoder_trains_along(tmp_path):
    method = replace(LINEAR, knobs={"trainable_encoder": True})
    for stage in list_stages(Cell(method, 5, 2), dataset_dir="/data", output_dir=tmp_path):
        assert stage.knobs["cache_dir"] is None


def test_a_cell_starts_from_its_preparation(tmp_path):
    cell = Cell(STARTED, 1, 3)
    (pretraining,) = list_stages(Preparation(STARTED, 3), dataset_dir="/data", output_dir=tmp_path)
    training, evaluating = list_stages(cell, dataset_dir="/data", output_dir=tmp_path)
    assert pretraining.configs == ("train", "pretrain")
    assert training.knobs["start_checkpoint"] == pretraining.knobs["ckpt_dir"] + "/model.pt"
    assert "start_checkpoint" not in evaluating.knobs
    (as_it_comes,) = list_stages(Cell(STARTED, 0, 3), dataset_dir="/data", output_dir=tmp_path)
    assert as_it_comes.parser().get_parsed_content("ckpt_path") == training.knobs["start_checkpoint"]


def test_a_cell_that_continues_another_starts_from_its_model_of_the_same_number_and_split(tmp_path):
    stages = {
        bundle: list_stages(Cell(replace(UNLABELLED, bundle=bundle), 5, 3), dataset_dir="/data", output_dir=tmp_path)
        for bundle in ("linearhead_acdc", "unet_acdc")
    }
    start = str(tmp_path / "m/patients_5/split_3/models/model.pt")
    for training, evaluating in stages.values():
        assert training.knobs["start_checkpoint"] == start
        assert training.configs == ("train", "unlabelled")
        assert training.knobs.get("cache_dir") is None  # of slices that are mixed anew in each step
        assert start not in evaluating.knobs.values()


def test_without_any_labelled_patient_one_learns_from_unlabelled_ones_and_is_scored_after_that(tmp_path):
    cell = Cell(UNLABELLED, 0, 3)
    training, evaluating = list_stages(cell, dataset_dir="/data", output_dir=tmp_path)
    for stage in (training, evaluating):
        assert stage.knobs["labelled_cases"] == 0
        assert stage.knobs["ckpt_dir"] == str(tmp_path / "u/patients_0/split_3/models")
        assert "start_checkpoint" not in stage.knobs  # the bundle names its start
    assert cell.starts_from is None
    (as_it_comes,) = list_stages(Cell(LINEAR, 0, 3), dataset_dir="/data", output_dir=tmp_path)
    assert as_it_comes.parser().get_parsed_content("ckpt_path") == pretrained_file("linear_head.pt")


def test_a_preparation_is_listed_once_before_the_cells_that_start_from_it():
    everywhere = Method("e", "e", "unet_acdc", start=Start(("phantoms",), once=True))
    cells = [Cell(method, count, split) for split in (0, 1) for method in (STARTED, everywhere) for count in (1, 5)]
    names = [task.name for task in with_preparations(cells)]
    assert names[:3] == ["s/start/split_0", "s/patients_1/split_0", "s/patients_5/split_0"]
    assert [name for name in names if "start" in name] == ["s/start/split_0", "e/start", "s/start/split_1"]


def test_a_cell_that_others_continue_is_listed_before_them_wherever_the_grid_has_it():
    cells = [Cell(UNLABELLED, 1, 0), Cell(STARTED, 1, 0), Cell(LINEAR, 1, 0)]
    assert [task.name for task in with_preparations(cells)] == [
        "m/patients_1/split_0",
        "u/patients_1/split_0",
        "s/start/split_0",
        "s/patients_1/split_0",
    ]


def test_a_folder_with_other_settings_is_refused(tmp_path):
    cell = Cell(LINEAR, 1, 0)
    write_record(tmp_path / cell.name, {"training": 1.0})
    with pytest.raises(ValueError, match="other settings"):
        run_cell(cell, dataset_dir="/data", output_dir=tmp_path)
    write_record(tmp_path / cell.name, {}, error="crashed")
    (tmp_path / cell.name / "models").mkdir()
    (tmp_path / cell.name / "models/checkpoint_epoch=1.pt").touch()
    with pytest.raises(ValueError, match="other settings"):
        run_cell(cell, dataset_dir="/data", output_dir=tmp_path)


def test_a_broken_cell_is_left_and_reported_until_it_is_tried_again(tmp_path, phantoms, caplog, monkeypatch):
    methods = {"as_it_comes": METHODS["as_it_comes"] | {"knobs": SMALL}}
    grid = write_grid(tmp_path / "grid.json", methods=methods, splits=[0])
    data, output = tmp_path / "data", tmp_path / "study"
    data.mkdir()
    folder = output / "as_it_comes/patients_0/split_0"

    def attempt(**options):
        caplog.clear()
        run(str(grid), str(output), dataset_dir=str(data), **options)

    with pytest.raises(SystemExit, match="1 runs failed, --retry tries them again: as_it_comes/patients_0/split_0"):
        attempt()
    assert has_failed(folder)
    assert "is not the ACDC release" in caplog.text
    data.rmdir()
    data.symlink_to(phantoms)
    with pytest.raises(SystemExit):
        attempt()
    assert re.search(r"is broken, --retry runs it again: exit status 1: .* is not the ACDC release", caplog.text)
    monkeypatch.setattr("study.cells._run", run_in_this_process)
    attempt(retry=True)
    assert is_finished(folder)
    assert not has_failed(folder)


def test_a_cell_whose_preparation_failed_is_not_run():
    def fail(task, **_):
        if isinstance(task, Preparation):
            raise CellError("no data")
        pytest.fail("ran without its start")

    (_, first), (_, second) = run_locally(with_preparations([Cell(STARTED, 1, 0)]), fail, [{}])
    assert first == "no data"
    assert second == "not run, since it starts from s/start/split_0, which failed"


def test_a_cell_that_continues_one_that_failed_is_not_run_nor_what_continues_it_in_turn(tmp_path):
    again = Method("v", "v", "linearhead_acdc", ("unlabelled",), continues="u")
    cells = [Cell(method, count, 0) for method in (LINEAR, UNLABELLED, again) for count in (0, 1)]

    def fail(task, **_):
        if task.name == "m/patients_1/split_0":
            raise CellError("no data")
        assert task.labelled_cases == 0, "ran without its start"

    errors = {task.name: error for task, error in run_locally(with_preparations(cells), fail, [{}])}
    assert [name for name, error in errors.items() if error is None] == [f"{m}/patients_0/split_0" for m in "muv"]
    assert errors["u/patients_1/split_0"] == "not run, since it starts from m/patients_1/split_0, which failed"
    assert errors["v/patients_1/split_0"] == "not run, since it starts from u/patients_1/split_0, which failed"
    write_record(tmp_path / "m/patients_1/split_0", {}, error="no data")
    waiting = _waiting(cells, tmp_path, ["m/patients_1/split_0"])
    assert [cell.name for cell in waiting] == [f"{m}/patients_0/split_0" for m in "muv"]


def test_cells_chosen_by_name_come_with_what_they_start_from():
    cells = with_preparations([Cell(method, 1, split) for split in (0, 1) for method in (LINEAR, UNLABELLED, STARTED)])
    assert [task.name for task in chosen_tasks(cells, "u/patients_1/split_1")] == [
        "m/patients_1/split_1",
        "u/patients_1/split_1",
    ]
    assert [task.name for task in chosen_tasks(cells, "s/patients_1/split_0")] == [
        "s/start/split_0",
        "s/patients_1/split_0",
    ]
    assert chosen_tasks(cells, "") == cells


def test_a_folder_is_locked_as_long_as_the_runner_of_a_killed_study_lives(tmp_path, monkeypatch, caplog):
    cell = Cell(LINEAR, 1, 0)
    runs = []

    popen = subprocess.Popen

    def start_bundle(_command, *, pass_fds, **_):
        if not runs:  # the study is killed; its runner lives on with the lock's descriptor
            runs.append(popen(["sleep", "2"], pass_fds=pass_fds))
            raise KeyboardInterrupt
        runs.append(runs[0].poll())
        return popen(["true"])

    monkeypatch.setattr("study.cells.subprocess.Popen", start_bundle)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, dataset_dir="/data", output_dir=tmp_path)
    with caplog.at_level(logging.INFO):
        assert run_cell(cell, dataset_dir="/data", output_dir=tmp_path)
    assert "is run by another process: waiting for it" in caplog.text
    assert runs[1:] == [0, 0]  # training and evaluation start after the other runner's end
    assert is_finished(tmp_path / cell.name)


def score_tables(output, grid):
    return {cell.name: (output / cell.name / "eval/metrics.csv").read_text() for cell in read_grid(grid).cells}


@pytest.mark.slow
def test_two_local_workers_give_the_numbers_of_a_serial_run(tmp_path, phantoms):
    methods = {
        "adapted": METHODS["adapted"] | {"knobs": SMALL},
        "unet": {
            "title": "unet",
            "bundle": "unet_acdc",
            "knobs": {"width": 2, "crop_size": 64, "epochs": 1, "phantom_share": 0, "test_time_views": 1},
            "start": {
                "overlays": ["phantoms"],
                "knobs": {"width": 2, "crop_size": 64, "epochs": 1, "steps_per_epoch": 1},
            },
        },
    }
    grid = write_grid(tmp_path / "grid.json", methods=methods, splits=[0], labelled_cases=[1])
    for name, workers in (("serial", 1), ("parallel", 2)):
        run(str(grid), str(tmp_path / name), dataset_dir=phantoms, workers=workers, threads=1)
    tables = score_tables(tmp_path / "serial", grid)
    assert tables == score_tables(tmp_path / "parallel", grid)
    assert len(tables) == 2


def test_dask_runs_preparations_first_and_passes_failures_on():
    cells = [Cell(STARTED, 1, split) for split in (0, 1)]
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster:
        results = run_on_dask(with_preparations(cells), _fail_in_split_0, cluster.scheduler_address)
        errors = {task.name: error for task, error in results}
    assert errors == {
        "s/start/split_0": "no data",
        "s/patients_1/split_0": "not run, since it starts from s/start/split_0, which failed",
        "s/start/split_1": None,
        "s/patients_1/split_1": None,
    }


def _fail_in_split_0(task):
    if task.name == "s/start/split_0":
        raise CellError("no data")


def test_a_scheduler_without_dask_is_refused_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ModuleNotFoundError, match=r"--scheduler needs Dask, .*'dask\[distributed\]'"):
        next(run_on_dask([], print, "tcp://127.0.0.1:8786"))


def test_a_cell_that_waits_for_its_preparation_leaves_the_workers_to_others():
    split_1_has_run = threading.Event()
    environments = [{"GPU": "0"}, {"GPU": "1"}]
    used = []

    def run_task(task, *, environment, **_):
        assert environment not in used
        used.append(environment)
        if task.name == "s/start/split_0":
            assert split_1_has_run.wait(10)
        if task.name == "s/patients_1/split_1":
            split_1_has_run.set()
        used.remove(environment)

    tasks = with_preparations([Cell(STARTED, 1, split) for split in (0, 1)])
    names = [task.name for task, _ in run_locally(tasks, run_task, environments)]
    assert sorted(names) == sorted(task.name for task in tasks)
    assert all(names.index(f"s/start/split_{s}") < names.index(f"s/patients_1/split_{s}") for s in (0, 1))


def test_one_worker_runs_tasks_in_the_order_given():
    everywhere = Method("e", "e", "unet_acdc", start=Start(("phantoms",), once=True))
    tasks = with_preparations([Cell(method, 1, split) for split in (0, 1) for method in (STARTED, LINEAR, everywhere)])
    assert [task for task, _ in run_locally(tasks, lambda *_, **__: None, [{}])] == tasks


@pytest.fixture
def heeds_interrupts():
    """Python's own handler of Ctrl-C, which a job in the background inherits as ignored, and its sub-processes too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("received_by", ["the study", "a runner"])  # a terminal's Ctrl-C reaches both, in any order
def test_an_interrupted_study_ends_its_runners_and_records_no_failure(tmp_path, monkeypatch, received_by):
    popen, both_run, started = subprocess.Popen, threading.Barrier(2), []

    def start_bundle(_command, **_):
        process = popen(["sleep", "60"])
        started.append(process)
        if both_run.wait(10) == 0:
            os.kill(os.getpid() if received_by == "the study" else started[0].pid, signal.SIGINT)
        return process

    monkeypatch.setattr("study.cells.subprocess.Popen", start_bundle)
    cells = [Cell(LINEAR, 1, split) for split in (0, 1)]
    run_task = partial(run_cell, dataset_dir="/data", output_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(run_locally(cells, run_task, [{}, {}]))
    assert {process.poll() for process in started} <= {-signal.SIGINT, -signal.SIGKILL}
    assert not any(has_failed(tmp_path / cell.name) for cell in cells)


def threads_of(count):
    return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}


def test_local_workers_have_a_gpu_each_and_share_the_cores(monkeypatch):
    monkeypatch.setattr(execution.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(execution.torch.cuda, "device_count", lambda: 0)
    assert worker_environments(4) == [threads_of("2")] * 4
    assert worker_environments(4, threads=3) == [threads_of("3")] * 4
    assert worker_environments(1) == [{}]
    monkeypatch.setattr(execution.torch.cuda, "device_count", lambda: 2)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in worker_environments(2)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in worker_environments(2)] == ["3", "5"]
    with pytest.raises(ValueError, match="no more workers than GPUs, one cell each; received 3 for 2"):
        worker_environments(3)


def test_a_dry_run_counts_cells_and_judges_the_time_by_finished_ones(phantoms, tmp_path, capsys):
    grid = str(write_grid(tmp_path / "grid.json", splits=[0, 1], labelled_cases=[1, 2]))
    cells = read_grid(grid).cells
    run(grid, str(tmp_path), phantoms, dry_run=True)
    assert "The time is unknown until a cell is finished" in capsys.readouterr().out
    write_record(tmp_path / cells[0].name, {"training": 120.0})
    write_record(tmp_path / cells[1].name, {"training": 9000.0}, commands=("training", "evaluating"), error="no")
    table = progress_table(cells, tmp_path).set_index("run")
    rows = table[["cells", "done", "failed"]].sum()
    assert rows.tolist() == [len(cells), 1, 1]
    assert table["minutes a cell"].max() == 2
    assert table["minutes a cell"].isna().sum() == len(table) - 1
    run(grid, str(tmp_path), phantoms, dry_run=True, workers=2)
    assert f"About {len(cells) - 1} min left with 2 at a time" in capsys.readouterr().out
    assert not (tmp_path / cells[-1].name).exists()


def test_remaining_time_leaves_interrupted_cells_out(tmp_path):
    cells = [Cell(LINEAR, count, split) for count in (1, 2) for split in (0, 1, 2)]
    assert remaining_seconds(cells, tmp_path) is None
    write_record(tmp_path / cells[0].name, {"training": 60.0})
    write_record(tmp_path / cells[1].name, {"training": 5000.0}, interrupted=True)
    assert measured_seconds(cells, tmp_path) == {"m/patients_1": 60.0}
    assert remaining_seconds(cells, tmp_path) == 60 + 3 * 60


def test_a_study_without_data_asks_for_dataset_dir(tmp_path):
    with pytest.raises(ValueError, match="give --dataset_dir PATH"):
        run(str(write_grid(tmp_path / "grid.json")), str(tmp_path))
    assert not Path(tmp_path / "phantoms").exists()


def test_a_missing_package_of_the_study_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    with pytest.raises(ModuleNotFoundError, match=r"a study needs tabulate, .*'\.\[study\]'"):
        importlib.reload(study)
