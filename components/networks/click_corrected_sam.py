"""Correction of a segmentation by clicks, with the promptable decoders of SAM and SAM 2.1."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F

from components.networks.corrector import ClickCorrector, against_rest
from components.sam.decoder import build_decoder
from components.sam.sam2_decoder import Sam2Decoder


class PromptedCorrector(ClickCorrector):
    """Correct the classes of slices that have clicks, by a decoder whose prompts are the clicks and the logits so far.

    Args:
        image_size: side in pixels of the encoder's images.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    def mask(
        self, embedding: torch.Tensor, logits: torch.Tensor, number: int, points: torch.Tensor, signs: torch.Tensor
    ) -> torch.Tensor:
        """Return the decoder's mask of one class, as `ClickCorrector` says."""
        before = against_rest(logits, number)
        height, width = before.shape
        scale = torch.tensor([self.image_size / width, self.image_size / height], device=points.device)
        prompt = F.interpolate(
            before[None, None],
            size=[self.image_size // 4] * 2,
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        mask = self.decode(embedding[None], (points * scale).float()[None], signs[None], prompt)
        return F.interpolate(mask, size=[height, width], mode="bilinear", align_corners=False)[0, 0]

    @abstractmethod
    def decode(
        self, embedding: torch.Tensor, points: torch.Tensor, signs: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits 1x1xhxw of the mask that prompts ask for, in any size.

        Args:
            embedding: 1xCxhxw.
            points: 1xNx2 as (x, y), in pixels of the encoder's images.
            signs: 1xN, 1 on the class and 0 off it.
            prompt: 1x1x(`image_size`/4)x(`image_size`/4), the logits so far.
        """


class ClickCorrectedSam(PromptedCorrector):
    """Correct by SAM's prompt encoder and mask decoder.

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
        super().__init__(image_size)
        self.mask_decoder, self.prompt_encoder = build_decoder(image_size=image_size, checkpoint=checkpoint)
        self.requires_grad_(False).eval()

    def decode(
        self, embedding: torch.Tensor, points: torch.Tensor, signs: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        """Return SAM's mask in the size of the encoder's images, the first of SAM's two steps to the slice's."""
        sparse, dense = self.prompt_encoder(points=(points, signs), boxes=None, masks=prompt)
        masks, _ = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return F.interpolate(masks, size=[self.image_size] * 2, mode="bilinear", align_corners=False)


class ClickCorrectedSam2(PromptedCorrector):
    """Correct by SAM 2.1's prompt encoder and mask decoder, on the embeddings of `Sam2FeatureMaps`.

    Prompts are as for SAM, and one mask is asked for. All else is as in Meta's `SAM2ImagePredictor.predict`.

    Args:
        checkpoint: the checkpoint of SAM 2.1 from which the encoder comes.
        image_size: side in pixels of the encoder's images.

    Raises:
        ImportError: if `transformers` is not installed.
        ValueError: if the checkpoint does not fit or lacks the decoder.
        FileNotFoundError: if it is missing.
    """

    def __init__(self, checkpoint: str, image_size: int = 1024) -> None:
        super().__init__(image_size)
        self.decoder = Sam2Decoder(image_size, checkpoint)
        self.requires_grad_(False).eval()

    def decode(
        self, embedding: torch.Tensor, points: torch.Tensor, signs: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        """Return SAM 2.1's mask, a quarter of the size of the encoder's images."""
        return self.decoder(embedding, points, signs, prompt)
