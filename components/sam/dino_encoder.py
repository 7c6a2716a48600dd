"""The encoders of DINOv2 and DINOv3, built by `transformers`, and the names of their weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from components.sam.transformers_encoder import TransformersEncoder, import_transformers

DINO2_PATCH, DINO3_PATCH = 14, 16
DINO2_SIZE, DINO3_SIZE = 518, 512  # sides of images in pixels: DINOv2's own, and DINOv3's of dense tasks
CONVNEXT_STRIDE, CONVNEXT_MULTIPLE = 4, 32  # of the first stage and of the last
REGISTER_TOKENS = 4  # of DINOv3; DINOv2 without registers has none
DINO_FORM = (
    "the keys of transformers, such as {key}, in a model.safetensors of the Hugging Face Hub, "
    "since Meta's own .pth file has others"
)


@dataclass(frozen=True)
class Vit:
    """Hyperparameters by which the vision transformers of DINO differ."""

    embed_dim: int
    depth: int
    num_heads: int


# Source: `config.json` of `facebook/dinov2-{small,base,large}` and `facebook/dinov3-vit{s,b,l}16-pretrain-lvd1689m`,
# as `convert_dinov2_to_hf.py` and `convert_dinov3_vit_to_hf.py` of `transformers` write them.
VITS = {"s": Vit(384, 12, 6), "b": Vit(768, 12, 12), "l": Vit(1024, 24, 16)}


@dataclass(frozen=True)
class ConvNext:
    """Hyperparameters by which the ConvNeXts of DINOv3 differ, one value for each stage."""

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]


# Source: `config.json` of `facebook/dinov3-convnext-*-pretrain-lvd1689m`, by `convert_dinov3_convnext_to_hf.py`.
CONVNEXTS = {
    "tiny": ConvNext((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ConvNext((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ConvNext((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ConvNext((3, 3, 27, 3), (192, 384, 768, 1536)),
}


class VitEncoder(TransformersEncoder):
    """A vision transformer of DINO, from pixels to its patch tokens after the last norm, laid out as an image.

    The class token and, of DINOv3, the register tokens take part in the attention and are left out of the result.
    `mask_token`, which only pre-training uses, is left out of the weights.

    Args:
        image_size: side in pixels of the images that a script takes.
        patch_size: side in pixels of a token.
    """

    def __init__(self, image_size: int, patch_size: int) -> None:
        super().__init__(image_size)
        self.patch_size = patch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode normalised images.

        Args:
            x: images Bx3xHxW, H and W multiples of the patch size.

        Returns:
            embeddings BxCx(H/patch)x(W/patch).
        """
        height, width = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        tokens = self.tokens(x)[:, -height * width :]
        return tokens.transpose(1, 2).unflatten(2, [height, width])

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Return all tokens BxNxC of images Bx3xHxW, the patches last, in row-major order."""
        raise NotImplementedError


class Dino2Encoder(VitEncoder):
    """A vision transformer of DINOv2 without registers.

    Args:
        architecture: hyperparameters.
        image_size: side in pixels of the images that a script takes.

    Raises:
        ImportError: if `transformers` is not installed.
    """

    def __init__(self, architecture: Vit, image_size: int = DINO2_SIZE) -> None:
        super().__init__(image_size, DINO2_PATCH)
        transformers = import_transformers("DINOv2")
        config = transformers.Dinov2Config(
            hidden_size=architecture.embed_dim,
            num_hidden_layers=architecture.depth,
            num_attention_heads=architecture.num_heads,
            image_size=DINO2_SIZE,
            patch_size=DINO2_PATCH,
            use_mask_token=False,
        )
        model = transformers.Dinov2Model(config)
        self.embeddings, self.layer, self.norm = model.embeddings, model.encoder.layer, model.layernorm

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Return all tokens BxNxC of images Bx3xHxW, the class token first."""
        tokens = self.embeddings(x)
        for layer in self.layer:
            tokens = layer(tokens)
        return self.norm(tokens)


class Dino3Encoder(VitEncoder):
    """A vision transformer of DINOv3. Differs: positions are not scaled at random while it is trained.

    Args:
        architecture: hyperparameters.
        image_size: side in pixels of the images that a script takes.

    Raises:
        ImportError: if `transformers` is not installed.
    """

    def __init__(self, architecture: Vit, image_size: int = DINO3_SIZE) -> None:
        super().__init__(image_size, DINO3_PATCH)
        transformers = import_transformers("DINOv3")
        config = transformers.DINOv3ViTConfig(
            hidden_size=architecture.embed_dim,
            intermediate_size=4 * architecture.embed_dim,
            num_hidden_layers=architecture.depth,
            num_attention_heads=architecture.num_heads,
            patch_size=DINO3_PATCH,
            num_register_tokens=REGISTER_TOKENS,
            pos_embed_rescale=None,
        )
        model = transformers.DINOv3ViTModel(config)
        self.embeddings, self.rope_embeddings = model.embeddings, model.rope_embeddings
        self.layer, self.norm = model.model.layer, model.norm
        self.embeddings.mask_token = None

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Return all tokens BxNxC of images Bx3xHxW, class token and register tokens first."""
        tokens, positions = self.embeddings(x), self.rope_embeddings(x)
        for layer in self.layer:
            tokens = layer(tokens, position_embeddings=positions)
        return self.norm(tokens)


class ConvNextEncoder(TransformersEncoder):
    """A ConvNeXt of DINOv3, from pixels to the maps of its four stages, concatenated at stride 4.

    The coarser three, of strides 8, 16 and 32, are repeated to stride 4. `layer_norm`, which follows the last stage for
    pooling, is left out.

    Args:
        architecture: hyperparameters.
        image_size: side in pixels of the images that a script takes.

    Raises:
        ImportError: if `transformers` is not installed.
    """

    def __init__(self, architecture: ConvNext, image_size: int = CONVNEXT_MULTIPLE) -> None:
        super().__init__(image_size)
        transformers = import_transformers("DINOv3")
        config = transformers.DINOv3ConvNextConfig(
            hidden_sizes=list(architecture.widths), depths=list(architecture.depths)
        )
        self.stages: nn.ModuleList = transformers.DINOv3ConvNextModel(config).model.stages

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode normalised images.

        Args:
            x: images Bx3xHxW, H and W multiples of 32.

        Returns:
            embeddings BxCx(H/4)x(W/4), C being the sum of the stages' channels.
        """
        maps = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            maps.append(F.interpolate(x, scale_factor=float(2**index)) if index else x)
        return torch.cat(maps, dim=1)


_PREFIX = r"(?:\w+\.)*?"
_DINO2_KEY = re.compile(_PREFIX + r"(embeddings\..+|(?:encoder\.)?layer\.\d+\..+|(?:layer)?norm\.(?:weight|bias))")
_DINO3_KEY = re.compile(_PREFIX + r"(embeddings\..+|layer\.\d+\..+|norm\.(?:weight|bias))")
_CONVNEXT_KEY = re.compile(_PREFIX + r"(stages\.\d+\..+|layer_norm\.(?:weight|bias))")
_DINO2_NAMES = (  # from those of files to those of the module
    ("encoder.layer.", "layer."),
    ("layernorm.", "norm."),
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
)


def dino2_image_encoder(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a DINOv2 under the names of `Dino2Encoder`; none for any other state dict.

    Args:
        state: one of `transformers`, with or without a prefix such as `dinov2.`; or any other.

    Returns:
        tensors by key.
    """
    weights = _matching(_DINO2_KEY, state)
    for files, ours in _DINO2_NAMES:
        weights = {key.replace(files, ours): value for key, value in weights.items()}
    return weights if {"embeddings.cls_token", "embeddings.position_embeddings"} <= weights.keys() else {}


def dino3_image_encoder(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a DINOv3 ViT under the names of `Dino3Encoder`; as `dino2_image_encoder`."""
    weights = _matching(_DINO3_KEY, state)
    is_dino3 = "embeddings.register_tokens" in weights and "embeddings.position_embeddings" not in weights
    return weights if is_dino3 else {}


def convnext_image_encoder(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a DINOv3 ConvNeXt under the names of `ConvNextEncoder`; as `dino2_image_encoder`."""
    weights = _matching(_CONVNEXT_KEY, state)
    return weights if "stages.0.downsample_layers.0.weight" in weights else {}


def _matching(pattern: re.Pattern[str], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {match[1]: value for key, value in state.items() if (match := pattern.fullmatch(key))}
