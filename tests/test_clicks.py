"""Clicks on one image: what their file may hold, which classes they correct, and where they lie for the network."""

import itertools
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from monai.bundle import ConfigParser
from monai.data import decollate_batch, list_data_collate
from PIL import Image
from test_custom_data import plain
from test_geometry import MIRRORED, ORDERS, Bands, oblique, reordered, save, volume

from adapt.new import new_bundle
from components.data.clicks import clicks_by_slice, read_clicks
from components.inference.correction import EMBEDDINGS, merge_slice

CLASSES = ("RV", "Myo", "LV")
RV, MYO, LV = 1, 2, 3
SHAPE = (20, 24, 5)


def read(content, shape=SHAPE) -> dict:
    return read_clicks(content, CLASSES, shape)


def test_clicks_are_voxels_by_class_in_any_case(tmp_path):
    expected = {(3, 4, 1): LV, (19, 23, 4): LV, (0, 0, 0): 0}
    content = {"lv": [[3, 4, 1], [19, 23.0, 4], [3, 4, 1]], "Background": [[0, 0, 0]], "Myo": []}
    assert read(content) == expected
    (tmp_path / "clicks.json").write_text(json.dumps(content))
    assert read(str(tmp_path / "clicks.json")) == expected


def test_a_pictures_clicks_are_pixels():
    assert read({"LV": [[3, 4], [5, 6, 0]]}, (20, 24, 1)) == {(3, 4, 0): LV, (5, 6, 0): LV}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"LV": [[20, 0, 0]]},
            r"the click \[20, 0, 0\] on LV is outside the image: expected \[0, 0, 0\] to \[19, 23, 4\]",
        ),
        ({"LV": [[0, -1, 0]]}, r"\[0, -1, 0\] on LV is outside"),
        ({"liver": [[0, 0, 0]]}, "no class 'liver' to click: expected some of RV, Myo, LV, background"),
        (
            {"LV": [[1, 2, 3]], "background": [[1, 2, 3]]},
            r"voxel \[1, 2, 3\] is clicked as LV and background: expected one",
        ),
        ({"LV": [[1, 2, 3]], "rv": [[1, 2, 3]]}, "is clicked as LV and RV"),
        ({"LV": [[1, 2]]}, r"\[1, 2\] of LV is no voxel: expected three whole numbers"),
        ({"LV": [[1, 2, 0.5]]}, "is no voxel"),
        ({"LV": [[1, 2, float("nan")]]}, "is no voxel"),
        ({"LV": [1, 2, 3]}, "1 of LV is no voxel"),
        ({"LV": 7}, "7 of LV is no voxel"),
        ([[1, 2, 3]], "holds a list: expected one list of voxels per class"),
    ],
)
def test_what_is_no_click_is_refused(content, said, tmp_path):
    file = tmp_path / "clicks.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        read(str(file))


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file missing\.json: expected a JSON file of clicks"):
        read("missing.json")
    with pytest.raises(ValueError, match="there are no clicks: give --clicks FILE"):
        read(None)
    (tmp_path / "clicks.json").write_text("LV: 1 2 3")
    with pytest.raises(ValueError, match=r"clicks\.json is no JSON file"):
        read(str(tmp_path / "clicks.json"))


def test_clicks_correct_their_class_and_those_on_background_what_is_there():
    labels = np.zeros(SHAPE, int)
    labels[5, 5] = RV
    clicks = read({"LV": [[1, 1, 0]], "background": [[5, 5, 0], [9, 9, 0], [5, 5, 2], [9, 9, 3]]})
    assert clicks_by_slice(clicks, labels, 2) == {
        0: {
            RV: [((5, 5, 0), False), ((9, 9, 0), False)],
            LV: [((1, 1, 0), True), ((5, 5, 0), False), ((9, 9, 0), False)],
        },
        2: {RV: [((5, 5, 2), False)]},  # the click in slice 3 is on background already
    }
    assert set(clicks_by_slice(clicks, labels, 0)) == {1, 5}


def test_a_new_piece_of_a_corrected_class_needs_a_click():
    before, redrawn = np.zeros((2, 12, 12), int)
    before[1:4, 1:4], before[1:4, 6:9] = LV, RV
    redrawn[1:6, 1:4] = LV  # grown
    redrawn[8:10, 1:3] = LV  # apart, without a click
    redrawn[8:10, 8:10] = LV  # apart, with one
    redrawn[11, 11] = RV  # an island of a class that is not corrected, which the cleaning took out
    after = merge_slice(before, redrawn, {LV: [((9, 9), True), ((8, 1), False)]})
    expected = before.copy()
    expected[1:6, 1:4] = expected[8:10, 8:10] = LV
    assert np.array_equal(after, expected)


def test_what_a_corrected_class_loses_goes_to_what_is_beneath():
    before = np.full((4, 4), LV)
    redrawn = before.copy()
    redrawn[0], redrawn[1] = MYO, 0
    assert np.array_equal(merge_slice(before, redrawn, {LV: [((0, 0), False)]}), redrawn)


class Encoder(torch.nn.Module):
    """Counts the slices that it encodes: the embedding is the slice."""

    def __init__(self):
        super().__init__()
        self.encoded = 0

    def forward(self, images):
        self.encoded += len(images)
        assert images.shape[1] == 3
        return images


class Painter(torch.nn.Module):
    """Gives a class the pixels within 1.5 pixels of its clicks, and takes those off it; sees the slice as embedding."""

    def __init__(self):
        super().__init__()
        self.grey_values = []

    def forward(self, embeddings, logits, clicks):
        painted = logits.clone()
        for slice_, before, of_slice in zip(embeddings, painted, clicks, strict=True):
            y, x = torch.meshgrid(*map(torch.arange, before.shape[1:]), indexing="ij")
            for label, (points, signs) in of_slice.items():
                for (at_x, at_y), sign in zip(points, signs, strict=True):
                    near = torch.hypot(x - at_x, y - at_y) < 1.5
                    before[label][near] = 99 if sign else -99
                    self.grey_values.append(float(slice_[0, round(float(at_y)), round(float(at_x))]))
        return painted


class Corrector:
    """The inference config of a bundle with a head, with the overlay of the correction and networks by hand."""

    def __init__(self, folder: Path, *, bundle: Path = REPOSITORY / "bundles/linearhead_acdc", **knobs) -> None:
        parser = ConfigParser()
        parser.read_config([bundle / "configs/inference.json", bundle / "configs/correct.json"])
        self.network = Bands()
        self.network.encoder, self.painter = Encoder(), Painter()
        small = {"canvas_size": 48, "crop_size": 48, "test_time_views": 1, "ckpt_path": "there is no model"}
        small |= {
            "bundle_root": str(bundle),
            "network": self.network,
            "click_encoder": self.network.encoder,
            "correction#corrector": self.painter,
            "output_dir": str(folder),
        }
        parser.update({**small, "clicks": {}, **knobs})
        self.inferer = parser.get_parsed_content("inferer")
        self.preprocessing = parser.get_parsed_content("preprocessing")
        self.correction = parser.get_parsed_content("correction")
        self.postprocessing = parser.get_parsed_content("postprocessing")
        self.folder = folder

    def __call__(self, path: str, clicks) -> np.ndarray:
        batch = list_data_collate([self.preprocessing({"image": path})])
        with torch.no_grad():
            batch["pred"] = self.inferer(batch["image"], self.network)
        (self.item,) = decollate_batch(batch)
        return self.again(clicks)

    def again(self, clicks) -> np.ndarray:
        self.correction.clicks = clicks
        self.postprocessing(self.item)
        (file,) = self.folder.glob("x_pred.*")
        return np.asarray(Image.open(file)).T if file.suffix == ".png" else np.asarray(nib.load(file).dataobj)


@pytest.mark.parametrize(("order", "mirrored"), list(itertools.product(ORDERS, MIRRORED[::3])))
def test_a_click_lands_on_its_voxel_however_the_volume_lies(order, mirrored, tmp_path):
    """Rectangular slices, so padded to squares, then resized by 49/24, cropped, and oblique in space."""
    views = 8 if mirrored[0] else 1
    corrector = Corrector(tmp_path, canvas_size=49, crop_size=45, test_time_views=views)
    path = save(tmp_path / "x.nii.gz", *reordered(volume(), oblique(25), order, mirrored))
    plain = corrector(path, {})
    slice_axis = order.index(2)
    on = tuple(int(size * 0.3) for size in plain.shape)
    new = next(label for label in (RV, MYO, LV) if label != plain[on])
    corrected = corrector(path, {CLASSES[new - 1]: [list(on)]})
    assert corrected[on] == new
    where = np.argwhere(corrected != plain)
    assert np.abs(where - on).max() <= 1
    assert (where[:, slice_axis] == on[slice_axis]).all()
    grey = np.asarray(nib.load(path).dataobj, float)
    scaled = np.clip((grey - np.percentile(grey, 0.5)) / np.ptp(np.percentile(grey, [0.5, 99.5])), 0, 1) * 255
    assert abs(corrector.painter.grey_values[0] - scaled[on]) < 25  # the network sees that voxel there


def test_a_click_lands_on_the_pixel_of_a_picture(tmp_path):
    bundle = new_bundle("cells", plain(tmp_path / "data", mode="L"), tmp_path, network="linearhead")[0]
    corrector = Corrector(tmp_path, bundle=bundle)
    picture = np.asarray(Image.open(tmp_path / "data/images/cell_0.png"))
    shutil.copy(tmp_path / "data/images/cell_0.png", tmp_path / "x.png")
    before = corrector(str(tmp_path / "x.png"), {})
    assert before.shape == picture.T.shape == (50, 40)
    on = tuple(np.argwhere(before != 1)[-1].tolist())
    (name,) = corrector.correction.class_names
    corrected = corrector(str(tmp_path / "x.png"), {name: [list(on)]})
    assert corrected[on] == 1
    assert np.abs(np.argwhere(corrected != before) - on).max() <= 1


@pytest.mark.parametrize("views", [1, 8])
def test_slices_without_a_click_are_those_of_the_plain_segmentation(views, tmp_path):
    corrector = Corrector(tmp_path, test_time_views=views, canvas_size=49, crop_size=45)
    path = save(tmp_path / "x.nii.gz", volume(), oblique(0))
    plain = corrector(path, {})
    off = (*np.argwhere(plain[..., 3] == LV)[0], 3)
    corrected = corrector(path, {"background": [[int(index) for index in off]], "RV": [[10, 12, 1]]})
    assert corrected[off] != LV
    assert corrected[10, 12, 1] == RV
    assert np.array_equal(corrected[..., [0, 2, 4]], plain[..., [0, 2, 4]])
    for on in ((10, 12, 1), off):
        where = np.argwhere(corrected[..., on[2]] != plain[..., on[2]])
        assert np.abs(where - on[:2]).max() <= 1


def test_the_correction_starts_anew_with_all_clicks_and_encodes_a_slice_once(tmp_path):
    corrector = Corrector(tmp_path)
    path = save(tmp_path / "x.nii.gz", volume(), oblique(0))
    plain = corrector(path, {})
    corrector.item[EMBEDDINGS] = {}
    encoder = corrector.network.encoder
    first = corrector.again({"RV": [[10, 12, 1]]})
    second = corrector.again({"RV": [[10, 12, 1]], "LV": [[4, 4, 1], [4, 4, 2]]})
    assert encoder.encoded == 2
    assert np.array_equal(corrector.again({"RV": [[10, 12, 1]]}), first)
    assert np.array_equal(corrector.again({}), plain)
    assert not np.array_equal(first, second)
    assert encoder.encoded == 2


def test_a_click_beyond_what_the_network_sees_is_answered(tmp_path, caplog):
    corrector = Corrector(tmp_path, crop_size=24)
    path = save(tmp_path / "x.nii.gz", volume(), oblique(0))
    plain = corrector(path, {})
    assert np.array_equal(corrector(path, {"LV": [[0, 0, 2]]}), plain)
    assert "the click [0, 0, 2] lies outside of what the network sees: it is left out" in caplog.text
