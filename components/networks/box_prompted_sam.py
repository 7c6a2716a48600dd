"""The baseline of SAM itself, untrained: one box prompt per class, taken from the ground truth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from components.base.precision import autocast_to, check_precision
from components.base.weights import fixed_random_weights
from components.sam.decoder import build_decoder
from components.sam.encoder import SamEncoder

OVERLAPS = ("smallest", "logit", "argmax")


class BoxPromptedSam(nn.Module):
    """Segment images by SAM, prompted with the bounding box of each class in the ground truth.

    Source: the row "SAM" of the paper's table 1. Differs: the authors feed images in 0..1 to a network that expects
    0..255, and resolve overlaps by `argmax`.

    Args:
        encoder: SAM's image encoder.
        out_channels: classes C, background included.
        checkpoint: SAM checkpoint of prompt encoder and mask decoder; None for random weights, the same in every run.
        overlaps: class of a pixel in several masks. `smallest` takes the smallest mask, so that the LV remains visible
            within a filled mask of the Myo; `logit` the highest logit; `argmax` the first class, as in the authors'
            code.
        precision: as for `components.networks.PromptFreeSam`.

    Raises:
        ValueError: if the rule or precision is unknown, or the checkpoint does not fit.
        FileNotFoundError: if the checkpoint is missing.
    """

    def __init__(
        self,
        encoder: SamEncoder,
        out_channels: int,
        checkpoint: str | None = None,
        *,
        overlaps: str = "smallest",
        precision: str = "auto",
    ) -> None:
        super().__init__()
        check_precision(precision)
        if overlaps not in OVERLAPS:
            raise ValueError(f"unknown overlaps {overlaps!r}: expected one of {', '.join(OVERLAPS)}")
        self.encoder = encoder
        self.out_channels = out_channels
        self.overlaps = overlaps
        self.precision = precision
        with fixed_random_weights():
            self.mask_decoder, self.prompt_encoder = build_decoder(image_size=encoder.image_size, checkpoint=checkpoint)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images whose ground truth is known.

        Args:
            images: Bx4xHxW: RGB in 0..255, and the true labels 0..C-1, used for the boxes only.

        Returns:
            one-hot segmentation BxCxHxW.
        """
        rgb, truths = images[:, :3], images[:, 3].round().long()
        with autocast_to(self.precision, images.device.type):
            embeddings = self.encoder(rgb)
        maps = [self._label_map(embedding, truth) for embedding, truth in zip(embeddings.float(), truths, strict=True)]
        return F.one_hot(torch.stack(maps), self.out_channels).movedim(3, 1).to(images.dtype)

    def _label_map(self, embedding: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Segment one image: from its embedding 256xhxw and true labels HxW to predicted labels HxW."""
        classes = [value for value in range(1, self.out_channels) if bool((truth == value).any())]
        if not classes:
            return torch.zeros_like(truth)
        size = self.encoder.image_size
        scale = torch.tensor([size / truth.shape[1], size / truth.shape[0]] * 2, device=truth.device)
        boxes = torch.stack([tight_box(truth == value) for value in classes]) * scale
        sparse, dense = self.prompt_encoder(points=None, boxes=boxes, masks=None)
        logits, _ = self.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        logits = F.interpolate(logits, size=list(truth.shape), mode="bilinear", align_corners=False)[:, 0]
        values = torch.tensor([0, *classes], device=truth.device)
        return values[resolve_overlaps(logits, self.overlaps)]


def tight_box(mask: torch.Tensor) -> torch.Tensor:
    """Return the tight box of a mask HxW: left, top, right and bottom edge in pixels from the top left corner."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def resolve_overlaps(logits: torch.Tensor, overlaps: str) -> torch.Tensor:
    """Combine the masks of several classes into one label map.

    Args:
        logits: KxHxW; a mask is where its logits are above 0.
        overlaps: as for `BoxPromptedSam`.

    Returns:
        HxW: 0 outside all masks, else 1 + the index of the mask that the pixel is assigned to.
    """
    masks = logits > 0
    if overlaps == "smallest":
        rank = masks.flatten(1).sum(1).argsort().argsort()  # 0 for the smallest
        priority = (len(masks) - rank).view(-1, 1, 1) * masks
    elif overlaps == "logit":
        priority = logits * masks
    else:
        priority = masks.long()
    highest, index = priority.max(0)
    return torch.where(highest > 0, index + 1, 0)
