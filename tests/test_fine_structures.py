"""Structures that are thin in large images: a larger canvas, patches in training, sliding windows in inference."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image, ImageDraw
from test_custom_data import decathlon, plain, scores, seen, trained, write_volume
from test_custom_networks import parsed as parsed_config
from test_custom_networks import run

from adapt.new import new_bundle
from components.data.custom_data import DatasetStatistics, canvas_side, class_widths, thinnest_class
from components.inference.slice_inferer import TestTimeAugmentationInferer
from components.networks.trained_with import decode_record, encode_record

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL_STEPS = {"width": 2, "steps": 1, "val_interval": 100, "is_silent": True, "train#dataset#at_least": 1}


def lines(root: Path, cases: int = 8, side: int = 512, thickness: int = 2, curves: int = 12) -> Path:
    """Folders images and masks of pictures with smooth dark curves on an uneven ground."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    places = np.linspace(0, 1, 200)
    for number in range(cases):
        random = np.random.default_rng(number)
        mask = Image.new("L", (side, side))
        for _ in range(curves):
            waves = random.normal(0, 0.08, (2, 3)) @ np.sin(np.pi * np.outer([1, 2, 3], places))
            ends = random.uniform(0, 1, (2, 2))
            path = (ends[:, :1] * (1 - places) + ends[:, 1:] * places + waves).T * side
            ImageDraw.Draw(mask).line([tuple(point) for point in path], fill=255, width=thickness, joint="curve")
        rows, columns = np.mgrid[:side, :side] / side
        ground = 120 + 50 * np.sin(5 * rows + random.uniform(0, 6)) * np.sin(4 * columns + random.uniform(0, 6))
        shown = ground - 40 * (np.asarray(mask) > 0) + random.normal(0, 8, (side, side))
        colours = np.stack([shown, shown / 2, shown / 4], axis=-1).clip(0, 255).astype(np.uint8)
        Image.fromarray(colours).save(root / f"images/line_{number}.png")
        mask.save(root / f"masks/line_{number}.png")
    return root


parsed = partial(parsed_config, labelled_cases=1)


def augmentations(config: ConfigParser) -> list[str]:
    return [type(each).__name__ for each in config.get_parsed_content("train#augmentation").transforms]


def record_of(model: Path) -> dict:
    return decode_record(torch.load(model, weights_only=True)["trained_with"])


def test_width_is_that_of_a_strip_and_the_radius_of_a_disc_in_each_slice():
    label = np.zeros((100, 200, 3), np.uint8)
    label[10:13, 20:180] = 1
    label[40:45, 20:180, 1] = 2
    rows, columns = np.ogrid[:100, :200]
    label[(rows - 75) ** 2 + (columns - 100) ** 2 < 20**2] = 3
    widths = {value: 200 * width for value, width in class_widths(label).items()}
    assert widths == {1: pytest.approx(3, rel=0.02), 2: pytest.approx(5, rel=0.05), 3: pytest.approx(20, rel=0.2)}
    assert class_widths(np.zeros((4, 4, 1))) == {}


def test_the_class_that_is_thinnest_in_the_median_case_decides():
    assert thinnest_class([{1: 0.1, 2: 0.03}, {1: 0.2}, {1: 0.01, 2: 0.05}]) == (2, pytest.approx(0.04))


@pytest.mark.parametrize(
    ("side", "pixels", "canvas"),
    [
        (999, 50, 256),
        (999, 15.7, 256),
        (999, 8, 512),  # 4/8 of 999, rounded up
        (999, 2, 992),  # as in the pictures, and not enlarged
        (200, 1, 192),
        (40, 1, 64),
        (256, 1, 256),
    ],
)
def test_the_canvas_grows_until_the_thinnest_class_has_4_pixels(side, pixels, canvas):
    assert canvas_side(side, pixels / side) == canvas


def test_thin_lines_enlarge_the_canvas_and_the_network_sees_patches(tmp_path):
    bundle, said = new_bundle("lines", lines(tmp_path / "data", cases=4), tmp_path)
    (sentence,) = (each for each in said if "thinnest" in each)
    assert "foreground is thinnest, about 2 of 512 pixels wide" in sentence
    assert (
        "labelled cases like these give a canvas of 512x512 (`canvas_size`), seen in patches of 128x128 (`patch_size`)"
        in sentence
    )
    config = parsed(bundle, "train")
    assert [config.get_parsed_content(name) for name in ("canvas_size", "crop_size", "patch_size")] == [512, 512, 128]
    assert config.get_parsed_content("validate#inferer").mode == "gaussian"
    assert config.get_parsed_content("learning_rate") == 0.001
    assert "RandLambdad" not in augmentations(config)
    shown = config.get_parsed_content("train#dataset")[0]
    assert shown["image"].shape == (3, 128, 128)
    assert shown["label"].shape == (1, 128, 128)


@pytest.mark.parametrize("make", [plain, decathlon])
def test_small_images_keep_their_canvas_and_are_seen_whole(tmp_path, make):
    config = parsed(new_bundle("organ", make(tmp_path / "data"), tmp_path)[0], "train")
    canvas, crop, patch = (config.get_parsed_content(f"{name}_size") for name in ("canvas", "crop", "patch"))
    assert canvas == 64
    assert patch == crop <= canvas
    inferer = config.get_parsed_content("validate#inferer")
    assert (inferer.mode, inferer.orig_roi_size) == ("constant", (crop, crop))
    assert ("RandSpatialCropd" in augmentations(config)) == (make is decathlon)  # volumes may be deeper than wide
    assert ("RandLambdad" in augmentations(config)) == (make is plain)  # negatives, of pictures
    assert config.get_parsed_content("learning_rate") == (0.0003 if make is plain else 0.001)


def test_thin_structures_of_volumes_enlarge_the_canvas_too(tmp_path):
    label = np.zeros((400, 400, 2), np.uint8)
    label[10:390, 100:102] = 1
    label[10:390, 300:350] = 2
    paths = {
        "image": write_volume(tmp_path / "i.nii.gz", label * 50.0),
        "label": write_volume(tmp_path / "l.nii.gz", label),
    }
    assert (
        DatasetStatistics(
            [paths], class_names=["A", "B"], label_values=[0, 1, 2], channels=1, slice_axis=2, modality=""
        ).canvas_size
        == 400
    )
    assert seen(tmp_path).canvas_size == 64


@pytest.mark.parametrize("views", [1, 8])
def test_sliding_windows_give_what_the_whole_slice_gives(views):
    generator = torch.Generator().manual_seed(0)
    volume = torch.rand(1, 3, 80, 80, 2, generator=generator)
    convolution = torch.nn.Conv2d(3, 2, 3, padding=1).requires_grad_(False)
    whole, windows = (
        TestTimeAugmentationInferer(
            roi_size=[side, side], mode=mode, sw_batch_size=4, spatial_dim=2, test_time_views=views
        )
        for side, mode in ((80, "constant"), (32, "gaussian"))
    )
    # A window's edge sees zeros beyond it, but counts little.
    difference = (whole(volume, convolution) - windows(volume, convolution)).abs()
    assert difference.mean() < 0.02 * convolution(volume[..., 0]).abs().mean()
    pixelwise = torch.nn.Conv2d(3, 2, 1).requires_grad_(False)
    torch.testing.assert_close(windows(volume, pixelwise), whole(volume, pixelwise))
    constant = windows(volume, lambda slices: torch.ones(len(slices), 2, *slices.shape[2:]))
    torch.testing.assert_close(constant, torch.full_like(constant, 1 if views == 1 else 0.5))


def test_training_records_the_patch_and_inference_slides_windows_of_it(tmp_path):
    bundle, _ = new_bundle("lines", lines(tmp_path / "data", side=320, curves=6), tmp_path)
    run("training", bundle, "train", labelled_cases=1, start_checkpoint="$None", patch_size=96, **SMALL_STEPS)
    model = bundle / "models/model.pt"
    assert {"canvas_size": 320, "patch_size": 96}.items() <= record_of(model).items()
    for inferer in (
        parsed(bundle, "inference").get_parsed_content("inferer"),
        parsed(bundle, "train", "evaluate").get_parsed_content("validate#inferer"),
    ):
        assert (inferer.orig_roi_size, inferer.mode) == ((96, 96), "gaussian")
    run("evaluating", bundle, "train", "evaluate", is_silent=True)
    (row,) = scores(bundle / "eval")
    picture = tmp_path / f"data/images/{row['case']}.png"
    before = np.asarray(Image.open(bundle / f"eval/{row['case']}_pred.png"))
    run("inferring", bundle, "inference", dataset_dir=str(picture), output_dir=str(tmp_path / "out"))
    assert np.array_equal(before, np.asarray(Image.open(tmp_path / f"out/{row['case']}_pred.png")))
    with pytest.raises(Exception, match="Failed to instantiate"):
        parsed(bundle, "inference", patch_size=64).get_parsed_content("inferer")


def test_a_model_without_a_recorded_patch_sees_whole_slices(tmp_path):
    bundle = trained(new_bundle("lines", lines(tmp_path / "data", side=320, curves=6), tmp_path)[0])
    state = torch.load(bundle / "models/model.pt", weights_only=True)
    record = decode_record(state["trained_with"])
    assert record.pop("patch_size") == 128
    torch.save(state | {"trained_with": encode_record(record)}, bundle / "models/model.pt")
    for inferer in (
        parsed(bundle, "inference").get_parsed_content("inferer"),
        parsed(bundle, "train", "evaluate").get_parsed_content("validate#inferer"),
    ):
        assert (inferer.orig_roi_size, inferer.mode) == ((320, 320), "constant")


def test_pictures_without_labels_and_heads_on_an_encoder_take_patches_too(tmp_path):
    data = lines(tmp_path / "data", side=320, curves=6)
    bundle, _ = new_bundle("lines", data, tmp_path)
    options = SMALL_STEPS | {"labelled_cases": 1, "unlabelled_cases": 1, "patch_size": 64, "start_checkpoint": "$None"}
    run("training", bundle, "train", "unlabelled", **options)
    assert record_of(bundle / "models/model.pt")["patch_size"] == 64

    head, _ = new_bundle("head", data, tmp_path, network="linearhead")
    config = parsed(head, "train", cache_dir=None)
    assert config.get_parsed_content("image_size") == config.get_parsed_content("patch_size") == 128
    assert "onnx_export" in (readme := (head / "docs/README.md").read_text())
    assert "[2,3,128,128]" in readme  # what is exported takes the windows of inference
    slices = config.get_parsed_content("train#dataset")
    first, again = (slices[0]["image"], slices[0]["image"])
    assert torch.equal(first, again)
    slices.set_epoch(2)
    assert not torch.equal(first, slices[0]["image"])
    slices.set_epoch(17)
    assert slices[0]["image"].shape == (3, 128, 128)


@pytest.mark.slow
def test_thin_lines_are_found_better_than_on_a_canvas_of_256_pixels(tmp_path):
    data = lines(tmp_path / "data")
    dice = {}
    for canvas in ("own", 256):
        bundle, _ = new_bundle(f"lines_{canvas}", data, tmp_path)
        options = {} if canvas == "own" else {"canvas_size": canvas}
        run("training", bundle, "train", labelled_cases=4, steps=75, val_interval=100, is_silent=True, **options)
        run("evaluating", bundle, "train", "evaluate", test_time_views=1, is_silent=True)
        dice[canvas] = float(scores(bundle / "eval")[0]["dice"])
    assert dice["own"] > max(0.75, dice[256] + 0.1), dice
