"""The data of pre-training: an endless stream of phantom slices, and a fixed set of them for validation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from ignite.engine import Engine, Events

from components.phantom.slices import FIELD_MM, phantom_slices
from components.pretraining.shape_stream import ShapeStream


class PhantomStream:
    """An endless stream of labelled phantom slices; a batch depends on the seed and its number only.

    The stream begins with normal hearts and widens to the full range of phantoms: a transformer trained from scratch
    learns them several times faster in this order (curriculum learning: Bengio et al., ICML 2009).

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
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.size = size
        self.field_mm = field_mm
        self.widening_batches = widening_batches
        self.position = 0  # number of the next batch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches from `position` on: `image` Bx3xHxW, equal channels in 0..255, and `label` Bx1xHxW, float."""
        while True:
            index, self.position = self.position, self.position + 1
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
            yield {"image": images.expand(-1, 3, -1, -1), "label": labels.float()}


class StreamPosition:
    """Ignite handler that sets the stream to the iteration at which an epoch starts, also in a resumed run.

    Args:
        stream: the training data, whose `position` is the number of the next batch.
    """

    def __init__(self, stream: PhantomStream | ShapeStream) -> None:
        self.stream = stream

    def attach(self, engine: Engine) -> None:
        """Register the handler on a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the stream to the batch after the last iteration, which `TrainingCheckpoints` has restored."""
        self.stream.position = engine.state.iteration


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
        for each stack `image` 1x`size`x`size`xD, grey values 0..255, and `label` of the same shape; drawn on the CPU,
        so that they do not depend on the GPU.
    """
    drawn = [phantom_slices(slices, seed=seed, index=index, size=size, field_mm=field_mm) for index in range(stacks)]
    return [{"image": images.permute(1, 2, 3, 0), "label": labels.permute(1, 2, 3, 0)} for images, labels in drawn]
