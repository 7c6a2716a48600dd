"""The data of pre-training: an endless stream of phantom slices, and a fixed set of them for validation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from ignite.engine import Engine, Events

from components.phantom.slices import FIELD_MM, phantom_slices


class PhantomStream:
    """An endless stream of labelled phantom slices; a batch depends on seed and number only.

    It begins with normal hearts and grows as wide as phantoms are drawn: a transformer that starts from nothing learns
    them several times sooner in this order (a curriculum: Bengio et al., ICML 2009).

    Args:
        batch_size: slices in a batch.
        seed: which stream, 0 or more.
        device: where the slices are drawn, and stay.
        size: side of the square canvas in pixels.
        field_mm: the same in mm.
        widening_batches: batches over which the draw widens; 0 for the full width from the first.
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
        """Yield from `position` on images Bx3xHxW, grey values 0..255 on three channels, and labels Bx1xHxW, float."""
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
    """Ignite handler that has every epoch take the batches of its own iterations, whether or not the run was resumed.

    Args:
        stream: the training data.
    """

    def __init__(self, stream: PhantomStream) -> None:
        self.stream = stream

    def attach(self, engine: Engine) -> None:
        """Register the handler on a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Go to the batch after the last iteration, which a checkpoint has restored by now."""
        self.stream.position = engine.state.iteration


def phantom_stacks(
    stacks: int, slices: int, *, seed: int, size: int = 256, field_mm: float = FIELD_MM
) -> list[dict[str, torch.Tensor]]:
    """Draw a fixed set of phantom slices for validation, in stacks that are scored as volumes are.

    Args:
        stacks: how many.
        slices: slices of a stack D, each of another phantom.
        seed: which stream they are drawn from; another than the training's.
        size: side of the square canvas in pixels.
        field_mm: the same in mm.

    Returns:
        for each stack `image` 1x`size`x`size`xD, grey values 0..255, and `label` of the same shape; drawn on the CPU,
        so that they are the same beside any GPU.
    """
    drawn = [phantom_slices(slices, seed=seed, index=index, size=size, field_mm=field_mm) for index in range(stacks)]
    return [{"image": images.permute(1, 2, 3, 0), "label": labels.permute(1, 2, 3, 0)} for images, labels in drawn]
