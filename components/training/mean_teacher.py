"""Pseudo-labels by a mean teacher: the exponential moving average of a network labels slices that have no label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.engines import default_prepare_batch

from components.data.slices import UNLABELLED
from components.training.averages import ExponentialMovingAverage


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
