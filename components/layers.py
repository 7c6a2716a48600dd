"""Layers of SAM in forms that cost less."""

import torch
import torch.nn.functional as F

from components.sam import import_from_segment_anything

common = import_from_segment_anything("modeling.common")


class LayerNorm2d(common.LayerNorm2d):  # type: ignore[name-defined]
    """Layer normalisation over channels.

    Source: `LayerNorm2d` of `segment_anything/modeling/common.py`. Differs: one fused pass instead of six; the numbers
    are the same.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise every position.

        Args:
            x: BxCxHxW.

        Returns:
            BxCxHxW.
        """
        channels_last = x.permute(0, 2, 3, 1)
        return F.layer_norm(channels_last, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)
