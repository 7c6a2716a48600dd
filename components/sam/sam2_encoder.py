"""The image encoders of SAM 2.1 with SAM's interface, built by `transformers`, and the names of their weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from components.sam.image_encoder import EMBEDDING_CHANNELS
from components.sam.transformers_encoder import TransformersEncoder, import_transformers

SIZE_MULTIPLE = 32  # of images, in pixels: three poolings after patches of 4x4


@dataclass(frozen=True)
class Hiera:
    """Hyperparameters by which SAM 2.1's image encoders differ; those with four values have one for each stage."""

    embed_dim: int
    num_heads: int
    blocks: tuple[int, int, int, int]
    global_blocks: tuple[int, int, int]
    windows: tuple[int, int, int, int]
    background_size: int


# Source: Meta's `sam2_configs/*.yaml` and, for what these leave out, the defaults of its class `Hiera`.
SAM2_ARCHITECTURES = {
    "sam2.1_hiera_tiny": Hiera(96, 1, (1, 2, 7, 2), (5, 7, 9), (8, 4, 14, 7), 7),
    "sam2.1_hiera_small": Hiera(96, 1, (1, 2, 11, 2), (7, 10, 13), (8, 4, 14, 7), 7),
    "sam2.1_hiera_base_plus": Hiera(112, 2, (2, 3, 16, 3), (12, 16, 20), (8, 4, 14, 7), 14),
    "sam2.1_hiera_large": Hiera(144, 2, (2, 6, 36, 4), (23, 33, 43), (8, 4, 16, 8), 7),
}

_ENCODER_KEY = re.compile(r"(?:image|vision)_encoder\.((?:trunk|backbone|neck\.convs)\..+)")
_RENAMED = (  # from Meta's names to those of `transformers`, which stay as they are
    (re.compile(r"^trunk\."), "backbone."),
    (re.compile(r"\bpatch_embed\.proj\."), "patch_embed.projection."),
    (re.compile(r"\bnorm([12])\."), r"layer_norm\1."),
    (re.compile(r"\bmlp\.layers\.0\."), "mlp.proj_in."),
    (re.compile(r"\bmlp\.layers\.1\."), "mlp.proj_out."),
    (re.compile(r"^neck\.convs\.(\d)\.conv\."), r"neck.convs.\1."),
)


class Sam2Encoder(TransformersEncoder):
    """An image encoder of SAM 2.1: its trunk Hiera and its feature pyramid, from pixels to embeddings at stride 4.

    Source: paper of SAM 2, appendix D.1. Differs: SAM 2 adds coarser features to those at stride 16 only, so that its
    map at stride 4 has passed the first stage alone. Here each level is added to the next finer one. The
    embeddings are the sum of SAM 2's three feature maps. The coarser two are repeated to stride 4.

    Args:
        architecture: hyperparameters of the trunk.
        image_size: side in pixels of the images that a script takes.

    Raises:
        ImportError: if `transformers` is not installed.
    """

    def __init__(self, architecture: Hiera, image_size: int = SIZE_MULTIPLE) -> None:
        super().__init__(image_size)
        transformers = import_transformers("SAM 2.1")
        widths = [architecture.embed_dim * 2**stage for stage in range(4)]
        trunk = transformers.Sam2HieraDetConfig(
            hidden_size=architecture.embed_dim,
            num_attention_heads=architecture.num_heads,
            embed_dim_per_stage=widths,
            num_attention_heads_per_stage=[architecture.num_heads * 2**stage for stage in range(4)],
            blocks_per_stage=list(architecture.blocks),
            global_attention_blocks=list(architecture.global_blocks),
            window_size_per_stage=list(architecture.windows),
            window_positional_embedding_background_size=[architecture.background_size] * 2,
        )
        config = transformers.Sam2VisionConfig(
            backbone_config=trunk, backbone_channel_list=widths[::-1], fpn_hidden_size=EMBEDDING_CHANNELS
        )
        model = transformers.Sam2VisionModel(config)
        self.backbone, self.neck = model.backbone, model.neck

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode normalised images.

        Args:
            x: images Bx3xHxW, H and W multiples of 32.

        Returns:
            embeddings Bx256x(H/4)x(W/4).
        """
        fine, middle, coarse = self.feature_maps(x)
        middle = middle + F.interpolate(coarse, scale_factor=2.0)
        return fine + F.interpolate(middle, scale_factor=2.0)

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return SAM 2's own feature maps of normalised images, which its mask decoder takes.

        Args:
            x: images Bx3xHxW, H and W multiples of 32.

        Returns:
            three maps Bx256xhxw, at strides 4, 8 and 16.
        """
        states = self.backbone(x).intermediate_hidden_states  # from fine to coarse, as the maps
        maps = [
            project(features.permute(0, 3, 1, 2))
            for project, features in zip(reversed(self.neck.convs), states, strict=True)
        ]
        *finer, coarse, coarsest = maps
        return [*finer, coarse + F.interpolate(coarsest, scale_factor=2.0)]


def sam2_image_encoder(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of SAM 2's image encoder from a whole checkpoint, under the names of `Sam2Encoder`.

    Args:
        state: a state dict of Meta's, with keys such as `image_encoder.trunk.*`; one of `transformers`, with keys such
            as `vision_encoder.backbone.*`; or any other.

    Returns:
        tensors by key; empty for any other state dict.
    """
    weights = {}
    for key, value in state.items():
        if match := _ENCODER_KEY.fullmatch(key):
            name = match[1]
            for pattern, replacement in _RENAMED:
                name = pattern.sub(replacement, name)
            weights[name] = value
    return weights if "backbone.pos_embed" in weights else {}
