"""Correction of a segmentation by clicks, with the promptable decoder of SAM."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from components.networks.corrector import ClickCorrector, against_rest
from components.sam.decoder import build_decoder


class ClickCorrectedSam(ClickCorrector):
    """Correct the classes of slices that have clicks, by SAM's prompt encoder and mask decoder.

    The logits so far are SAM's mask prompt, and one mask is asked for, as `segment_anything` recommends for a
    refinement. All else is as in `SamPredictor.predict_torch`. Source: Kirillov et al., "Segment Anything", ICCV 2023.

    Args:
        checkpoint: the SAM checkpoint from which the encoder comes.
        image_size: side in pixels of the encoder's images.

    Raises:
        ValueError: if the checkpoint does not fit.
        FileNotFoundError: if it is missing.
    """

    def __init__(self, checkpoint: str, image_size: int = 1024) -> None:
        super().__init__()
        self.image_size = image_size
        self.mask_decoder, self.prompt_encoder = build_decoder(image_size=image_size, checkpoint=checkpoint)
        self.requires_grad_(False).eval()

    def mask(
        self, embedding: torch.Tensor, logits: torch.Tensor, number: int, points: torch.Tensor, signs: torch.Tensor
    ) -> torch.Tensor:
        """Return SAM's mask of one class, as `ClickCorrector` says."""
        before = against_rest(logits, number)
        height, width = before.shape
        scale = torch.tensor([self.image_size / width, self.image_size / height], device=points.device)
        prompt = F.interpolate(
            before[None, None],
            size=list(self.prompt_encoder.mask_input_size),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        sparse, dense = self.prompt_encoder(
            points=((points * scale).float()[None], signs[None]), boxes=None, masks=prompt
        )
        masks, _ = self.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        for size in ([self.image_size] * 2, [height, width]):  # in SAM's two steps
            masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        return masks[0, 0]
