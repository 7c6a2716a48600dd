"""A click head learns from simulated clicks, and what clicks bring is measured by simulated clicks."""

import monai.bundle
import numpy as np
import pandas as pd
import pytest
import torch
from test_pretraining import BUNDLE, TINY, config, is_same

from components.data.clicks import depth_inside, largest_piece
from components.networks.click_head import ClickHead
from components.phantom.dataset import write_phantom_dataset
from study.clicks import clicks

SIDE = {"canvas_size": 64, "image_size": 64}


def practise(folder, **overrides) -> None:
    small = {**{key: value for key, value in TINY.items() if key != "model_type"}, **SIDE}
    folders = {"bundle_root": str(BUNDLE), "ckpt_dir": str(folder), "output_dir": str(folder / "eval")}
    monai.bundle.run("training", config_file=config("train", "clicks"), **{**small, **folders, **overrides})


def weights(folder, epoch: int = 2) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"checkpoint_epoch={epoch}.pt", weights_only=True)["model"]


def test_a_run_trains_the_click_head_alone_resumes_and_exports(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    practise(whole)
    trained = weights(whole)
    assert trained.keys() == ClickHead().state_dict().keys()
    practise(killed, epochs=1)
    assert not is_same(weights(killed, 1), trained)
    practise(killed, resume=True)
    assert is_same(weights(killed), trained)

    file = tmp_path / "click_head.pt"
    paths = {"bundle_root": str(BUNDLE), "ckpt_dir": str(whole), "export_path": str(file)}
    monai.bundle.run("exporting", config_file=config("train", "clicks"), **paths)
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


@pytest.mark.parametrize("bundle", ["linearhead_acdc"])
def test_simulated_clicks_bring_what_the_table_says(bundle, tmp_path):
    data = write_phantom_dataset(str(tmp_path / "phantoms"), patients=10, size_hw_d=(64, 56, 3))
    clicks(bundle, str(tmp_path / "out"), dataset_dir=data, count=4, cases=2)
    table = pd.read_csv(tmp_path / "out/clicks.csv")
    assert len(table) == 2 * 5 * 3
    means = table.groupby("clicks")[["corrected", "redrawn"]].mean()
    assert means.loc[0, "corrected"] == means.loc[0, "redrawn"]
    assert means["redrawn"].is_monotonic_increasing
    assert means.loc[4, "corrected"] > means.loc[0, "corrected"]
