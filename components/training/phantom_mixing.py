"""Phantom slices mixed into batches of real ones, so that a head pre-trained on phantoms does not forget them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch
from monai.engines import default_prepare_batch
from torch import Tensor

from components.data.acdc import CLASS_NAMES
from components.phantom.slices import FIELD_MM, phantom_slices

_DRAWN_AT_A_TIME = 32


class PhantomMixing:
    """A trainer's `prepare_batch` that adds phantom slices to every batch of real ones.

    The phantoms come from a finite pool, so that a frozen encoder's embeddings of them are cache hits after the first
    pass. They are not augmented, since all of them differ already. The first pass draws them one after the other, as
    they are needed; every later pass takes the whole pool in a new random order. Runs with the same seed take the same
    phantoms, and so does a resumed run if `components.training.EpochSeeds` is given this object. In a distributed run
    each step's phantoms are divided among the processes.

    Their labels are 0 background, 1 RV, 2 Myo, 3 LV: they can be mixed with a data set of these classes only.

    Args:
        share: fraction of phantoms in the resulting batch, from 0 up to below 1. All B real slices are kept, and
            B * share / (1 - share) phantoms, rounded, are added. With 0 this is MONAI's `default_prepare_batch`.
        pool_size: number of phantoms in the pool.
        seed: seed of the pool and its orders, 0 or more.
        canvas_share: side of the real slices over the side of the canvas they were cropped from.
        class_names: class names of the real slices.

    Raises:
        ValueError: if `share` or `pool_size` is out of range, or the share is above 0 and the classes differ.
    """

    def __init__(
        self,
        share: float,
        *,
        pool_size: int = 512,
        seed: int = 0,
        canvas_share: float = 1.0,
        class_names: Sequence[str] = CLASS_NAMES,
    ) -> None:
        if not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(
                f"expected the phantoms' share of a batch from 0 up to below 1, received {share!r}: "
                "give for example --phantom_share 0.5"
            )
        if share > 0 and tuple(class_names) != CLASS_NAMES:
            raise ValueError(
                f"phantoms are hearts with the classes {', '.join(CLASS_NAMES)}, in this order: expected these "
                f"class_names, received {', '.join(class_names)}; give --phantom_share 0"
            )
        if pool_size < 1:
            raise ValueError(f"expected a pool_size of 1 phantom or more, received {pool_size}")
        self.share = share
        self.pool_size = pool_size
        self.seed = seed
        self.field_mm = canvas_share * FIELD_MM
        self._images = self._labels = torch.empty(0)  # the phantoms drawn so far, uint8
        self._position = 0  # number of phantoms taken before the next step, by all processes together

    def __call__(
        self, batchdata: Any, device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
    ) -> Any:
        """Prepare a batch as MONAI does, and add phantoms.

        Args:
            batchdata: what `default_prepare_batch` takes; with a share above 0 it must hold images BxCxSxS in 0..255
                and labels Bx1xSxS.
            device: device of the batch.
            non_blocking: whether copies to it may overlap with work on the CPU.
            kwargs: further arguments of `Tensor.to`.

        Returns:
            images (B+P)xCxSxS and labels (B+P)x1xSxS, with the P phantoms last. They have the data types of the real
            slices and no metadata. With a share of 0, what `default_prepare_batch` returns.

        Raises:
            ValueError: if the share is above 0 and the images are not square or have no labels.
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
        phantoms, phantom_labels = self._next(count, size=images.shape[2])
        phantoms = phantoms.expand(-1, images.shape[1], -1, -1)
        return _concatenate(images, phantoms), _concatenate(labels, phantom_labels)

    def go_to(self, real_slices: int) -> None:
        """Continue as if this many real slices had been processed, by all processes together."""
        self._position = round(real_slices * self.share / (1 - self.share))

    def _next(self, count: int, *, size: int) -> tuple[Tensor, Tensor]:
        """Return images and labels of the next phantoms, each `count`x1x`size`x`size` uint8."""
        start = self._position + count * idist.get_rank()
        self._position += count * idist.get_world_size()
        chosen = [self._order(n // self.pool_size)[n % self.pool_size] for n in range(start, start + count)]
        if self._images.shape[-1] != size:
            self._images = self._labels = torch.empty(0, 1, size, size, dtype=torch.uint8)
        while len(self._images) <= max(chosen, default=-1):
            self._draw(size)
        return self._images[chosen], self._labels[chosen]

    def _order(self, pass_number: int) -> Sequence[int]:
        """Return the order in which a pass takes the pool's phantoms; the first pass is number 0."""
        if pass_number == 0:
            return range(self.pool_size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + pass_number)
        return torch.randperm(self.pool_size, generator=generator).tolist()

    def _draw(self, size: int) -> None:
        """Draw the next phantoms of the pool."""
        start = len(self._images)
        count = min(_DRAWN_AT_A_TIME, self.pool_size - start)
        index = start // _DRAWN_AT_A_TIME
        images, labels = phantom_slices(count, seed=self.seed, index=index, size=size, field_mm=self.field_mm)
        self._images = torch.cat([self._images, images.to(torch.uint8)])
        self._labels = torch.cat([self._labels, labels])


def _concatenate(real: Tensor, phantoms: Tensor) -> Tensor:
    plain = real.as_subclass(torch.Tensor)  # without the metadata of MONAI's tensors, which phantoms do not have
    return torch.cat([plain, phantoms.to(plain)])
