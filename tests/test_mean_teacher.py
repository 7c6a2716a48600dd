"""Self-training: `configs/unlabelled.json`, by which the running mean of the network labels slices to train on."""

import json
from pathlib import Path

import monai.bundle
import pytest
import torch
from conftest import REPOSITORY, messages_of
from monai.data import DataLoader
from monai.engines import SupervisedTrainer

from components.data.acdc import list_patients, read_acdc
from components.data.cases import list_cases, list_unlabelled
from components.data.slices import UNLABELLED, SliceDataset
from components.data.split import split_patients
from components.networks import LinearHead, PromptFreeSam
from components.networks.unet import GreyUNet
from components.phantom.dataset import write_phantom_dataset
from components.pretrained import pretrained_file
from components.sam import SamEncoder
from components.training.averages import ExponentialMovingAverage
from components.training.checkpoints import TrainingCheckpoints
from components.training.epoch_handlers import EpochSeeds
from components.training.mean_teacher import PseudoLabelCutMix


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> str:
    """Eight patients: six train, one validates, one tests."""
    return write_phantom_dataset(str(tmp_path_factory.mktemp("data") / "phantoms"), patients=8, size_hw_d=(32, 32, 2))


def names(cases) -> list[str]:
    return [Path(case["image"]).name.partition("_")[0] for case in cases]


def test_unlabelled_are_the_training_patients_without_a_label(phantoms):
    labelled = list_cases(read_acdc(phantoms), "training", labelled_cases=2)
    cases = list_unlabelled(read_acdc(phantoms), labelled=labelled)
    training = split_patients(list(list_patients(phantoms)), 0)["training"]
    assert names(cases) == [name for name in training[2:] for _ in range(2)]
    assert all(case.keys() == {"image"} for case in cases)
    assert names(list_unlabelled(read_acdc(phantoms), labelled=labelled, cases=1)) == 2 * [training[2]]


def test_with_a_label_of_one_frame_a_patient_is_not_unlabelled(phantoms):
    labelled = list_cases(read_acdc(phantoms), "training", labelled_cases=1, label_unit="frames")
    assert len(labelled) == 1
    assert len(list_unlabelled(read_acdc(phantoms), labelled=labelled)) == 10


@pytest.mark.parametrize("count", [0, 6])
def test_more_unlabelled_cases_than_there_are_or_none_are_refused(count, phantoms):
    labelled = list_cases(read_acdc(phantoms), "training", labelled_cases=1)
    with pytest.raises(ValueError, match=f"unlabelled_cases must be between 1 and 5, .* received {count}"):
        list_unlabelled(read_acdc(phantoms), labelled=labelled, cases=count)


def test_when_all_are_labelled_nothing_is_left_to_learn_from(phantoms):
    with pytest.raises(ValueError, match="between 1 and 0"):
        list_unlabelled(read_acdc(phantoms), labelled=list_cases(read_acdc(phantoms), "training"))


@pytest.mark.parametrize("subset", ["validation", "test"])
def test_labels_of_other_subsets_are_refused(subset, phantoms):
    cases = list_cases(read_acdc(phantoms), subset)
    with pytest.raises(ValueError, match=f"received {names(cases)[0]} of the {subset} subset of split 0"):
        list_unlabelled(read_acdc(phantoms), labelled=cases)


def test_unlabelled_cases_count_groups_and_those_of_the_list_come_last(tmp_path):
    files = [tmp_path / f"{name}.nii" for name in ("a0", "a1", "b0", "u0", "u1", "v0", "w0")]
    for file in files:
        file.touch()
    cases = [{"image": str(file), "label": "x", "group": file.name[0]} for file in files]
    data = {"dataset_dir": str(tmp_path), "pictures": False, "training": cases[:3], "validation": [], "test": cases[6:]}
    data["unlabelled"] = [{"image": case["image"], "group": case["group"]} for case in cases[3:6]]
    order = list(dict.fromkeys(Path(case["image"]).name[0] for case in list_cases(data, "training")))
    found = [
        [Path(case["image"]).stem for case in list_unlabelled(data, labelled=[], cases=count)] for count in range(1, 5)
    ]
    expected = {"a": ["a0", "a1"], "b": ["b0"], "u": ["u0", "u1"], "v": ["v0"]}
    groups = [*order, "u", "v"]
    assert found == [[name for group in groups[:count] for name in expected[group]] for count in range(1, 5)]
    with pytest.raises(ValueError, match="received w of the test subset"):
        list_unlabelled(data, labelled=cases[6:])
    files[5].unlink()
    with pytest.raises(FileNotFoundError, match=r"the listed image .*v0\.nii.* is missing"):
        list_unlabelled(data, labelled=[])


def test_slices_of_unlabelled_volumes_follow_the_labelled_ones_and_have_no_label():
    image = torch.full((1, 8, 8, 2), 200.0)
    labelled = {"image": image, "label": torch.full_like(image, 3)}
    dataset = SliceDataset([labelled], unlabelled=[{"image": image}], progress=False)
    assert [dataset[index]["label"].unique().tolist() for index in range(len(dataset))] == [[3], [3], [255], [255]]


def taught_by(network: torch.nn.Module) -> PseudoLabelCutMix:
    return PseudoLabelCutMix(ExponentialMovingAverage(network))


class Bright(torch.nn.Module):
    """Says class 1 where a slice is bright, and is never asked in training mode."""

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        assert not self.training
        bright = (slices[:, :1] > 100).float()
        return torch.cat([1 - bright, bright], dim=1)


def batch_of(labels: list[int]) -> dict[str, torch.Tensor]:
    """Return noise, and labels of one value each; of the unlabelled slices the frame that an augmentation adds is 0."""
    images = torch.rand(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 200
    label = torch.tensor(labels).float()[:, None, None, None].repeat(1, 1, 16, 16)
    label[label[:, 0, 8, 8] == UNLABELLED, :, 0] = 0
    return {"image": images, "label": label}


def test_every_batch_is_labelled_by_the_mean_after_the_step_before_it():
    network = torch.nn.Conv2d(1, 2, 1)
    running = ExponentialMovingAverage(network)
    mixing = PseudoLabelCutMix(running)
    before = running.mean.bias.clone()
    means = []
    for step in (1.0, 2.0, 3.0):
        mixing({"image": torch.zeros(1, 1, 4, 4), "label": torch.zeros(1, 1, 4, 4)})
        means.append(running.mean.bias.clone())
        with torch.no_grad():
            network.bias.fill_(step)
    assert torch.equal(means[0], before)
    assert torch.allclose(means[1], 0.99 * before + 0.01)
    assert torch.allclose(means[2], 0.99 * (0.99 * before + 0.01) + 0.02)


def test_encoder_of_a_teacher_stays_the_one_that_its_fingerprint_names():
    encoder = SamEncoder("phantom_unet", str(pretrained_file("phantom_unet.pth")), 32)
    network = PromptFreeSam(encoder, LinearHead(out_channels=2))
    running = ExponentialMovingAverage(network)
    named = encoder.fingerprint.clone()
    for _ in range(3):
        running.update()
        running.mean(torch.zeros(1, 3, 32, 32))
    assert torch.equal(running.mean.state_dict()["encoder.fingerprint"], named)
    assert torch.equal(network.state_dict()["encoder.fingerprint"], named)


def test_the_teacher_labels_what_has_no_label_and_nothing_else():
    batch = batch_of([2, UNLABELLED, 1, UNLABELLED, UNLABELLED])
    before = {key: value.clone() for key, value in batch.items()}
    torch.manual_seed(0)
    images, labels = taught_by(Bright().train())(batch, "cpu")
    assert torch.equal(images[[0, 2]], batch["image"][[0, 2]])
    assert torch.equal(labels[[0, 2]], batch["label"][[0, 2]])
    assert torch.equal(labels[[1, 3, 4]], (images[[1, 3, 4], :1] > 100).float())
    assert all(torch.equal(value, before[key]) for key, value in batch.items())


def test_each_slice_without_a_label_gets_a_rectangle_of_another():
    batch = batch_of([UNLABELLED, UNLABELLED, UNLABELLED])
    torch.manual_seed(0)
    images, _ = taught_by(Bright())(batch, "cpu")
    own = (images == batch["image"]).all(dim=1)
    foreign = (images == batch["image"].roll(1, 0)).all(dim=1)
    assert (own | foreign).all()
    assert foreign.float().mean(dim=(1, 2)) == pytest.approx(0.5, abs=0.1)
    for mask in foreign:  # is a rectangle
        assert torch.equal(mask, mask.any(dim=1)[:, None] & mask.any(dim=0))
    assert not torch.equal(foreign[0], foreign[1])


def test_mixing_depends_on_the_global_generator_alone():
    batch, mixing = batch_of([UNLABELLED, UNLABELLED, UNLABELLED]), taught_by(Bright())
    mixed = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        mixed.append(mixing(batch, "cpu")[0])
    assert torch.equal(mixed[0], mixed[2])
    assert not torch.equal(mixed[0], mixed[1])


def test_a_batch_with_labels_alone_is_left_as_it_is_and_the_teacher_is_not_asked():
    batch = batch_of([0, 1])
    images, labels = taught_by(torch.nn.Identity())(batch, "cpu")
    assert torch.equal(images, batch["image"])
    assert torch.equal(labels, batch["label"])


def test_a_training_without_any_volume_is_refused():
    with pytest.raises(ValueError, match="received none: give for example --labelled_cases 1"):
        SliceDataset([], progress=False)


def train_with_a_teacher(folder: Path, *, epochs: int, resume: bool = False) -> tuple[dict, dict]:
    """Train a tiny network on two labelled slices and four others; returns its weights and its teacher's."""
    random = torch.Generator().manual_seed(0)
    image, other = (torch.randint(0, 255, (1, 8, 8, depth), generator=random) for depth in (2, 4))
    dataset = SliceDataset(
        [{"image": image, "label": image // 128}], unlabelled=[{"image": other}], views=0, progress=False
    )
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    teacher = ExponentialMovingAverage(network, momentum=0.9)
    mixing = PseudoLabelCutMix(teacher)
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=DataLoader(dataset, batch_size=2, shuffle=True),
        prepare_batch=mixing,
        network=network,
        optimizer=optimizer,
        loss_function=lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels[:, 0].long()),
        train_handlers=[
            EpochSeeds(dataset, seed=0, prepare_batch=mixing),
            TrainingCheckpoints(ckpt_dir=folder, network=network, optimizer=optimizer, resume=resume, teacher=teacher),
        ],
    )
    trainer.run()
    return network.state_dict(), teacher.mean.state_dict()


def test_a_resumed_teacher_and_its_network_end_bit_for_bit_like_undisturbed_ones(tmp_path):
    undisturbed = train_with_a_teacher(tmp_path / "whole", epochs=4)
    train_with_a_teacher(tmp_path / "killed", epochs=2)
    saved = torch.load(tmp_path / "killed/checkpoint_epoch=2.pt", weights_only=True)
    assert any(not torch.equal(value, saved["teacher"][key]) for key, value in saved["model"].items())  # it lags behind
    resumed = train_with_a_teacher(tmp_path / "killed", epochs=4, resume=True)
    for before, after in zip(undisturbed, resumed, strict=True):
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    torch.save(saved | {"teacher": None}, tmp_path / "killed/checkpoint_epoch=4.pt")
    with pytest.raises(ValueError, match="got one of a run without teacher"):
        train_with_a_teacher(tmp_path / "killed", epochs=5, resume=True)


def run_overlay(bundle: str, folder: Path, phantoms: str, **overrides) -> Path:
    configs = [str(REPOSITORY / f"bundles/{bundle}/configs/{name}.json") for name in ("train", "unlabelled")]
    knobs = {"dataset_dir": phantoms, "canvas_size": 32, "crop_size": 32, "epochs": 2, "phantom_share": 0}
    knobs |= {"ckpt_dir": str(folder / "models"), "output_dir": str(folder / "eval"), "test_time_views": 2}
    knobs |= {"is_silent": True, "val_interval": 1, "unlabelled_cases": 2}
    monai.bundle.run("training", config_file=configs, logging_file=False, **knobs | overrides)
    return folder / "models"


def train(start: Path, folder: Path, phantoms: str, **overrides) -> Path:
    return run_overlay("unet_acdc", folder, phantoms, start_checkpoint=str(start), width=2, **overrides)


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
    undisturbed = weights(train(start, tmp_path / "whole", phantoms, labelled_cases=1) / "model.pt")
    models = train(start, tmp_path / "killed", phantoms, labelled_cases=1)
    (models / "checkpoint_epoch=2.pt").unlink()
    train(start, tmp_path / "killed", phantoms, labelled_cases=1, resume=True)
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
    models = train(start, tmp_path / "run", str(without_labels), labelled_cases=0)
    before, after = (weights(file) for file in (start, models / "model.pt"))
    assert any(not torch.equal(value, after[key]) for key, value in before.items() if key in after)


def test_teacher_is_resumed_with_the_network_and_missing_it_is_an_error(start, phantoms, tmp_path):
    models = train(start, tmp_path / "run", phantoms, labelled_cases=1)
    saved = torch.load(models / "checkpoint_epoch=2.pt", weights_only=True)
    assert saved["teacher"].keys() == saved["model"].keys()
    moved = [key for key, value in saved["model"].items() if not torch.equal(value, saved["teacher"][key])]
    assert moved  # it lags behind
    torch.save(saved | {"teacher": None}, models / "checkpoint_epoch=2.pt")
    with pytest.raises(RuntimeError) as caught:
        train(start, tmp_path / "run", phantoms, labelled_cases=1, resume=True, epochs=3)
    assert "of a run without teacher" in messages_of(caught.value)


@pytest.mark.parametrize("trainable_encoder", [False, "neck"])
def test_model_of_a_head_fits_its_encoder(trainable_encoder, phantoms, tmp_path):
    knobs = {"labelled_cases": 0, "image_size": 32, "start_checkpoint": "$None", "test_time_views": 1}
    models = run_overlay("linearhead_acdc", tmp_path, phantoms, trainable_encoder=trainable_encoder, **knobs)
    encoder = SamEncoder("phantom_unet", str(pretrained_file("phantom_unet.pth")), 32, trainable_encoder)
    network = PromptFreeSam(encoder, LinearHead(out_channels=4), start_checkpoint=str(models / "model.pt"))
    saved = torch.load(models / "model.pt", weights_only=True)
    assert all(torch.equal(value, saved[f"head.{key}"]) for key, value in network.head.state_dict().items())


@pytest.mark.parametrize("head", ["autosam_acdc", "cnnhead_acdc", "linearhead_acdc"])
def test_overlay_is_the_same_for_every_head_and_the_unet_has_no_cache_but_half_phantoms(head):
    ours, unet = (
        json.loads((REPOSITORY / f"bundles/{name}/configs/unlabelled.json").read_text()) for name in (head, "unet_acdc")
    )
    assert (
        unet.pop("phantom_share")
        == 0.5
        == json.loads((REPOSITORY / f"bundles/{head}/configs/train.json").read_text())["phantom_share"]
    )  # that of the UNet's train.json counts the slices, of which these have no label
    assert unet.pop("start_share") == 0  # it starts from a model of these patients, which it should not keep to
    assert ours == {**unet, "cache_dir": None, "views": 0}
