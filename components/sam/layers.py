"""Layers of SAM in forms that cost less."""

import torch
import torch.nn.functional as F
from torch import nn

from components.sam.segment_anything_import import import_from_segment_anything

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


class TokenUpscale(nn.ConvTranspose2d):
    """A transposed convolution of kernel and stride 2 on positions that are kept as tokens.

    Its four outputs a position do not overlap, so it is one matrix product; bringing them into place can wait until the
    channels are few.

    Args:
        in_channels: of a token.
        out_channels: of each of its four outputs.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Upscale.

        Args:
            x: ...xC_in.

        Returns:
            ...x2x2xC_out: row, column and channels within each position.
        """
        bias = self.bias
        assert bias is not None  # torch.jit.script knows it of a variable only
        return F.linear(x, self.weight.permute(2, 3, 1, 0).flatten(0, 2), bias.repeat(4)).unflatten(-1, [2, 2, -1])


def image_of_tokens(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bring twice upscaled tokens into place.

    Args:
        x: Bx(`height`*`width`)x2x2x2x2xC, as two `TokenUpscale` leave it.
        height: rows of tokens.
        width: columns of tokens.

    Returns:
        BxCx(4*`height`)x(4*`width`).
    """
    x = x.unflatten(1, [height, width]).permute(0, 7, 1, 3, 5, 2, 4, 6)
    return x.flatten(5, 7).flatten(2, 4)
