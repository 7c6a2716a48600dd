"""What a user gets wrong, through MONAI's runner: one message that says what was expected, what came, what to do."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, messages_of
from monai.bundle import ConfigParser, ReferenceResolver

from components.networks.heads import ViTHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.phantom.dataset import write_phantom_dataset
from components.sam.encoder import SamEncoder
from components.training.command_line import read_command_line

CONFIGS = REPOSITORY / "bundles" / "autosam_acdc" / "configs"
TINY = {"model_type": "vit_tiny", "sam_checkpoint": "$None", "image_size": 64}
REAL_SLICES_ALONE = {"phantom_share": 0, "test_time_views": 1}


@pytest.fixture
def phantoms(tmp_path) -> Path:
    """Patients of its own for each test to spoil: two train, one validates, one tests."""
    return Path(write_phantom_dataset(str(tmp_path / "data"), patients=4, size_hw_d=(48, 40, 3)))


def message_of(run_id: str, name: str, folder: Path, **overrides) -> str:
    """Run a workflow that must fail and return the whole chain of its errors' messages."""
    output = {"output_dir": str(folder / "eval")}
    if name == "train":
        output |= {"ckpt_dir": str(folder / "models"), "cache_dir": "$None", "epochs": 1, **REAL_SLICES_ALONE}
    with pytest.raises(Exception) as caught:  # MONAI wraps a component's error in one of its own
        monai.bundle.run(run_id, config_file=str(CONFIGS / f"{name}.json"), **{**TINY, **output, **overrides})
    return messages_of(caught.value)


def train(phantoms: Path, **overrides) -> str:
    return message_of("training", "train", phantoms.parent, dataset_dir=str(phantoms), **overrides)


def infer(dataset_dir: Path | str, folder: Path) -> str:
    model = str(folder / "model.pt")
    return message_of("inferring", "inference", folder, dataset_dir=str(dataset_dir), ckpt_path=model)


def untrained_state() -> dict[str, torch.Tensor]:
    """What `model.pt` would hold of a network before training."""
    return PromptFreeSam(SamEncoder("vit_tiny"), ViTHead(4)).state_dict()


def rewrite(path: Path, change) -> None:
    """Change a NIfTI file's voxels."""
    file = nib.load(path)
    voxels = change(np.asarray(file.dataobj).astype(np.float32))
    nib.save(nib.Nifti1Image(voxels, file.affine), path)


def spoil_all(phantoms: Path, change, *, labels: bool) -> None:
    """Change the images or the labels of all patients, as the split decides who trains."""
    for path in phantoms.rglob("*_frame*.nii.gz"):
        if path.name.endswith("_gt.nii.gz") == labels:
            rewrite(path, change)


def test_no_dataset_dir(tmp_path):
    assert "give --dataset_dir PATH" in message_of("training", "train", tmp_path)
    assert "give --dataset_dir PATH" in infer("", tmp_path)


@pytest.mark.parametrize("overlays", [["evaluate", "mine"], ["mine", "evaluate"]])
def test_lists_of_ones_own_are_scored_by_their_test_list_alone(overlays, tmp_path):
    listed = [{"image": "07.nii.gz", "label": "07_seg.nii.gz"}]
    lists = {"train#dataset#data": listed, "validate#dataset#data": listed}
    mine = tmp_path / "mine.json"
    files = [str(mine if name == "mine" else CONFIGS / f"{name}.json") for name in ("train", *overlays)]
    mine.write_text(json.dumps(lists))
    with pytest.raises(Exception) as caught:
        monai.bundle.run("evaluating", config_file=files, ckpt_path="no such file", output_dir=str(tmp_path), **TINY)
    assert "give --dataset_dir PATH, or your own lists of cases: " in messages_of(caught.value)
    assert "test#data for evaluation" in messages_of(caught.value)
    scored = [{"image": "08.nii.gz", "label": "08_seg.nii.gz"}]
    mine.write_text(json.dumps(lists | {"test#data": scored}))
    parser = ConfigParser()
    parser.read_config(files)
    assert parser.get_parsed_content("validate#dataloader").dataset.data == scored


def test_folder_that_is_not_acdc(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    assert "expected folders patient001" in message_of("training", "train", tmp_path, dataset_dir=str(tmp_path))


def test_patient_without_ground_truth(phantoms):
    next(phantoms.rglob("*_gt.nii.gz")).unlink()
    assert "has no label of its" in train(phantoms)


def test_image_and_label_of_different_shapes(phantoms):
    spoil_all(phantoms, lambda voxels: voxels[:-1], labels=True)
    assert "expected the image's shape (48, 40, 3), received (47, 40, 3)" in train(phantoms)


def test_label_out_of_range(phantoms):
    spoil_all(phantoms, lambda voxels: voxels + 1, labels=True)
    assert "holds labels [4.0]: expected whole numbers 0..3" in train(phantoms)


def test_truncated_volume(phantoms):
    for path in phantoms.rglob("*_frame*.nii.gz"):
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))
    assert "cannot be read: expected a complete NIfTI file" in train(phantoms)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda voxels: np.where(voxels > voxels.mean(), np.nan, voxels), "NaN or infinite voxels"),
        (np.ones_like, "has no contrast"),
    ],
    ids=["nan", "constant"],
)
def test_volume_of_no_use(phantoms, change, message):
    spoil_all(phantoms, change, labels=False)
    assert message in train(phantoms)


def test_no_sam_checkpoint(phantoms):
    nowhere = str(phantoms.parent / "sam_vit_b_01ec64.pth")
    message = train(phantoms, model_type="vit_b", sam_checkpoint=nowhere)
    assert f"no encoder checkpoint at {nowhere}" in message
    assert "download_large_files" in message


def test_checkpoint_of_another_model_type(phantoms, sam_checkpoint):
    message = train(phantoms, sam_checkpoint=sam_checkpoint)
    assert "is a vit_b checkpoint, but model_type is vit_tiny: give --model_type vit_b" in message


def test_inference_without_a_model(phantoms):
    message = infer(phantoms, phantoms.parent)
    assert f"expected a trained model at '{phantoms.parent / 'model.pt'}'" in message
    assert "Train first" in message


def test_inference_with_another_encoder(phantoms):
    state = untrained_state()
    state["encoder.fingerprint"] = state["encoder.fingerprint"] + 1
    torch.save(state, phantoms.parent / "model.pt")
    assert "the vit_tiny encoder in use" in infer(phantoms, phantoms.parent)


def test_inference_of_an_array_of_five_axes(tmp_path):
    torch.save(untrained_state(), tmp_path / "model.pt")
    tensors = tmp_path / "tensors.nii.gz"
    nib.save(nib.Nifti1Image(np.random.RandomState(0).rand(16, 16, 2, 3, 6), np.eye(4)), tensors)
    assert "is not one 3D volume: expected (H, W, D), received (16, 16, 2, 3, 6)" in infer(tensors, tmp_path)


def test_cache_for_a_trainable_encoder(phantoms):
    message = train(phantoms, trainable_encoder=True, cache_dir=str(phantoms.parent / "embeddings"))
    assert "embeddings change with every step, so none can be looked up: give --cache_dir '$None'" in message


def test_cache_folder_that_is_a_file(phantoms):
    (phantoms.parent / "embeddings").write_text("not a folder")
    message = train(phantoms, cache_dir=str(phantoms.parent / "embeddings"))
    assert "give --cache_dir another folder, or '$None' for none" in message


def test_word_that_is_no_truth_value_is_not_taken_for_true(phantoms):
    assert "trainable must be True, False, 'neck' or 'lora', received 'false'" in train(
        phantoms, trainable_encoder="false"
    )
    command = ["monai", "run", "--config_file", str(CONFIGS / "train.json")]
    for option in ("resume", "debug", "include_testing", "largest_component"):
        with pytest.raises(ValueError, match=f"expected True or False, received `--{option} no`"):
            read_command_line({ReferenceResolver._vars: {}}, argv=[*command, f"--{option}", "no"])


@pytest.mark.parametrize(("typed", "meant"), [("false", False), ("TRUE", True)])
def test_truth_value_in_other_letters_is_what_it_says(typed, meant):
    variables: dict = {}
    options = ["--resume", typed, "--trainable_encoder", typed]
    command = ["monai", "run", "--config_file", str(CONFIGS / "train.json"), *options]
    read_command_line({ReferenceResolver._vars: variables}, argv=command)
    assert variables == {"resume": meant, "trainable_encoder": meant}


def test_error_is_the_last_line_of_the_command_and_its_exit_status_is_one():
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(CONFIGS / "train.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    last_line = result.stderr.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert "give --dataset_dir PATH" in last_line
