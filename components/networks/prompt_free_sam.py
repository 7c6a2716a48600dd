"""The network of SAM's image encoder and a prompt-free head."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from components.base.export import in_export
from components.base.precision import autocast_to, check_precision
from components.base.weights import key_test, load_starting_weights, read_starting_weights
from components.networks.any_object import for_classes, is_of_any_object
from components.networks.trained_with import attach_training_record, check_trained_views

_START_REMEDY = (
    "give --start_checkpoint the model.pt of a run with the same head and encoder, or '$None' for a fresh head"
)


class PromptFreeSam(nn.Module):
    """Segment images without prompts, by an image encoder and a head.

    Source: paper figure 2. Its state dict holds the trained parts only; see `components.sam.SamEncoder`.

    The network enters autocast itself, for the device of the images, so the engines' `amp` stays false. Weights,
    gradients and logits are always fp32. When scripted, traced or exported, it computes in fp32.

    Args:
        encoder: from images Bx3xHxW in 0..255 to embeddings Bx256xhxw.
        head: from embeddings to logits BxCx4hx4w.
        precision: `fp32`; `bf16` (products and convolutions of encoder and head, also in training); or `auto`, bf16
            if the device is faster with it and fp32 otherwise.
        start_checkpoint: a file to start from, such as another run's `model.pt`. It is the `state_dict()` of a network
            with the same head and encoder, in fp32 or fp16. In `general_linear_head.pt` of `components.pretrained`,
            each class starts as an object of any kind. None keeps the weights of `encoder` and `head`.
        trained_with: the training record that the state dict holds, and that every loaded file is compared with; see
            `components.networks.trained_with.attach_training_record`.

    Raises:
        ValueError: if the precision is unknown, a file cannot be read or does not fit, or there are more test-time
            views than training shows.
        FileNotFoundError: if `start_checkpoint` is missing.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        precision: str = "auto",
        *,
        start_checkpoint: str | None = None,
        trained_with: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_precision(precision)
        self.encoder = encoder
        self.head = head
        self.precision = precision
        attach_training_record(self, trained_with)
        if start_checkpoint is not None:
            state = read_starting_weights(
                start_checkpoint, kind="start checkpoint", remedy=_START_REMEDY, is_key=key_test(self)
            )
            if is_of_any_object(state):
                *_, weight, bias = head.state_dict()  # of the layer that makes the logits
                state = for_classes(state, (f"head.{weight}", f"head.{bias}"), len(head.get_parameter(bias)))
                state["trained_with"] = self.get_buffer("trained_with")  # the file knows nothing of these classes
            load_starting_weights(self, state, path=start_checkpoint, remedy=_START_REMEDY)
        check_trained_views(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            images: Bx3xHxW in 0..255.

        Returns:
            raw logits BxCxHxW, fp32 if the weights are, interpolated if the head's output has another size.
        """
        if torch.jit.is_scripting():  # noqa: SIM108 - only a statement keeps the other branch out of the script
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
        if in_export():
            return self.head(self.encoder(images))
        with autocast_to(self.precision, images.device.type):
            logits = self.head(self.encoder(images))
        return logits.float() if logits.dtype == torch.bfloat16 else logits
