"""A volume's content decides its labels, and its header theirs: whatever order, form, unit or type the file has."""

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.data import decollate_batch, list_data_collate

from components.data.prediction_writer import GEOMETRY_FIELDS
from components.data.transforms import LoadVolumed, SlicesLastd

SHAPE = (20, 24, 5)  # voxels towards left, back and head
SPACING = (1.25, 1.5, 8.0)
ORDERS = list(itertools.permutations(range(3)))
MIRRORED = list(itertools.product([False, True], repeat=3))


def volume() -> np.ndarray:
    """Smooth grey values without symmetry, -200 to 200, and noise that makes any mix-up visible."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    values = 120 * np.cos(4 * np.hypot(x - 0.3, y + 0.2 * z)) + 60 * x * y
    return 2 * np.round((values + np.random.default_rng(0).normal(0, 10, SHAPE)) / 2).astype(
        np.int16
    )  # even: see slope


def oblique(degrees: float, spacing=SPACING) -> np.ndarray:
    """The affine of a volume towards left, back and head, tilted about two axes."""
    a = np.radians(degrees)
    tilt = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    tilt = tilt @ np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag([-spacing[0], -spacing[1], spacing[2]])
    affine[:3, 3] = (31.5, -7.25, 12.0)
    return affine


def reordered(array, affine, order=(0, 1, 2), mirrored=(False, False, False)):
    """The same content with its axes in another order and direction, and the affine that says so."""
    axes = np.zeros((4, 4))
    axes[3, 3] = 1
    for new, old in enumerate(order):
        axes[old, new] = -1 if mirrored[new] else 1
        axes[old, 3] = array.shape[old] - 1 if mirrored[new] else 0
    flipped = tuple(axis for axis, flip in enumerate(mirrored) if flip)
    return np.flip(array.transpose(order), flipped), affine @ axes


def save(path: Path, array, affine, *, forms="both", dtype=None, unit=2, slope=None) -> str:
    image = nib.Nifti1Image(np.ascontiguousarray(array), affine)
    image.set_qform(affine, code=0 if forms == "sform" else 1)
    image.set_sform(affine, code=0 if forms == "qform" else 2)
    if forms == "different":  # as SPM leaves them when it moves a volume: the sform is new, the qform old
        moved = affine.copy()
        moved[:3, 3] += (30, -20, 15)
        image.set_qform(moved, code=1)
    if dtype is not None:
        image.set_data_dtype(dtype)
    if slope is not None:
        image.header.set_slope_inter(*slope)
    image.header["xyzt_units"] = unit
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return str(path)


class Bands(torch.nn.Module):
    """Four bands of grey values that shift across the slice: it sees the pose of what it is shown."""

    def forward(self, images):
        grey = images[:, :1] + torch.linspace(0, 90, images.shape[2])[:, None] - torch.linspace(0, 30, images.shape[3])
        return -((grey - torch.tensor([20.0, 90.0, 160.0, 230.0])[:, None, None]) ** 2) / 1000


class Segmenter:
    """The UNet's inference config on a small canvas, with another network and one view."""

    def __init__(self, folder: Path, **knobs) -> None:
        parser = ConfigParser()
        parser.read_config(REPOSITORY / "bundles/unet_acdc/configs/inference.json")
        small = {"canvas_size": 32, "crop_size": 32, "test_time_views": 1}
        plain = {"slice_smoothing": 0, "minimum_lv_share": 0, "minimum_rv_probability": 0, "largest_component": False}
        plain["ckpt_path"] = "there is no model"
        parser.update({**small, **plain, "output_dir": str(folder), **knobs})
        self.network = Bands()
        self.inferer = parser.get_parsed_content("inferer")
        self.preprocessing = parser.get_parsed_content("preprocessing")
        self.postprocessing = parser.get_parsed_content("postprocessing")
        self.folder = folder

    def __call__(self, path: str) -> nib.Nifti1Image:
        batch = list_data_collate([self.preprocessing({"image": path})])
        with torch.no_grad():
            batch["pred"] = self.inferer(batch["image"], self.network)
        self.postprocessing(decollate_batch(batch)[0])
        name = Path(path).name.removesuffix(".gz").removesuffix(".nii")
        return nib.load(self.folder / f"{name}_pred.nii.gz")


@pytest.fixture(scope="module")
def segment(tmp_path_factory):
    return Segmenter(tmp_path_factory.mktemp("predictions"))


@pytest.fixture(scope="module")
def expected(segment, tmp_path_factory) -> np.ndarray:
    labels = np.asarray(segment(save(tmp_path_factory.mktemp("x") / "x.nii.gz", volume(), oblique(0))).dataobj)
    assert np.bincount(labels.flat, minlength=4).min() > 50  # all classes, so that a mix-up shows
    return labels


def header_of(path) -> nib.Nifti1Header:
    return nib.load(path).header


def assert_same_geometry(prediction, path) -> None:
    for field in GEOMETRY_FIELDS:
        assert np.array_equal(prediction.header[field], header_of(path)[field]), field


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.sampled_from(ORDERS),
    mirrored=st.sampled_from(MIRRORED),
    degrees=st.floats(-25, 25),
    across=st.floats(2.0, 12.0),
    forms=st.sampled_from(["both", "sform", "qform", "different"]),
    dtype=st.sampled_from([np.int16, np.int32, np.float32, np.float64, ">i2", ">f4"]),
    slope=st.sampled_from([None, (2.0, 0.0), (0.5, -64.0), (1.0, 1024.0)]),
    unit=st.sampled_from([(0, 1.0), (1, 0.001), (2, 1.0), (3, 1000.0)]),
)
def test_the_same_labels_in_the_world_with_the_images_own_header(
    tmp_path, segment, expected, order, mirrored, degrees, across, forms, dtype, slope, unit
):
    code, per_mm = unit
    affine = oblique(degrees, (1.25, 1.25, 1.25 * across))
    affine[:3] *= per_mm
    array, affine = reordered(volume(), affine, order, mirrored)
    path = save(
        tmp_path / "x.nii.gz", array.astype(np.float64), affine, forms=forms, dtype=dtype, unit=code, slope=slope
    )
    prediction = segment(path)
    assert np.array_equal(np.asarray(prediction.dataobj), reordered(expected, affine, order, mirrored)[0])
    assert_same_geometry(prediction, path)


@pytest.mark.parametrize("order", ORDERS)
def test_slices_as_thin_as_their_pixels_lie_along_the_axis_that_is_named(tmp_path, expected, order):
    cube = (1.5, 1.5, 1.5)
    array, affine = reordered(volume(), oblique(0, cube), order)
    path = save(tmp_path / "x.nii.gz", array, affine)
    segment = Segmenter(tmp_path / "out", slice_axis=order.index(2))
    assert np.array_equal(np.asarray(segment(path).dataobj), expected.transpose(order))


def test_slices_as_thin_as_their_pixels_lie_along_the_third_axis_unless_named(tmp_path, segment, expected):
    path = save(tmp_path / "x.nii.gz", volume(), oblique(0, (1.5, 1.5, 1.5)))
    assert np.array_equal(np.asarray(segment(path).dataobj), expected)


@pytest.mark.parametrize("slice_axis", [3, -1, "2", True])
def test_an_axis_that_a_volume_lacks_is_refused(slice_axis):
    with pytest.raises(ValueError, match=r"expected slice_axis 0, 1 or 2.*give for example --slice_axis 0"):
        SlicesLastd("image", slice_axis=slice_axis)


@pytest.mark.parametrize("shape", [(*SHAPE, 1), (*SHAPE, 1, 1)])
def test_axes_of_length_one_are_dropped_and_given_back(tmp_path, segment, expected, shape):
    path = save(tmp_path / "x.nii.gz", volume().reshape(shape), oblique(0))
    prediction = segment(path)
    assert prediction.shape == shape
    assert np.array_equal(np.asarray(prediction.dataobj).reshape(SHAPE), expected)
    assert_same_geometry(prediction, path)


def test_header_that_nibabel_would_mend_comes_back_as_it_was(tmp_path, segment, expected):
    path = Path(save(tmp_path / "x.nii", volume(), oblique(0)))
    content = bytearray(path.read_bytes())
    content[80:92] = np.array([-1.25, 1.5, 0], "<f4").tobytes()  # pixdim
    path.write_bytes(content)
    prediction = segment(str(path))
    assert np.array_equal(np.asarray(prediction.dataobj), expected)
    assert gzip.decompress(Path(prediction.get_filename()).read_bytes())[80:92] == content[80:92]


def test_nifti_2_stays_nifti_2(tmp_path, segment, expected):
    path = str(tmp_path / "x.nii.gz")
    nib.save(nib.Nifti2Image(volume(), oblique(10)), path)
    prediction = segment(path)
    assert isinstance(prediction, nib.Nifti2Image)
    assert np.array_equal(np.asarray(prediction.dataobj), expected)
    assert_same_geometry(prediction, path)


# Labels beside their image


def pair(tmp_path, affine, label, label_affine, **options) -> dict[str, str]:
    return {
        "image": save(tmp_path / "x.nii.gz", volume(), affine),
        "label": save(tmp_path / "x_gt.nii.gz", label, label_affine, **options),
    }


def truth() -> np.ndarray:
    return (np.abs(volume()) % 4).astype(np.uint8)


@pytest.mark.parametrize(("order", "mirrored"), list(itertools.product(ORDERS, MIRRORED)))
def test_label_in_another_voxel_order_is_brought_to_its_image(tmp_path, order, mirrored):
    affine = oblique(17)
    loaded = LoadVolumed(["image", "label"])(pair(tmp_path, affine, *reordered(truth(), affine, order, mirrored)))
    assert np.array_equal(loaded["label"][0], truth())
    assert np.allclose(loaded["label"].affine, affine)


def test_label_less_than_a_thousandth_of_a_voxel_away_is_in_place(tmp_path):
    moved = oblique(17)
    moved[:3, 3] += 5e-4
    loaded = LoadVolumed(["image", "label"])(pair(tmp_path, oblique(17), truth(), moved))
    assert np.array_equal(loaded["label"][0], truth())


def _shifted(affine):
    affine[0, 3] += 40
    return affine


def _half_a_voxel_off(affine):
    affine[:3, 3] += affine[:3, 0] / 2
    return affine


def _of_other_spacing(affine):
    affine[:3, 0] *= 1.01
    return affine


@pytest.mark.parametrize("changed", [_shifted, _half_a_voxel_off, _of_other_spacing, lambda _: oblique(20)])
def test_label_elsewhere_is_refused_with_both_affines(tmp_path, changed):
    case = pair(tmp_path, oblique(17), truth(), changed(oblique(17)))
    with pytest.raises(
        ValueError, match=r"x_gt\.nii\.gz is not on the grid of its image: expected the affine"
    ) as error:
        LoadVolumed(["image", "label"])(case)
    for affine in (nib.load(case["image"]).affine, nib.load(case["label"]).affine):
        assert str(np.round(affine[:3], 4).tolist()) in str(error.value)


def test_label_without_a_unit_has_its_images(tmp_path):
    affine = oblique(17)
    affine[:3] *= 1000
    case = {
        "image": save(tmp_path / "x.nii.gz", volume(), affine, unit=3),
        "label": save(tmp_path / "x_gt.nii.gz", truth(), affine, unit=0),
    }
    loaded = LoadVolumed(["image", "label"])(case)
    assert np.allclose(loaded["label"].affine, oblique(17), atol=1e-4)


def test_singleton_axis_of_a_label_alone_does_not_matter(tmp_path):
    loaded = LoadVolumed(["image", "label"])(pair(tmp_path, oblique(0), truth()[..., None], oblique(0)))
    assert np.array_equal(loaded["label"][0], truth())


# Lengths


@pytest.mark.parametrize(("unit", "per_mm"), [(0, 1), (1, 0.001), (2, 1), (3, 1000)])
def test_lengths_are_in_mm_whatever_the_headers_unit(tmp_path, unit, per_mm):
    affine = oblique(17)
    affine[:3] *= per_mm
    image = LoadVolumed("image")({"image": save(tmp_path / "x.nii.gz", volume(), affine, unit=unit)})["image"]
    assert np.allclose(image.affine, oblique(17), atol=1e-4)


def test_two_voxel_sizes_in_one_header_are_both_named_and_the_affines_count(tmp_path, caplog):
    path = Path(save(tmp_path / "x.nii", volume(), oblique(0), forms="sform"))
    content = bytearray(path.read_bytes())
    content[80:92] = np.ones(3, "<f4").tobytes()
    path.write_bytes(content)
    image = LoadVolumed("image")({"image": str(path)})["image"]
    assert np.allclose(image.affine, oblique(0))
    assert "gives two voxel sizes, 1.25 x 1.5 x 8 by the sform and 1 x 1 x 1 by pixdim" in caplog.text


def test_form_that_is_no_affine_counts_as_not_set(tmp_path, caplog):
    path = Path(save(tmp_path / "x.nii", volume(), oblique(0)))
    content = bytearray(path.read_bytes())
    content[280:328] = bytes(48)  # the rows of the sform
    path.write_bytes(content)
    image = LoadVolumed("image")({"image": str(path)})["image"]
    assert np.allclose(image.affine, oblique(0), atol=1e-5)
    assert "the sform of its header is not an affine" in caplog.text
