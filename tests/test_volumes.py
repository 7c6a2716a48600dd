import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import messages_of
from PIL import Image

from components.base.volume_metadata import CASE
from components.data.prediction_writer import SavePredictiond
from components.data.transforms import LoadVolumed
from components.data.volume_search import find_volumes

AFFINE = np.array([[-1.2, 0.3, 0.1, 20.5], [0.2, 1.1, -4.0, -7.25], [0.05, 0.4, 9.0, 3.125], [0, 0, 0, 1]])


def save(path, shape, dtype=np.int16, values=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.arange(np.prod(shape)).reshape(shape) % 100 if values is None else values
    nib.save(nib.Nifti1Image(array.astype(dtype), AFFINE), path)
    return str(path)


def test_folder_is_searched_recursively_without_labels_and_predictions(tmp_path):
    expected = [save(tmp_path / "a" / "x_frame01.nii.gz", (4, 4, 2)), save(tmp_path / "b" / "c" / "y.nii", (4, 4, 1))]
    save(tmp_path / "a" / "x_frame01_gt.nii.gz", (4, 4, 2))
    save(tmp_path / "a" / "x_frame01_pred.nii.gz", (4, 4, 2))
    save(tmp_path / "a" / "x_4d_gt.nii.gz", (4, 4, 2, 3))
    save(tmp_path / "a" / "tensors.nii.gz", (4, 4, 2, 3, 6))
    save(tmp_path / "a" / "._x_frame01.nii.gz", (4, 4, 2))
    found = find_volumes(str(tmp_path))
    assert [volume["image"] for volume in found] == expected
    assert list(found.skipped) == [
        "a/tensors.nii.gz",
        "a/x_4d_gt.nii.gz",
        "a/x_frame01_gt.nii.gz",
        "a/x_frame01_pred.nii.gz",
    ]
    assert "neither a 3D volume nor a series of them but an array (4, 4, 2, 3, 6)" in found.skipped["a/tensors.nii.gz"]


@pytest.mark.parametrize("shape", [(4, 4, 2, 3), (4, 4, 2, 1, 3), (4, 4, 2, 3, 1)])
def test_every_frame_of_a_series_is_found(tmp_path, shape):
    volume, series = save(tmp_path / "x.nii.gz", (4, 4, 2)), save(tmp_path / "cine.nii.gz", shape)
    frames = [{"image": series, "frame": frame, "frames": 3} for frame in range(3)]
    assert find_volumes(series) == frames
    assert find_volumes(str(tmp_path)) == [*frames, {"image": volume}]
    for frame in frames:
        loaded = LoadVolumed("image")(frame)["image"]
        whole = np.arange(96).reshape(4, 4, 2, 3)
        assert np.array_equal(loaded[0].numpy(), whole[..., frame["frame"]])


@pytest.mark.parametrize("shape", [(4, 4, 1, 12), (4, 4, 1, 12, 1), (4, 4, 1, 1, 12), (4, 1, 4, 12), (1, 4, 4, 12)])
def test_the_fourth_axis_is_time_also_where_there_is_one_slice(tmp_path, shape):
    path = save(tmp_path / "cine.nii.gz", shape)
    found = find_volumes(path)
    assert [item["frame"] for item in found] == list(range(12))
    whole = np.arange(192).reshape(16, 12) % 100
    for item in found:
        loaded = LoadVolumed("image")(item)["image"]
        assert loaded.shape == (1, *shape[:3])
        assert np.allclose(loaded.affine, AFFINE)
        assert np.array_equal(loaded.numpy().ravel(), whole[:, item["frame"]])


@pytest.mark.parametrize(("shape", "is_said"), [((1, 4, 4, 12), True), ((4, 4, 1, 12), False), ((1, 4, 4), False)])
def test_a_first_axis_of_length_one_may_be_channels_so_the_log_says_how_it_is_read(tmp_path, shape, is_said, caplog):
    caplog.set_level(logging.INFO)
    path = save(tmp_path / "x.nii.gz", shape)
    assert len(find_volumes(path)) == (12 if len(shape) == 4 else 1)
    assert (f"{path}: the array (1, 4, 4, 12) is read as 12 frames of (1, H, W)" in caplog.text) == is_said
    assert is_said == bool(caplog.text)


@pytest.mark.parametrize("shape", [(4, 4, 1, 12, 3), (4, 1, 4, 2, 3)])
def test_several_values_for_each_voxel_and_time_are_not_taken_for_slices(tmp_path, shape):
    save(tmp_path / "x.nii.gz", (4, 4, 2))
    save(tmp_path / "velocity.nii.gz", shape)
    found = find_volumes(str(tmp_path))
    assert [Path(item["image"]).name for item in found] == ["x.nii.gz"]
    assert found.skipped == {"velocity.nii.gz": f"neither a 3D volume nor a series of them but an array {shape}"}


def test_a_series_is_no_volume_to_train_on(tmp_path):
    with pytest.raises(Exception) as caught:
        LoadVolumed("image")({"image": save(tmp_path / "cine.nii.gz", (4, 4, 2, 3))})
    assert "give single frames of a series" in messages_of(caught.value)


def test_file_is_taken_as_it_is_named(tmp_path):
    path = save(tmp_path / "x_gt.nii.gz", (4, 4, 2))
    assert find_volumes(path) == [{"image": path}]


LABELS = np.zeros((8, 8, 3))
LABELS[2:5, 2:5, 1:] = 3


@pytest.mark.parametrize(
    "name", ["heart_gt", "heart_dseg", "heart-label", "heart.seg", "heart_roi", "mask", "label_sa_ED", "SEG", "h_masks"]
)
def test_a_file_named_like_a_label_is_left_out(tmp_path, name):
    save(tmp_path / "heart.nii.gz", (4, 4, 3))
    save(tmp_path / f"{name}.nii.gz", (4, 4, 3))
    found = find_volumes(str(tmp_path))
    assert [Path(item["image"]).name for item in found] == ["heart.nii.gz"]
    assert found.skipped == {f"{name}.nii.gz": "a label or prediction by its name"}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_label_map_is_known_by_its_content_and_segmented_with_a_warning_if_named(tmp_path, dtype, caplog):
    path = save(tmp_path / "patient_a.nii.gz", LABELS.shape, dtype, LABELS)
    save(tmp_path / "segmentations/liver.nii.gz", (4, 4, 3))
    image = save(tmp_path / "ct.nii.gz", (8, 8, 3), dtype)
    found = find_volumes(str(tmp_path))
    assert [item["image"] for item in found] == [image]
    assert found.skipped["patient_a.nii.gz"].startswith("a label map by its content")
    assert found.skipped["segmentations"] == "a folder of labels"
    assert [item["image"] for item in find_volumes(path)] == [path]
    assert f"{path} is segmented, though it is a label map by its content" in caplog.text


@pytest.mark.parametrize("values", [np.zeros((8, 8, 3)), LABELS + 0.5, np.arange(192).reshape(8, 8, 3)])
def test_other_grey_values_are_no_label_map(tmp_path, values):
    path = save(tmp_path / "x.nii.gz", values.shape, np.float32, values)
    assert [item["image"] for item in find_volumes(str(tmp_path))] == [path]


def test_a_picture_is_refused_where_a_volume_is_expected_and_the_reverse(tmp_path):
    volume = save(tmp_path / "x.nii.gz", (4, 4, 3))
    (tmp_path / "x.png").touch()
    with pytest.raises(ValueError, match=r"x\.png is a picture: expected a volume, on which"):
        find_volumes(str(tmp_path / "x.png"))
    with pytest.raises(ValueError, match=r"x\.nii\.gz is no picture: expected a picture"):
        find_volumes(volume, pictures=True)


def test_webp_is_not_read_and_the_message_says_what_to_do(tmp_path):
    webp = tmp_path / "x.webp"
    Image.new("RGB", (4, 4)).save(webp, lossless=True)
    said = r"x\.webp is a WebP picture, which is not read: expected \.png, .*; convert it to PNG"
    for pictures in (False, True):
        with pytest.raises(ValueError, match=said):
            find_volumes(str(webp), pictures=pictures)
    with pytest.raises(ValueError, match=said):
        LoadVolumed("image")({"image": str(webp)})
    Image.new("RGB", (4, 4)).save(tmp_path / "y.png")
    assert list(find_volumes(str(tmp_path), pictures=True).skipped) == ["x.webp"]


def test_damaged_file_stays_in_the_list_for_the_loader_to_name(tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8b\x08garbage")
    assert len(find_volumes(str(tmp_path))) == 1
    with pytest.raises(ValueError, match=r"broken\.nii\.gz cannot be read"):
        LoadVolumed("image")(find_volumes(str(tmp_path))[0])


def test_nothing_to_segment_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="give --dataset_dir"):
        find_volumes("")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_volumes(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no volume found"):
        find_volumes(str(tmp_path))


def test_folders_join_the_names_of_volumes_that_are_named_alike(tmp_path):
    names = {
        "t2": "t2",
        "p01/t2": "p01_t2",
        "p02/t2": "p02_t2",
        "a/p03/scan/t1": "p03_scan_t1",
        "p04/scan/t1": "p04_scan_t1",
    }
    names |= {"p04/scan/own": "own"}
    for file in names:
        save(tmp_path / "in" / f"{file}.nii.gz", (4, 4, 2))
    found = find_volumes(str(tmp_path / "in"))
    named = {str(Path(item["image"]).relative_to(tmp_path / "in")).partition(".")[0]: item.get(CASE) for item in found}
    assert named == {file: None if file in ("t2", "p04/scan/own") else name for file, name in names.items()}
    for item in found:
        SavePredictiond("image", str(tmp_path / "out"))(LoadVolumed("image")(item))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}_pred.nii.gz" for name in names.values()}


@pytest.mark.parametrize("other", ["p/x.nii", "q/p_x.nii.gz"])
def test_volumes_whose_names_are_equal_also_with_their_folders_are_refused(tmp_path, other):
    save(tmp_path / "p" / "x.nii.gz", (4, 4, 2))
    save(tmp_path / "q" / "x.nii.gz", (4, 4, 2))
    save(tmp_path / other, (4, 4, 2))
    with pytest.raises(ValueError, match=r"would both have the case name p_x, .* rename one"):
        find_volumes(str(tmp_path))


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7, 1), (1, 7, 3)])
def test_saved_label_map_has_the_images_shape_affine_and_uint8(tmp_path, shape):
    image = LoadVolumed("image")({"image": save(tmp_path / "x.nii.gz", shape)})["image"]
    labels = (image > 10).float()
    labels.affine = labels.affine + 1e-9  # a rounding error such as an inversion may cause
    SavePredictiond("pred", str(tmp_path / "out"))({"pred": labels})
    written = nib.load(tmp_path / "out" / "x_pred.nii.gz")
    assert written.shape == shape
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(written.affine, nib.load(tmp_path / "x.nii.gz").affine)
    assert np.array_equal(np.asarray(written.dataobj), labels[0].numpy())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x_pred.nii.gz"]


def test_label_map_on_another_grid_is_not_written(tmp_path):
    image = LoadVolumed("image")({"image": save(tmp_path / "x.nii.gz", (5, 7, 3))})["image"]
    with pytest.raises(Exception) as caught:
        SavePredictiond("pred", str(tmp_path / "out"))({"pred": torch.cat([image, image], dim=1)})
    assert "image's grid" in messages_of(caught.value)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("suffix", "written"), [(".mha", ".mha"), (".mhd", ".mha"), (".nrrd", ".nrrd"), (".nhdr", ".nrrd")]
)
@pytest.mark.parametrize("depth", [3, 1])
def test_label_map_of_another_format_is_saved_in_that(tmp_path, suffix, written, depth):
    itk = pytest.importorskip("itk", reason="pip install -c constraints.txt -e '.[formats]'")
    image = itk.image_from_array(np.arange(35 * depth, dtype=np.int16).reshape(depth, 7, 5))
    image.SetSpacing([1.5, 1.25, 8.0])
    image.SetOrigin([-3.0, 20.5, 7.0])
    image.SetDirection(np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]))
    itk.imwrite(image, str(tmp_path / f"x{suffix}"))
    loaded = LoadVolumed("image")({"image": str(tmp_path / f"x{suffix}")})["image"]
    SavePredictiond("pred", str(tmp_path / "out"))({"pred": (loaded > 10).float()})
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == f"x_pred{written}"
    labels = itk.imread(str(file))
    assert np.array_equal(itk.array_from_image(labels), itk.array_from_image(image) > 10)
    assert itk.array_from_image(labels).dtype == np.uint8
    for part in ("GetSpacing", "GetOrigin"):
        assert np.allclose(getattr(labels, part)(), getattr(image, part)())
    assert np.allclose(itk.array_from_matrix(labels.GetDirection()), itk.array_from_matrix(image.GetDirection()))
