"""What `--tracking mlflow` records of a training and of an evaluation."""

import os
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_monai_bundle, succeeds

from components.phantom.dataset import write_phantom_dataset

mlflow = pytest.importorskip("mlflow", reason="pip install -c constraints.txt -e '.[tracking]'")
pytestmark = pytest.mark.slow  # with MLflow installed, every process that imports MONAI's handlers imports it too

KNOBS = {
    "model_type": "vit_tiny",
    "sam_checkpoint": "$None",
    "cache_dir": "$None",
    "image_size": "64",
    "labelled_cases": "2",
    "epochs": "2",
    "val_interval": "1",
    "phantom_share": "0",
    "test_time_views": "1",
    "tracking": "mlflow",
}
DICE = {"val_mean_dice", *(f"val_mean_dice_{name}" for name in ("RV", "Myo", "LV"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of a head that was trained and evaluated, with an overlay of an earlier run in it."""
    folder = tmp_path_factory.mktemp("tracked")
    data = write_phantom_dataset(str(folder / "data"), patients=4, size_hw_d=(64, 48, 3))
    output = folder / "eval"
    output.mkdir()
    (output / "earlier_overlay.png").touch()
    os.utime(output / "earlier_overlay.png", (0, 0))
    knobs = KNOBS | {"dataset_dir": data, "ckpt_dir": str(folder / "models"), "output_dir": str(output)}
    options = [text for name, value in knobs.items() for text in (f"--{name}", value)]
    for run_id, files in (("training", "train"), ("evaluating", "train,evaluate")):
        configs = str([f"configs/{name}.json" for name in files.split(",")])
        arguments = ("run", run_id, "--config_file", configs, *options)
        succeeds(run_monai_bundle(*arguments, cwd=REPOSITORY / "bundles/linearhead_acdc"))
    return folder


@pytest.fixture(scope="module")
def client(folder) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{folder}/eval/mlruns.db")


@pytest.fixture(scope="module")
def runs(client) -> list[mlflow.entities.Run]:
    """The training and the evaluation."""
    experiment = client.get_experiment_by_name("monai_experiment")
    return client.search_runs(experiment.experiment_id, order_by=["attributes.start_time"])


def artifacts(client, run) -> list[str]:
    return sorted(Path(file.path).name for file in client.list_artifacts(run.info.run_id))


def test_each_workflow_is_a_run_of_its_own_and_finished(runs):
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]


def test_both_runs_have_the_knobs_as_given(runs, folder):
    for run in runs:
        given = {name: run.data.params[name] for name in ("epochs", "image_size", "labelled_cases", "ckpt_dir")}
        assert given == {"epochs": "2", "image_size": "64", "labelled_cases": "2", "ckpt_dir": f"{folder}/models"}


def test_training_has_losses_and_dice_by_class_of_every_validation(client, runs):
    run = runs[0]
    assert {"train_loss", "train_mean_loss", *DICE} <= run.data.metrics.keys()
    for name in DICE:
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == [1, 2]
    (config,) = artifacts(client, run)
    assert config.startswith("config_")


def test_evaluation_has_scores_by_class_and_its_own_overlays_and_tables(client, runs, folder):
    run = runs[1]
    assert {*DICE, *(name.replace("mean_dice", "assd_mm") for name in DICE)} <= run.data.metrics.keys()
    config, *others = artifacts(client, run)
    assert config.startswith("config_")
    overlays = sorted(path.name for path in (folder / "eval").glob("patient*_overlay.png"))
    assert len(overlays) == 2
    assert others == ["metrics.csv", *overlays, "summary.csv"]
