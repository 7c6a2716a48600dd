"""Averages of a network's weights: over the steps of a training, or with those that it started from."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from ignite.engine import Engine, Events
from torch import nn

from components.base.weights import unwrapped


class AveragedNetwork:
    """A copy of a network whose trained weights are an average.

    Differs: ignite's `EMAHandler` averages frozen weights as well. Rounding changes them slowly, so that they no longer
    match the encoder's fingerprint. Here frozen weights are shared with the network.

    Args:
        network: the network in training; the inner module of a `DistributedDataParallel` is taken.

    Attributes:
        mean: the copy, in evaluation mode.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = unwrapped(network)
        frozen = [parameter for parameter in self.network.parameters() if not parameter.requires_grad]
        self.mean = copy.deepcopy(self.network, {id(parameter): parameter for parameter in frozen})
        self.mean.requires_grad_(False).eval()

    def trained_weights(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield each trained weight of the copy with that of the network."""
        for mean, trained in zip(self.mean.parameters(), self.network.parameters(), strict=True):
            if trained.requires_grad:
                yield mean, trained

    def copy_statistics(self) -> None:
        """Copy the running statistics of trained layers, such as those of batch norm."""
        for mean, module in zip(self.mean.modules(), self.network.modules(), strict=True):
            if any(value.requires_grad for value in module.parameters(recurse=False)):
                for name, value in module.named_buffers(recurse=False):
                    mean.get_buffer(name).copy_(value)


class ExponentialMovingAverage(AveragedNetwork):
    """A copy of a network whose trained weights are their exponential moving average over the steps of a training.

    Args:
        network: as for `AveragedNetwork`.
        momentum: share of the average that a step keeps; 0.99 averages about the last hundred steps.

    Raises:
        ValueError: when `momentum` is not between 0 and 1.
    """

    def __init__(self, network: nn.Module, momentum: float = 0.99) -> None:
        if not 0 < momentum < 1:
            raise ValueError(f"expected a momentum between 0 and 1, received {momentum}: give for example 0.99")
        super().__init__(network)
        self.momentum = momentum

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network."""
        for mean, trained in self.trained_weights():
            mean.lerp_(trained, 1 - self.momentum)
        self.copy_statistics()


class MeanWithStart(AveragedNetwork):
    """A copy of a network whose trained weights are the mean of their present values and of those at the start.

    A few labelled patients improve a network on most patients, and worsen it on others. The mean keeps most of the
    gain and is more robust.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.

    Args:
        network: as for `AveragedNetwork`, with the weights of the start.
        start_share: weight of the start in the mean, from 0 (none) to below 1.

    Raises:
        ValueError: when `start_share` is out of range.
    """

    def __init__(self, network: nn.Module, start_share: float) -> None:
        if not 0 <= start_share < 1:
            raise ValueError(
                f"expected a start_share of 0 or more and below 1, received {start_share}: give for example 0.25"
            )
        super().__init__(network)
        self.start_share = start_share
        self._start = [trained.detach().clone() for _, trained in self.trained_weights()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the mean of the start and the network's present weights."""
        for start, (mean, trained) in zip(self._start, self.trained_weights(), strict=True):
            mean.copy_(torch.lerp(trained, start, self.start_share))
        self.copy_statistics()


class AverageUpdates:
    """Ignite handler that updates a mean with the start after each epoch. List it BEFORE the validation handler.

    Args:
        averaged: the mean.
    """

    def __init__(self, averaged: MeanWithStart) -> None:
        self.averaged = averaged

    def attach(self, engine: Engine) -> None:
        """Register the handler.

        Args:
            engine: the trainer.
        """
        # when a resumed run ends without an epoch, its only update is the last one
        engine.add_event_handler(Events.EPOCH_COMPLETED | Events.COMPLETED, self.averaged.update)
