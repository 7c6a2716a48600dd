"""Labels of one's own data: pictures turned by EXIF, palettes, deep colours, ignored voxels, sides, masks by organ."""

import json
import subprocess
import sys
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from PIL import Image, TiffImagePlugin

from adapt.layouts import read_layout
from adapt.new import new_bundle
from adapt.survey import survey
from components.data.cases import list_cases
from components.data.custom_data import DatasetStatistics, read_data
from components.data.pictures import PictureReader, PictureWriter
from components.data.slices import IGNORED, SliceDataset
from components.data.transforms import CentralCropd, LeaveOutIgnoredd, LoadVolumed
from components.evaluation.metrics import dice_per_class
from components.training.known_pixels import KnownPixelsDiceCELoss

BLACK, RED, BLUE, WHITE = (0, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)
TURNED_BY = {3: 2, 6: 3, 8: 1}  # quarter turns, counter-clockwise, that set a picture of an EXIF orientation upright


def described(bundle: Path) -> dict:
    return json.loads((bundle / "configs/data.json").read_text())


def read(path: Path, **options) -> np.ndarray:
    """The values of a picture, as on a screen."""
    reader = PictureReader(**options)
    array, _ = reader.get_data(reader.read(path))
    return array[:, :, 0].swapaxes(0, 1)


def two_blobs(number: int, side: int = 40, *, is_sided: bool) -> np.ndarray:
    """A label map with two squares: the second always below the first, or anywhere around it."""
    label = np.zeros((side, side), np.uint8)
    angle = 0.0 if is_sided else 2.4 * number
    for value, sign in ((1, -1), (2, 1)):
        row, column = (int(side / 2 + sign * 9 * turn) for turn in (np.cos(angle), np.sin(angle)))
        label[row - 3 : row + 3, column - 3 : column + 3] = value
    return label


def image_of(label: np.ndarray) -> np.ndarray:
    noise = np.random.RandomState(int(label.sum())).rand(*label.shape) * 20
    return (noise + 50 * (label % 3)).astype(np.uint8)


def pictures(root: Path, labels: list[np.ndarray], palettes: list | None = None, names=("images", "labels")) -> Path:
    for folder in names:
        (root / folder).mkdir(parents=True)
    for number, label in enumerate(labels):
        Image.fromarray(image_of(label)).save(root / names[0] / f"{number}.png")
        mask = Image.fromarray(label)
        if palettes:
            colours = palettes[number % len(palettes)]
            by_class = [BLACK, RED, BLUE] if BLACK in colours else [WHITE, RED, BLUE]
            mask = Image.fromarray(np.array([colours.index(each) for each in by_class], np.uint8)[label])
            mask.putpalette([value for colour in colours for value in colour])
        mask.save(root / names[1] / f"{number}.png")
    return root


def volumes(root: Path, labels: list[np.ndarray], names: dict[str, int] | None = None) -> Path:
    """nnU-Net's folder, or plain folders if the classes have no names."""
    folders = ("imagesTr", "labelsTr") if names else ("images", "labels")
    for folder in folders:
        (root / folder).mkdir(parents=True)
    for number, label in enumerate(labels):
        for folder, array, end in zip(folders, (image_of(label), label), ("_0000" if names else "", ""), strict=True):
            nib.save(nib.Nifti1Image(array, np.diag([1, 1, 4, 1.0])), root / folder / f"{number}{end}.nii.gz")
    if names:
        (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}, "labels": names}))
    return root


@pytest.mark.parametrize("orientation", TURNED_BY)
@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".jpg", {"quality": 100}), (".png", {}), (".tif", {}), (".tif", {"compression": "tiff_lzw"})],
)
def test_a_photograph_is_turned_as_its_exif_orientation_says(tmp_path, orientation, suffix, options):
    shown = np.kron(np.array([[0, 60, 120], [180, 200, 240]], np.uint8), np.ones((16, 16), np.uint8))
    stored = np.rot90(shown, -TURNED_BY[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photograph{suffix}"
    Image.fromarray(stored).save(path, exif=exif, **options)
    assert np.abs(read(path) - shown).max() <= 3


def test_a_prediction_lies_on_the_turned_photograph(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.RandomState(0).randint(0, 255, (20, 30), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photograph.jpg", exif=exif)
    image = LoadVolumed("image")({"image": tmp_path / "photograph.jpg"})["image"]
    writer = PictureWriter()
    writer.set_data_array(image, channel_dim=0)
    writer.set_metadata(image.meta)
    writer.write(tmp_path / "pred.png")
    assert Image.open(tmp_path / "pred.png").size == (20, 30)


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_in_a_tiff_are_refused(tmp_path, channels):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    width, height = 4, 3
    for tag, value in {
        256: width,
        257: height,
        258: (16,) * channels,
        259: 1,
        262: 2,
        277: channels,
        278: height,
    }.items():
        tags[tag] = value
    tags[273], tags[279] = 8, width * height * channels * 2
    if channels == 4:
        tags[338] = 2
    path = tmp_path / "deep.tif"
    with path.open("wb") as file:
        pixels = np.arange(width * height * channels, dtype="<u2").tobytes()
        file.write(b"II*\0" + (8 + len(pixels)).to_bytes(4, "little") + pixels)
        tags.save(file)
    with pytest.raises(ValueError, match=r"deep.tif has colours or transparency of 16 bits: expected 8; convert it"):
        PictureReader().read(path)


def test_classes_are_colours_where_palettes_change_places(tmp_path):
    labels = [two_blobs(number, is_sided=False) for number in range(6)]
    data = pictures(tmp_path / "data", labels, [[BLACK, RED, BLUE], [BLACK, BLUE, RED], [RED, BLACK, BLUE]])
    bundle, said = new_bundle("cells", data, tmp_path)
    values = described(bundle)
    assert values["label_values"] == ["#000000", "#0000ff", "#ff0000"]
    assert values["class_names"] == ["class_1", "class_2"]
    assert "classes: class_1 (#0000ff), class_2 (#ff0000)" in said
    assert any("the palettes of the labels differ from file to file" in sentence for sentence in said)
    load = LoadVolumed("label", label_values=values["label_values"])
    for number, label in enumerate(labels):
        loaded = load({"label": data / f"labels/{number}.png"})["label"][0, :, :, 0].numpy().T
        assert np.array_equal(loaded, np.array([0, 2, 1])[label])
    cases = list_cases(read_data(bundle / "configs/data.json"), "training")
    options = {name: values[name] for name in ("class_names", "label_values", "channels", "slice_axis", "modality")}
    assert DatasetStatistics(cases, **options).canvas_size == 64
    stray = Image.fromarray(labels[0])
    stray.putpalette([*BLACK, *RED, *(0, 255, 0)])
    stray.save(tmp_path / "stray.png")
    with pytest.raises(
        ValueError, match=r"stray.png has the colour #00ff00: expected one of #000000, #0000ff, #ff0000"
    ):
        load({"label": tmp_path / "stray.png"})


@pytest.mark.parametrize(
    ("palettes", "values"),
    [
        ([[BLACK, RED, BLUE]], [0, 1, 2]),
        ([[BLUE, BLACK, RED], [BLUE, BLACK, RED]], [0, 1, 2]),
        ([[WHITE, RED, BLUE], [WHITE, BLUE, RED]], ["#ffffff", "#0000ff", "#ff0000"]),
    ],
    ids=["one palette", "one palette in another order", "palettes without black"],
)
def test_indices_are_classes_where_all_files_have_one_palette(tmp_path, palettes, values):
    data = pictures(tmp_path / "data", [two_blobs(number, is_sided=False) for number in range(4)], palettes)
    assert described(new_bundle("cells", data, tmp_path)[0])["label_values"] == values


def test_palettes_that_differ_beside_a_grey_label_are_refused(tmp_path):
    labels = [two_blobs(number, is_sided=False) for number in range(4)]
    data = pictures(tmp_path / "data", labels, [[BLACK, RED, BLUE], [BLACK, BLUE, RED]])
    Image.fromarray(labels[0]).save(data / "labels/0.png")
    with pytest.raises(ValueError, match=r"differ from file to file, and .*0\.png has none: expected .* convert them"):
        new_bundle("cells", data, tmp_path)


def test_a_corrected_prediction_keeps_its_indices_beside_labels_by_colour(tmp_path):
    writer = PictureWriter()
    writer.set_data_array(torch.tensor([[0, 1], [2, 2]])[None, :, :, None], channel_dim=0)
    writer.write(tmp_path / "pred.png")
    label = read(tmp_path / "pred.png", is_label=True, colours=["#000000", "#0000ff", "#ff0000"])
    assert label.tolist() == [[0, 2], [1, 2]]


def with_ignored(number: int, value: int = 3) -> np.ndarray:
    """A label map of six slices, of which every third one is annotated."""
    label = np.repeat(two_blobs(number, is_sided=True)[:, :, None], 6, axis=2)
    label[:, :, np.arange(6) % 3 > 0] = value
    return label


def test_an_ignore_label_takes_no_part_in_training_and_scores(tmp_path):
    names = {"background": 0, "top": 1, "bottom": 2, "ignore": 3}
    data = volumes(tmp_path / "data", [with_ignored(number) for number in range(6)], names)
    bundle, said = new_bundle("organ", data, tmp_path)
    values = described(bundle)
    assert (values["class_names"], values["label_values"], values["ignore_label"]) == (["top", "bottom"], [0, 1, 2], 3)
    assert any("voxels of the value 3, `ignore`, count in neither training nor scores" in each for each in said)
    options = {"labelled_cases": 2, "width": 2, "steps": 1, "val_interval": 100, "is_silent": True}
    options |= {"bundle_root": str(bundle), "output_dir": str(tmp_path / "eval"), "logging_file": False}
    train, evaluate = (str(bundle / f"configs/{name}.json") for name in ("train", "evaluate"))
    monai.bundle.run("training", config_file=train, **options)
    monai.bundle.run("evaluating", config_file=[train, evaluate], **options)
    rows = (tmp_path / "eval/metrics.csv").read_text().splitlines()
    assert {row.split(",")[1] for row in rows[1:]} == {"top", "bottom"}


def test_ignored_voxels_become_no_class_and_slices_of_nothing_else_are_left_out(tmp_path):
    label = with_ignored(0)
    nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / "l.nii.gz")
    nib.save(nib.Nifti1Image(image_of(label), np.eye(4)), tmp_path / "i.nii.gz")
    case = {"image": str(tmp_path / "i.nii.gz"), "label": str(tmp_path / "l.nii.gz")}
    load = LoadVolumed(["image", "label"], num_classes=3, ignore_label=3)
    assert load(case)["label"].unique().tolist() == [0, 1, 2, IGNORED]
    slices = SliceDataset([case], load, progress=False)
    assert len(slices) == 2
    with pytest.raises(ValueError, match=r"l\.nii\.gz holds labels \[3"):
        LoadVolumed(["image", "label"], num_classes=3)(case)
    options = {"class_names": ["a", "b"], "label_values": [0, 1, 2], "channels": 1, "slice_axis": 2, "modality": "CT"}
    seen = DatasetStatistics([case], ignore_label=3, **options)
    assert seen.crop_size(256) == 224  # the squares end 12 pixels from the middle of 40, and the margin is an eighth
    assert seen.normalisation[2] <= 120


def test_ignored_pixels_change_no_warning_of_the_crop(caplog):
    label = torch.zeros(1, 20, 20, 1)
    label[:, :2] = IGNORED
    label[:, 9:11, 9:11] = 1
    item = {key: MetaTensor(label, meta={"filename_or_obj": "a"}) for key in ("image", "label")}
    CentralCropd(["image", "label"], roi_size=[8, 8, -1])(item)
    assert not caplog.text


def test_the_loss_and_its_gradient_do_not_depend_on_ignored_pixels():
    options = {"include_background": False, "to_onehot_y": True, "softmax": True, "batch": True}
    loss, monais = KnownPixelsDiceCELoss(**options), DiceCELoss(**options)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 6, generator=generator, requires_grad=True)
    target = torch.randint(0, 3, (2, 1, 8, 6), generator=generator).float()
    assert torch.equal(loss(logits, target), monais(logits, target))
    half = target.clone()
    half[:, :, 4:] = IGNORED
    value = loss(logits, half)
    torch.testing.assert_close(value, monais(logits[:, :, :4], target[:, :, :4]))
    value.backward()
    assert logits.grad[:, :, 4:].abs().max() == 0 < logits.grad[:, :, :4].abs().max()
    assert loss(logits, torch.full_like(target, IGNORED)).item() == 0


def test_ignored_voxels_count_in_no_score():
    truth, pred = torch.zeros(1, 6, 6, 1), torch.zeros(1, 6, 6, 1)
    truth[:, :2] = 1
    pred[:, :4] = 1
    truth[:, 2:4] = IGNORED
    known = LeaveOutIgnoredd("pred")({"pred": pred, "label": truth})
    one_hot = [torch.nn.functional.one_hot(known[key].long()[0], 2).movedim(-1, 0)[None] for key in ("pred", "label")]
    assert dice_per_class(*one_hot).item() == 1
    assert truth.max() == IGNORED
    assert pred.sum() == 24


def test_negative_labels_are_refused_with_what_to_do(tmp_path):
    label = two_blobs(0, is_sided=True)[:, :, None].astype(np.int16)
    label[0] = -1
    data = volumes(tmp_path / "data", [label])
    with pytest.raises(ValueError, match=r"0\.nii\.gz has the value -1: expected 0 for the background .* set it to 0"):
        new_bundle("organ", data, tmp_path)


@pytest.mark.parametrize("kind", ["volumes", "pictures"])
@pytest.mark.parametrize(
    ("is_sided", "cases", "options", "is_turned", "sentence"),
    [
        (True, 8, {}, False, "the classes have no names and may be sides"),
        (False, 8, {}, True, "the classes have no names, but lie in changing directions"),
        (False, 4, {}, False, "the classes have no names and may be sides"),
        (True, 8, {"classes": "core, rim"}, True, "no class names a side"),
        (True, 8, {"classes": "left horn,right horn"}, False, "left horn, right horn name sides"),
        (True, 8, {"turned": True}, True, ""),
        (False, 8, {"turned": False}, False, ""),
    ],
)
def test_classes_without_names_are_turned_only_if_they_are_no_sides(
    tmp_path, kind, is_sided, cases, options, is_turned, sentence
):
    labels = [two_blobs(number, is_sided=is_sided) for number in range(cases)]
    make = pictures if kind == "pictures" else volumes
    data = make(tmp_path / "data", [label if kind == "pictures" else label[:, :, None] for label in labels])
    bundle, said = new_bundle("organ", data, tmp_path, **options)
    assert described(bundle)["turned_views"] is is_turned
    assert any(sentence in each for each in said)


def test_numbers_as_names_are_none_and_names_must_fit_the_labels(tmp_path):
    labels = [two_blobs(number, is_sided=True)[:, :, None] for number in range(6)]
    data = volumes(tmp_path / "data", labels, {"background": 0, "label_1": 1, "label_2": 2})
    assert described(new_bundle("organ", data, tmp_path)[0])["turned_views"] is False
    with pytest.raises(ValueError, match=r"--classes gives 1 names, head: expected 2, one for each of .* \[1, 2\]"):
        new_bundle("other", data, tmp_path, classes="head")
    bundle, _ = new_bundle("named", data, tmp_path, classes="head,body")
    assert (described(bundle)["class_names"], described(bundle)["turned_views"]) == (["head", "body"], True)


def test_the_command_takes_names_and_turned_and_prints_where_it_wrote(tmp_path):
    labels = [two_blobs(number, is_sided=True) for number in range(4)]
    pictures(tmp_path / "data", labels, names=("image", "label"))
    command = ["-m", "adapt", "new", "cells", "--data", "data", "--output_dir", "out", "--classes", "a,b"]
    done = subprocess.run(
        [sys.executable, *command, "--turned", "False"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"{tmp_path / 'out/cells'} is made" in done.stdout
    values = described(tmp_path / "out/cells")
    assert (values["class_names"], values["turned_views"]) == (["a", "b"], False)


@pytest.mark.parametrize("names", [("image", "label"), ("images", "mask"), ("images", "images"), (".", ".")])
def test_folders_in_the_singular_and_masks_beside_their_images_are_read(tmp_path, names):
    labels = [two_blobs(number, is_sided=True) for number in range(3)]
    data = pictures(tmp_path / "one", labels)
    for number in range(3):
        for role, folder, end in zip(("images", "labels"), names, ("", "_mask"), strict=True):
            target = tmp_path / "data" / folder / f"{number}{end if names[0] == names[1] else ''}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((data / role / f"{number}.png").read_bytes())
    listed = described(new_bundle("cells", tmp_path / "data", tmp_path)[0])["training"]
    assert [case["image"] for case in listed] == [str(Path(names[0], f"{number}.png")) for number in range(3)]
    assert len({case["label"] for case in listed}) == 3


def test_an_image_without_a_mask_beside_others_that_have_one_is_named(tmp_path):
    data = pictures(tmp_path / "data", [two_blobs(0, is_sided=True)])
    Image.open(data / "labels/0.png").save(data / "images/0_mask.png")
    Image.open(data / "images/0.png").save(data / "images/1.png")
    (data / "labels").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"1 files have no label, such as .*1\.png"):
        new_bundle("cells", data, tmp_path)


def by_organ(root: Path, cases: int = 3) -> Path:
    """TotalSegmentator's layout, with an organ that no case shows."""
    for number in range(cases):
        label = np.repeat(two_blobs(number, is_sided=True)[:, :, None], 3, axis=2)
        folder = root / f"s{number:04}/segmentations"
        folder.mkdir(parents=True)
        affine = np.diag([-1.5, -1.5, 3, 1])
        nib.save(nib.Nifti1Image(image_of(label).astype(np.int16) - 1000, affine), folder.parent / "ct.nii.gz")
        for name, value in {"liver": 2, "spleen": 1, "brain": 9}.items():
            nib.save(nib.Nifti1Image((label == value).astype(np.uint8), affine), folder / f"{name}.nii.gz")
    return root


def test_masks_of_single_organs_become_label_maps_beside_the_bundle(tmp_path):
    data = by_organ(tmp_path / "data")
    before = sorted(data.rglob("*"))
    bundle, said = new_bundle("organs", data, tmp_path / "out")
    assert sorted(data.rglob("*")) == before
    values = described(bundle)
    assert (values["class_names"], values["label_values"], values["modality"]) == (["liver", "spleen"], [0, 1, 2], "CT")
    assert values["dataset_dir"] == str(tmp_path / "out/organs_data")
    assert any(f"are written to {tmp_path / 'out/organs_data'}" in sentence for sentence in said)
    case = read_data(bundle / "configs/data.json")["training"][0]
    assert Path(case["image"]).name == "s0000.nii.gz"
    loaded = LoadVolumed(["image", "label"], num_classes=3)(case)
    assert np.array_equal(loaded["label"][0, :, :, 0], np.array([0, 2, 1])[two_blobs(0, is_sided=True)])
    assert Path(case["image"]).resolve() == data / "s0000/ct.nii.gz"
    with pytest.raises(FileExistsError, match=r"organs_data already exists, where label maps would be written"):
        bundle.rename(tmp_path / "moved")
        new_bundle("organs", data, tmp_path / "out")


def test_a_mask_on_another_grid_is_named_and_nothing_is_left(tmp_path):
    data = by_organ(tmp_path / "data")
    odd = nib.load(data / "s0001/segmentations/spleen.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(odd.dataobj), np.eye(4)), data / "s0001/segmentations/spleen.nii.gz")
    with pytest.raises(ValueError, match=r"s0001/segmentations/spleen\.nii\.gz is not on the grid of .*liver"):
        new_bundle("organs", data, tmp_path / "out")
    assert not (tmp_path / "out/organs").exists()
    assert not (tmp_path / "out/organs_data").exists()


def test_labels_that_are_nearly_whole_are_read_as_in_training(tmp_path):
    label = with_ignored(0).clip(0, 2).astype(np.float32) * np.float32(0.99998)
    for folder, array in (("images", image_of(label.round().astype(np.uint8))), ("labels", label)):
        (tmp_path / folder).mkdir()
        for number in range(4):
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / folder / f"{number}.nii.gz")
    description, _ = survey(read_layout(tmp_path), tmp_path)
    assert description["label_values"] == [0, 1, 2]
