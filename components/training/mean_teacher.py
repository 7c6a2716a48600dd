"""Labels that the running mean of a network gives to slices without one, for the network to train on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from monai.engines import default_prepare_batch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from components.data.slices import UNLABELLED


class ExponentialMovingAverage:
    """A copy of a network whose trained weights are their running mean over the steps of a training.

    Differs: ignite's `EMAHandler` averages frozen weights as well, by which rounding slowly changes them, so that an
    encoder is no longer the one that its fingerprint names. Here they are those of the network itself.

    Args:
        network: the network in training; of a `DistributedDataParallel` the inner module.
        momentum: what each step leaves of the mean: 0.99 is a mean of about the last hundred steps.

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
        """Move the mean towards the network; running statistics, such as those of a batch norm, are taken over."""
        for mean, module in zip(self.mean.modules(), self.network.modules(), strict=True):
            trained = {name for name, value in module.named_parameters(recurse=False) if value.requires_grad}
            for name in trained:
                mean.get_parameter(name).lerp_(module.get_parameter(name), 1 - self.momentum)
            for name, value in module.named_buffers(recurse=False) if trained else ():
                mean.get_buffer(name).copy_(value)


class PseudoLabelCutMix:
    """A trainer's `prepare_batch` that has a teacher label the slices without a label, and mixes them.

    The teacher, the running mean of the network in training, first takes up the last step. Then it labels these slices
    as they are. A rectangle of half the size of each is replaced by that of another one, with its labels (CutMix). So
    the network sees in strange surroundings what its teacher has seen in the whole slice. All pixels count, also where
    the teacher is not sure.

    Sources: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017; French et al.,
    "Semi-supervised semantic segmentation needs strong, varied perturbations", BMVC 2020. MONAI's `CutMix` cuts all
    slices of a batch at one place, and out of some of them nothing.

    The rectangles depend on the state of torch's global generator, which `components.training.EpochSeeds` sets.

    Args:
        teacher: of the network in training, which maps images BxCxHxW to logits BxKxHxW.
        prepare_batch: makes images BxCxHxW and labels Bx1xHxW of a batch, such as `PhantomMixing`. Unlabelled are those
            in whose label there is an `UNLABELLED` of `components.data.slices`.
    """

    def __init__(
        self, teacher: ExponentialMovingAverage, prepare_batch: Callable[..., Any] = default_prepare_batch
    ) -> None:
        self.teacher = teacher
        self.prepare_batch = prepare_batch

    def __call__(
        self, batchdata: Any, device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepare the batch of the next step, and label what is unlabelled.

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
    """Replace a rectangle of each slice, half of its area, by the same one of the slice before it in the batch."""
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
