"""`autosam correct`: a segmentation is corrected by clicks, as the command line and MONAI do it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from test_custom_data import decathlon
from test_front_door import SHORT, autosam_says, elsewhere, phantoms, refusal, values, volume  # noqa: F401
from test_release import trained

import autosam
from adapt.new import new_bundle
from autosam.runner import LOG
from components.data.volume_search import find_volumes
from components.phantom.degraded import SPACING_MM, degraded_phantom
from components.pretrained import pretrained_file

ONE_VIEW = ("--test_time_views", "1")


@pytest.fixture
def bundle(tiny_sam_checkpoint, phantoms, autosam_says, elsewhere) -> Path:  # noqa: F811
    """A linear head on a small SAM, hardly trained."""
    small = ("--model_type", "vit_tiny", "--sam_checkpoint", tiny_sam_checkpoint, "--image_size", 64)
    autosam_says("train", "linearhead_acdc", "--data", phantoms, "--overlay", "sam", *small, *SHORT, "--epochs", 1)
    return elsewhere / "linearhead_acdc"


def clicks_file(**clicks) -> Path:
    Path("clicks.json").write_text(json.dumps(clicks))
    return Path("clicks.json")


def test_correcting_changes_the_slices_with_clicks_alone(bundle, autosam_says, volume, elsewhere):  # noqa: F811
    of_bundle = ("--bundle", bundle.name)
    autosam_says("segment", volume, *of_bundle)
    clicks = clicks_file(lv=[[30, 25, 1], [32, 27, 1]], Myo=[[20, 20, 1]], background=[[3, 3, 1]])
    first, *said = autosam_says("correct", volume, "--clicks", clicks, *of_bundle)
    assert re.match(r"corrected 1 image with linearhead_acdc", said[0])
    name = f"{volume.name.removesuffix('.nii.gz')}_pred.nii.gz"
    plain, corrected = (nib.load(elsewhere / folder / name) for folder in ("segmented", "corrected"))
    assert np.array_equal(plain.affine, corrected.affine)
    before, after = (np.asarray(each.dataobj) for each in (plain, corrected))
    assert np.array_equal(before[..., [0, 2]], after[..., [0, 2]])
    assert not np.array_equal(before[..., 1], after[..., 1])
    assert "4 clicks correct 1 slices" in (elsewhere / "corrected" / LOG).read_text()

    command = shlex.split(first.removeprefix("$ "))
    command[0] = sys.executable
    command[command.index("--output_dir") + 1] = "monai"
    subprocess.run(command, check=True, capture_output=True, env={"PYTHONPATH": str(REPOSITORY)})
    assert np.array_equal(values(elsewhere / "monai" / name), after)

    segmenter = autosam.load(bundle)
    clicks = {"LV": [[30, 25, 1], [32, 27, 1]], "Myo": [[20, 20, 1]], "background": [[3, 3, 1]]}
    assert np.array_equal(segmenter.correct(volume, clicks)[0].numpy(), after)
    assert np.array_equal(segmenter(volume)[0].numpy(), before)
    cine = np.stack([nib.load(volume).get_fdata()] * 3, axis=-1)
    with pytest.raises(ValueError, match="holds 3 images or frames: expected one, in which the clicks lie"):
        segmenter.correct(cine, clicks, affine=plain.affine)

    for content, error in (
        ({"LV": [[30, 25, 3]]}, "is outside the image: expected [0, 0, 0] to [63, 55, 2]"),
        ({"liver": [[0, 0, 0]]}, "there is no class 'liver' to click: expected some of RV, Myo, LV, background"),
    ):
        refused = ("correct", volume, "--clicks", clicks_file(**content), *of_bundle, "-o", "refused")
        assert error in refusal(autosam_says, *refused)
        assert "segmented 0" not in (elsewhere / "refused" / LOG).read_text()  # before it was segmented
    said = refusal(autosam_says, "correct", volume, "--clicks", "missing.json", *of_bundle)
    assert said == "there is no missing.json: expected a JSON file of clicks"
    said = refusal(autosam_says, "correct", volume.parent, "--clicks", clicks_file(), *of_bundle)
    assert f"{len(find_volumes(str(volume.parent)))} images or frames: expected one" in said


def test_an_image_is_segmented_once_for_all_corrections(bundle, volume):  # noqa: F811
    segmenter = autosam.load(bundle)
    seen = []
    segmenter._network.register_forward_hook(lambda *_: seen.append("segmented"))
    correction = segmenter.correction(volume)
    with pytest.raises(ValueError, match="is outside the image"):
        correction({"LV": [[30, 25, 3]]})
    assert not seen
    rounds = [{"LV": [[30, 25, 1]]}, {"LV": [[30, 25, 1]], "background": [[32, 27, 1]]}, {}]
    corrected = [correction(clicks)[0].numpy() for clicks in rounds]
    shown = len(seen)
    assert shown > 0
    for clicks, after in zip(rounds, corrected, strict=True):
        assert np.array_equal(after, segmenter.correct(volume, clicks)[0].numpy())
    assert len(seen) == 4 * shown
    assert np.array_equal(corrected[2], segmenter(volume)[0].numpy())


def test_a_click_on_air_gets_an_answer(bundle, autosam_says, volume):  # noqa: F811
    for clicks in ({"LV": [[0, 0, 0]]}, {"background": [[0, 0, 0]]}, {}):
        (_, said, *_) = autosam_says(
            "correct", volume, "--clicks", clicks_file(**clicks), "--bundle", bundle, "-o", "out"
        )
        assert said.startswith("corrected 1 image")
    autosam_says("segment", volume, "--bundle", bundle)
    name = f"{volume.name.removesuffix('.nii.gz')}_pred.nii.gz"
    assert np.array_equal(values(Path("out", name)), values(Path("segmented", name)))


@pytest.mark.parametrize("name", ["linearhead_acdc", "unet_acdc"])
def test_shipped_bundles_take_clicks_too(name, autosam_says, volume):  # noqa: F811
    """A hole of background is clicked into the LV, where the network had it."""
    autosam_says("segment", volume, "--bundle", name)
    file = f"{volume.name.removesuffix('.nii.gz')}_pred.nii.gz"
    plain = values(Path("segmented", file))
    inside = np.argwhere(plain == 3)
    middle = inside[len(inside) // 2].tolist()
    autosam_says("correct", volume, "--clicks", clicks_file(background=[middle]), "--bundle", name)
    corrected = values(Path("corrected", file))
    assert corrected[tuple(middle)] == 0
    others = np.arange(plain.shape[2]) != middle[2]
    assert np.array_equal(corrected[..., others], plain[..., others])


def test_a_click_takes_an_object_off_a_picture_whose_encoder_was_trained_along(autosam_says, elsewhere):  # noqa: F811
    rows, columns = np.mgrid[:96, :96]
    for folder in ("images", "labels"):
        (elsewhere / "discs" / folder).mkdir(parents=True)
    for number in range(8):
        discs = [np.hypot(rows - 30 - number, columns - x) < 10 for x in (25, 70)]
        noise = np.random.default_rng(number).uniform(0, 40, (96, 96))
        Image.fromarray((noise + 150 * (discs[0] | discs[1])).astype(np.uint8)).save(f"discs/images/{number}.png")
        Image.fromarray((discs[0] | discs[1]).astype(np.uint8)).save(f"discs/labels/{number}.png")
    autosam_says("new", "blobs", "discs")
    autosam_says("train", "blobs", "--labelled", 2, "--steps", 4)
    last = torch.load("blobs/models/checkpoint_epoch=1.pt", weights_only=True)["model"]
    shipped = torch.load(pretrained_file("general_unet.pth"), weights_only=True)["image_encoder.neck.0.weight"]
    assert not torch.equal(last["encoder.image_encoder.neck.0.weight"], shipped.float())
    torch.save(last, "blobs/models/model.pt")  # whether or not it is the best

    segmenter = autosam.load("blobs")
    before = segmenter("discs/images/7.png")[0].numpy().squeeze()
    after = segmenter.correct("discs/images/7.png", {"background": [[70, 37]]})[0].numpy().squeeze()
    where = np.s_[:48], np.s_[48:]  # x comes first
    assert [np.count_nonzero(before[half]) > 200 for half in where] == [True, True]
    assert np.count_nonzero(after[where[1]]) < 0.1 * np.count_nonzero(before[where[1]])
    assert np.array_equal(after[where[0]], before[where[0]])


@pytest.mark.parametrize("network", ["unet", "linearhead"])
def test_clicks_on_volumes_of_other_organs_are_refused(network, autosam_says, elsewhere):  # noqa: F811
    data = decathlon(elsewhere / "data", real=False)
    bundle = trained(new_bundle("organ", data, elsewhere, network=network)[0])
    image = next((data / "imagesTr").glob("*.nii.gz"))
    said = refusal(autosam_says, "correct", image, "--clicks", clicks_file(), "--bundle", bundle)
    assert "received volumes of another kind, on which they did not help; make the bundle with autosam new" in said
    assert not list(Path("corrected").glob("*_pred*"))


def test_volumes_of_other_organs_take_clicks_on_sam_2(sam2_checkpoint, autosam_says, elsewhere):  # noqa: F811
    data = decathlon(elsewhere / "data", real=False)
    encoder = {"model_type": "sam2.1_hiera_tiny", "sam_checkpoint": sam2_checkpoint}
    torch.manual_seed(0)
    bundle = trained(new_bundle("organ", data, elsewhere, network="linearhead", **encoder)[0], image_size=32, planes=1)
    image = next((data / "imagesTr").glob("*.nii.gz"))
    clicks = clicks_file(Anterior=[[8, 10, 1]], background=[[15, 20, 1]])
    autosam_says("segment", image, "--bundle", bundle, *ONE_VIEW)
    autosam_says("correct", image, "--clicks", clicks, "--bundle", bundle, *ONE_VIEW)
    assert "2 clicks correct 1 slices" in Path("corrected", LOG).read_text()
    name = f"{image.name.removesuffix('.nii.gz')}_pred.nii.gz"
    before, after = (values(Path(folder, name)) for folder in ("segmented", "corrected"))
    assert (before != after).any((0, 1)).tolist() == [False, True, False]


def test_two_clicks_mend_most_of_a_slice_of_a_hard_phantom():
    """Of a seed that no training has seen: a false RV beside the heart."""
    voxels, truth = degraded_phantom(1, 14)
    affine = np.diag([*SPACING_MM, 1.0])
    segmenter = autosam.load("linearhead_acdc", precision="fp32")
    clicks = {"background": [[104, 128, 8], [92, 104, 8]]}
    wrong = [
        np.count_nonzero(labels[0].numpy() != truth, axis=(0, 1))
        for labels in (segmenter(voxels, affine=affine), segmenter.correct(voxels, clicks, affine=affine))
    ]
    assert wrong[1][8] < 0.5 * wrong[0][8]
    assert np.array_equal(np.delete(wrong[0], 8), np.delete(wrong[1], 8))
