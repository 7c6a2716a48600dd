"""MobileSAM's image encoder, a TinyViT, for any image size and with its batch norms folded into its convolutions."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from components.sam.image_encoder import EMBEDDING_CHANNELS
from components.sam.layers import LayerNorm2d

# Source: `build_sam_vit_t` of MobileSAM.
WIDTHS = (64, 128, 160, 320)  # channels of the stages
DEPTHS = (2, 2, 6, 2)  # blocks of the stages
STRIDES = (2, 2, 1)  # of the reduction after each stage but the last
HEAD_CHANNELS = 32
WINDOW_SIZES = (7, 14, 7)  # of the stages with attention, in tokens
EXPANSION = 4  # of the hidden channels of a block

# The classification head of TinyViT, which MobileSAM's checkpoint holds and its forward pass does not use.
CLASSIFIER_KEYS = frozenset({"norm_head.weight", "norm_head.bias", "head.weight", "head.bias"})


class ConvNorm(nn.Module):
    """A convolution and a batch norm, which are one convolution in eval mode.

    They are folded in each pass, from the current weights, at negligible cost. Parameters, their names and gradients
    remain those of the two.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd side of the kernel.
        stride: step of the convolution.
        groups: groups of channels that are convolved separately.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve and normalise BxCxHxW."""
        if self.training:
            return self.bn(self.c(x))
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None
        assert variance is not None
        scale = self.bn.weight * torch.rsqrt(variance + self.bn.eps)
        weight = self.c.weight * scale.view(-1, 1, 1, 1)
        padding = self.c.kernel_size[0] // 2
        return F.conv2d(x, weight, self.bn.bias - mean * scale, self.c.stride, padding, groups=self.c.groups)


class MBConv(nn.Module):
    """An inverted residual block: expand, convolve each channel, reduce."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = EXPANSION * channels
        self.conv1 = ConvNorm(channels, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map BxCxHxW to the same shape."""
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(hidden))


class PatchMerging(nn.Module):
    """Convolutions from one stage's channels and grid to the next one's."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels)
        self.conv2 = ConvNorm(out_channels, out_channels, 3, stride=stride, groups=out_channels)
        self.conv3 = ConvNorm(out_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map BxCxHxW to BxC'x(H/stride)x(W/stride)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Multi-head self-attention in windows, with a learned bias for each distance between two tokens of a window."""

    def __init__(self, channels: int, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.num_heads = channels // HEAD_CHANNELS
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.attention_biases = nn.Parameter(torch.zeros(self.num_heads, window_size**2))
        # The biases are in the order of the distances from a window's first token: rows, then columns.
        token = torch.arange(window_size**2)
        rows, columns = token // window_size, token % window_size
        distances = (rows - rows[:, None]).abs() * window_size + (columns - columns[:, None]).abs()
        self.distances = nn.Buffer(distances, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend within windows that tile the grid from its top left corner.

        Args:
            x: tokens BxHxWxC.

        Returns:
            tokens BxHxWxC.
        """
        batch, height, width, channels = x.shape
        size = self.window_size
        rows, columns = -(-height // size), -(-width // size)
        qkv = self.qkv(self.norm(x))
        if height % size > 0 or width % size > 0:
            # Windows are padded with zeros beyond the grid, which the norm turns into its bias.
            padded = self.qkv(self.norm.bias).to(qkv.dtype).repeat(batch, rows * size, columns * size, 1)
            padded[:, :height, :width] = qkv
            qkv = padded
        qkv = qkv.view(batch, rows, size, columns, size, 3 * channels).transpose(2, 3)
        qkv = qkv.reshape(batch * rows * columns, size * size, self.num_heads, 3, -1).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            qkv[:, :, :, 0],
            qkv[:, :, :, 1],
            qkv[:, :, :, 2],
            attn_mask=self.attention_biases[:, self.distances].to(qkv.dtype).unsqueeze(0),
        )
        attended = attended.transpose(1, 2).reshape(batch, rows, columns, size, size, channels).transpose(2, 3)
        attended = attended.reshape(batch, rows * size, columns * size, channels)
        return self.proj(attended[:, :height, :width])


class TinyViTBlock(nn.Module):
    """A transformer block with a convolution of each channel between attention and MLP."""

    def __init__(self, channels: int, window_size: int) -> None:
        super().__init__()
        self.attn = WindowAttention(channels, window_size)
        self.local_conv = ConvNorm(channels, channels, 3, groups=channels)
        self.mlp = nn.Sequential(
            OrderedDict(
                norm=nn.LayerNorm(channels),
                fc1=nn.Linear(channels, EXPANSION * channels),
                act=nn.GELU(),
                fc2=nn.Linear(EXPANSION * channels, channels),
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map BxCxHxW to the same shape."""
        tokens = x.permute(0, 2, 3, 1)
        tokens = tokens + self.attn(tokens)
        tokens = self.local_conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (tokens + self.mlp(tokens)).permute(0, 3, 1, 2)


class TinyViT(nn.Module):
    """MobileSAM's image encoder: convolutions down to stride 8, then attention in windows, at stride 8 and 16.

    Source: Wu et al., TinyViT, ECCV 2022; Zhang et al., MobileSAM, arXiv 2306.14289. Parameters have the names of
    MobileSAM's checkpoint, and the numbers are the same. Differs: any image size is accepted, and the unused
    classification head (`CLASSIFIER_KEYS`) is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        first = WIDTHS[0]
        stem = nn.Sequential(ConvNorm(3, first // 2, 3, stride=2), nn.GELU(), ConvNorm(first // 2, first, 3, stride=2))
        self.patch_embed = nn.Sequential(OrderedDict(seq=stem))
        stages = []
        for index, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
            blocks = [
                TinyViTBlock(width, WINDOW_SIZES[index - 1]) if index > 0 else MBConv(width) for _ in range(depth)
            ]
            parts: OrderedDict[str, nn.Module] = OrderedDict(blocks=nn.Sequential(*blocks))
            if index < len(STRIDES):
                parts["downsample"] = PatchMerging(width, WIDTHS[index + 1], STRIDES[index])
            stages.append(nn.Sequential(parts))
        self.layers = nn.Sequential(*stages)
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], EMBEDDING_CHANNELS, kernel_size=1, bias=False),
            LayerNorm2d(EMBEDDING_CHANNELS),
            nn.Conv2d(EMBEDDING_CHANNELS, EMBEDDING_CHANNELS, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(EMBEDDING_CHANNELS),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode normalised images.

        Args:
            x: images Bx3xHxW, H and W multiples of 16.

        Returns:
            embeddings Bx256x(H/16)x(W/16).
        """
        x = x.contiguous(memory_format=torch.channels_last)  # the layout of tokens, which blocks view as images
        return self.neck(self.layers(self.patch_embed(x)))
