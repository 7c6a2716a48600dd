"""The baseline without SAM: MONAI's UNet, trained from scratch or from pre-trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.networks.nets import BasicUNet
from torch import nn

from components.base.export import in_export
from components.base.layers import use_faster_layers
from components.base.precision import autocast_to, check_precision
from components.base.weights import load_starting_weights, read_starting_weights
from components.networks.trained_with import attach_training_record, check_trained_views

CONTRACTING_PATH = ("conv_0", "down_1", "down_2", "down_3", "down_4")


class GreyUNet(nn.Module):
    """Segment images with a UNet of four poolings, on the grey values or the colours of RGB images.

    Source: MONAI's `BasicUNet`, after Ronneberger et al. 2015 (31M weights at `width` 64, as in the paper). It has
    instance norm, since batches are small.

    Args:
        out_channels: classes, background included.
        width: channels at full size; they double with every pooling. 31.1M / 7.8M / 1.9M weights at 64 / 32 / 16.
        precision: as for `components.networks.PromptFreeSam`.
        in_channels: 1 for grey values, 3 for colours or for a slice between its neighbours.
        start_checkpoint: another run's `model.pt` to start from; None for random weights. A `model.pt` of
            `components.networks.ContrastiveUNet` holds the contracting path only.
        trained_with: as for `components.networks.PromptFreeSam`.

    Raises:
        ValueError: if the precision is unknown, a file cannot be read or does not fit, or there are more test-time
            views than training shows.
        FileNotFoundError: if `start_checkpoint` is missing.
    """

    def __init__(
        self,
        out_channels: int,
        width: int = 64,
        precision: str = "auto",
        *,
        in_channels: int = 1,
        start_checkpoint: str | None = None,
        trained_with: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_precision(precision)
        self.precision = precision
        self.in_channels = in_channels
        features = [width * times for times in (1, 2, 4, 8, 16, 1)]
        self.unet = BasicUNet(spatial_dims=2, in_channels=in_channels, out_channels=out_channels, features=features)
        use_faster_layers(self.unet)
        attach_training_record(self, trained_with)
        if start_checkpoint is not None:
            self._load_start(start_checkpoint)
        check_trained_views(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            images: Bx3xHxW in 0..255; the first `in_channels` are used. H and W are 16 or more.

        Returns:
            raw logits BxCxHxW, fp32 if the weights are.
        """
        values = grey_values(images, self.in_channels)
        if torch.jit.is_scripting():  # noqa: SIM108 - only a statement keeps the other branch out of the script
            logits = self.unet(values)
        else:
            logits = self._segment(values)
        return logits

    @torch.jit.unused
    def _segment(self, values: torch.Tensor) -> torch.Tensor:
        """Run the UNet in this network's precision."""
        if in_export():
            return self.unet(values)
        with autocast_to(self.precision, values.device.type):
            logits = self.unet(values)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def _load_start(self, path: str) -> None:
        remedy = "give --start_checkpoint a file of a UNet with the same width and classes, or '$None' for none"
        state = read_starting_weights(
            path,
            kind="start checkpoint",
            remedy=remedy,
            is_key=lambda key: key.startswith(("unet.", "projection.", "trained_with")),
        )
        own = {key: value for key, value in state.items() if not key.startswith("projection.")}
        contracting = {f"unet.{key}" for key in self.unet.state_dict() if key.split(".")[0] in CONTRACTING_PATH}
        is_whole = own.keys() != contracting
        if not is_whole:  # weights trained without these classes have no record of them
            own["trained_with"] = self.get_buffer("trained_with")
        load_starting_weights(self, own, path=path, remedy=remedy, strict=is_whole)


def grey_values(images: torch.Tensor, channels: int = 1) -> torch.Tensor:
    """Return the first channels of images Bx3xHxW in 0..255, scaled to -1..1: Bx1xHxW, or Bx3xHxW for colours."""
    return images[:, :channels] / 127.5 - 1
