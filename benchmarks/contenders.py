"""The image encoders to compare: those of several projects, with the same weights, and MobileSAM's."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from components.base.precision import autocast_to, has_native_bf16
from components.sam.encoder import SamEncoder
from components.sam.image_encoder import (
    ARCHITECTURES,
    EMBEDDING_CHANNELS,
    PATCH_SIZE,
    WINDOW_SIZE,
    ImageEncoder,
    with_cast_weights,
)
from components.sam.segment_anything_import import import_from_segment_anything
from components.sam.tiny_vit import TinyViT

REFERENCE = "segment_anything"
OURS = "ours"
BF16 = " bf16"  # suffix of the names of contenders in bf16
OURS_BF16 = OURS + BF16
REFERENCE_BF16 = REFERENCE + BF16
OURS_VIT_T = "ours vit_t"  # MobileSAM's encoder, with its own weights
OURS_VIT_T_BF16 = OURS_VIT_T + BF16
HUGGING_FACE = {"transformers eager": "eager", "transformers sdpa": "sdpa"}

Encode = Callable[[torch.Tensor], torch.Tensor]

# From SAM's parameter names, which this project uses, to those of `transformers.SamVisionModel`, where they differ.
HUGGING_FACE_NAMES = {
    "patch_embed.proj.": "patch_embed.projection.",
    "blocks.": "layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    "neck.0.": "neck.conv1.",
    "neck.1.": "neck.layer_norm1.",
    "neck.2.": "neck.conv2.",
    "neck.3.": "neck.layer_norm2.",
}


def encoder_names(device: torch.device) -> list[str]:
    """List the encoders that can be built on this machine, the baseline first."""
    names = [REFERENCE, OURS, OURS_VIT_T]
    if has_native_bf16(device.type):
        names += [OURS_BF16, OURS_VIT_T_BF16, REFERENCE_BF16]
    if importlib.util.find_spec("transformers") is not None:
        names += HUGGING_FACE
    return names


def precisions(device: torch.device) -> list[str]:
    """List the precisions to measure this project's networks in: bf16 only if the device supports it natively."""
    return ["fp32", "bf16"] if has_native_bf16(device.type) else ["fp32"]


def silence_random_weights() -> None:
    """Suppress the warning about random weights, which do not matter for timings."""
    logging.getLogger("components.sam.encoder").setLevel(logging.ERROR)


def random_state_dict(model_type: str) -> dict[str, torch.Tensor]:
    """Draw random weights of an image encoder, the same in every call.

    Positional embeddings are initialised with zeros, so they are drawn too. Otherwise encoders that treat them
    differently would agree.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        state = ImageEncoder(ARCHITECTURES[model_type]).state_dict()
        for key, value in state.items():
            if key == "pos_embed" or ".rel_pos_" in key:
                value.normal_(std=0.1)
    return state


def build_encoder(
    name: str, model_type: str, weights: Mapping[str, torch.Tensor], *, image_size: int, device: torch.device
) -> Encode:
    """Build an encoder with given weights.

    Args:
        name: one of `encoder_names`.
        model_type: the architecture.
        weights: its state dict with SAM's parameter names, at the native size; `vit_t` has random ones instead.
        image_size: side of the images in pixels. Absolute positions are interpolated here, relative ones by each
            contender.
        device: the device to run on.

    Returns:
        a function from normalised images Bx3xHxW to embeddings Bx256x(H/16)x(W/16), without gradients.
    """
    module: Any
    if name in HUGGING_FACE:
        module = hugging_face_encoder(model_type, weights, image_size=image_size, attention=HUGGING_FACE[name])
    elif name in (REFERENCE, REFERENCE_BF16):
        module = segment_anything_encoder(model_type, weights, image_size=image_size)
    elif name in (OURS_VIT_T, OURS_VIT_T_BF16):
        module = TinyViT()
    else:
        module = ImageEncoder(ARCHITECTURES[model_type])
        module.load_state_dict(weights)
    module = module.eval().to(device)
    if name in (OURS, OURS_BF16):
        return as_ours(module, "bf16" if name == OURS_BF16 else "fp32", device)

    def encode(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=name.endswith(BF16)):
            output = module(images)
        return output.last_hidden_state if name in HUGGING_FACE else output

    return encode


def as_ours(module: nn.Module, precision: str, device: torch.device) -> Encode:
    """Return the forward pass of one of this project's encoders on a device, as `SamEncoder` runs it.

    On a CPU its weights are cast to bf16 once.
    """
    if precision == "bf16" and device.type == "cpu":
        module = with_cast_weights(module, torch.bfloat16)
    return in_precision(module, precision)


def in_precision(module: Callable[[torch.Tensor], torch.Tensor], precision: str) -> Encode:
    """Return a forward pass without gradients in `fp32` or `bf16`, with this project's library of products in fp32."""

    def encode(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast_to(precision, images.device.type):
            return module(images)

    return encode


def segment_anything_encoder(model_type: str, weights: Mapping[str, torch.Tensor], *, image_size: int) -> nn.Module:
    """Build `segment_anything`'s own encoder for one image size."""
    architecture = ARCHITECTURES[model_type]
    module = import_from_segment_anything("modeling.image_encoder").ImageEncoderViT(
        img_size=architecture.native_size,
        patch_size=PATCH_SIZE,
        embed_dim=architecture.embed_dim,
        depth=architecture.depth,
        num_heads=architecture.num_heads,
        out_chans=EMBEDDING_CHANNELS,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=WINDOW_SIZE,
        global_attn_indexes=architecture.global_attn_indexes,
    )
    module.load_state_dict(weights)
    # Relative positions keep their native size: the encoder interpolates them in its forward pass.
    module.pos_embed = nn.Parameter(_resized_positions(weights["pos_embed"], image_size))
    return module


def hugging_face_encoder(
    model_type: str, weights: Mapping[str, torch.Tensor], *, image_size: int, attention: str
) -> nn.Module:
    """Build `transformers.SamVisionModel` for one image size.

    Args:
        model_type: the architecture.
        weights: an encoder's state dict with SAM's parameter names.
        image_size: side in pixels.
        attention: the `attn_implementation`, `eager` or `sdpa`.
    """
    from transformers import SamVisionConfig, SamVisionModel

    architecture = ARCHITECTURES[model_type]
    options: dict[str, Any] = {
        "image_size": architecture.native_size,
        "patch_size": PATCH_SIZE,
        "hidden_size": architecture.embed_dim,
        "output_channels": EMBEDDING_CHANNELS,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "window_size": WINDOW_SIZE,
        "global_attn_indexes": list(architecture.global_attn_indexes),
        "attn_implementation": attention,
    }
    module = SamVisionModel(SamVisionConfig(**options))
    encoder: Any = module.vision_encoder
    encoder.load_state_dict({hugging_face_name(key): value for key, value in weights.items()})
    encoder.pos_embed = nn.Parameter(_resized_positions(weights["pos_embed"], image_size))
    encoder.patch_embed.image_size = (image_size, image_size)
    return module


def hugging_face_name(key: str) -> str:
    """Translate a parameter name of SAM to that of the vision encoder of `transformers`."""
    for ours, theirs in HUGGING_FACE_NAMES.items():
        key = key.replace(ours, theirs)
    return key


class ReferenceEncoder(nn.Module):
    """`segment_anything`'s encoder with preprocessing and without a cache.

    Args:
        encoder: this project's encoder, whose weights and preprocessing it uses.
    """

    def __init__(self, encoder: SamEncoder) -> None:
        super().__init__()
        weights = encoder.image_encoder.state_dict()
        self.image_encoder = segment_anything_encoder(encoder.model_type, weights, image_size=encoder.image_size)
        self.preprocess = encoder.preprocess
        self.out_channels = encoder.out_channels
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images Bx3xHxW in 0..255."""
        with torch.no_grad():
            return self.image_encoder(self.preprocess(images))


def _resized_positions(positions: torch.Tensor, image_size: int) -> torch.Tensor:
    """Interpolate absolute positions 1xHxWxC as `components.sam.image_encoder.ImageEncoder` does."""
    side = image_size // PATCH_SIZE
    if positions.shape[1] == side:
        return positions.clone()
    channels_first = positions.permute(0, 3, 1, 2)
    resized = F.interpolate(channels_first, size=[side, side], mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous()
