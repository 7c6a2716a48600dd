"""Several processes train and evaluate as one does."""

import re
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
from conftest import REPOSITORY, run_monai_bundle, run_monai_bundle_here, succeeds

from components.phantom.dataset import write_phantom_dataset
from components.training.phantom_mixing import PhantomMixing

pytestmark = pytest.mark.usefixtures("one_thread")  # as each of several processes has

BUNDLE = REPOSITORY / "bundles/linearhead_acdc"
SMALL = {
    "image_size": "64",
    "epochs": "2",
    "val_interval": "1",
    "labelled_cases": "2",
    "learning_rate": "0.005",
    "start_checkpoint": "$None",
    "sam_checkpoint": "$None",
    "test_time_views": "2",
}


def run(run_id: str, *configs: str, processes: int, **knobs) -> str:
    files = ",".join(f"'configs/{name}.json'" for name in configs)
    options = [text for name, value in (SMALL | knobs).items() for text in (f"--{name}", str(value))]
    arguments = ["run", run_id, "--config_file", f"[{files}]", *options]
    if processes == 1:
        return run_monai_bundle_here(*arguments, cwd=BUNDLE)
    return succeeds(run_monai_bundle(*arguments, cwd=BUNDLE, processes=processes))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> str:
    """Fourteen patients, of which two validate and two test."""
    return write_phantom_dataset(str(tmp_path_factory.mktemp("data") / "phantoms"), patients=14, size_hw_d=(64, 48, 3))


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory) -> dict[int, tuple[Path, str]]:
    """The folder and the words of a training, by number of processes."""
    runs = {}
    for processes, overlays in {1: (), 2: ("multi_gpu_train",)}.items():
        folder = tmp_path_factory.mktemp(f"of_{processes}")
        said = run(
            "training",
            "train",
            *overlays,
            processes=processes,
            dataset_dir=phantoms,
            ckpt_dir=folder / "models",
            output_dir=folder / "eval",
            cache_dir=folder / "embeddings",
            **{"train#prepare_batch#pool_size": 8},
        )
        runs[processes] = folder, said
    return runs


def losses(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"Metrics -- train_mean_loss: ([0-9.]+)", said)]


def embeddings(folder: Path) -> set[str]:
    return {
        path.name for path in (folder / "embeddings").rglob("*") if path.is_file() and not path.name.startswith(".")
    }


def test_two_processes_follow_the_loss_of_one(trained):
    one, two = (losses(trained[processes][1]) for processes in (1, 2))
    assert len(one) == len(two) == 2  # and only one process says it
    assert one[1] < one[0]
    assert two == pytest.approx(one, rel=0.02)


def test_one_process_writes(trained):
    folder, said = trained[2]
    assert {path.name for path in (folder / "models").iterdir()} == {
        "model.pt",
        "checkpoint_epoch=1.pt",
        "checkpoint_epoch=2.pt",
    }
    assert len({path.name.rpartition(".")[0] for path in (folder / "eval").glob("events*")}) == 1  # host and process
    assert said.count("embedding cache ") == 1


def test_model_of_several_processes_is_that_of_one(trained):
    one, two = (torch.load(trained[n][0] / "models/model.pt", weights_only=True) for n in (1, 2))
    assert one.keys() == two.keys()
    assert all(value.shape == two[key].shape for key, value in one.items())


def test_processes_fill_one_cache_with_what_one_would(trained):
    one, two = (embeddings(trained[processes][0]) for processes in (1, 2))
    assert len(one) > 50
    assert one == two


@pytest.mark.slow
def test_evaluation_by_several_processes_gives_the_same_files(trained, phantoms, tmp_path):
    folder, _ = trained[1]
    for processes, overlays in {1: (), 3: ("multi_gpu_evaluate",)}.items():
        knobs = {"dataset_dir": phantoms, "ckpt_dir": folder / "models", "cache_dir": tmp_path / f"cache_{processes}"}
        output = tmp_path / str(processes)
        run("evaluating", "train", "evaluate", *overlays, processes=processes, output_dir=output, **knobs)
    one, three = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("1", "3"))
    assert sum(name.endswith("_pred.nii.gz") for name in one) == 4
    assert one == three


def test_processes_share_out_the_phantoms_of_a_step(monkeypatch):
    def steps(rank: int, processes: int, slices: int) -> list[torch.Tensor]:
        monkeypatch.setattr(idist, "get_rank", lambda: rank)
        monkeypatch.setattr(idist, "get_world_size", lambda: processes)
        mixing = PhantomMixing(0.5, pool_size=6)
        batch = {"image": torch.zeros(slices, 1, 16, 16), "label": torch.zeros(slices, 1, 16, 16)}
        return [mixing(batch)[0][slices:] for _ in range(3)]

    alone = steps(0, 1, slices=4)
    shared = zip(steps(0, 2, slices=2), steps(1, 2, slices=2), strict=True)
    assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(shared, alone, strict=True))
