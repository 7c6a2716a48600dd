"""Data of pre-training beyond hearts: an endless stream of pictures of random shapes, and fixed ones for validation."""

from __future__ import annotations

import numpy as np
import torch

from components.phantom.shapes import random_shapes
from components.pretraining.stream import EndlessStream


class ShapeStream(EndlessStream):
    """An endless stream of labelled pictures of random shapes; a batch depends on the seed and its number only.

    Args:
        batch_size: pictures in a batch.
        seed: seed of the stream, 0 or more.
        size: side of a picture in pixels.
    """

    def __init__(self, batch_size: int, *, seed: int, size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.size = size

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """Draw the batch of a number: `image` Bx3xHxW, colours 0..255, and `label` Bx1xHxW, 0 or 1, float."""
        rng = np.random.default_rng([self.seed, index])
        images, labels = zip(*(random_shapes(self.size, rng) for _ in range(self.batch_size)), strict=True)
        return {
            "image": torch.from_numpy(np.stack(images)).float(),
            "label": torch.from_numpy(np.stack(labels)[:, None]).float(),
        }


def shape_stacks(stacks: int, pictures: int, *, seed: int, size: int) -> list[dict[str, torch.Tensor]]:
    """Draw fixed pictures of random shapes for validation, in stacks like volumes.

    Args:
        stacks: number of stacks.
        pictures: number of pictures D of a stack.
        seed: seed of the stream they are drawn from, different from the training's.
        size: side of a picture in pixels.

    Returns:
        `image` 3x`size`x`size`xD of each stack, colours 0..255, and `label` 1x`size`x`size`xD.
    """
    stream = ShapeStream(pictures, seed=seed, size=size)
    batches = [stream.batch(index) for index in range(stacks)]
    return [{key: value.permute(1, 2, 3, 0) for key, value in batch.items()} for batch in batches]
