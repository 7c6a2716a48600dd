"""The network that joins SAM's image encoder and a prompt-free head."""

import torch
import torch.nn.functional as F
from torch import nn

from components.base.precision import autocast_to, check_precision
from components.base.weights import read_start, start_from

_OTHER_START = (
    "give --head_checkpoint the model.pt of a run with the same head and encoder, or '$None' for a fresh head"
)


class PromptFreeSam(nn.Module):
    """Segment images with an image encoder and a head, without prompts.

    Source: paper figure 2. Its checkpoints hold what was trained; `components.sam.SamEncoder` says how.

    Precision is the network's own: it enters autocast for the device that the images are on, so the engines' `amp`
    stays false. Weights, gradients and logits are fp32 in any case. Scripted, traced and exported, it computes in fp32.

    Args:
        encoder: from images Bx3xHxW in 0..255 to embeddings Bx256xhxw.
        head: from embeddings to logits BxCx4hx4w.
        precision: `fp32`; `bf16` (products and convolutions of encoder and head, in training too); or `auto`, bf16
            where the device computes it natively and fp32 elsewhere.
        head_checkpoint: a file to start from, such as another run's `model.pt`: what `state_dict()` of a network with
            the same head and encoder gave, weights in fp32 or fp16; None for the weights that the parts come with.

    Raises:
        ValueError: for another precision, or a file that cannot be read or does not fit.
        FileNotFoundError: when `head_checkpoint` is not there.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        precision: str = "auto",
        *,
        head_checkpoint: str | None = None,
    ) -> None:
        super().__init__()
        check_precision(precision)
        self.encoder = encoder
        self.head = head
        self.precision = precision
        if head_checkpoint is not None:
            state = read_start(head_checkpoint, kind="head checkpoint", way_out=_OTHER_START)
            start_from(self, state, path=head_checkpoint, way_out=_OTHER_START)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            images: Bx3xHxW in 0..255.

        Returns:
            raw logits BxCxHxW, fp32 if the weights are, interpolated where the head's grid is another.
        """
        if torch.jit.is_scripting():  # noqa: SIM108 - a branch that only a statement leaves out of the script
            logits = self.head(self.encoder(images))
        else:
            logits = self._segment(images)
        size = [images.shape[2], images.shape[3]]
        if logits.shape[2] != size[0] or logits.shape[3] != size[1]:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits

    @torch.jit.unused
    def _segment(self, images: torch.Tensor) -> torch.Tensor:
        """Run encoder and head in this network's precision."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self.head(self.encoder(images))
        with autocast_to(self.precision, images.device.type):
            logits = self.head(self.encoder(images))
        return logits.float() if logits.dtype == torch.bfloat16 else logits
