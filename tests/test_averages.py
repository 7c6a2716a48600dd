"""Averages of a network's weights: a copy with averaged trained weights and shared frozen ones."""

import monai.bundle
import pytest
import torch
from conftest import REPOSITORY

from components.networks.unet import GreyUNet
from components.phantom.dataset import write_phantom_dataset
from components.training.averages import ExponentialMovingAverage, MeanWithStart


def head_on_frozen_encoder() -> torch.nn.Sequential:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.Conv2d(2, 2, 1), torch.nn.BatchNorm2d(2))
    network[0].requires_grad_(False)
    return network


@pytest.mark.parametrize("average", [ExponentialMovingAverage, MeanWithStart])
def test_frozen_weights_are_shared_and_statistics_copied(average):
    network = head_on_frozen_encoder()
    averaged = average(network, 0.5)
    network[2](torch.rand(2, 2, 4, 4))
    averaged.update()
    assert averaged.mean[0].weight is network[0].weight
    assert averaged.mean[1].weight is not network[1].weight
    assert torch.equal(averaged.mean[2].running_mean, network[2].running_mean)
    assert averaged.mean[2].running_mean is not network[2].running_mean
    assert not averaged.mean.training
    assert not any(parameter.requires_grad for parameter in averaged.mean.parameters())
    assert network[1].weight.requires_grad


def test_moving_average_follows_the_trained_weights():
    network = head_on_frozen_encoder()
    running = ExponentialMovingAverage(network, momentum=0.75)
    first = network[1].weight.detach().clone()
    with torch.no_grad():
        for step in (1, 2, 2):
            network[1].weight.fill_(step)
            running.update()
    assert torch.allclose(running.mean[1].weight, 0.75 * (0.75 * (0.75 * first + 0.25) + 0.25 * 2) + 0.25 * 2)


@pytest.mark.parametrize("start_share", [0, 0.25])
def test_mean_with_the_start_depends_on_the_present_weights_alone(start_share):
    network = head_on_frozen_encoder()
    averaged = MeanWithStart(network, start_share)
    start = network[1].weight.detach().clone()
    assert torch.equal(averaged.mean[1].weight, start)
    with torch.no_grad():
        for step in (1, 2):
            network[1].weight.fill_(step)
            averaged.update()
    assert torch.allclose(averaged.mean[1].weight, start_share * start + (1 - start_share) * 2)


@pytest.mark.parametrize("momentum", [0, 1, 1.5])
def test_impossible_momentum_is_refused(momentum):
    with pytest.raises(ValueError, match="between 0 and 1"):
        ExponentialMovingAverage(head_on_frozen_encoder(), momentum=momentum)


@pytest.mark.parametrize("start_share", [-0.1, 1])
def test_impossible_share_of_the_start_is_refused(start_share):
    with pytest.raises(ValueError, match="start_share of 0 or more and below 1"):
        MeanWithStart(head_on_frozen_encoder(), start_share)


def test_unet_keeps_the_mean_of_its_start_and_the_last_epoch(tmp_path):
    start = tmp_path / "start.pt"
    torch.manual_seed(0)
    torch.save(GreyUNet(out_channels=4, width=2).state_dict(), start)
    monai.bundle.run(
        "training",
        config_file=str(REPOSITORY / "bundles/unet_acdc/configs/train.json"),
        logging_file=False,
        dataset_dir=write_phantom_dataset(str(tmp_path / "phantoms"), patients=8, size_hw_d=(32, 32, 2)),
        ckpt_dir=str(tmp_path / "models"),
        output_dir=str(tmp_path / "eval"),
        start_checkpoint=str(start),
        width=2,
        canvas_size=32,
        crop_size=32,
        epochs=1,
        phantom_share=0,
        test_time_views=2,
        is_silent=True,
        learning_rate=10,  # so that the start is better on the validation cases
    )
    before, trained, saved = (
        torch.load(path, weights_only=True)
        for path in (start, tmp_path / "models/checkpoint_epoch=1.pt", tmp_path / "models/model.pt")
    )
    weights = {name: value for name, value in before.items() if value.is_floating_point()}
    assert trained["start_score"] > trained["best_score"]
    assert any(not torch.equal(value, trained["model"][name]) for name, value in weights.items())
    for name, value in weights.items():
        torch.testing.assert_close(saved[name], torch.lerp(value, trained["model"][name], 0.5))
