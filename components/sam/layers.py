"""Faster forms of SAM's layers."""

import torch
import torch.nn.functional as F
from torch import nn

from components.sam.segment_anything_import import import_from_segment_anything

sam_common = import_from_segment_anything("modeling.common")


class LayerNorm2d(sam_common.LayerNorm2d):  # type: ignore[name-defined]
    """Layer normalisation over channels.

    Source: `LayerNorm2d` of `segment_anything/modeling/common.py`. Differs: one fused kernel instead of six operations;
    the numbers are the same.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each position over its channels.

        Args:
            x: BxCxHxW.

        Returns:
            BxCxHxW.
        """
        channels_last = x.permute(0, 2, 3, 1)
        return F.layer_norm(channels_last, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class TokenUpscale(nn.ConvTranspose2d):
    """A transposed convolution of kernel size and stride 2, on tokens instead of an image.

    The four outputs of a position do not overlap, so the convolution is one matrix product. They are rearranged to an
    image later, by `image_of_tokens`, when there are fewer channels to move.

    Args:
        in_channels: channels of a token.
        out_channels: channels of each of its four outputs.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Upscale each token to 2x2.

        Args:
            x: ...xC_in.

        Returns:
            ...x2x2xC_out: rows, columns and channels of each position's outputs.
        """
        bias = self.bias
        assert bias is not None  # torch.jit.script narrows the type of a local variable only
        return F.linear(x, self.weight.permute(2, 3, 1, 0).flatten(0, 2), bias.repeat(4)).unflatten(-1, [2, 2, -1])


def image_of_tokens(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Rearrange twice upscaled tokens to an image.

    Args:
        x: Bx(`height`*`width`)x2x2x2x2xC, the output of two `TokenUpscale` layers.
        height: rows of tokens.
        width: columns of tokens.

    Returns:
        BxCx(4*`height`)x(4*`width`).
    """
    x = x.unflatten(1, [height, width]).permute(0, 7, 1, 3, 5, 2, 4, 6)
    return x.flatten(5, 7).flatten(2, 4)
