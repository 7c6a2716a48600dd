"""Pseudo-labels by a mean teacher: the exponential moving average of a network labels slices that have no label."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from monai.engines import default_prepare_batch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from components.data.slices import UNLABELLED


class ExponentialMovingAverage:
    """A copy of a network whose trained weights are their exponential moving average over the steps of a training.

    Differs: ignite's `EMAHandler` averages frozen weights as well. Rounding changes them slowly, so that they no longer
    match the encoder's fingerprint. Here frozen weights are shared with the network.

    Args:
        network: the network in training; the inner module of a `DistributedDataParallel` is taken.
        momentum: share of the average that a step keeps; 0.99 averages about the last hundred steps.

    Attributes:
        mean: the copy, in evaluation mode.

    Raises:
        ValueError: when `momentum` is not between 0 and 1.
    """

    def __init__(self, network: torch.nn.Module, momentum: float = 0.99) -> None:
        if not 0 < momentum < 1:
            raise ValueError(f"expected a momentum between 0 and 1, received {momentum}: give for example 0.99")
        self.network = network.module if isinstance(network, DataParallel | DistributedDataParallel) else network
        self.momentum = momentum
        frozen = [parameter for parameter in self.network.parameters() if not parameter.requires_grad]
        self.mean = copy.deepcopy(self.network, {id(parameter): parameter for parameter in frozen})
        self.mean.requires_grad_(False).eval()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network, and copy running statistics such as those of batch norm."""
        for mean, module in zip(self.mean.modules(), self.network.modules(), strict=True):
            trained = {name for name, value in module.named_parameters(recurse=False) if value.requires_grad}
            for name in trained:
                mean.get_parameter(name).lerp_(module.get_parameter(name), 1 - self.momentum)
            for name, value in module.named_buffers(recurse=False) if trained else ():
                mean.get_buffer(name).copy_(value)


class PseudoLabelCutMix:
    """A trainer's `prepare_batch` that gives slices without a label pseudo-labels of a teacher, and applies CutMix.

    The teacher is first updated by the last step, and labels each slice as a whole. Then a rectangle of half the area
    of each slice is replaced by that of another slice, with its labels. The network must find in new surroundings what
    the teacher found in the whole slice. All pixels count, whatever the teacher's confidence.

    Sources: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017; French et al.,
    "Semi-supervised semantic segmentation needs strong, varied perturbations", BMVC 2020. Differs: MONAI's `CutMix`
    cuts all slices of a batch at one place, and some of them not at all.

    The rectangles depend on the state of torch's global generator, which `components.training.EpochSeeds` sets.

    Args:
        teacher: average of the network in training, which maps images BxCxHxW to logits BxKxHxW.
        prepare_batch: makes images BxCxHxW and labels Bx1xHxW of a batch, such as `PhantomMixing`. A slice is
            unlabelled if its label has a pixel `UNLABELLED` of `components.data.slices`.
    """

    def __init__(
        self, teacher: ExponentialMovingAverage, prepare_batch: Callable[..., Any] = default_prepare_batch
    ) -> None:
        self.teacher = teacher
        self.prepare_batch = prepare_batch

    def __call__(
        self, batchdata: Any, device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepare the batch of the next step, and give its unlabelled slices pseudo-labels.

        Args:
            batchdata: what `prepare_batch` takes.
            device: where the batch goes.
            non_blocking: whether copies to it may overlap with work on the CPU.
            kwargs: further arguments of `Tensor.to`.

        Returns:
            images BxCxHxW and labels Bx1xHxW, without metadata; those with a label are not changed.
        """
        self.teacher.update()
        batch = self.prepare_batch(batchdata, device, non_blocking, **kwargs)
        images, labels = (part.as_subclass(torch.Tensor).clone() for part in batch)
        unlabelled = (labels == UNLABELLED).flatten(1).any(dim=1)
        if unlabelled.any():
            shown = images[unlabelled]
            with torch.no_grad():
                taught = self.teacher.mean(shown).argmax(dim=1, keepdim=True).to(labels)
            images[unlabelled], labels[unlabelled] = _cutmix(shown, taught)
        return images, labels


def _cutmix(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace a rectangle of each slice, half of its area, by that of the slice before it in the batch."""
    is_kept = torch.ones(len(images), 1, *images.shape[2:], dtype=torch.bool)
    for kept in is_kept[:, 0]:
        height = kept.shape[0] * 0.5 ** float(torch.rand(()))
        width = kept.numel() / 2 / height
        top, left = (
            float(torch.rand(())) * (room - side) for room, side in zip(kept.shape, (height, width), strict=True)
        )
        kept[round(top) : round(top + height), round(left) : round(left + width)] = False
    is_kept = is_kept.to(images.device)
    return (
        torch.where(is_kept, images, images.roll(1, dims=0)),
        torch.where(is_kept, labels, labels.roll(1, dims=0)),
    )
