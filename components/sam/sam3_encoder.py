"""The image encoder of SAM 3, built by `transformers`, and the names of its weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from components.sam.image_encoder import EMBEDDING_CHANNELS
from components.sam.transformers_encoder import TransformersEncoder, import_transformers

SAM3_PATCH = 14
SAM3_SIZE = 1008  # side in pixels of the images on which it was trained
SAM3_MEAN = SAM3_STD = (127.5, 127.5, 127.5)  # of each colour in 0..255
SAM3_FORM = (
    "the keys of transformers, such as vision_encoder.backbone.*, in the model.safetensors of the Hugging Face Hub, "
    "since Meta's own sam3.pt has others"
)


@dataclass(frozen=True)
class Sam3Vit:
    """Hyperparameters of SAM 3's vision transformer. Source: `config.json` of `facebook/sam3`, the class's defaults."""

    embed_dim: int = 1024
    mlp_dim: int = 4736
    depth: int = 32
    num_heads: int = 16
    global_blocks: tuple[int, ...] = (7, 15, 23, 31)


class Sam3Encoder(TransformersEncoder):
    """The image encoder of SAM 3: its vision transformer and the map of its neck with one token a patch.

    The neck's finer maps are computed from the same tokens, as the heads compute theirs, so they are left out.

    Args:
        architecture: hyperparameters of the vision transformer.
        image_size: side in pixels of the images; the rotary positions of the global blocks follow it.

    Raises:
        ImportError: if `transformers` is not installed.
    """

    def __init__(self, architecture: Sam3Vit, image_size: int = SAM3_SIZE) -> None:
        super().__init__(image_size)
        transformers = import_transformers("SAM 3")
        trunk = transformers.Sam3ViTConfig(
            hidden_size=architecture.embed_dim,
            intermediate_size=architecture.mlp_dim,
            num_hidden_layers=architecture.depth,
            num_attention_heads=architecture.num_heads,
            global_attn_indexes=list(architecture.global_blocks),
            image_size=image_size,
            patch_size=SAM3_PATCH,
        )
        config = transformers.Sam3VisionConfig(
            backbone_config=trunk, fpn_hidden_size=EMBEDDING_CHANNELS, scale_factors=[1.0]
        )
        model = transformers.Sam3VisionModel(config)
        self.backbone, self.neck = model.backbone, model.neck.fpn_layers[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode normalised images.

        Args:
            x: images Bx3x`image_size`x`image_size`.

        Returns:
            embeddings Bx256x(`image_size`/14)x(`image_size`/14).
        """
        tokens = self.backbone(x).last_hidden_state
        return self.neck(tokens.transpose(1, 2).unflatten(2, [x.shape[2] // SAM3_PATCH, x.shape[3] // SAM3_PATCH]))


_KEY = re.compile(r"(?:\w+\.)*?(backbone\..+|neck\.(?:fpn_layers\.2\.)?proj\d\..+)")


def sam3_image_encoder(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of SAM 3's image encoder under the names of `Sam3Encoder`; none for any other state dict.

    Args:
        state: one of `transformers`, with keys such as `vision_encoder.backbone.*`, of the whole model with the prefix
            `detector_model.`; or any other.

    Returns:
        tensors by key.
    """
    weights = {
        match[1].replace("fpn_layers.2.", ""): value for key, value in state.items() if (match := _KEY.fullmatch(key))
    }
    return weights if "backbone.embeddings.position_embeddings" in weights else {}
