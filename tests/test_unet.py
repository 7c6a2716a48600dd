"""The UNet baseline's network."""

import pytest
import torch

from components.networks.unet import CONTRACTING_PATH, GreyUNet

IMAGES = torch.arange(2 * 3 * 48 * 32).view(2, 3, 48, 32).float() % 255


@pytest.mark.parametrize(("width", "count"), [(64, 31_112_260), (16, 1_948_180)])
def test_weights_are_as_many_as_documented(width, count):
    assert sum(parameter.numel() for parameter in GreyUNet(4, width).parameters()) == count


def test_logits_have_the_images_size_and_depend_on_the_grey_values_alone():
    network = GreyUNet(4, width=2).eval()
    logits = network(IMAGES)
    assert logits.shape == (2, 4, 48, 32)
    assert logits.dtype == torch.float32
    coloured = IMAGES.clone()
    coloured[:, 1:] = 0
    assert torch.equal(network(coloured), logits)
    assert not torch.equal(network(IMAGES.flip(3)), logits)


def test_bf16_is_near_fp32_and_scripted_is_fp32():
    network = GreyUNet(4, width=4, precision="fp32").eval()
    expected = network(IMAGES)
    torch.testing.assert_close(torch.jit.script(network)(IMAGES), expected)
    network.precision = "bf16"
    logits = network(IMAGES)
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()))


def test_start_is_a_whole_network_or_its_contracting_path(tmp_path):
    other = GreyUNet(4, width=2)
    torch.save(other.state_dict(), tmp_path / "model.pt")
    parts = tuple(f"unet.{part}." for part in CONTRACTING_PATH)
    contracting = {key: value for key, value in other.state_dict().items() if key.startswith(parts)}
    assert 0 < len(contracting) < len(other.state_dict())
    torch.save(contracting, tmp_path / "contracting.pt")

    whole = GreyUNet(4, width=2, start_checkpoint=str(tmp_path / "model.pt")).state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in other.state_dict().items())
    part = GreyUNet(4, width=2, start_checkpoint=str(tmp_path / "contracting.pt")).state_dict()
    same = {key for key, value in other.state_dict().items() if torch.equal(value, part[key])}
    assert contracting.keys() <= same
    assert any(key.endswith("weight") for key in other.state_dict().keys() - same)


def test_start_that_does_not_fit_is_refused(tmp_path):
    state = GreyUNet(4, width=2).state_dict()
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="does not fit this network: give --start_checkpoint a file of a UNet"):
        GreyUNet(4, width=4, start_checkpoint=str(tmp_path / "model.pt"))
    del state["unet.conv_0.conv_0.conv.weight"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(ValueError, match="does not fit"):
        GreyUNet(4, width=2, start_checkpoint=str(tmp_path / "less.pt"))
    with pytest.raises(FileNotFoundError, match=r"no start checkpoint at .*none\.pt"):
        GreyUNet(4, width=2, start_checkpoint=str(tmp_path / "none.pt"))
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        GreyUNet(4, precision="half")
