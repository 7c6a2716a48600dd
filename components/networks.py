"""The network that joins SAM's image encoder and a prompt-free head."""

import torch
import torch.nn.functional as F
from torch import nn


class PromptFreeSam(nn.Module):
    """Segment images with an image encoder and a head, without prompts.

    Source: paper figure 2. Its checkpoints hold what was trained; `components.encoder.SamEncoder` says how.

    Args:
        encoder: from images Bx3xHxW in 0..255 to embeddings Bx256xhxw.
        head: from embeddings to logits BxCx4hx4w.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            images: Bx3xHxW in 0..255.

        Returns:
            raw logits BxCxHxW, interpolated where the head's grid is another.
        """
        logits = self.head(self.encoder(images))
        size = [images.shape[2], images.shape[3]]
        if logits.shape[2] != size[0] or logits.shape[3] != size[1]:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits
