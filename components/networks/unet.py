"""The baseline without SAM: MONAI's UNet, trained from scratch or from pre-trained weights."""

from __future__ import annotations

import torch
from monai.networks.nets import BasicUNet
from torch import nn

from components.base.precision import autocast_to, check_precision
from components.base.weights import load_starting_weights, read_starting_weights

CONTRACTING_PATH = ("conv_0", "down_1", "down_2", "down_3", "down_4")


class GreyUNet(nn.Module):
    """Segment images with a UNet of four poolings, on the grey values of the RGB images that all networks here take.

    Source: MONAI's `BasicUNet`, after Ronneberger et al. 2015 (31M weights at `width` 64, as in the paper), with
    instance norm, since batches are small.

    Args:
        out_channels: classes, background included.
        width: channels at full size; they double with every pooling. 31.1M / 7.8M / 1.9M weights at 64 / 32 / 16.
        precision: as for `components.networks.PromptFreeSam`.
        start_checkpoint: a file to start from: another run's `model.pt`, or that of
            `components.networks.ContrastiveUNet`, which holds the contracting path alone; None for random weights.

    Raises:
        ValueError: for an unknown precision, or a file that cannot be read or does not fit.
        FileNotFoundError: when `start_checkpoint` is not there.
    """

    def __init__(
        self, out_channels: int, width: int = 64, precision: str = "auto", *, start_checkpoint: str | None = None
    ) -> None:
        super().__init__()
        check_precision(precision)
        self.precision = precision
        features = [width * times for times in (1, 2, 4, 8, 16, 1)]
        self.unet = BasicUNet(spatial_dims=2, in_channels=1, out_channels=out_channels, features=features)
        if start_checkpoint is not None:
            self._load_start(start_checkpoint)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            images: Bx3xHxW in 0..255, grey; only the first channel is used. H and W are 16 or more.

        Returns:
            raw logits BxCxHxW, fp32 if the weights are.
        """
        grey = grey_values(images)
        if torch.jit.is_scripting():  # noqa: SIM108 - only a statement keeps the other branch out of the script
            logits = self.unet(grey)
        else:
            logits = self._segment(grey)
        return logits

    @torch.jit.unused
    def _segment(self, grey: torch.Tensor) -> torch.Tensor:
        """Run the UNet in this network's precision."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self.unet(grey)
        with autocast_to(self.precision, grey.device.type):
            logits = self.unet(grey)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def _load_start(self, path: str) -> None:
        remedy = "give --start_checkpoint a file of a UNet with the same width and classes, or '$None' for none"
        state = read_starting_weights(
            path, kind="start checkpoint", remedy=remedy, is_key=lambda key: key.startswith(("unet.", "projection."))
        )
        own = {key: value for key, value in state.items() if not key.startswith("projection.")}
        contracting = {key for key in self.state_dict() if key.split(".")[1] in CONTRACTING_PATH}
        load_starting_weights(self, own, path=path, remedy=remedy, strict=own.keys() != contracting)


def grey_values(images: torch.Tensor) -> torch.Tensor:
    """Return the first channel of images Bx3xHxW in 0..255, scaled to -1..1: Bx1xHxW."""
    return images[:, :1] / 127.5 - 1
