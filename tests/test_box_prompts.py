"""SAM prompted with the boxes of the ground truth."""

import copy
import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_readme_explains_knobs, run_monai_bundle_here
from monai.bundle import verify_metadata, verify_net_in_out
from torch.nn import functional as F

from components.networks.box_prompted_sam import BoxPromptedSam, resolve_overlaps, tight_box
from components.phantom.dataset import write_phantom_dataset
from components.sam.encoder import SamEncoder

RV, MYO, LV = 1, 2, 3
BUNDLE = REPOSITORY / "bundles/sambox_acdc"


def disc(radius: float, *, at: tuple[float, float] = (20, 20), size: int = 40) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((y - at[0]) ** 2 + (x - at[1]) ** 2).sqrt() < radius


def nested() -> torch.Tensor:
    """Logits like SAM's for RV, Myo and LV: the mask of the Myo is filled and covers the LV."""
    masks = torch.stack([disc(4, at=(20, 3)), disc(12), disc(6)])
    return torch.where(masks, 1.0, -1.0) * torch.tensor([1.0, 3.0, 2.0]).view(3, 1, 1)


def test_smallest_mask_keeps_the_lv_inside_the_filled_myo():
    labels = resolve_overlaps(nested(), "smallest")
    assert torch.equal(labels == LV, disc(6))
    assert torch.equal(labels == MYO, disc(12) & ~disc(6))
    assert torch.equal(labels == 0, ~(disc(12) | disc(4, at=(20, 3))))


def test_the_authors_rule_erases_the_lv():
    labels = resolve_overlaps(nested(), "argmax")
    assert not (labels == LV).any()
    assert torch.equal(labels == RV, disc(4, at=(20, 3)))


def test_highest_logit_wins_or_loses_by_its_value():
    logits = nested()
    assert not (resolve_overlaps(logits, "logit") == LV).any()
    logits[LV - 1] *= 2
    assert torch.equal(resolve_overlaps(logits, "logit") == LV, disc(6))


def test_box_has_the_masks_outer_edges():
    mask = torch.zeros(10, 20, dtype=torch.bool)
    mask[2:5, 7:8] = True
    assert tight_box(mask).tolist() == [7, 2, 8, 5]


@pytest.fixture(scope="module")
def network(sam_checkpoint) -> BoxPromptedSam:
    """SAM's promptable decoder with random weights, behind a small encoder."""
    return BoxPromptedSam(SamEncoder("vit_tiny", image_size=64), 4, sam_checkpoint, precision="fp32").eval()


def test_prompts_are_those_that_sam_computes(network, sam_vit_b):
    truth = torch.zeros(32, 32, dtype=torch.long)
    truth[4:20, 8:12] = LV
    embedding = torch.randn(256, 4, 4)
    prompts = copy.deepcopy(sam_vit_b.prompt_encoder)
    prompts.image_embedding_size, prompts.input_image_size = (4, 4), (64, 64)
    with torch.no_grad():
        sparse, dense = prompts(points=None, boxes=torch.tensor([[16.0, 8, 24, 40]]), masks=None)
        logits, _ = sam_vit_b.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=prompts.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    expected = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)[0, 0] > 0
    assert 0 < expected.sum() < expected.numel()
    with torch.no_grad():
        assert torch.equal(network._label_map(embedding, truth), LV * expected)


def test_classes_that_the_truth_lacks_are_not_predicted(network):
    images = torch.rand(2, 4, 48, 48) * 255
    images[:, 3] = 0
    images[0, 3, 10:20, 10:30] = MYO
    output = network(images)
    assert output.shape == (2, 4, 48, 48)
    assert torch.equal(output.sum(1), torch.ones(2, 48, 48))
    assert not output[0, [RV, LV]].any()
    assert torch.equal(output[1, 0], torch.ones(48, 48))


def test_random_weights_are_the_same_in_every_run():
    first, second = (BoxPromptedSam(SamEncoder("vit_tiny", image_size=64), out_channels=4) for _ in range(2))
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="unknown overlaps 'first': expected one of smallest, logit, argmax"):
        BoxPromptedSam(SamEncoder("vit_tiny", image_size=64), 4, overlaps="first")


def test_bundle_scores_the_test_patients_by_sams_decoder_within_the_boxes_classes(tiny_sam_checkpoint, tmp_path):
    data = write_phantom_dataset(str(tmp_path / "phantoms"), patients=4, size_hw_d=(64, 48, 3))
    knobs = {
        "dataset_dir": data,
        "output_dir": tmp_path / "eval",
        "cache_dir": tmp_path / "embeddings",
        "sam_checkpoint": tiny_sam_checkpoint,
        "model_type": "vit_tiny",
        "image_size": 64,
    }
    options = [str(text) for name, value in knobs.items() for text in (f"--{name}", value)]
    run_monai_bundle_here("run", "evaluating", "--config_file", "configs/evaluate.json", *options, cwd=BUNDLE)
    with (tmp_path / "eval/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3
    for case in {row["case"] for row in rows}:
        truth = next(Path(data).rglob(f"{case}_gt.nii.gz"))
        prediction, labels = (nib.load(path) for path in (tmp_path / f"eval/{case}_pred.nii.gz", truth))
        assert prediction.shape == labels.shape
        for predicted, true in zip(
            *(np.moveaxis(np.asarray(x.dataobj), 2, 0) for x in (prediction, labels)), strict=True
        ):
            assert set(np.unique(predicted)) <= {0, *np.unique(true)}


def test_readme_explains_every_knob_with_its_default():
    assert_readme_explains_knobs(BUNDLE, "evaluate")


def test_metadata_follow_the_schema_and_tell_the_network(metadata_schema, tmp_path):
    local = tmp_path / "schema.json"
    local.write_bytes(Path(metadata_schema).read_bytes())
    metadata = str(BUNDLE / "configs/metadata.json")
    verify_metadata(meta_file=metadata, filepath=str(local))
    verify_net_in_out(
        net_id="network_def",
        config_file=str(BUNDLE / "configs/evaluate.json"),
        meta_file=metadata,
        device="cpu",
        model_type="vit_tiny",
        sam_checkpoint="$None",
        cache_dir="$None",
        image_size=64,
    )
