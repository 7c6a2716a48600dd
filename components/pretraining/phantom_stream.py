"""The data of pre-training: an endless stream of phantom slices, and a fixed set of them for validation."""

from __future__ import annotations

import torch

from components.phantom.slices import FIELD_MM, phantom_slices
from components.pretraining.stream import EndlessStream


class PhantomStream(EndlessStream):
    """An endless stream of labelled phantom slices; a batch depends on the seed and its number only.

    The stream begins with normal hearts and widens to the full range of phantoms. A transformer trained from scratch
    learns several times faster in this order (curriculum learning: Bengio et al., ICML 2009).

    Args:
        batch_size: slices in a batch.
        seed: seed of the stream, 0 or more.
        device: device on which the slices are drawn and returned.
        size: side of the square canvas in pixels.
        field_mm: side of the canvas in mm.
        widening_batches: number of batches over which the range widens; with 0 it is full from the first batch.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        size: int = 256,
        field_mm: float = FIELD_MM,
        widening_batches: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.size = size
        self.field_mm = field_mm
        self.widening_batches = widening_batches

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """Draw the batch of a number: `image` Bx3xHxW, equal channels in 0..255, and `label` Bx1xHxW, float."""
        width = 1.0 if index >= self.widening_batches else index / self.widening_batches
        images, labels = phantom_slices(
            self.batch_size,
            seed=self.seed,
            index=index,
            device=self.device,
            size=self.size,
            field_mm=self.field_mm,
            width=width,
        )
        return {"image": images.expand(-1, 3, -1, -1), "label": labels.float()}


def phantom_stacks(
    stacks: int, slices: int, *, seed: int, size: int = 256, field_mm: float = FIELD_MM
) -> list[dict[str, torch.Tensor]]:
    """Draw a fixed set of phantom slices for validation, in stacks that are scored like volumes.

    Args:
        stacks: number of stacks.
        slices: number of slices D of a stack, each of another phantom.
        seed: seed of the stream they are drawn from, different from the training's.
        size: side of the square canvas in pixels.
        field_mm: side of the canvas in mm.

    Returns:
        `image` 1x`size`x`size`xD of each stack, grey values 0..255, and `label` of the same shape. They are drawn on
        the CPU, so that they do not depend on the GPU.
    """
    drawn = [phantom_slices(slices, seed=seed, index=index, size=size, field_mm=field_mm) for index in range(stacks)]
    return [{"image": images.permute(1, 2, 3, 0), "label": labels.permute(1, 2, 3, 0)} for images, labels in drawn]
