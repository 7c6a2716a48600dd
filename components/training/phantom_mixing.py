"""Phantom slices mixed into the batches of a training on real ones, so that a head forgets nothing it knew of them."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
import torch
from monai.engines import default_prepare_batch
from torch import Tensor

from components.phantom.slices import FIELD_MM, phantom_slices

_DRAWN_AT_A_TIME = 32


class PhantomMixing:
    """A trainer's `prepare_batch` that adds phantom slices to every batch of real ones.

    The phantoms come from a finite pool, so that a frozen encoder's embeddings of them can be looked up, and are not
    augmented, being all different as it is. All come once before any comes again: first as they are drawn, each when
    its turn comes, then in shuffled orders; the same in every run with the same seed, resumed ones too if
    `components.training.EpochSeeds` knows of it. In a distributed run the processes share each step's phantoms out
    between them.

    Their labels are 0 background, 1 RV, 2 Myo, 3 LV: mix them with a data set of these classes only.

    Args:
        share: fraction of the resulting batch that is phantom, from 0 up to below 1. All real slices stay; to B of
            them B * share / (1 - share), rounded, are added. With 0 this is MONAI's `default_prepare_batch`.
        pool_size: phantoms in the pool.
        seed: of pool and order, 0 or more.
        canvas_share: side of the slices over that of the canvas they were cropped from.

    Raises:
        ValueError: when `share` or `pool_size` is out of range.
    """

    def __init__(self, share: float, *, pool_size: int = 512, seed: int = 0, canvas_share: float = 1.0) -> None:
        if not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(
                f"expected the phantoms' share of a batch from 0 up to below 1, received {share!r}: "
                "give for example --phantom_share 0.5"
            )
        if pool_size < 1:
            raise ValueError(f"expected a pool_size of 1 phantom or more, received {pool_size}")
        self.share = share
        self.pool_size = pool_size
        self.seed = seed
        self.field_mm = canvas_share * FIELD_MM
        self._images = self._labels = torch.empty(0)  # what is drawn so far, uint8
        self._position = 0  # in the endless order of all phantoms to come

    def __call__(
        self, batchdata: Any, device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
    ) -> Any:
        """Prepare a batch as MONAI does, and add phantoms.

        Args:
            batchdata: what `default_prepare_batch` takes; with a share above 0 it must hold images BxCxSxS in 0..255
                and labels Bx1xSxS.
            device: where the batch goes.
            non_blocking: whether copies to it may overlap with the host's work.
            kwargs: further arguments of `Tensor.to`.

        Returns:
            images (B+P)xCxSxS and labels (B+P)x1xSxS, the P phantoms last, of the real ones' types and without
            metadata; with a share of 0 what `default_prepare_batch` returns.

        Raises:
            ValueError: when images to be mixed are not square or have no labels.
        """
        batch = default_prepare_batch(batchdata, device, non_blocking, **kwargs)
        if self.share == 0:
            return batch
        images, labels = batch
        if labels is None or images.ndim != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(
                "phantoms can be mixed into square labelled slices only, BxCxSxS: expected those, received images "
                f"{tuple(images.shape)} {'without' if labels is None else 'with'} labels; give --phantom_share 0"
            )
        count = round(len(images) * self.share / (1 - self.share))
        phantoms, truths = self._next(count, size=images.shape[2])
        phantoms = phantoms.expand(-1, images.shape[1], -1, -1)
        return _joined(images, phantoms), _joined(labels, truths)

    def go_to(self, real_slices: int) -> None:
        """Go on as after that many real slices, of all processes together."""
        self._position = round(real_slices * self.share / (1 - self.share))

    def _next(self, count: int, *, size: int) -> tuple[Tensor, Tensor]:
        """Take the next phantoms off the order, images and labels `count`x1x`size`x`size` as uint8."""
        start = self._position + count * idist.get_rank()
        self._position += count * idist.get_world_size()
        chosen = [self._order(place // self.pool_size)[place % self.pool_size] for place in range(start, start + count)]
        if self._images.shape[-1] != size:
            self._images = self._labels = torch.empty(0, 1, size, size, dtype=torch.uint8)
        while len(self._images) <= max(chosen, default=-1):
            self._draw(size)
        return self._images[chosen], self._labels[chosen]

    def _order(self, turn: int) -> list[int]:
        """Return the order of the pool the first time (turn 0), the second, and so on."""
        if turn == 0:
            return list(range(self.pool_size))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return torch.randperm(self.pool_size, generator=generator).tolist()

    def _draw(self, size: int) -> None:
        """Add some phantoms to the pool."""
        start = len(self._images)
        count = min(_DRAWN_AT_A_TIME, self.pool_size - start)
        index = start // _DRAWN_AT_A_TIME
        images, labels = phantom_slices(count, seed=self.seed, index=index, size=size, field_mm=self.field_mm)
        self._images = torch.cat([self._images, images.to(torch.uint8)])
        self._labels = torch.cat([self._labels, labels])


def _joined(real: Tensor, phantoms: Tensor) -> Tensor:
    plain = real.as_subclass(torch.Tensor)  # MONAI's tensors carry metadata, of which phantoms have none
    return torch.cat([plain, phantoms.to(plain)])
