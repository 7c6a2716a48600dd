"""The faster layers for a CPU compute what torch's own do."""

import pytest
import torch
from monai.networks.nets import BasicUNet
from torch import nn

from components.base.layers import InstanceNorm2d, MaxPool2x2, use_faster_layers
from tests.conftest import seeded

INSTANCE = ("instance", {"affine": True})
FEATURES = (4, 4, 8, 8, 8, 4)


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (1, 1, 2, 2), (2, 3, 9, 7)])
def test_the_pooling_gives_the_very_numbers_of_max_pool(shape):
    images = torch.randn(*shape, generator=seeded(0))
    assert torch.equal(MaxPool2x2()(images), nn.MaxPool2d(2)(images))
    assert torch.equal(torch.jit.script(MaxPool2x2())(images), nn.MaxPool2d(2)(images))


def test_the_pooling_passes_gradients_as_max_pool_does():
    images = torch.zeros(1, 1, 4, 4)  # equal pixels, whose gradient goes to one of them
    gradients = []
    for pooling in (MaxPool2x2(), nn.MaxPool2d(2)):
        start = images.clone().requires_grad_()
        pooling(start).sum().backward()
        gradients.append(start.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_instance_norm_agrees_with_torchs_in_value_and_gradient(dtype):
    norms = [kind(3, affine=True) for kind in (InstanceNorm2d, nn.InstanceNorm2d)]
    results = []
    for norm in norms:
        norm.weight.data = torch.tensor([0.5, 1.0, 2.0])
        norm.bias.data = torch.tensor([0.1, 0.0, -0.3])
        norm.to(dtype)
        images = (3 + torch.randn(2, 3, 17, 12, generator=seeded(1))).to(dtype).requires_grad_()
        output = norm(images)
        (output * torch.randn(output.shape, generator=seeded(3))).sum().backward()
        results.append([output, images.grad, norm.weight.grad, norm.bias.grad])
    for ours, theirs in zip(*results, strict=True):
        scale = theirs.abs().max()
        assert (ours - theirs).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * scale
    scripted = torch.jit.script(norms[0])(images.detach())
    assert torch.equal(scripted, results[1][0])


def test_a_unet_keeps_its_weights_and_its_numbers():
    torch.manual_seed(0)
    unet = BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=FEATURES, norm=INSTANCE)
    images = torch.randn(2, 1, 40, 32, generator=seeded(2))
    expected, before = unet(images), {name: id(weight) for name, weight in unet.named_parameters()}
    use_faster_layers(unet)
    assert {type(layer) for layer in unet.modules()} >= {MaxPool2x2, InstanceNorm2d}
    assert {name: id(weight) for name, weight in unet.named_parameters()} == before
    assert (unet(images) - expected).abs().max() < 1e-5
    with torch.no_grad():
        assert (unet(images) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("layer", [nn.MaxPool2d(3), nn.MaxPool2d(2, ceil_mode=True), nn.InstanceNorm2d(4)])
def test_a_layer_with_other_settings_is_refused(layer):
    with pytest.raises(ValueError, match=r"expected .*, received"):
        use_faster_layers(nn.Sequential(layer))
