"""Correction of a segmentation by clicks, with the promptable decoder of SAM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from components.sam.checkpoint import read_checkpoint
from components.sam.decoder import build_decoder
from components.sam.encoder import SamEncoder, fingerprint
from components.sam.encoders import SHIPPED, encoder_type, encoder_weights

ClassClicks = Mapping[int, tuple[torch.Tensor, torch.Tensor]]  # by class: points Nx2 as (x, y), and their signs N


class ClickCorrectedSam(nn.Module):
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

    @torch.no_grad()
    def forward(self, embeddings: torch.Tensor, logits: torch.Tensor, clicks: Sequence[ClassClicks]) -> torch.Tensor:
        """Correct slices.

        Args:
            embeddings: Bx256xhxw, of the encoder that belongs to the checkpoint.
            logits: BxCxHxW, those of a softmax; HxW is the slice as the encoder was shown it.
            clicks: for each slice, the clicks of each class to correct. Points are Nx2, x along W and y along H, in
                pixels from the centre of the first one. A sign is 1 on the class and 0 off it.

        Returns:
            logits BxCxHxW. Classes and slices without a click are as they were, bit for bit. The softmax gives a
            corrected class the probability that SAM gives its mask. If several masks claim a pixel, the larger logit
            of SAM wins.
        """
        corrected = logits.clone()
        for embedding, before, after, of_slice in zip(embeddings, logits, corrected, clicks, strict=True):
            others = [number for number in range(len(before)) if number not in of_slice]
            rest = before[others].logsumexp(0)
            for number, (points, signs) in of_slice.items():
                after[number] = self._mask(embedding, against_rest(before, number), points, signs) + rest
        return corrected

    def _mask(
        self, embedding: torch.Tensor, before: torch.Tensor, points: torch.Tensor, signs: torch.Tensor
    ) -> torch.Tensor:
        """Return SAM's logits HxW of one class, from an embedding 256xhxw, the logits HxW so far, and clicks."""
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


def against_rest(logits: torch.Tensor, number: int) -> torch.Tensor:
    """Return the logits of one class against all others.

    Args:
        logits: CxHxW, those of a softmax.
        number: the class.

    Returns:
        HxW, above 0 where the class has more than half of the probability.
    """
    others = torch.cat([logits[:number], logits[number + 1 :]])
    return logits[number] - others.logsumexp(0)


def has_click_corrector(model_type: str) -> bool:
    """Return whether `click_corrector` has a network for an encoder, one of `components.sam.encoders.ENCODERS`."""
    return model_type not in SHIPPED and encoder_type(model_type).has_sam_decoder


def click_corrector(encoder: SamEncoder, checkpoint: str | None) -> nn.Module:
    """Return the network that corrects the slices of an encoder by clicks.

    Args:
        encoder: the encoder.
        checkpoint: its file.

    Returns:
        a module that is called as `ClickCorrectedSam`, on the encoder's device. It raises ValueError if the encoder has
        other weights than its file.

    Raises:
        ValueError: if there is no such network for the encoder, or the encoder is trained.
        FileNotFoundError: if the file is missing.
    """
    name = encoder.model_type
    if not has_click_corrector(name) or checkpoint is None:
        file = "" if checkpoint else ", which has no file"
        raise ValueError(
            f"so far, clicks correct bundles on a SAM checkpoint only: received the encoder {name}{file}; make such a "
            "bundle with autosam train autosam_acdc --overlay sam --sam_checkpoint FILE, or autosam new --encoder vit_b"
        )
    state = encoder_weights(read_checkpoint(checkpoint), name, encoder.image_encoder.state_dict(), path=checkpoint)
    of_file = fingerprint(state)

    def check_encoder(*_: Any) -> None:
        if encoder.trainable or not torch.equal(encoder.fingerprint.cpu(), of_file):
            raise ValueError(
                f"the encoder was trained further than {checkpoint}, and SAM's decoder does not know it: give a bundle "
                "that was trained with --trainable_encoder False"
            )

    if encoder.trainable:
        check_encoder()
    corrector = ClickCorrectedSam(checkpoint, encoder.image_size).to(encoder.pixel_mean.device)
    corrector.register_forward_pre_hook(check_encoder)
    return corrector
