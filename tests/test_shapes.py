"""Random shapes, the bundle that trains a UNet on them, and what starts from its weights."""

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
from components.networks.unet import GreyUNet
from components.phantom.shapes import random_shapes
from components.pretrained import pretrained_file
from components.pretraining import shape_stream
from components.pretraining.shape_stream import ShapeStream
from components.sam.encoder import SamEncoder

BUNDLE = REPOSITORY / "bundles" / "shape_unet"
TINY = {"width": 4, "patch_size": 32, "batch_size": 2, "steps_per_epoch": 2, "epochs": 2}


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
    assert grey > 20 and coloured > 10 and empty < 20
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

    def draw_until_killed(size, rng, **kinds):
        drawn.append(size)
        if len(drawn) == 7:  # in the second epoch of two batches of two
            raise KeyboardInterrupt
        return random_shapes(size, rng, **kinds)

    monkeypatch.setattr(shape_stream, "random_shapes", draw_until_killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    resumed = train(tmp_path, resume=True)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert decode_record(whole["trained_with"]) == {"class_names": ["object"]}


@pytest.mark.parametrize(("channels", "classes"), [(1, 4), (3, 2), (3, 3)])
def test_every_class_starts_as_the_object_on_grey_values_or_colours(trained, tmp_path, channels, classes):
    file = tmp_path / "export/start.pt"
    config = str(BUNDLE / "configs/train.json")
    monai.bundle.run(
        "exporting", config_file=config, **TINY, bundle_root=str(BUNDLE), ckpt_dir=str(trained), export_path=str(file)
    )
    objects = GreyUNet(2, 4, "fp32", in_channels=3, start_checkpoint=str(file)).eval()
    record = {"class_names": [f"class_{index}" for index in range(1, classes)], "crop_size": 32}
    own = GreyUNet(classes, 4, "fp32", in_channels=channels, start_checkpoint=str(file), trained_with=record).eval()
    image = torch.rand(1, 1, 32, 32).expand(-1, 3, -1, -1) * 255
    with torch.no_grad():
        expected, logits = objects(image), own(image)
    assert torch.allclose(logits[:, :1], expected[:, :1], atol=5e-3)
    assert torch.allclose(logits[:, 1:], expected[:, 1:].expand(-1, classes - 1, -1, -1), atol=5e-3)
    assert decode_record(own.trained_with)["class_names"] == record["class_names"]


def test_a_start_of_another_width_is_refused(trained):
    with pytest.raises(ValueError, match="a UNet with the same width"):
        GreyUNet(2, 8, in_channels=3, start_checkpoint=str(trained / "model.pt"))


def test_what_comes_with_the_package_knows_objects_that_it_has_not_seen():
    state = torch.load(pretrained_file("shape_unet.pt"), weights_only=True)
    assert decode_record(state["trained_with"]) == {"class_names": ["object"]}
    assert {value.dtype for key, value in state.items() if key != "trained_with"} == {torch.float16}
    network = GreyUNet(2, 16, in_channels=3, start_checkpoint=pretrained_file("shape_unet.pt")).eval()
    batch = next(iter(ShapeStream(24, seed=20230613, size=128)))
    with torch.no_grad():
        predicted = network(batch["image"]).argmax(1, keepdim=True)
    overlap = (predicted * batch["label"]).sum()
    assert 2 * overlap / (predicted.sum() + batch["label"].sum()) > 0.8


def test_the_general_encoder_knows_objects_and_tubes_that_it_has_not_seen():
    encoder = SamEncoder("general_unet", pretrained_file("general_unet.pth"), 128)
    network = PromptFreeSam(encoder, LinearHead(2), start_checkpoint=pretrained_file("general_linear_head.pt")).eval()
    batch = next(iter(ShapeStream(24, seed=20230613, size=128, tubes=True)))
    with torch.no_grad():
        predicted = network(batch["image"]).argmax(1, keepdim=True)
    overlap = (predicted * batch["label"]).sum()
    assert 2 * overlap / (predicted.sum() + batch["label"].sum()) > 0.8


def test_pictures_with_tubes_hold_thin_objects_and_neighbouring_slices():
    drawn = [random_shapes(64, np.random.default_rng(seed), tubes=True) for seed in range(60)]
    thin = [label.sum() for _, label in drawn if label.any() and not binary_erosion(label, iterations=2).any()]
    assert len(thin) > 5
    grey = sum((image[0] == image[1]).all() for image, _ in drawn)
    assert 8 < grey < 30


def test_the_encoders_overlay_trains_and_exports_an_encoder_and_its_head(tmp_path):
    config = [str(BUNDLE / f"configs/{name}.json") for name in ("train", "encoder")]
    folders = {"bundle_root": str(BUNDLE), "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path / "eval")}
    options = {key: value for key, value in TINY.items() if key != "width"} | folders
    monai.bundle.run("training", config_file=config, **options)
    monai.bundle.run("exporting", config_file=config, **options, export_dir=str(tmp_path / "export"))
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"general_unet.pth", "general_linear_head.pt"}
    encoder = SamEncoder("general_unet", str(tmp_path / "export/general_unet.pth"), 32)
    start = str(tmp_path / "export/general_linear_head.pt")
    assert PromptFreeSam(encoder, LinearHead(3), start_checkpoint=start)(torch.zeros(1, 3, 32, 32)).shape[1] == 3


def test_readme_explains_the_knobs():
    assert_readme_explains_knobs(BUNDLE, "train", except_for=("dataset_dir",))
