"""MobileSAM's image encoder: its own module's numbers and files."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from components.sam.decoder import build_decoder
from components.sam.encoder import SamEncoder
from components.sam.tiny_vit import CLASSIFIER_KEYS, ConvNorm, TinyViT

FIXED_GRID = "x.view(B, 64, 64, C)"
ANY_GRID = "x.view(B, self.img_size // 16, self.img_size // 16, C)"


class _NoDropPath(nn.Module):
    """MobileSAM's encoder drops no path."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob


@pytest.fixture
def mobile_sam(monkeypatch):
    """A function that builds MobileSAM's own encoder; for another size than 1024 its grid is made general."""
    package = importlib.util.find_spec("mobile_sam")
    if package is None:
        pytest.skip("mobilesam-mirror is not installed: pip install -c constraints.txt -e '.[test]'")
    # Its package imports torchvision, and this file four names of timm: the file is run with stand-ins for these.
    timm = types.ModuleType("timm.models.layers")
    vars(timm).update(DropPath=_NoDropPath, to_2tuple=lambda x: (x, x), trunc_normal_=nn.init.trunc_normal_)
    registry = types.ModuleType("timm.models.registry")
    vars(registry).update(register_model=lambda build: build)
    for name, module in {
        "timm": types.ModuleType("timm"),
        "timm.models": types.ModuleType("timm.models"),
        "timm.models.layers": timm,
        "timm.models.registry": registry,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    (folder,) = package.submodule_search_locations
    source = (Path(folder) / "modeling/tiny_vit_sam.py").read_text()
    assert source.count(FIXED_GRID) == 1

    def build(image_size: int) -> nn.Module:
        module = types.ModuleType("tiny_vit_sam")
        exec(source if image_size == 1024 else source.replace(FIXED_GRID, ANY_GRID), vars(module))
        return module.TinyViT(
            img_size=image_size,
            embed_dims=[64, 128, 160, 320],
            depths=[2, 2, 6, 2],
            num_heads=[2, 4, 5, 10],
            window_sizes=[7, 7, 14, 7],
            drop_path_rate=0.0,
        )

    return build


def randomise(state: dict[str, torch.Tensor]) -> None:
    """Draw all that is initialised with zeros or ones, which no test could tell from leaving it out."""
    for key, value in state.items():
        if key.endswith(("running_var", "bn.weight", "norm.weight", "neck.1.weight", "neck.3.weight")):
            value.uniform_(0.5, 2)
        elif key.endswith(("bias", "attention_biases", "running_mean")):
            value.normal_(std=0.3)


@pytest.fixture(scope="module")
def encoder_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = TinyViT().state_dict()
    randomise(state)
    return state


@pytest.fixture
def file_of(encoder_state, tmp_path):
    """A function that writes a file in the layout of `mobile_sam.pt`, some of its keys changed."""

    def write(**changed: torch.Tensor) -> str:
        state = encoder_state | {key: torch.ones(2) for key in CLASSIFIER_KEYS}
        state = {f"image_encoder.{key}": value for key, value in state.items()} | changed
        for part, module in zip(("mask_decoder", "prompt_encoder"), build_decoder(), strict=True):
            state |= {f"{part}.{key}": value for key, value in module.state_dict().items()}
        torch.save(state, tmp_path / "mobile_sam.pt")
        return str(tmp_path / "mobile_sam.pt")

    return write


# At 1024 MobileSAM's file is as it is. At the others windows of 7 and 14 tokens fill the grid, or go beyond it.
@pytest.mark.parametrize("image_size", [pytest.param(1024, marks=pytest.mark.slow), 16, 112, 176, 224])
def test_equals_mobile_sams_own_module(image_size, mobile_sam):
    torch.manual_seed(0)
    theirs = mobile_sam(image_size)
    randomise(theirs.state_dict())
    theirs.eval()  # looks its biases up, once
    state = theirs.state_dict()
    assert state.keys() - TinyViT().state_dict().keys() == CLASSIFIER_KEYS
    ours = TinyViT().eval()
    ours.load_state_dict({key: value for key, value in state.items() if key not in CLASSIFIER_KEYS})
    images = torch.randn(1 if image_size == 1024 else 2, 3, image_size, image_size)
    with torch.no_grad():
        expected = theirs(images)
        embeddings = ours(images)
    spread = float(expected.max() - expected.min())
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5 * spread)


def test_gradients_equal_those_of_mobile_sams_own_module(mobile_sam):
    torch.manual_seed(0)
    theirs, ours = mobile_sam(112).double().train(), TinyViT().double().train()
    randomise(theirs.state_dict())
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if key not in CLASSIFIER_KEYS})
    images = torch.randn(2, 3, 112, 112).double()
    for module in (theirs, ours):
        module(images).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-6, atol=1e-9)
    for key, value in ours.state_dict().items():  # the statistics that batch norms keep
        torch.testing.assert_close(value, theirs.state_dict()[key])


def test_folded_batch_norms_equal_the_unfolded_ones(encoder_state, monkeypatch):
    encoder = TinyViT().eval()
    encoder.load_state_dict(encoder_state)
    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        folded = encoder(images)
        monkeypatch.setattr(ConvNorm, "forward", lambda self, x: self.bn(self.c(x)))
        expected = encoder(images)
    assert not torch.equal(folded, expected)  # they are two ways to compute
    torch.testing.assert_close(folded, expected, rtol=0, atol=1e-5 * float(expected.max() - expected.min()))


def test_has_as_many_weights_as_mobile_sams_file():
    parts = (TinyViT(), *build_decoder(), nn.ModuleDict({"norm_head": nn.LayerNorm(320), "head": nn.Linear(320, 1000)}))
    assert round(sum(parameter.numel() for part in parts for parameter in part.parameters()) / 1e6, 2) == 10.13


def test_mobile_sams_file_is_loaded_without_its_classification_head(file_of, encoder_state):
    encoder = SamEncoder("vit_t", file_of(), image_size=64)
    weights = encoder.image_encoder.state_dict()
    assert weights.keys() == encoder_state.keys()
    assert all(torch.equal(value, encoder_state[key]) for key, value in weights.items())


def test_keys_beside_the_classification_head_are_refused(file_of):
    path = file_of(**{"image_encoder.head.scale": torch.ones(1), "image_encoder.neck.0.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"extra: image_encoder\.head\.scale; misshapen: image_encoder\.neck\.0"):
        SamEncoder("vit_t", path)


def test_a_classification_head_in_another_encoders_file_is_refused(tmp_path):
    state = SamEncoder("vit_tiny").image_encoder.state_dict() | {"head.weight": torch.ones(2)}
    torch.save({f"image_encoder.{key}": value for key, value in state.items()}, tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"extra: image_encoder\.head\.weight"):
        SamEncoder("vit_tiny", str(tmp_path / "tiny.pth"))


def test_mobile_sams_file_for_another_model_type_is_named(file_of):
    with pytest.raises(ValueError, match="is a vit_t checkpoint, but model_type is vit_tiny: give --model_type vit_t"):
        SamEncoder("vit_tiny", file_of())


def test_statistics_of_batch_norms_are_weights_to_the_fingerprint():
    encoder = SamEncoder("vit_t", image_size=64)
    image = torch.zeros(1, 3, 32, 32)
    before, embedding = encoder.state_dict()["fingerprint"].clone(), encoder(image)
    encoder.image_encoder.layers[0].blocks[0].conv1.bn.running_mean.add_(1)
    assert not torch.equal(encoder(image), embedding)
    assert not torch.equal(encoder.state_dict()["fingerprint"], before)


def test_training_along_moves_the_statistics_and_evaluation_uses_them():
    encoder = SamEncoder("vit_t", image_size=64, trainable=True).train()
    images = torch.rand(2, 3, 64, 64) * 255
    before = encoder.eval()(images)
    encoder.train()(images)
    assert not torch.equal(encoder.eval()(images), before)
