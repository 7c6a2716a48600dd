"""Self-training: `configs/unlabelled.json`, which trains on volumes that the network itself has labelled."""

import json
from pathlib import Path

import monai.bundle
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from monai.bundle import ConfigParser
from monai.inferers import SliceInferer
from monai.transforms import AsDiscreted, RepeatChanneld

from components.data.acdc import list_cases, list_patients, list_unlabelled, split_patients
from components.data.slices import SliceDataset
from components.networks.unet import GreyUNet
from components.phantom.dataset import write_phantom_dataset
from components.training.pseudo_labels import PseudoLabeld


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> str:
    """Eight patients: six train, one validates, one tests."""
    return write_phantom_dataset(str(tmp_path_factory.mktemp("data") / "phantoms"), patients=8, size_hw_d=(32, 32, 2))


def names(cases) -> list[str]:
    return [Path(case["image"]).name.partition("_")[0] for case in cases]


def test_unlabelled_are_the_training_patients_without_a_label(phantoms):
    labelled = list_cases(phantoms, "training", labelled_patients=2)
    cases = list_unlabelled(phantoms, labelled=labelled)
    training = split_patients(list(list_patients(phantoms)), 0)["training"]
    assert names(cases) == [name for name in training[2:] for _ in range(2)]
    assert all(case.keys() == {"image"} for case in cases)
    assert names(list_unlabelled(phantoms, labelled=labelled, patients=1)) == 2 * [training[2]]


def test_with_a_label_of_one_frame_a_patient_is_not_unlabelled(phantoms):
    labelled = list_cases(phantoms, "training", labelled_patients=1, label_unit="frames")
    assert len(labelled) == 1
    assert len(list_unlabelled(phantoms, labelled=labelled)) == 10


@pytest.mark.parametrize("patients", [0, 6])
def test_more_unlabelled_patients_than_there_are_or_none_are_refused(patients, phantoms):
    labelled = list_cases(phantoms, "training", labelled_patients=1)
    with pytest.raises(ValueError, match=f"unlabelled_patients must be between 1 and 5, .* received {patients}"):
        list_unlabelled(phantoms, labelled=labelled, patients=patients)


def test_when_all_are_labelled_nothing_is_left_to_learn_from(phantoms):
    with pytest.raises(ValueError, match="between 1 and 0"):
        list_unlabelled(phantoms, labelled=list_cases(phantoms, "training"))


@pytest.mark.parametrize("subset", ["validation", "test"])
def test_labels_of_other_subsets_are_refused(subset, phantoms):
    cases = list_cases(phantoms, subset)
    with pytest.raises(ValueError, match=f"received {names(cases)[0]} of the {subset} subset of split 0"):
        list_unlabelled(phantoms, labelled=cases)


class Thresholds(torch.nn.Module):
    """Says class 1 where the left half is bright, knows nothing of turned slices, and is never in training mode."""

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert slices.shape[1] == 3
        left = torch.arange(slices.shape[3]) < slices.shape[3] // 2
        bright = (slices[:, :1] > 100) & left
        return torch.cat([~bright, bright], dim=1).float()


def labeller() -> PseudoLabeld:
    return PseudoLabeld(
        Thresholds().train(),
        SliceInferer(roi_size=(8, 8), sw_batch_size=2, spatial_dim=2),
        preprocessing=RepeatChanneld("image", 3),
        postprocessing=AsDiscreted("pred", argmax=True),
    )


def test_a_volume_gets_what_the_network_says_of_every_slice():
    image = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(0)) * 200
    labelled = labeller()({"image": image})
    expected = (image > 100).float()
    expected[:, :, 4:] = 0
    assert torch.equal(labelled["label"], expected)
    assert torch.equal(labelled["image"], image)


def test_slices_of_unlabelled_volumes_follow_the_labelled_ones():
    image = torch.full((1, 8, 8, 2), 200.0)
    labelled = {"image": image, "label": torch.full_like(image, 3)}
    dataset = SliceDataset([labelled], unlabelled=[{"image": image}], pseudo_labels=labeller(), progress=False)
    assert [int(dataset[index]["label"].max()) for index in range(len(dataset))] == [3, 3, 1, 1]


def test_unlabelled_volumes_without_a_labeller_are_refused():
    with pytest.raises(ValueError, match="expected pseudo_labels"):
        SliceDataset([], unlabelled=[{"image": np.zeros((1, 8, 8, 2))}], progress=False)


def test_a_training_without_any_volume_is_refused():
    with pytest.raises(ValueError, match="received none: give for example --labelled_patients 1"):
        SliceDataset([], progress=False)


def train(start: Path, folder: Path, phantoms: str, **overrides) -> Path:
    configs = [str(REPOSITORY / f"bundles/unet_acdc/configs/{name}.json") for name in ("train", "tiny", "unlabelled")]
    knobs = {"dataset_dir": phantoms, "start_checkpoint": str(start), "canvas_size": 32, "crop_size": 32, "epochs": 2}
    knobs |= {"ckpt_dir": str(folder / "models"), "output_dir": str(folder / "eval"), "phantom_share": 0, "width": 2}
    knobs |= {"is_silent": True, "val_interval": 1, "unlabelled_patients": 2, "test_time_views": 2}
    monai.bundle.run("training", config_file=configs, logging_file=False, **knobs | overrides)
    return folder / "models"


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    network = GreyUNet(out_channels=4, width=2)
    file = tmp_path_factory.mktemp("start") / "model.pt"
    torch.save(network.state_dict(), file)
    return file


def weights(file: Path) -> dict[str, torch.Tensor]:
    state = torch.load(file, weights_only=True)
    return state.get("network", state)


def test_training_killed_between_epochs_ends_like_an_undisturbed_one(start, phantoms, tmp_path):
    undisturbed = weights(train(start, tmp_path / "whole", phantoms, labelled_patients=1) / "model.pt")
    models = train(start, tmp_path / "killed", phantoms, labelled_patients=1)
    (models / "checkpoint_epoch=2.pt").unlink()
    train(start, tmp_path / "killed", phantoms, labelled_patients=1, resume=True)
    resumed = weights(models / "model.pt")
    assert all(torch.equal(value, resumed[key]) for key, value in undisturbed.items())


def test_without_any_label_the_last_epoch_is_kept_and_no_label_is_read(start, phantoms, tmp_path):
    without_labels = tmp_path / "unlabelled"
    for source in Path(phantoms).rglob("*"):
        if source.is_file():
            copied = without_labels / source.relative_to(phantoms)
            copied.parent.mkdir(parents=True, exist_ok=True)
            is_label = source.name.endswith("_gt.nii.gz")
            copied.write_bytes(b"no label" if is_label else source.read_bytes())
    models = train(start, tmp_path / "run", str(without_labels), labelled_patients=0)
    before, after = (weights(file) for file in (start, models / "model.pt"))
    assert any(not torch.equal(value, after[key]) for key, value in before.items() if key in after)


def test_overlay_is_the_same_in_every_bundle():
    texts = {path.read_text() for path in REPOSITORY.glob("bundles/*/configs/unlabelled.json")}
    assert len(texts) == 1
    parser = ConfigParser(json.loads(texts.pop()))
    assert parser["unlabelled_patients"] is None
