import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Resized

from components.data.preprocessing import scaled_grey_values, square_canvas
from components.data.transforms import (
    CentralCropd,
    LoadVolumed,
    PadInPlaneToSquared,
    RoundIntensityd,
    SlicesLastd,
)

SHAPE = (6, 10, 3)


def save(path: Path, array: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(array, np.diag([1.5, 1.5, 10, 1])), path)
    return str(path)


@pytest.fixture
def case(tmp_path) -> dict[str, str]:
    image = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16)
    return {
        "image": save(tmp_path / "image.nii.gz", image),
        "label": save(tmp_path / "label.nii.gz", (image % 4).astype(np.uint8)),
    }


load = LoadVolumed(["image", "label"])


def test_volume_and_label_are_loaded_channel_first(case):
    loaded = load(case)
    assert loaded["image"].shape == loaded["label"].shape == (1, *SHAPE)
    assert loaded["image"][0, 1, 2, 1] == 1 * 30 + 2 * 3 + 1


def test_metadata_stand_apart_too_where_a_host_asks_for_them(case):
    transform = LoadVolumed(["image", "label"])
    transform._loader.image_only = False  # as MONAI Label does
    loaded = transform(case)
    assert loaded["image"].shape == (1, *SHAPE)
    assert np.array_equal(loaded["image_meta_dict"]["original_affine"], np.diag([1.5, 1.5, 10, 1]))
    assert loaded["label_meta_dict"]["filename_or_obj"] == case["label"]
    assert load(case).keys() == {"image", "label"}


def test_single_slice_keeps_its_third_axis(tmp_path):
    path = save(tmp_path / "one.nii.gz", np.arange(60).reshape(6, 10, 1).astype(np.int16))
    assert LoadVolumed("image")({"image": path})["image"].shape == (1, 6, 10, 1)


@pytest.mark.parametrize("shape", [(6, 10, 3, 5), (6, 10)])
def test_series_and_flat_image_are_refused(tmp_path, shape):
    path = save(tmp_path / "x.nii.gz", np.arange(np.prod(shape)).reshape(shape).astype(np.int16))
    with pytest.raises(ValueError, match=r"x\.nii\.gz is not one 3D volume: expected \(H, W, D\), received \(6, 10"):
        LoadVolumed("image")({"image": path})


def test_truncated_file_is_named(case):
    path = Path(case["image"])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"image\.nii\.gz cannot be read: expected a complete NIfTI file"):
        load(case)


def test_file_whose_voxels_end_early_is_named(case):
    path = Path(case["image"])
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-50]))
    with pytest.raises(ValueError, match=r"image\.nii\.gz cannot be read"):
        load(case)


def test_missing_file_is_named(case):
    with pytest.raises(FileNotFoundError, match=r"there is no label .*gone"):
        load({**case, "label": str(Path(case["label"]).with_name("gone.nii.gz"))})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_counted(case, tmp_path, value):
    image = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.float32)
    image[0, 0, :2] = value
    with pytest.raises(ValueError, match="holds 2 NaN or infinite voxels"):
        load({**case, "image": save(tmp_path / "nan.nii.gz", image)})


def test_constant_volume_is_refused(case, tmp_path):
    with pytest.raises(ValueError, match=r"has no contrast.*received 7 from"):
        load({**case, "image": save(tmp_path / "flat.nii.gz", np.full(SHAPE, 7, np.int16))})


def test_label_of_another_shape_is_refused(case, tmp_path):
    label = save(tmp_path / "other.nii.gz", np.zeros((6, 10, 4), np.uint8))
    with pytest.raises(ValueError, match=r"expected the image's shape \(6, 10, 3\), received \(6, 10, 4\)"):
        load({**case, "label": label})


@pytest.mark.parametrize("value", [4, 255, 0.5, -1])
def test_label_value_out_of_range_is_named(case, tmp_path, value):
    label = np.zeros(SHAPE, np.float32)
    label[2, 3, 1] = value
    with pytest.raises(ValueError, match=rf"holds labels \[{float(value)}\]: expected whole numbers 0\.\.3"):
        load({**case, "label": save(tmp_path / "odd.nii.gz", label)})


@pytest.mark.parametrize(("shape", "start"), [((4, 8, 2), (2, 0)), ((9, 4, 2), (0, 2)), ((5, 5, 1), (0, 0))])
def test_square_is_padded_evenly_and_undone(shape, start):
    pad = PadInPlaneToSquared("image")
    image = MetaTensor(torch.rand(1, *shape) + 1)
    padded = pad({"image": image})["image"]
    side = max(shape[:2])
    assert padded.shape == (1, side, side, shape[2])
    row, column = start
    assert torch.equal(padded[:, row : row + shape[0], column : column + shape[1]], image)
    assert padded.sum() == pytest.approx(image.sum().item(), rel=1e-6)
    assert torch.equal(pad.inverse({"image": padded})["image"], image)


@pytest.mark.parametrize("shape", [(154, 224, 3), (512, 428, 2), (40, 30, 1)])
def test_canvas_is_inverted_to_the_native_grid(tmp_path, shape):
    grid = np.stack(np.meshgrid(*(np.linspace(0, 1, size) for size in shape[:2]), indexing="ij"))
    ramp = (grid[0] + 2 * grid[1])[..., None].repeat(shape[2], axis=2).astype(np.float32)
    canvas = Compose(
        [
            LoadVolumed("image"),
            PadInPlaneToSquared("image"),
            Resized("image", spatial_size=[256, 256, -1], mode="trilinear"),
        ]
    )
    item = canvas({"image": save(tmp_path / "ramp.nii.gz", ramp)})
    assert item["image"].shape == (1, 256, 256, shape[2])
    item["pred"] = item["image"].clone()
    native = Invertd("pred", transform=canvas, orig_keys="image", nearest_interp=False)(item)["pred"]
    assert native.shape == (1, *shape)
    assert np.allclose(native.affine, nib.load(tmp_path / "ramp.nii.gz").affine)
    # Interpolation preserves a ramp except at its border, where it includes zeros of the padding.
    inner = (slice(6, -6), slice(6, -6))
    assert np.abs(native[0].numpy()[inner] - ramp[inner]).max() < 0.02


def test_values_are_clipped_and_rounded():
    rounded = RoundIntensityd("image")({"image": torch.tensor([-3.0, 0.4, 0.6, 254.6, 300.0]), "other": 1})
    assert rounded["image"].tolist() == [0, 0, 1, 255, 255]
    assert rounded["other"] == 1


def spelled_out_canvas(keys) -> Compose:
    """The steps of `square_canvas(keys, canvas_size=48, crop_size=32, slice_axis=0)`, one by one."""
    modes = ["trilinear", "nearest-exact"][: len(keys)]
    steps = [SlicesLastd(keys, slice_axis=0), PadInPlaneToSquared(keys)]
    steps += [Resized(keys, spatial_size=[48, 48, -1], mode=modes, anti_aliasing=[True, False][: len(keys)])]
    steps += [CentralCropd(keys, [32, 32, -1]), RoundIntensityd("image")]
    return Compose(steps)


@pytest.fixture
def odd_case(tmp_path) -> dict[str, str]:
    """A volume whose slices follow each other along its first axis, larger than the canvas, in two directions."""
    image = np.random.RandomState(0).randint(0, 255, (4, 61, 83)).astype(np.int16)
    affine = np.diag([10, -1.5, 1.5, 1])
    paths = {}
    for role, array in (("image", image), ("label", (image // 64).astype(np.uint8))):
        paths[role] = str(tmp_path / f"{role}.nii.gz")
        nib.save(nib.Nifti1Image(array, affine), paths[role])
    return paths


@pytest.mark.parametrize("keys", [("image", "label"), ("image",)])
def test_square_canvas_is_the_list_of_its_steps_and_inverted_like_it(odd_case, keys):
    loaded = LoadVolumed(["image", "label"])(odd_case)
    canvas = square_canvas(keys, canvas_size=48, crop_size=32, slice_axis=0)
    steps = spelled_out_canvas(keys)
    results = []
    for transform in (Compose([scaled_grey_values("image", [0.5, 99.5]), each]) for each in (canvas, steps)):
        item = transform(loaded)
        assert item["image"].shape == (1, 32, 32, 4)
        item["pred"] = item["image"].clone()
        native = Invertd("pred", transform=transform, orig_keys="image", nearest_interp=False)(item)["pred"]
        assert native.shape[1:] == (4, 61, 83)
        results.append([*(item[key] for key in ("image", "label")), native])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
        assert torch.equal(ours.affine, expected.affine)


def test_square_canvas_passes_over_an_absent_label_and_keeps_classes(odd_case):
    canvas = square_canvas(["image", "label"], canvas_size=48, crop_size=32, slice_axis=0)
    loaded = LoadVolumed(["image", "label"])(odd_case)
    item = canvas(loaded)
    assert item["label"].unique().tolist() == [0, 1, 2, 3]
    del loaded["label"]
    assert torch.equal(canvas(loaded)["image"], item["image"])
    assert canvas(loaded).keys() == {"image"}


def test_grey_values_are_scaled_by_percentiles_of_each_image_or_by_a_fixed_range():
    image = torch.arange(101.0).view(1, 101, 1)
    by_percentiles = scaled_grey_values("image", [10, 90])({"image": image})["image"].flatten()
    assert by_percentiles[[0, 10, 50, 90, 100]].tolist() == pytest.approx([0, 0, 127.5, 255, 255], abs=1e-3)
    fixed = scaled_grey_values("image", ["values", 50, 60])({"image": image})["image"].flatten()
    assert fixed[[49, 50, 56, 60, 61]].tolist() == pytest.approx([0, 0, 153, 255, 255], abs=1e-3)


@pytest.mark.parametrize("normalisation", [[], [1], ["percentiles", 0.5, 99.5], ["values", 1], ["0", "1"], [1, 2, 3]])
def test_another_normalisation_is_refused(normalisation):
    with pytest.raises(
        ValueError, match=r'expected normalisation \[0.5, 99.5\], .* or \["values", low, high\], received'
    ):
        scaled_grey_values("image", normalisation)
