"""Inference on a folder: every file is accounted for, and one that fails does not stop the others."""

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import messages_of
from monai.data import DataLoader
from monai.transforms import AsDiscreted, Compose

from components.data.prediction_writer import SavePredictiond
from components.data.transforms import LoadVolumed
from components.data.volume_search import VolumeDataset, find_volumes
from components.inference.segmentation import SegmentationEvaluator
from components.inference.slice_inferer import TestTimeAugmentationInferer

SHAPE = (8, 8, 3)


class Threshold(torch.nn.Module):
    """Two classes by grey value; a value above 5000 makes its logits NaN."""

    def forward(self, images):
        logits = torch.cat([50 - images, images - 50], dim=1)
        return torch.where(images.max() > 5000, torch.nan, logits)


def save(path: Path, high=100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(0).integers(0, 100, SHAPE).astype(np.int16)
    array[0, 0, 0] = high
    nib.save(nib.Nifti1Image(array, np.diag([1, 1, 5, 1])), path)
    return path


def segment(folder: Path, output_dir: Path, num_workers=0) -> SegmentationEvaluator:
    dataset = VolumeDataset(find_volumes(str(folder)), LoadVolumed("image"))
    evaluator = SegmentationEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(dataset, batch_size=1, num_workers=num_workers),
        network=Threshold(),
        inferer=TestTimeAugmentationInferer(roi_size=SHAPE[:2], spatial_dim=2, sw_batch_size=2),
        postprocessing=Compose([AsDiscreted("pred", argmax=True), SavePredictiond("pred", str(output_dir))]),
        skipped=dataset.skipped,
    )
    evaluator.logger.setLevel(logging.ERROR)
    evaluator.run()
    return evaluator


@pytest.fixture
def study(tmp_path) -> Path:
    """A folder as they come: good volumes under odd names and behind links, and all kinds of others."""
    folder = tmp_path / "study"
    save(folder / "a" / "plain.nii.gz")
    save(folder / "a" / "UPPER.NII.GZ")
    nib.save(nib.Nifti1Pair(np.arange(192).reshape(SHAPE).astype(np.int16), np.eye(4)), folder / "a" / "pair.img")
    save(tmp_path / "store" / "linked" / "linked.nii.gz")
    (folder / "linked").symlink_to(tmp_path / "store" / "linked")
    (folder / "a" / "back").symlink_to(folder)
    save(folder / "labelsTr" / "plain2.nii.gz")
    save(folder / "a" / "plain_gt.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 2, 3, 6), np.int16), np.eye(4)), folder / "tensors.nii.gz")
    (folder / "notes.txt").write_text("hello")
    save(folder / "a" / "._plain.nii.gz")
    return folder


@pytest.mark.parametrize("num_workers", [0, 1])
def test_good_volumes_are_segmented_and_the_others_named(study, tmp_path, caplog, num_workers):
    (study / "z_gone.nii.gz").symlink_to(study / ".git/annex/objects/gone")
    (study / "b_broken.nii.gz").write_bytes(b"\x1f\x8b\x08garbage")
    save(study / "c_hot.nii.gz", high=6000)
    caplog.set_level(logging.INFO)
    with pytest.raises(RuntimeError, match="3 of 7 volumes failed: ") as error:
        segment(study, tmp_path / "out", num_workers)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{case}_pred.nii.gz" for case in ("plain", "UPPER", "pair", "linked")}
    for reason in (
        "b_broken.nii.gz cannot be read: expected a complete NIfTI file",
        "c_hot.nii.gz has no segmentation: expected finite values from the network",
        "z_gone.nii.gz is a link whose target is missing: fetch it",
    ):
        assert reason in str(error.value)
        assert f"failed: {study}/{reason}" in caplog.text
    assert "segmented 4 of 7 volumes" in caplog.text
    assert "skipped 1, a folder of labels: labelsTr" in caplog.text
    assert "skipped 1, a label or prediction by its name: a/plain_gt.nii.gz" in caplog.text
    assert "skipped 1, neither a 3D volume nor a series of them but an array (4, 4, 2, 3, 6)" in caplog.text
    assert "notes.txt" not in caplog.text
    assert "._plain" not in caplog.text


def test_folder_without_faults_ends_well(study, tmp_path):
    assert len(segment(study, tmp_path / "out").segmented) == 4


def test_volumes_in_which_nothing_was_found_are_named_at_the_end(tmp_path, caplog):
    save(tmp_path / "heart.nii.gz")
    dark = np.random.default_rng(0).integers(-900, -100, SHAPE).astype(np.int16)
    nib.save(nib.Nifti1Image(dark, np.eye(4)), tmp_path / "other.nii.gz")
    segment(tmp_path, tmp_path / "out")
    assert f"nothing was found in 1: {tmp_path / 'other.nii.gz'}; check" in caplog.text


def test_the_error_of_an_only_volume_is_its_own(tmp_path):
    (tmp_path / "x.nii.gz").write_bytes(b"hello")
    with pytest.raises(RuntimeError) as error:
        segment(tmp_path / "x.nii.gz", tmp_path / "out")
    assert "x.nii.gz is not a NIfTI file but something that begins with b'hello'" in messages_of(error.value)


def test_lack_of_memory_stops_the_run(study, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise MemoryError

    monkeypatch.setattr(Threshold, "forward", fail)
    with pytest.raises(MemoryError):
        segment(study, tmp_path / "out")


@pytest.mark.parametrize("labels", ["labels", "masks", "labelsTs", "Segmentations"])
def test_labels_beside_images_are_left_out(tmp_path, labels):
    image = save(tmp_path / "images" / "x.nii.gz")
    save(tmp_path / labels / "x.nii.gz")
    found = find_volumes(str(tmp_path))
    assert found == [{"image": str(image)}]
    assert found.skipped == {labels: "a folder of labels"}


def test_folder_named_like_labels_without_images_beside_it_is_searched(tmp_path):
    image = save(tmp_path / "masks" / "x.nii.gz")
    assert find_volumes(str(tmp_path)) == [{"image": str(image)}]


def test_same_file_by_two_links_is_segmented_once(tmp_path):
    image = save(tmp_path / "study" / "x.nii.gz")
    (tmp_path / "study" / "more").mkdir()
    (tmp_path / "study" / "more" / "x.nii.gz").symlink_to(image)
    found = find_volumes(str(tmp_path / "study"))
    assert len(found) == 1
    assert list(found.skipped.values()) == ["the same file as more/x.nii.gz"]
