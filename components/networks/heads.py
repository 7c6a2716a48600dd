"""Prompt-free prediction heads, each from image embeddings, SAM's Bx256xhxw, to raw logits BxCx4hx4w.

Source: paper section 3.2. Where a head differs from the authors' code, its class says so.
"""

import math

import torch
from monai.networks.blocks import Convolution, SimpleASPP
from torch import nn

from components.sam.decoder import build_decoder
from components.sam.image_encoder import EMBEDDING_CHANNELS
from components.sam.layers import LayerNorm2d, TokenUpscale, image_of_tokens

TOKEN_NOISE_SEED = 0
SAM_TOKEN_NOISE = 0.02
RANDOM_TOKEN_NOISE = 1.0  # with less, the classes of a random decoder become distinct only after hundreds of steps


class ViTHead(nn.Module):
    """SAM's mask decoder without prompts, with one set of output tokens per class ("AutoSAM").

    Source: paper section 3.2, "Vision Transformer", and `segment_anything/modeling/mask_decoder.py`.
    Differs: the authors' code uses a random positional encoding, omits `no_mask_embed`, and loads neither the IoU nor
    the mask tokens. Here all four are SAM's own. The classes share one hypernetwork MLP (that of SAM's mask 0) and
    differ in their tokens. The IoU head and the MLPs of masks 1 to 3 are omitted. With one class and no noise this is
    SAM's decoder without prompts.

    Args:
        out_channels: number of classes C, background included.
        checkpoint: SAM checkpoint whose mask decoder and prompt encoder the head starts from; None for random weights.
        token_noise: standard deviation of the seeded noise added to each class's copy of SAM's tokens, so that the
            copies differ; None for 0.02 with a checkpoint and 1, the spread of the random tokens, without.

    Raises:
        ValueError: if the checkpoint's decoder or prompt encoder does not fit.
        FileNotFoundError: if the checkpoint is missing.
    """

    def __init__(self, out_channels: int, checkpoint: str | None = None, *, token_noise: float | None = None) -> None:
        super().__init__()
        decoder, prompts = build_decoder(on_tokens=True, checkpoint=checkpoint)
        if token_noise is None:
            token_noise = RANDOM_TOKEN_NOISE if checkpoint is None else SAM_TOKEN_NOISE
        self.out_channels = out_channels
        self.transformer = decoder.transformer
        self.output_upscaling = decoder.output_upscaling
        self.hypernetwork = decoder.output_hypernetworks_mlps[0]
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).detach()
        noise = torch.randn(out_channels, *tokens.shape, generator=torch.Generator().manual_seed(TOKEN_NOISE_SEED))
        self.tokens = nn.Parameter(tokens + token_noise * noise)
        self.no_mask_embed = nn.Buffer(prompts.no_mask_embed.weight.detach().clone())
        self.frequencies = nn.Buffer(prompts.pe_layer.positional_encoding_gaussian_matrix.clone())

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Decode the logits of each class.

        Args:
            embeddings: Bx256xhxw.

        Returns:
            logits BxCx4hx4w.
        """
        batch, _, height, width = embeddings.shape
        image = embeddings.flatten(2).transpose(1, 2) + self.no_mask_embed
        tokens = self.tokens.unsqueeze(0).expand(batch, -1, -1, -1)
        queries, image = self.transformer(tokens, image, self.positional_encoding(height, width))

        features = self.output_upscaling(image)
        mask = self.hypernetwork(queries[:, 1])  # the IoU token comes first, then the tokens of masks 0 to 3
        logits = (features.flatten(1, 5) @ mask.unsqueeze(2)).unflatten(1, features.shape[1:6])
        return image_of_tokens(logits, height, width).view(batch, self.out_channels, 4 * height, 4 * width)

    def positional_encoding(self, height: int, width: int) -> torch.Tensor:
        """Return SAM's positional encoding of a grid, by random Fourier features.

        Source: `PositionEmbeddingRandom` of `segment_anything/modeling/prompt_encoder.py`. Differs: torch.jit
        can script it.

        Args:
            height: rows of the grid.
            width: columns of the grid.

        Returns:
            (`height`*`width`)x256, in row-major order.
        """
        frequencies = self.frequencies
        y = (torch.arange(height, device=frequencies.device, dtype=frequencies.dtype) + 0.5) / height
        x = (torch.arange(width, device=frequencies.device, dtype=frequencies.dtype) + 0.5) / width
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        points = 2 * torch.stack([grid_x, grid_y], dim=-1) - 1
        angles = 2 * math.pi * (points @ frequencies)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1).flatten(0, 1)


class CNNHead(nn.Sequential):
    """A convolutional decoder of k stages that upscales by 4 for every k.

    Source: paper section 3.2, "Convolutional Neural Network". Differs: the authors' code drops the transposed
    convolution of the first two stages for every k > 2, so that its upscaling depends on k. Here only the last two
    stages have one.

    Args:
        out_channels: number of classes C, background included.
        depth: number of stages k, at least 2; the first has 64 * 2^k channels, each further one half as many.
        in_channels: channels of the embeddings; a point-wise convolution and a norm first make 256 of any other number.

    Raises:
        ValueError: if `depth` is below 2.
    """

    def __init__(self, out_channels: int, depth: int = 4, in_channels: int = EMBEDDING_CHANNELS) -> None:
        if depth < 2:
            raise ValueError(f"depth must be at least 2 (two stages upscale by 2 each), received {depth}")
        width = 64 * 2**depth
        layers: list[nn.Module] = []
        if in_channels != EMBEDDING_CHANNELS:
            layers += [nn.Conv2d(in_channels, EMBEDDING_CHANNELS, kernel_size=1), LayerNorm2d(EMBEDDING_CHANNELS)]
        layers += [*_conv_relu(EMBEDDING_CHANNELS, width, 1), *_conv_relu(width, width, 1)]
        for stage in range(depth):
            if stage < depth - 2:
                layers += [*_conv_relu(width, width, 3), *_conv_relu(width, width // 2, 3)]
            else:
                layers += [*_conv_relu(width, width, 3), *_conv_relu(width, width, 3)]
                layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
            width //= 2
        layers += [nn.Conv2d(width, width, kernel_size=3, padding=1), nn.Conv2d(width, out_channels, kernel_size=1)]
        super().__init__(*layers)


class DeepLabHead(nn.Sequential):
    """DeepLabV3's head: atrous spatial pyramid pooling by MONAI, a convolution, a classifier, and bilinear upscaling.

    Source: Chen et al., arXiv:1706.05587; the paper of AutoSAM names it as future work. Differs: MONAI's pyramid has
    no global average, and dilations of 1, 2, 4 and 6. Norms are instance norms, since batches are small.

    Args:
        out_channels: number of classes C, background included.
        in_channels: channels of the embeddings, any number.
        width: channels of each of the pyramid's four branches, and of the convolution after it.
    """

    def __init__(self, out_channels: int, in_channels: int = EMBEDDING_CHANNELS, *, width: int = 64) -> None:
        norm = ("INSTANCE", {"affine": True})
        super().__init__(
            SimpleASPP(2, in_channels, width, norm_type=norm, acti_type="RELU"),
            Convolution(2, 4 * width, width, norm=norm, act="RELU", bias=False),
            nn.Conv2d(width, out_channels, kernel_size=1),
            nn.Upsample(scale_factor=4, mode="bilinear"),
        )


class LinearHead(nn.Sequential):
    """Two transposed convolutions and two point-wise ones, computed as matrix products on tokens.

    Source: paper section 3.2, "Linear Layer". Differs: the authors' code ends on a ReLU, so that a class with negative
    logits gets no gradient. Here the logits are raw.

    Args:
        out_channels: number of classes C, background included.
        in_channels: channels of the embeddings; a point-wise layer and a norm first make 256 of any other number.
    """

    def __init__(self, out_channels: int, in_channels: int = EMBEDDING_CHANNELS) -> None:
        layers: list[nn.Module] = []
        if in_channels != EMBEDDING_CHANNELS:
            layers += [nn.Linear(in_channels, EMBEDDING_CHANNELS), nn.LayerNorm(EMBEDDING_CHANNELS, eps=1e-6)]
        super().__init__(
            *layers,
            TokenUpscale(EMBEDDING_CHANNELS, 64),
            nn.LayerNorm(64, eps=1e-6),
            nn.GELU(),
            TokenUpscale(64, 32),
            nn.GELU(),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, out_channels),
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Decode each position on its own, then rearrange the results to an image.

        Args:
            embeddings: Bx256xhxw.

        Returns:
            logits BxCx4hx4w.
        """
        x = embeddings.flatten(2).transpose(1, 2)
        for layer in self:
            x = layer(x)
        return image_of_tokens(x, embeddings.shape[2], embeddings.shape[3])


def _conv_relu(in_channels: int, out_channels: int, kernel_size: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2), nn.ReLU()
