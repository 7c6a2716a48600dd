"""A click head learns from simulated clicks, and what clicks bring is measured by simulated clicks."""

import monai.bundle
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from test_pretraining import is_same

from components.base.masks import depth_inside, largest_piece
from components.networks.click_head import ClickHead
from components.phantom.dataset import write_phantom_dataset
from components.phantom.slices import phantom_slices
from components.pretraining.click_practice import _error_at, _other_truth
from study.clicks import clicks

FEW = {"batch_size": 4, "steps_per_epoch": 2, "epochs": 2, "val_interval": 1}
SMALL = {
    "phantom_encoder": {**FEW, "canvas_size": 64, "image_size": 64, "val_stacks": 1, "slices_per_stack": 3},
    "general_encoder": {**FEW, "patch_size": 64, "validate#dataset#data#stacks": 1},
}


def run(name: str, bundle: str, folder, **overrides) -> None:
    root = REPOSITORY / "bundles" / bundle
    folders = {"bundle_root": str(root), "ckpt_dir": str(folder), "output_dir": str(folder / "eval")}
    config = [str(root / "configs" / file) for file in ("train.json", "clicks.json")]
    monai.bundle.run(name, config_file=config, **{**SMALL[bundle], **folders, **overrides})


def weights(folder, epoch: int = 2) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"checkpoint_epoch={epoch}.pt", weights_only=True)["model"]


@pytest.mark.parametrize("bundle", SMALL)
def test_a_run_trains_the_click_head_alone_resumes_and_exports(bundle, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("training", bundle, whole)
    trained = weights(whole)
    assert trained.keys() == ClickHead().state_dict().keys()
    run("training", bundle, killed, epochs=1)
    assert not is_same(weights(killed, 1), trained)
    run("training", bundle, killed, resume=True)
    assert is_same(weights(killed), trained)

    file = tmp_path / "click_head.pt"
    run("exporting", bundle, whole, export_path=str(file))
    exported = torch.load(file, weights_only=True)
    assert {value.dtype for value in exported.values()} == {torch.float16}
    ClickHead().load_state_dict(exported)


def test_the_innermost_point_of_the_largest_error_is_found():
    wrong = np.zeros((20, 30), bool)
    wrong[2:4, 2:4] = wrong[8:15, 10:17] = wrong[8, 10:25] = True
    piece = largest_piece(wrong)
    assert not piece[2, 2]
    assert piece.sum() == wrong.sum() - 4
    depth = depth_inside(piece)
    assert np.unravel_index(depth.argmax(), depth.shape) == (11, 13)
    assert not largest_piece(np.zeros((3, 3), bool)).any()
    whole = depth_inside(np.ones((5, 5), bool))
    assert np.unravel_index(whole.argmax(), whole.shape) == (2, 2)


def test_another_experts_labels_differ_in_several_ways():
    label = phantom_slices(1, seed=1, size=96, field_mm=264.0, width=0.0)[1][0].float()
    assert label.unique().tolist() == [0, 1, 2, 3]
    random = np.random.default_rng(0)
    drawn = [_other_truth(label, random) for _ in range(60)]
    assert all(each.shape == label.shape and {*each.unique().tolist()} <= {0, 1, 2, 3} for each in drawn)
    sizes = [[int((each == number).sum()) for each in drawn] for number in (1, 2, 3)]
    for own, before in zip(sizes, [int((label == number).sum()) for number in (1, 2, 3)], strict=True):
        assert min(own) == 0  # absent
        assert any(0 < size < before for size in own)
        assert any(size > before for size in own)
    assert 15 < sum(torch.equal(each, label) for each in drawn) < 35
    empty = torch.zeros_like(label)
    assert all(torch.equal(_other_truth(empty, random), empty) for _ in range(10))


def test_a_click_asks_for_the_error_that_it_lies_in_alone():
    wrong = torch.zeros(20, 30, dtype=torch.bool)
    wrong[2:4, 2:4] = wrong[8:15, 10:17] = True
    nothing = torch.zeros_like(wrong)
    assert _error_at((12, 9, 1), wrong, nothing).sum() == 7 * 7
    assert not _error_at((12, 9, 1), wrong, ~nothing).any()
    assert not _error_at((25, 9, 1), wrong, nothing).any()


def test_simulated_clicks_bring_what_the_table_says(tmp_path):
    data = write_phantom_dataset(str(tmp_path / "phantoms"), patients=10, size_hw_d=(64, 56, 3))
    clicks("linearhead_acdc", str(tmp_path / "out"), dataset_dir=data, count=4, cases=2)
    table = pd.read_csv(tmp_path / "out/clicks.csv")
    assert len(table) == 2 * 5 * 3
    means = table.groupby("clicks")[["corrected", "redrawn"]].mean()
    assert means.loc[0, "corrected"] == means.loc[0, "redrawn"]
    assert means["redrawn"].is_monotonic_increasing
    assert means.loc[4, "corrected"] > means.loc[0, "corrected"]
