"""SAM 2.1's mask decoder and prompt encoder, built by `transformers`, the maps they take, and their weights' names."""

import re
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from components.base.weights import join_keys
from components.sam.checkpoint import load_part, read_checkpoint
from components.sam.encoder import SamEncoder
from components.sam.image_encoder import EMBEDDING_CHANNELS
from components.sam.sam2_encoder import Sam2Encoder
from components.sam.transformers_encoder import import_transformers

_MIDDLE, _COARSE = 2, 4  # strides of these maps, in tokens of the fine one
_MIDDLE_CHANNELS, _COARSE_CHANNELS = (EMBEDDING_CHANNELS // times**2 for times in (_MIDDLE, _COARSE))

_PART = re.compile(r"(sam_)?((?:prompt_encoder|mask_decoder)\..+)")
_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
_POINTS = re.compile(r"prompt_encoder\.point_embeddings\.\d\.weight")
_THREE_LAYERS = r"\b(iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps\.\d)\.layers"
_RENAMED = (  # from Meta's names to those of `transformers`
    (re.compile(r"\bnorm(\d|_final_attn)\."), r"layer_norm\1."),
    (re.compile(r"\bout_proj\."), "o_proj."),
    (re.compile(r"\bmlp\.layers\.0\."), "mlp.proj_in."),
    (re.compile(r"\bmlp\.layers\.1\."), "mlp.proj_out."),
    (re.compile(rf"{_THREE_LAYERS}\.0\."), r"\1.proj_in."),
    (re.compile(rf"{_THREE_LAYERS}\.1\."), r"\1.layers.0."),
    (re.compile(rf"{_THREE_LAYERS}\.2\."), r"\1.proj_out."),
    (re.compile(r"\boutput_upscaling\.0\."), "upscale_conv1."),
    (re.compile(r"\boutput_upscaling\.1\."), "upscale_layer_norm."),
    (re.compile(r"\boutput_upscaling\.3\."), "upscale_conv2."),
    (re.compile(r"\bmask_downscaling\.0\."), "mask_embed.conv1."),
    (re.compile(r"\bmask_downscaling\.1\."), "mask_embed.layer_norm1."),
    (re.compile(r"\bmask_downscaling\.3\."), "mask_embed.conv2."),
    (re.compile(r"\bmask_downscaling\.4\."), "mask_embed.layer_norm2."),
    (re.compile(r"\bmask_downscaling\.6\."), "mask_embed.conv3."),
    (re.compile(r"\bpe_layer\.positional_encoding_gaussian_matrix$"), "shared_embedding.positional_embedding"),
)


class Sam2FeatureMaps(nn.Module):
    """The three feature maps of an encoder of SAM 2.1 as one tensor, for `Sam2Decoder`.

    They are never cached, because the cache of a `SamEncoder` holds other embeddings of the same weights.

    Args:
        encoder: one of SAM 2.1.
    """

    def __init__(self, encoder: SamEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize, normalise and encode images.

        Args:
            images: Bx3xHxW in 0..255, any height and width.

        Returns:
            Bx336xhxw, h and w a quarter of the encoder's image size. The first 256 channels are the map at stride 4.
            Then come 64 of that at stride 8 and 16 of that at stride 16, with their channels spread over pixels.
        """
        encoder = cast(Sam2Encoder, self.encoder.image_encoder)
        fine, middle, coarse = encoder.feature_maps(self.encoder.preprocess(images))
        return torch.cat([fine, F.pixel_shuffle(middle, _MIDDLE), F.pixel_shuffle(coarse, _COARSE)], dim=1)


class Sam2Decoder(nn.Module):
    """SAM 2.1's prompt encoder and mask decoder, from feature maps and prompts to one mask.

    The numbers are those of `Sam2Model` of `transformers` and of Meta's `SAM2ImagePredictor` for one mask. This is the
    first token's or, where that is not stable, the one of the other three with the best predicted score.
    Source: Ravi et al., "SAM 2: Segment Anything in Images and Videos", ICLR 2025.

    Args:
        image_size: side in pixels of the encoder's images, a multiple of 32.
        checkpoint: a whole checkpoint of SAM 2.1, in Meta's names or those of `transformers`; None for random weights.

    Raises:
        ImportError: if `transformers` is not installed.
        FileNotFoundError: if the checkpoint is missing.
        ValueError: if it has no such decoder, or does not fit.
    """

    def __init__(self, image_size: int, checkpoint: str | None = None) -> None:
        super().__init__()
        transformers = import_transformers("SAM 2.1")
        modules = transformers.models.sam2.modeling_sam2
        of_prompts = transformers.Sam2PromptEncoderConfig(image_size=image_size)
        of_masks = transformers.Sam2MaskDecoderConfig(attn_implementation="sdpa")
        self.prompt_encoder = modules.Sam2PromptEncoder(of_prompts)
        self.mask_decoder = modules.Sam2MaskDecoder(of_masks)
        self.no_memory_embedding = nn.Parameter(torch.zeros(1, 1, EMBEDDING_CHANNELS))
        if checkpoint is not None:
            state = read_checkpoint(checkpoint)
            weights = sam2_decoder_weights(state)
            if not weights:
                parts = dict.fromkeys(key.partition(".")[0] for key in state)
                raise ValueError(
                    f"{checkpoint} has no mask decoder of SAM 2.1: expected also the keys of Meta's file "
                    "(sam_mask_decoder.*) or of transformers (mask_decoder.*); received only keys that begin with "
                    f"{join_keys(list(parts))}; give --sam_checkpoint the whole file from which the encoder comes"
                )
            load_part(self, "decoder", weights, path=checkpoint)

    def forward(
        self, embeddings: torch.Tensor, points: torch.Tensor, signs: torch.Tensor, masks: torch.Tensor
    ) -> torch.Tensor:
        """Segment one object in each image.

        Args:
            embeddings: Bx336xhxw, of `Sam2FeatureMaps`.
            points: BxNx2 as (x, y), in pixels of the encoder's images.
            signs: BxN, 1 on the object and 0 off it.
            masks: Bx1xhxw, logits of the object so far.

        Returns:
            logits Bx1xhxw.
        """
        fine, middle, coarse = embeddings.split([EMBEDDING_CHANNELS, _MIDDLE_CHANNELS, _COARSE_CHANNELS], dim=1)
        coarse = F.pixel_unshuffle(coarse, _COARSE) + self.no_memory_embedding.view(1, -1, 1, 1)
        sparse, dense = self.prompt_encoder(points[:, None], signs[:, None].long(), None, masks)
        found, *_ = self.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=self._positions().expand(len(coarse), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=[
                self.mask_decoder.conv_s0(fine),
                self.mask_decoder.conv_s1(F.pixel_unshuffle(middle, _MIDDLE)),
            ],
        )
        return found[:, 0]

    def _positions(self) -> torch.Tensor:
        """Return the embeddings 1x256xhxw of the centres of the coarse map's positions."""
        side = self.prompt_encoder.image_embedding_size[0]
        centres = (torch.arange(side, device=self.no_memory_embedding.device) + 0.5) / side
        grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1)
        return self.prompt_encoder.shared_embedding(grid).permute(2, 0, 1)[None]


def sam2_decoder_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of SAM 2.1's decoder from a whole checkpoint, under the names of `Sam2Decoder`.

    Args:
        state: a state dict of Meta's, with keys such as `sam_mask_decoder.*`; one of `transformers`, with keys such as
            `mask_decoder.*`; or any other.

    Returns:
        tensors by key; empty for a state dict without mask decoder.
    """
    weights, points = {}, []
    for key, value in state.items():
        if key in ("no_mem_embed", "no_memory_embedding"):
            weights["no_memory_embedding"] = value
        elif key == "shared_image_embedding.positional_embedding":  # the same as the prompt encoder's
            weights[_POSITIONS] = value
        elif match := _PART.fullmatch(key):
            name = match[2]
            for pattern, replacement in _RENAMED if match[1] else ():
                name = pattern.sub(replacement, name)
            if _POINTS.fullmatch(name):
                points.append((name, value))
            else:
                weights[name] = value
    if points:
        weights["prompt_encoder.point_embed.weight"] = torch.cat([value for _, value in sorted(points)])
    return weights if any(key.startswith("mask_decoder.") for key in weights) else {}
