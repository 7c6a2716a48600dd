"""Series of volumes through inference: frame by frame, smoothed over time, 4D again on their own grid."""

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import messages_of
from monai.data import DataLoader
from monai.transforms import AsDiscreted, Compose, Invertd

from components.data.prediction_writer import SavePredictiond
from components.data.transforms import LoadVolumed, PadInPlaneToSquared, SlicesLastd
from components.data.volume_search import VolumeDataset, find_volumes
from components.inference.cine_buffer import CineBuffer
from components.inference.segmentation import SegmentationEvaluator
from components.inference.slice_inferer import TestTimeAugmentationInferer

SHAPE = (6, 8, 3)
AFFINE = np.array([[-1.2, 0.3, 0.1, 20.5], [0.2, 1.1, -4.0, -7.25], [0.05, 0.4, 9.0, 3.125], [0, 0, 0, 1]])


class Threshold(torch.nn.Module):
    """Two classes by grey value; a value above 5000 makes its logits NaN. It counts the slices it has seen."""

    def __init__(self, above=50.0):
        super().__init__()
        self.above = above
        self.slices = 0

    def forward(self, images):
        self.slices += len(images)
        logits = torch.cat([self.above - images, images - self.above], dim=1)
        return torch.where(images.max() > 5000, torch.nan, logits)


def save(path: Path, voxels, seconds=0.04) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels.astype(np.int16), AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    if voxels.ndim > 3:
        image.header["pixdim"][4] = seconds
    nib.save(image, path)
    return path


def noise(frames):
    return np.random.default_rng(0).integers(0, 100, (*SHAPE, frames))


def segment(
    path: Path, output_dir: Path, *, network=None, smoothing=None, handlers=(), saving=()
) -> SegmentationEvaluator:
    """Segment without any scaling of the grey values, on slices padded to a square."""
    preprocessing = Compose([LoadVolumed("image"), SlicesLastd("image"), PadInPlaneToSquared("image")])
    dataset = VolumeDataset(find_volumes(str(path)), preprocessing)
    inverse = Invertd("pred", orig_keys="image", transform=preprocessing, nearest_interp=False)
    saving = [AsDiscreted("pred", argmax=True), SavePredictiond("pred", str(output_dir)), *saving]
    evaluator = SegmentationEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(dataset, batch_size=1),
        network=network or Threshold(),
        inferer=TestTimeAugmentationInferer(roi_size=(64, 64), spatial_dim=2, sw_batch_size=2),
        postprocessing=Compose([inverse, *saving]),
        frames=CineBuffer(str(output_dir), smoothing=smoothing),
        skipped=dataset.skipped,
        val_handlers=list(handlers),
    )
    evaluator.logger.setLevel(logging.ERROR)
    evaluator.run()
    return evaluator


def stop_after(slices):
    def stop(network, _):
        if network.slices >= slices:
            raise KeyboardInterrupt

    return stop


def labels_of(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_a_series_has_the_labels_of_its_frames_on_its_own_grid_with_its_frame_time(tmp_path):
    voxels = noise(4)
    save(tmp_path / "in" / "cine.nii.gz", voxels)
    for frame in range(4):
        save(tmp_path / "in" / f"alone{frame}.nii.gz", voxels[..., frame])
    assert len(segment(tmp_path / "in", tmp_path / "out").segmented) == 5
    written = nib.load(tmp_path / "out" / "cine_pred.nii.gz")
    assert (written.shape, written.get_data_dtype()) == ((*SHAPE, 4), np.uint8)
    assert np.allclose(written.affine, AFFINE)
    assert written.header.get_xyzt_units() == ("mm", "sec")
    assert written.header["pixdim"][4] == np.float32(0.04)
    for frame in range(4):
        assert np.array_equal(written.dataobj[..., frame], labels_of(tmp_path / "out" / f"alone{frame}_pred.nii.gz"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "cine_pred.nii.gz",
        *(f"alone{frame}_pred.nii.gz" for frame in range(4)),
    }


@pytest.mark.parametrize("shape", [(6, 8, 3, 1, 4), (6, 8, 3, 4, 1)])
def test_axes_of_length_one_are_given_back(tmp_path, shape):
    path = save(tmp_path / "cine.nii.gz", noise(4).reshape(shape))
    segment(path, tmp_path / "out")
    assert np.array_equal(labels_of(tmp_path / "out" / "cine_pred.nii.gz"), (noise(4) > 50).reshape(shape))


def test_a_cine_of_one_slice_is_segmented_frame_by_frame(tmp_path):
    voxels = noise(4)[:, :, :1]
    network = Threshold()
    segment(save(tmp_path / "cine.nii.gz", voxels), tmp_path / "out", network=network)
    assert network.slices == 1 + 4  # one slice tells networks apart
    written = nib.load(tmp_path / "out" / "cine_pred.nii.gz")
    assert written.header["pixdim"][4] == np.float32(0.04)
    assert np.array_equal(written.dataobj, voxels > 50)


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path):
    path = save(tmp_path / "cine.nii.gz", noise(5))
    stopped, resumed, whole = Threshold(), Threshold(), Threshold()
    stopped.register_forward_pre_hook(stop_after(10))
    with pytest.raises(KeyboardInterrupt):
        segment(path, tmp_path / "out", network=stopped)
    assert not (tmp_path / "out" / "cine_pred.nii.gz").exists()
    segment(path, tmp_path / "out", network=resumed)
    segment(path, tmp_path / "whole", network=whole)
    assert (whole.slices, resumed.slices) == (1 + 15, 1 + 6)  # one slice tells networks apart
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cine_pred.nii.gz"]
    assert np.array_equal(*(labels_of(tmp_path / name / "cine_pred.nii.gz") for name in ("out", "whole")))


@pytest.mark.parametrize("changed", ["network", "image"])
def test_what_another_network_or_image_left_is_not_used(tmp_path, changed):
    path = save(tmp_path / "cine.nii.gz", noise(3))
    stopped = Threshold()
    stopped.register_forward_pre_hook(stop_after(4))
    with pytest.raises(KeyboardInterrupt):
        segment(path, tmp_path / "out", network=stopped)
    assert len(list((tmp_path / "out" / ".cine_pred.frames").glob("*.npy"))) == 1
    network = Threshold(60 if changed == "network" else 50)
    if changed == "image":
        save(path, 99 - noise(3))
    segment(path, tmp_path / "out", network=network)
    assert network.slices == 1 + 9
    truth = noise(3) > 60 if changed == "network" else 99 - noise(3) > 50
    assert np.array_equal(labels_of(tmp_path / "out" / "cine_pred.nii.gz"), truth)


def test_a_series_with_a_frame_that_fails_does_not_stop_the_others(tmp_path):
    hot, flat = noise(4), noise(4)
    hot[0, 0, 0, 1] = 6000
    flat[..., 2] = 7
    save(tmp_path / "in" / "a_hot.nii.gz", hot)
    save(tmp_path / "in" / "b_flat.nii.gz", flat)
    save(tmp_path / "in" / "good.nii.gz", noise(4))
    with pytest.raises(RuntimeError, match="2 of 3 volumes failed") as error:
        segment(tmp_path / "in", tmp_path / "out")
    assert "a_hot.nii.gz has no segmentation" in str(error.value)
    assert "b_flat.nii.gz has no contrast" in str(error.value)
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["good_pred.nii.gz"]


def test_the_error_of_an_only_series_is_its_own(tmp_path):
    voxels = noise(3)
    voxels[..., 1] = 7
    with pytest.raises(Exception) as error:
        segment(save(tmp_path / "cine.nii.gz", voxels), tmp_path / "out")
    assert "cine.nii.gz has no contrast" in messages_of(error.value)


def store_of(tmp_path, frames, smoothing):
    store = CineBuffer(str(tmp_path), smoothing=smoothing)
    store.start("cine", np.zeros(1))
    for number, frame in enumerate(frames):
        store.add(np.array([number]), lambda frame=frame: np.array([frame], np.float32))
    return np.concatenate(list(store.smoothed()))


def test_frames_over_a_whole_cycle_are_smoothed_around_its_end(tmp_path):
    beat = np.cos(2 * np.pi * np.arange(20) / 20)
    smoothed = store_of(tmp_path, beat, 1.0)
    assert smoothed == pytest.approx(np.exp(-0.5 * (2 * np.pi / 20) ** 2) * beat, abs=2e-3)


def test_frames_of_a_part_of_the_cycle_are_smoothed_up_to_their_ends_only(tmp_path):
    smoothed = store_of(tmp_path, np.arange(20.0), 1.0)
    assert smoothed[3:-3] == pytest.approx(np.arange(3, 17), abs=1e-5)
    assert 0 < smoothed[0] < 1
    assert 18 < smoothed[-1] < 19


def test_frames_that_an_earlier_run_kept_are_smoothed_like_new_ones(tmp_path):
    for frames in (np.cos(2 * np.pi * np.arange(20) / 20), np.arange(20.0)):
        new = store_of(tmp_path / str(frames[1]), frames, 1.0)
        assert np.array_equal(store_of(tmp_path / str(frames[1]), np.full(20, np.nan), 1.0), new)


@pytest.mark.parametrize(("frames", "smoothing"), [(9, None), (20, 0)])
def test_few_frames_and_a_smoothing_of_none_leave_frames_as_they_are(tmp_path, frames, smoothing):
    beat = np.arange(frames) % 2
    assert np.array_equal(store_of(tmp_path, beat, smoothing), beat)


def test_ten_frames_are_smoothed_a_little(tmp_path):
    smoothed = store_of(tmp_path, np.arange(10) % 2, None)
    assert 0 < smoothed[0] < 0.01


def test_a_negative_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="frame_smoothing of 0 frames or more"):
        CineBuffer(str(tmp_path), smoothing=-1)
