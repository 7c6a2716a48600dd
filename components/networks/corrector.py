"""The base class of networks that correct a segmentation by clicks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import nn

ClassClicks = Mapping[int, tuple[torch.Tensor, torch.Tensor]]  # by class: points Nx2 as (x, y), and their signs N


class ClickCorrector(nn.Module, ABC):
    """Correct the classes of slices that have clicks, each against the rest."""

    @torch.no_grad()
    def forward(self, embeddings: torch.Tensor, logits: torch.Tensor, clicks: Sequence[ClassClicks]) -> torch.Tensor:
        """Correct slices.

        Args:
            embeddings: BxExhxw, of the encoder for which this network was trained.
            logits: BxCxHxW, those of a softmax over C classes; HxW is the slice as the encoder was shown it.
            clicks: for each slice, the clicks of each class to correct. Points are Nx2, x along W and y along H, in
                pixels from the centre of the first one. A sign is 1 on the class and 0 off it.

        Returns:
            logits BxCxHxW. Classes and slices without a click are as they were, bit for bit. The softmax gives a
            corrected class the probability that `mask` gives it. If several masks claim a pixel, the larger logit
            wins.
        """
        corrected = logits.clone()
        for embedding, before, after, of_slice in zip(embeddings, logits, corrected, clicks, strict=True):
            others = [number for number in range(len(before)) if number not in of_slice]
            rest = before[others].logsumexp(0)
            for number, (points, signs) in of_slice.items():
                after[number] = self.mask(embedding, before, number, points, signs) + rest
        return corrected

    @abstractmethod
    def mask(
        self, embedding: torch.Tensor, logits: torch.Tensor, number: int, points: torch.Tensor, signs: torch.Tensor
    ) -> torch.Tensor:
        """Return the corrected logits HxW of one class against all others.

        Args:
            embedding: Exhxw.
            logits: CxHxW, those so far.
            number: the class.
            points: Nx2 as (x, y), in pixels.
            signs: N, 1 on the class and 0 off it.
        """


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
