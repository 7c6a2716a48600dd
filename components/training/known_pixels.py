"""A loss that counts annotated pixels alone."""

from __future__ import annotations

from monai.losses import DiceCELoss
from torch import Tensor

from components.data.slices import IGNORED


class KnownPixelsDiceCELoss(DiceCELoss):
    """MONAI's `DiceCELoss` over the pixels of a batch whose label is not `IGNORED` of `components.data.slices`.

    It takes the options of `DiceCELoss`, with `batch` set, since the pixels that are left are those of no slice. A
    batch without ignored pixels gives the loss of `DiceCELoss`, bit for bit; a batch without others gives 0.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 - MONAI's name
        """Compute the loss.

        Args:
            input: logits BxCxHxW.
            target: class indices Bx1xHxW, or `IGNORED`.

        Returns:
            the loss, a scalar.
        """
        known = (target != IGNORED).as_subclass(Tensor)
        if known.all():
            return super().forward(input, target)
        if not known.any():
            return 0 * input.sum()
        pixels = [part.as_subclass(Tensor).movedim(1, 0).flatten(1) for part in (input, target)]
        return super().forward(*(part[:, known.flatten()][None] for part in pixels))
