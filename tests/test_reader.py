"""Files as they come from the field: what can be read is read, the rest is refused with its cause."""

import gzip
import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import ScaleIntensityRangePercentiles

from components.data.reader import VolumeReader
from components.data.transforms import LoadVolumed

AFFINE = np.diag([-1.5, -1.5, 8.0, 1.0])
SHAPE = (12, 10, 4)
GREY = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)


def save(path: Path, array, affine=AFFINE, dtype=None) -> str:
    nib.save(nib.Nifti1Image(array, affine, dtype=dtype), path)
    return str(path)


def load(path, key="image", **options):
    return LoadVolumed(key, **options)({key: str(path)})[key]


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", ">i2", "u2", "i4", ">i4", "u4", "i8", "u8", "f4", ">f4", "f8"])
def test_every_type_of_number_is_read(tmp_path, dtype):
    array = (GREY % 100).astype(dtype)
    assert np.array_equal(load(save(tmp_path / "x.nii.gz", array, dtype=dtype))[0], GREY % 100)


def test_slope_and_intercept_are_applied(tmp_path):
    image = nib.Nifti1Image(GREY, AFFINE)
    image.header.set_slope_inter(0.5, -10)
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([0.5, -10], "<f4").tobytes()
    (tmp_path / "x.nii").write_bytes(content)
    assert np.array_equal(load(tmp_path / "x.nii")[0], GREY * 0.5 - 10)


def test_complex_values_are_read_as_magnitudes(tmp_path):
    phase = np.linspace(-np.pi, np.pi, SHAPE[0])[:, None, None]
    path = save(tmp_path / "x.nii.gz", (GREY * np.exp(1j * phase)).astype(np.complex64))
    assert np.allclose(load(path)[0], GREY, atol=1e-3)


@pytest.mark.parametrize(
    ("value", "voxels"), [(1e20, 1), (3.4e38, 200), (-3.4028235e38, 1), (1e300, 1), (-9999, 60), (-32768, 200)]
)
def test_values_that_are_no_data_leave_the_others_as_they_were(tmp_path, caplog, value, voxels):
    array = GREY.astype(np.float64)
    array.flat[:voxels] = value
    image = load(save(tmp_path / "x.nii.gz", array))
    assert np.array_equal(image[0].flatten()[voxels:], array.flat[voxels:])
    assert (image[0].flatten()[:voxels] == array.flat[voxels:].min()).all()
    assert f"{voxels} voxels hold {value:g}, which counts as no data" in caplog.text
    assert image.dtype == torch.float32


@pytest.mark.parametrize("air", [-1024, -3])
def test_negative_values_that_belong_to_the_image_stay(tmp_path, air):
    array = GREY + np.int16(air)
    array.flat[:60] = air
    assert np.array_equal(load(save(tmp_path / "x.nii.gz", array))[0], array)


def test_one_bright_voxel_does_not_change_the_grey_values_of_the_network(tmp_path):
    scale = ScaleIntensityRangePercentiles(lower=0.5, upper=99.5, b_min=0, b_max=255, clip=True)
    plain, bright = GREY.astype(np.float64), GREY.astype(np.float64)
    bright[0, 0, 0] = 1e6
    difference = (scale(load(save(tmp_path / "a.nii", plain))) - scale(load(save(tmp_path / "b.nii", bright)))).abs()
    assert difference[0].flatten()[1:].max() < 2


@pytest.mark.parametrize("name", ["x.nii", "x.NII", "x.dat", "x"])
def test_content_decides_not_the_name(tmp_path, name):
    zipped = Path(save(tmp_path / "source.nii.gz", GREY))
    (tmp_path / name).write_bytes(zipped.read_bytes())
    assert np.array_equal(load(tmp_path / name)[0], GREY)
    (tmp_path / f"{name}.gz").write_bytes(gzip.decompress(zipped.read_bytes()))
    assert np.array_equal(load(tmp_path / f"{name}.gz")[0], GREY)


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair, nib.Spm99AnalyzeImage])
@pytest.mark.parametrize("suffix", [".hdr", ".img"])
def test_pair_of_header_and_image_is_read_by_either_name(tmp_path, kind, suffix):
    nib.save(kind(GREY, AFFINE), tmp_path / "x.img")
    image = load(tmp_path / f"x{suffix}")
    assert np.array_equal(image[0], GREY)
    assert np.allclose(np.abs(np.diag(image.affine)), [1.5, 1.5, 8, 1])


def test_another_format_that_nibabel_knows_is_read(tmp_path):
    nib.save(nib.MGHImage(GREY, AFFINE), tmp_path / "x.mgz")
    image = load(tmp_path / "x.mgz")
    assert np.array_equal(image[0], GREY)
    assert np.allclose(image.affine, AFFINE)


def test_image_without_its_header_is_refused(tmp_path):
    nib.save(nib.Nifti1Pair(GREY, AFFINE), tmp_path / "x.img")
    (tmp_path / "x.hdr").unlink()
    with pytest.raises(ValueError, match=r"x\.img has no header: expected x\.hdr beside it"):
        load(tmp_path / "x.img")


@pytest.mark.parametrize(
    "folder", ["Übung 心臓", "a@b", "o'brien", "2023", "br[1]{v}*", "a::b", "p,q", "a#b", "$x", "%s"]
)
def test_odd_paths_are_read(tmp_path, folder):
    (tmp_path / folder).mkdir()
    nib.save(nib.Nifti1Pair(GREY, AFFINE), tmp_path / folder / "v.img")
    for path in (save(tmp_path / folder / "v.nii.gz", GREY), tmp_path / folder / "v.img"):
        assert np.array_equal(load(path)[0], GREY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a NIfTI file but empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(400), "but a PNG picture: expected a volume as .nii.gz or .nii"),
        (bytes(128) + b"DICM" + bytes(400), "but a DICOM file: give the folder of its study"),
        (b"\x08\0\x05\0CS\x0a\0ISO_IR 100" + bytes(400), "but a DICOM file: give the folder of its study"),
        (b"/annex/objects/MD5E-s1--x.nii.gz\n", "but the pointer of a file that git-annex has not fetched"),
        (b"version https://git-lfs.github.com/spec/v1", "but the pointer of a file that Git LFS has not fetched"),
        (b"PK\x03\x04" + bytes(400), "but a ZIP archive"),
        (b"hello", "but something that begins with b'hello'"),
        (b"\x1f\x8b\x08garbage", "cannot be read: expected a complete NIfTI file"),
    ],
)
def test_what_is_no_volume_is_called_what_it_is(tmp_path, content, message):
    (tmp_path / "x.nii.gz").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path / "x.nii.gz")


def test_colour_image_is_refused_by_that_name(tmp_path):
    colours = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    path = save(tmp_path / "x.nii.gz", colours)
    with pytest.raises(ValueError, match=r"x\.nii\.gz is a colour image \(R, G, B in each voxel\): expected one grey"):
        load(path)


def test_header_without_any_geometry_is_refused(tmp_path):
    image = nib.Nifti1Image(GREY, AFFINE)
    content = bytearray(image.to_bytes())
    content[252:256] = bytes(4)  # both codes
    content[80:92] = np.array([np.nan, 1, 1], "<f4").tobytes()  # voxel sizes
    (tmp_path / "x.nii").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"x\.nii has no geometry: expected a header whose sform, qform or voxel sizes"
    ):
        load(tmp_path / "x.nii")


def test_labels_stored_as_fractions_are_rounded(tmp_path):
    labels = (GREY % 4).astype(np.float32)
    path = save(tmp_path / "x.nii.gz", labels * np.float32(0.9999))
    assert np.array_equal(load(path, "label")[0], labels)


def test_one_hot_labels_are_refused_by_that_name(tmp_path):
    path = save(tmp_path / "x.nii.gz", np.stack([c == GREY % 4 for c in range(4)], axis=-1).astype(np.uint8))
    with pytest.raises(ValueError, match=r"received \(12, 10, 4, 4\); give the argmax of one-hot labels"):
        load(path, "label")


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_other_formats_need_a_package_that_is_named(tmp_path, monkeypatch, suffix):
    monkeypatch.setitem(sys.modules, "itk", None)
    (tmp_path / f"x{suffix}").write_bytes(b"NRRD0004\n")
    with pytest.raises(ImportError, match=rf"x\{suffix} needs the package itk-io to be read: `pip install itk-io`"):
        load(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd"])
def test_other_formats_are_read_where_that_package_is(tmp_path, suffix):
    itk = pytest.importorskip("itk", reason="pip install -c constraints.txt -e '.[formats]'")
    image = itk.image_view_from_array(np.ascontiguousarray(GREY.T))
    image.SetSpacing([1.5, 1.5, 8.0])
    itk.imwrite(image, str(tmp_path / f"x{suffix}"))
    loaded = load(tmp_path / f"x{suffix}")
    assert np.array_equal(loaded[0], GREY)
    assert np.allclose(loaded.affine, AFFINE)


def test_blank_slices_are_read(tmp_path):
    array = GREY.copy()
    array[..., 0] = 0
    assert np.array_equal(load(save(tmp_path / "x.nii.gz", array))[0], array)


def test_upper_case_file_is_read_where_lower_case_is_usual(tmp_path):
    shutil.move(save(tmp_path / "x.nii.gz", GREY), tmp_path / "X.NII.GZ")
    volume, metadata = VolumeReader().get_data(VolumeReader().read(tmp_path / "X.NII.GZ"))
    assert np.array_equal(volume, GREY)
    assert metadata["spatial_shape"].tolist() == list(SHAPE)
