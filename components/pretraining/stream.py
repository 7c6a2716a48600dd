"""Endless streams of newly drawn batches, and their position in a resumed run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from ignite.engine import Engine, Events


class EndlessStream(ABC):
    """Endless batches, each of which depends on its number and the stream's settings only."""

    def __init__(self) -> None:
        self.position = 0  # number of the next batch

    @abstractmethod
    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """Draw the batch of a number."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches from `position` on."""
        while True:
            index, self.position = self.position, self.position + 1
            yield self.batch(index)


class StreamPosition:
    """Ignite handler that sets the stream to the iteration at which an epoch starts, also in a resumed run.

    Args:
        stream: the training data.
    """

    def __init__(self, stream: EndlessStream) -> None:
        self.stream = stream

    def attach(self, engine: Engine) -> None:
        """Register the handler on a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the stream to the batch after the last iteration, which `TrainingCheckpoints` has restored."""
        self.stream.position = engine.state.iteration
