"""Random shapes, the bundle that trains an encoder on them, and what starts from its weights."""

from itertools import islice
from pathlib import Path

import monai.bundle
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_readme_explains_knobs
from scipy.ndimage import binary_erosion

from components.networks.heads import LinearHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.networks.trained_with import decode_record
from components.phantom.shapes import random_shapes
from components.pretrained import pretrained_file
from components.pretraining import shape_stream
from components.pretraining.shape_stream import ShapeStream
from components.sam.encoder import SamEncoder

BUNDLE = REPOSITORY / "bundles" / "general_encoder"
TINY = {"patch_size": 32, "batch_size": 2, "steps_per_epoch": 2, "epochs": 2}


def train(folder: Path, **overrides) -> dict[str, torch.Tensor]:
    """Train for two epochs of two steps; return the weights."""
    folders = {"bundle_root": str(BUNDLE), "ckpt_dir": str(folder), "output_dir": str(folder / "eval")}
    config = str(BUNDLE / "configs/train.json")
    monai.bundle.run("training", config_file=config, **{**TINY, **folders, **overrides})
    return torch.load(folder / "model.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of an uninterrupted training of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder


def test_pictures_are_of_all_kinds_and_their_labels_are_the_objects():
    drawn = [random_shapes(64, np.random.default_rng(seed)) for seed in range(60)]
    grey = coloured = empty = bright = dark = 0
    for image, label in drawn:
        assert image.shape == (3, 64, 64) and image.dtype == np.uint8
        assert label.shape == (64, 64) and set(np.unique(label)) <= {0, 1}
        is_grey = (image[0] == image[1]).all() and (image[1] == image[2]).all()
        grey, coloured, empty = grey + is_grey, coloured + (not is_grey), empty + (not label.any())
        if is_grey and label.any() and not label.all():
            brighter = image[0][label == 1].mean() - image[0][label == 0].mean()
            bright, dark = bright + (brighter > 20), dark + (brighter < -20)
    assert grey > 8 and coloured > 10 and empty < 20
    assert bright > 5 and dark > 5
    assert 0.02 < np.mean([label.mean() for _, label in drawn]) < 0.4


def test_a_batch_depends_on_the_seed_and_its_number_only():
    first, second = islice(ShapeStream(2, seed=3, size=32), 2)
    assert first["image"].shape == (2, 3, 32, 32) and first["label"].shape == (2, 1, 32, 32)
    later = ShapeStream(2, seed=3, size=32)
    later.position = 1
    again = next(iter(later))
    assert torch.equal(again["image"], second["image"]) and torch.equal(again["label"], second["label"])
    assert not torch.equal(first["image"], second["image"])
    assert not torch.equal(next(iter(ShapeStream(2, seed=4, size=32)))["image"], first["image"])


def test_a_killed_training_ends_in_the_weights_of_an_uninterrupted_one(trained, tmp_path, monkeypatch):
    whole = torch.load(trained / "model.pt", weights_only=True)
    drawn = []

    def draw_until_killed(size, rng):
        drawn.append(size)
        if len(drawn) == 7:  # in the second epoch of two batches of two
            raise KeyboardInterrupt
        return random_shapes(size, rng)

    monkeypatch.setattr(shape_stream, "random_shapes", draw_until_killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    resumed = train(tmp_path, resume=True)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert decode_record(whole["trained_with"]) == {"class_names": ["object"]}


def test_the_general_encoder_knows_objects_and_tubes_that_it_has_not_seen():
    encoder = SamEncoder("general_unet", pretrained_file("general_unet.pth"), 128)
    network = PromptFreeSam(encoder, LinearHead(2), start_checkpoint=pretrained_file("general_linear_head.pt")).eval()
    batch = next(iter(ShapeStream(24, seed=20230613, size=128)))
    with torch.no_grad():
        predicted = network(batch["image"]).argmax(1, keepdim=True)
    overlap = (predicted * batch["label"]).sum()
    assert 2 * overlap / (predicted.sum() + batch["label"].sum()) > 0.8


def test_pictures_with_tubes_hold_thin_objects_and_neighbouring_slices():
    drawn = [random_shapes(64, np.random.default_rng(seed)) for seed in range(60)]
    thin = [label.sum() for _, label in drawn if label.any() and not binary_erosion(label, iterations=2).any()]
    assert len(thin) > 5
    grey = sum((image[0] == image[1]).all() for image, _ in drawn)
    assert 8 < grey < 30


def test_the_encoder_and_its_head_are_exported_and_every_class_starts_as_the_object(trained, tmp_path):
    folders = {"bundle_root": str(BUNDLE), "ckpt_dir": str(trained), "export_dir": str(tmp_path)}
    monai.bundle.run("exporting", config_file=str(BUNDLE / "configs/train.json"), **TINY, **folders)
    assert {path.name for path in tmp_path.iterdir()} == {"general_unet.pth", "general_linear_head.pt"}
    encoder = SamEncoder("general_unet", str(tmp_path / "general_unet.pth"), 32)
    start = str(tmp_path / "general_linear_head.pt")
    objects, own = (PromptFreeSam(encoder, LinearHead(classes), start_checkpoint=start) for classes in (2, 4))
    image = torch.rand(1, 3, 32, 32) * 255
    with torch.no_grad():
        expected, logits = objects(image), own(image)
    torch.testing.assert_close(logits, expected[:, [0, 1, 1, 1]])


def test_readme_explains_the_knobs():
    assert_readme_explains_knobs(BUNDLE, "train", "clicks", except_for=("dataset_dir",))
