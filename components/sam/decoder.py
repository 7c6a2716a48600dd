"""SAM's mask decoder and prompt encoder, made of `segment_anything`'s layers or of this project's."""

from typing import Any

from torch import nn

from components.sam.checkpoint import load_part, read_checkpoint, sam_image_encoder, sam_parts
from components.sam.encoders import family_of
from components.sam.image_encoder import EMBEDDING_CHANNELS, PATCH_SIZE
from components.sam.layers import TokenUpscale
from components.sam.segment_anything_import import import_from_segment_anything
from components.sam.token_attention import TwoWayTransformer

sam_mask_decoder = import_from_segment_anything("modeling.mask_decoder")
sam_prompt_encoder = import_from_segment_anything("modeling.prompt_encoder")
sam_transformer = import_from_segment_anything("modeling.transformer")

TRANSFORMER = {"depth": 2, "embedding_dim": EMBEDDING_CHANNELS, "num_heads": 8, "mlp_dim": 2048}


def build_decoder(*, image_size: int = 1024, on_tokens: bool = False, checkpoint: str | None = None) -> tuple[Any, Any]:
    """Build SAM's mask decoder and prompt encoder as `segment_anything/build_sam.py` does.

    Args:
        image_size: side in pixels of the images that the prompts refer to; it matters for prompts only.
        on_tokens: whether to use this project's transformer and upscaling, which work on tokens; parameters and their
            names are the same.
        checkpoint: a SAM checkpoint to load both from; None for random weights.

    Returns:
        the mask decoder and the prompt encoder.

    Raises:
        FileNotFoundError: if the checkpoint is missing.
        ValueError: if the checkpoint does not fit.
    """
    transformer = (TwoWayTransformer if on_tokens else sam_transformer.TwoWayTransformer)(**TRANSFORMER)
    decoder = sam_mask_decoder.MaskDecoder(transformer_dim=EMBEDDING_CHANNELS, transformer=transformer)
    if on_tokens:
        decoder.output_upscaling[0] = TokenUpscale(EMBEDDING_CHANNELS, EMBEDDING_CHANNELS // 4)
        decoder.output_upscaling[1] = nn.LayerNorm(EMBEDDING_CHANNELS // 4, eps=1e-6)
        decoder.output_upscaling[3] = TokenUpscale(EMBEDDING_CHANNELS // 4, EMBEDDING_CHANNELS // 8)
    grid = image_size // PATCH_SIZE
    prompts = sam_prompt_encoder.PromptEncoder(
        EMBEDDING_CHANNELS, (grid, grid), (image_size, image_size), mask_in_chans=16
    )
    if checkpoint is not None:
        state = read_checkpoint(checkpoint)
        family = family_of(state)
        if family is not None and family.read is not sam_image_encoder:
            raise ValueError(
                f"{checkpoint} is of {family.family}, which lacks SAM's mask decoder: "
                "use the CNN head or the linear head on this encoder"
            )
        parts = sam_parts(state, path=checkpoint)
        load_part(decoder, "mask_decoder", parts["mask_decoder"], path=checkpoint)
        load_part(prompts, "prompt_encoder", parts["prompt_encoder"], path=checkpoint)
    return decoder, prompts
