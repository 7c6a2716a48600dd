"""Correction of a segmentation by clicks, with a small network on the embeddings of a shipped encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from torch import nn

from components.base.layers import use_faster_layers
from components.base.masks import pieces_at
from components.networks.corrector import ClickCorrector, against_rest
from components.sam.image_encoder import EMBEDDING_CHANNELS

DISC_RADIUS_PX = 3.0  # of the mark of a click, on the slice as the encoder was shown it
_SURROUNDINGS_PX = 15.0  # standard deviation of the smooth mark around it
_LARGEST_LOGIT = 8.0
_SMALLEST_GRID = 16  # of embeddings, since the UNet halves it three times more
_FEATURES = 16  # channels that the embeddings are reduced to, at half size


class ClickHead(ClickCorrector):
    """Correct one class at a time with a UNet at half the slice's size, on embeddings, answer so far and clicks.

    It knows no class by name: a class is seen against the rest, so one network serves all. Clicks are discs, as in
    Sofiiuk et al., "Reviving Iterative Training with Mask Guidance for Interactive Segmentation", ICIP 2022. Differs:
    all clicks are seen at once, with the answer before any click, and a smooth mark has their wider surroundings.

    Args:
        width: channels of the UNet's first level.
        start_checkpoint: file of weights to start from, such as `click_head.pt` of `components.pretrained`.
    """

    def __init__(self, width: int = 16, start_checkpoint: str | None = None) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(EMBEDDING_CHANNELS, 4 * _FEATURES, kernel_size=1)
        features = [width * times for times in (1, 2, 3, 4, 4, 1)]
        self.unet = BasicUNet(spatial_dims=2, in_channels=_FEATURES + 5, out_channels=1, features=features)
        use_faster_layers(self.unet)
        if start_checkpoint is not None:
            self.load_state_dict(torch.load(start_checkpoint, map_location="cpu", weights_only=True))

    def masks(
        self, embeddings: torch.Tensor, logits: torch.Tensor, numbers: Sequence[int], marks: torch.Tensor
    ) -> torch.Tensor:
        """Correct one class of each slice.

        Args:
            embeddings: Bx256xhxw, of slices of 4hx4w pixels.
            logits: BxCx4hx4w, those of a softmax.
            numbers: the class of each slice, B of them.
            marks: Bx3x4hx4w, as `click_marks` draws them.

        Returns:
            the logits Bx4hx4w of the class against all others.
        """
        before = torch.stack([against_rest(each, number) for each, number in zip(logits, numbers, strict=True)])
        before = before.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)[:, None]
        foreground = 1 - logits.softmax(dim=1)[:, :1]
        others = (foreground - before.sigmoid()).clamp_min(0)
        maps = F.avg_pool2d(torch.cat([before / 4, others, marks[:, 2:]], dim=1), 2)
        discs = F.max_pool2d(marks[:, :2], 2)
        change = self.unet(torch.cat([F.pixel_shuffle(self.reduce(embeddings), 2), maps, discs], dim=1))
        return (before + F.interpolate(change.float(), scale_factor=2, mode="bilinear"))[:, 0]

    def mask(
        self, embedding: torch.Tensor, logits: torch.Tensor, number: int, points: torch.Tensor, signs: torch.Tensor
    ) -> torch.Tensor:
        """Correct one class of one slice, as `ClickCorrector` says."""
        size, grid = list(logits.shape[1:]), [max(side, _SMALLEST_GRID) for side in embedding.shape[1:]]
        seen = [4 * side for side in grid]  # the encoder may see slices in another size
        scale = torch.tensor([seen[1] / size[1], seen[0] / size[0]], device=points.device)
        marks = click_marks((points * scale).float(), signs, seen)
        mask = self.masks(_resized(embedding, grid)[None], _resized(logits, seen)[None], [number], marks[None])
        before, after = against_rest(logits, number), _resized(mask, size)[0]
        return torch.where(_with_clicks(before > 0, after > 0, points, signs), after, before)


def _with_clicks(before: torch.Tensor, after: torch.Tensor, points: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return the connected changes of a mask HxW that a click asks for: pixels gained on the class, or lost off it."""
    columns, rows = points.round().long().cpu().T
    last_row, last_column = (size - 1 for size in before.shape)
    rows, columns = rows.clamp(0, last_row).numpy(), columns.clamp(0, last_column).numpy()
    asked = np.zeros(before.shape, bool)
    for sign, changed in ((1, after & ~before), (0, before & ~after)):
        of_sign = (signs == sign).cpu().numpy()
        asked |= pieces_at(changed.cpu().numpy(), rows[of_sign], columns[of_sign])
    return torch.as_tensor(asked, device=before.device)


def _resized(maps: torch.Tensor, size_hw: list[int]) -> torch.Tensor:
    """Return maps CxHxW in another size, if it differs."""
    if list(maps.shape[1:]) == size_hw:
        return maps
    return F.interpolate(maps[None], size=size_hw, mode="bilinear")[0]


def click_marks(points: torch.Tensor, signs: torch.Tensor, size_hw: Sequence[int]) -> torch.Tensor:
    """Draw the clicks on one class.

    Args:
        points: Nx2 as (x, y), in pixels.
        signs: N, 1 on the class and 0 off it.
        size_hw: height and width of the slice.

    Returns:
        3xHxW: discs on the class, discs off it, and both as smooth bumps of their sign.
    """
    device = points.device
    y, x = (torch.arange(size, device=device, dtype=torch.float) for size in size_hw)
    squares = (x - points[:, 0, None]).square()[:, None] + (y - points[:, 1, None]).square()[:, :, None]
    discs = (squares <= DISC_RADIUS_PX**2).float()
    bumps = torch.exp(-squares / (2 * _SURROUNDINGS_PX**2))
    on = (signs > 0).to(discs)[:, None, None]
    marks = [(discs * on).sum(0).clamp_max(1), (discs * (1 - on)).sum(0).clamp_max(1), (bumps * (2 * on - 1)).sum(0)]
    return torch.stack(marks)
