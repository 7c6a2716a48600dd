"""The data of pre-training beyond hearts: an endless stream of pictures of random shapes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from components.phantom.shapes import random_shapes


class ShapeStream:
    """An endless stream of labelled pictures of random shapes; a batch depends on the seed and its number only.

    Args:
        batch_size: pictures in a batch.
        seed: seed of the stream, 0 or more.
        size: side of a picture in pixels.
    """

    def __init__(self, batch_size: int, *, seed: int, size: int = 128) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.size = size
        self.position = 0  # number of the next batch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches from `position` on: `image` Bx3xHxW, colours 0..255, and `label` Bx1xHxW, 0 or 1, float."""
        while True:
            rng = np.random.default_rng([self.seed, self.position])
            self.position += 1
            images, labels = zip(*(random_shapes(self.size, rng) for _ in range(self.batch_size)), strict=True)
            yield {
                "image": torch.from_numpy(np.stack(images)).float(),
                "label": torch.from_numpy(np.stack(labels)[:, None]).float(),
            }
