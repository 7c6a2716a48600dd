"""Files of weights: what is unwrapped, and what is refused in which words."""

import argparse

import pytest
import torch
from torch import nn

from components.base.weights import key_test, load_weights, read_state_dict
from components.networks.unet import GreyUNet
from components.sam.checkpoint import read_sam_checkpoint

SAM = {f"{part}.weight": torch.ones(2) for part in ("image_encoder", "prompt_encoder", "mask_decoder")}


def network() -> nn.Module:
    return nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 3)})


def read(folder, content, **options):
    path = folder / "weights.pt"
    torch.save(content, path)
    options = {"kind": "start checkpoint", "remedy": "give another", "is_key": key_test(network())} | options
    return read_state_dict(str(path), **options)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"model": state, "optimizer": {"state": {0: {"step": 1}}, "param_groups": []}, "epoch": 3},
        lambda state: {"model_state": state, "loss": torch.tensor(0.5)},
        lambda state: {"state_dict": prefixed(state, "module."), "scaler": {}},
        lambda state: prefixed(state, "model."),
        lambda state: prefixed(state, "module.net."),
    ],
    ids=["flat", "model", "model_state", "state_dict and module", "model prefix", "two prefixes"],
)
def test_weights_of_other_programs_are_unwrapped(tmp_path, wrapped):
    state = dict(network().state_dict())
    found = read(tmp_path, wrapped(state))
    assert found.keys() == state.keys()
    load_weights(network(), found, path="weights.pt", remedy="none")


@pytest.mark.parametrize("prefix", ["", "module.", "sam.", "module.sam."])
def test_sam_checkpoint_is_unwrapped(tmp_path, prefix):
    torch.save({"model": prefixed(SAM, prefix), "epoch": 1}, tmp_path / "sam.pth")
    parts = read_sam_checkpoint(str(tmp_path / "sam.pth"))
    assert {part: list(state) for part, state in parts.items()} == {
        "image_encoder": ["weight"],
        "prompt_encoder": ["weight"],
        "mask_decoder": ["weight"],
    }


def test_start_of_a_unet_is_unwrapped(tmp_path):
    unet = GreyUNet(4, width=2)
    torch.save({"model": prefixed(unet.state_dict(), "module."), "epoch": 1}, tmp_path / "model.pt")
    started = GreyUNet(4, width=2, start_checkpoint=str(tmp_path / "model.pt"))
    assert all(torch.equal(value, started.state_dict()[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": SAM, "ema": SAM, "epoch": 3}, r"with 2 of them and the keys model \(dict\), ema \(dict\), epoch"),
        ({"outer": {"inner": {"w": [1]}}, "epoch": 3}, r"with 0 of them and the keys outer \(dict\), epoch \(int\)"),
        ([torch.ones(1)], "expected a state dict of tensors, got a list; give another"),
        ({"model": SAM, "arguments": argparse.Namespace(lr=1)}, "it holds a argparse.Namespace, which is not loaded"),
    ],
    ids=["two state dicts", "none", "list", "object"],
)
def test_file_that_cannot_be_unwrapped_is_refused_with_what_it_holds(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


def test_prefix_that_some_keys_lack_stays_and_is_named(tmp_path):
    state = prefixed(SAM, "module.") | {"text_encoder.weight": torch.ones(1)}
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"received also module\.image_encoder\.weight, .*text_encoder\.weight"):
        read_sam_checkpoint(str(tmp_path / "sam.pth"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_with_their_keys(tmp_path, value):
    state = dict(network().state_dict())
    state["head.weight"][0, 0] = state["head.bias"][0] = value
    with pytest.raises(ValueError, match=r"weights\.pt .* in 2 of its 4 tensors \(head\.weight, head\.bias\)"):
        read(tmp_path, {"model": state})


def test_half_precision_weights_whose_sum_overflows_are_finite(tmp_path):
    state = {"head.weight": torch.full((9,), 6e4, dtype=torch.float16), "head.count": torch.tensor(3)}
    assert read(tmp_path, state).keys() == state.keys()


def test_weights_of_another_network_are_refused_with_a_few_of_the_keys():
    state = {f"other{number}.weight": torch.ones(1) for number in range(99)}
    with pytest.raises(ValueError) as caught:
        load_weights(network(), state, path="model.pt", remedy="give another")
    message = str(caught.value)
    assert 'Missing key(s) in state_dict: "encoder.weight"' in message
    assert '"other0.weight"' in message
    assert "and 91 more" in message
    assert "other50" not in message
