"""Several heads on one encoder, trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.handlers import from_engine
from torch import nn


class JointHead(nn.Module):
    """Several heads on one encoder: in training each slice goes through one of them, in evaluation through all.

    Every training step trains the encoder on all slices and each head on its share of them, at the cost of one head.

    Args:
        heads: heads by name, each from embeddings Bx256xhxw to logits BxCx4hx4w, with the same C.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(heads)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Decode a batch.

        Args:
            embeddings: Bx256xhxw; in training B is a multiple of the number of heads N.

        Returns:
            in training logits BxCx4hx4w, where slice i is from head i mod N; in evaluation Bx(N*C)x4hx4w, head by head.

        Raises:
            ValueError: if the size of a training batch is not a multiple of the number of heads.
        """
        heads = list(self.heads.values())
        if not self.training:
            return torch.cat([head(embeddings) for head in heads], dim=1)
        if len(embeddings) % len(heads):
            raise ValueError(
                f"expected a batch of slices that the {len(heads)} heads can share evenly, received {len(embeddings)}: "
                f"give --batch_size a multiple of {len(heads)}"
            )
        logits = [head(embeddings[first :: len(heads)]) for first, head in enumerate(heads)]
        return torch.stack(logits, dim=1).flatten(0, 1)


def predictions_of_all(output: Any, keys: Sequence[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the predictions of all heads with the truth of each, as the input of one metric.

    Args:
        output: an evaluator's decollated output, with `label` and the predictions, CxHxWxD each.
        keys: keys of the predictions.

    Returns:
        the predictions and equally many truths.
    """
    pairs = [from_engine([key, "label"])(output) for key in keys]
    return [pred for preds, _ in pairs for pred in preds], [truth for _, truths in pairs for truth in truths]
