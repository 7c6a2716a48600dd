"""A bundle in MONAI Deploy: a volume in memory through the overlay, and the whole application on DICOM."""

import os
import subprocess
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_monai_bundle, succeeds
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from components.data.acdc import list_patients
from components.data.transforms import LoadVolumed
from components.phantom.dataset import write_phantom_dataset
from release.__main__ import build

# what DICOM asks of every MR image, and MONAI Deploy's writer of its source
ASKED = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> dict[str, str]:
    root = write_phantom_dataset(str(tmp_path_factory.mktemp("data") / "phantoms"), patients=1, size_hw_d=(64, 48, 4))
    return next(iter(list_patients(root).values()))[0]


def test_volume_in_memory_is_loaded_and_checked_like_its_file(case):
    load = LoadVolumed("image")
    from_file = load({"image": case["image"]})["image"]
    volume = nib.load(case["image"])
    in_memory = MetaTensor(np.asarray(volume.dataobj), affine=torch.as_tensor(volume.affine))
    from_memory = load({"image": in_memory})["image"]
    assert torch.equal(from_memory.as_tensor(), from_file.as_tensor())
    assert from_memory.dtype == from_file.dtype
    assert torch.equal(from_memory.affine, from_file.affine)
    with pytest.raises(ValueError, match="the image in memory has no contrast"):
        load({"image": torch.ones_like(in_memory)})
    with pytest.raises(ValueError, match=r"expected image in memory as HxWxD, received the shape \(64, 48\)"):
        load({"image": in_memory[..., 0]})


@pytest.mark.parametrize("bundle", ["cnnhead_acdc", "unet_acdc"])
def test_nothing_is_saved_by_the_overlay(bundle):
    def last_transforms(*names: str) -> list[str]:
        parser = ConfigParser()
        parser.read_config([REPOSITORY / "bundles" / bundle / f"configs/{name}.json" for name in names])
        trained = {"out_channels": 4, "class_names": ["a"], "slice_smoothing": 0, "largest_component": False}
        trained |= {
            "channels": 1,
            "slice_axis": None,
            "minimum_lv_share": 0,
            "minimum_rv_probability": 0,
            "minimum_wall_mm": 0,
            "test_time_views": 1,
        }
        parser.update({"settings": trained, "output_dir": "", "preprocessing#transforms": []})
        return [type(transform).__name__ for transform in parser.get_parsed_content("postprocessing").transforms]

    saving = last_transforms("inference")
    assert saving[-2:] == ["SavePredictiond", "SaveDicomSegd"]
    assert last_transforms("inference", "inference_deploy") == saving[:-2]


@pytest.mark.slow
def test_monai_deploy_segments_a_dicom_series(tmp_path, case):
    python = os.environ.get("DEPLOY_PYTHON")
    if python is None:
        pytest.skip("no environment with MONAI Deploy at hand: set DEPLOY_PYTHON to its Python, see docs/serving.md")
    pydicom = pytest.importorskip("pydicom")
    from test_dicom import write_classic

    volume = nib.load(case["image"])
    frame = nib.Nifti1Image(np.asarray(volume.dataobj)[..., None].astype(np.int16), volume.affine)
    write_classic(tmp_path / "series", frame, one_series=True, trigger=None)
    for file in (tmp_path / "series").iterdir():
        image = pydicom.dcmread(file)
        image.SliceThickness = float(volume.header.get_zooms()[2])
        for name in ASKED:
            setattr(image, name, "")
        image.save_as(file)

    build(str(tmp_path / "dist"), bundle="linearhead_acdc")
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.zip"))) as archive:
        archive.extractall(tmp_path)
    bundle = tmp_path / "linearhead_acdc"
    net = ("--net_id", "network_def", "--ckpt_file", "models/model.pt", "--filepath", "models/model.ts")
    configs = ("--config_file", "configs/inference.json", "--meta_file", "configs/metadata.json")
    succeeds(run_monai_bundle("ckpt_export", *configs, *net, cwd=bundle))
    command = [python, str(REPOSITORY / "serving/deploy_app.py")]
    places = ["--input", str(tmp_path / "series"), "--output", str(tmp_path / "seg")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [*command, *places], cwd=bundle, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr

    (file,) = (tmp_path / "seg").iterdir()
    seg = pydicom.dcmread(file)
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["rv", "myo", "lv"]
    run = ("run", "inferring", "--config_file", "['configs/inference.json','configs/inference_ts.json']")
    ours = ("--dataset_dir", case["image"], "--output_dir", str(tmp_path / "out"))
    succeeds(run_monai_bundle(*run, *ours, cwd=bundle))
    pred = np.asarray(nib.load(next((tmp_path / "out").glob("*_pred.nii.gz"))).dataobj)
    numbers = [
        item.SegmentIdentificationSequence[0].ReferencedSegmentNumber for item in seg.PerFrameFunctionalGroupsSequence
    ]
    voxels = dict.fromkeys((1, 2, 3), 0)
    for number, plane in zip(numbers, seg.pixel_array, strict=True):
        voxels[number] += int(plane.sum())
    assert voxels == {number: int((pred == number).sum()) for number in (1, 2, 3)}
