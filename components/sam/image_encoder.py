"""A faster form of `segment_anything`'s image encoder, for any image size."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from components.sam.attention import RelPosAttention, concatenate, rows_at_a_time
from components.sam.layers import LayerNorm2d
from components.sam.segment_anything_import import import_from_segment_anything

sam_image_encoder = import_from_segment_anything("modeling.image_encoder")

PATCH_SIZE = 16
EMBEDDING_CHANNELS = 256  # of the image embeddings, between encoder and head
WINDOW_SIZE = 14


@dataclass(frozen=True)
class Architecture:
    """Hyperparameters by which SAM's image encoders differ."""

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    native_size: int


# Source: `segment_anything/build_sam.py` for b, l and h; `vit_tiny` is this project's own.
ARCHITECTURES = {
    "vit_b": Architecture(768, 12, 12, (2, 5, 8, 11), 1024),
    "vit_l": Architecture(1024, 24, 16, (5, 11, 17, 23), 1024),
    "vit_h": Architecture(1280, 32, 16, (7, 15, 23, 31), 1024),
    "vit_tiny": Architecture(192, 6, 3, (0, 1, 2, 3, 4, 5), 256),
}


class EncoderBlock(sam_image_encoder.Block):  # type: ignore[name-defined]
    """A transformer block of SAM's image encoder with this project's attention; the numbers are the same."""

    def __init__(self, dim: int, num_heads: int, *, window_size: int, input_size: tuple[int, int]) -> None:
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(dim, num_heads, norm_layer=norm_layer, window_size=window_size)
        side = (window_size, window_size) if window_size > 0 else input_size
        self.attn = RelPosAttention(dim, num_heads, use_rel_pos=True, input_size=side)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, in windows or globally, then apply the MLP.

        Args:
            x: tokens BxHxWxC.

        Returns:
            tokens BxHxWxC.
        """
        normalised = self.norm1(x)
        if self.window_size > 0:
            x = x + self.attn.attend_in_windows(normalised, self.window_size)
        else:
            x = x + self.attn(normalised)
        rows = rows_at_a_time(x, self.mlp.lin1.out_features)
        return concatenate([part + self.mlp(self.norm2(part)) for part in x.split(rows, dim=1)], dim=1)


class ImageEncoder(sam_image_encoder.ImageEncoderViT):  # type: ignore[name-defined]
    """SAM's image encoder, with SAM's parameter names, for images of any multiple of the patch size.

    Positional embeddings are stored at the native size and interpolated in the forward pass: absolute ones here,
    relative ones in the attention. So the state dict does not depend on the image size.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(
            img_size=architecture.native_size,
            patch_size=PATCH_SIZE,
            embed_dim=architecture.embed_dim,
            depth=0,
            out_chans=EMBEDDING_CHANNELS,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        grid = architecture.native_size // PATCH_SIZE
        self.blocks.extend(
            EncoderBlock(
                dim=architecture.embed_dim,
                num_heads=architecture.num_heads,
                window_size=0 if index in architecture.global_attn_indexes else WINDOW_SIZE,
                input_size=(grid, grid),
            )
            for index in range(architecture.depth)
        )
        self.neck[1] = LayerNorm2d(EMBEDDING_CHANNELS)
        self.neck[3] = LayerNorm2d(EMBEDDING_CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode normalised images.

        Args:
            x: images Bx3xHxW, H and W multiples of 16.

        Returns:
            embeddings Bx256x(H/16)x(W/16).
        """
        x = self.patch_embed(x).contiguous()  # else each layer would copy its input from a channels-first layout
        positions = self.pos_embed
        if positions is not None:
            if positions.shape[1] != x.shape[1] or positions.shape[2] != x.shape[2]:
                positions = F.interpolate(
                    positions.permute(0, 3, 1, 2), size=[x.shape[1], x.shape[2]], mode="bicubic", align_corners=False
                ).permute(0, 2, 3, 1)
            x = x + positions
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


def with_cast_weights(encoder: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy an encoder, with the weights of its products and convolutions in the precision that autocast uses.

    Autocast casts frozen weights again in every product, but not those of the copy.
    """
    encoder = copy.deepcopy(encoder)
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    return encoder
