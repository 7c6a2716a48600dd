"""Pre-training of the UNet without labels: SimCLR (Chen et al. 2020) on its contracting path."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from monai.transforms import Randomizable
from torch import nn

from components.base.precision import autocast_to, check_precision
from components.networks.unet import CONTRACTING_PATH, GreyUNet, grey_values


class TwoViews(Randomizable):
    """Two augmented views of an image, drawn independently.

    Args:
        transform: the augmentation, of a dictionary with `image`.
    """

    def __init__(self, transform: Callable[[dict], dict]) -> None:
        self.transform = transform

    def set_random_state(self, seed: int | None = None, state: Any = None) -> TwoViews:
        """Seed the augmentation."""
        if isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed=seed, state=state)
        return self

    def randomize(self, data: Any) -> None:
        """Do nothing: the augmentation draws for itself."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[str, Any]:
        """Return `image` and `other`, two views of the image of `data`."""
        first, second = (self.transform({"image": data["image"].clone()})["image"] for _ in range(2))
        return {"image": first, "other": second}


class ContrastiveUNet(nn.Module):
    """From images to vectors that tell them apart: a UNet's contracting path, its maxima over space, two linear layers.

    Maxima, not means: the path ends on an instance norm, which leaves nearly the same mean in every channel and image.
    Its checkpoints name the path as `components.networks.GreyUNet` does, which takes them for its `start_checkpoint`.

    Args:
        width: of the UNet.
        precision: as of `components.networks.PromptFreeSam`.
        dimension: of the vectors.

    Raises:
        ValueError: for another precision.
    """

    def __init__(self, width: int = 64, precision: str = "auto", *, dimension: int = 128) -> None:
        super().__init__()
        check_precision(precision)
        self.precision = precision
        whole = GreyUNet(1, width).unet
        self.unet = nn.ModuleDict({name: getattr(whole, name) for name in CONTRACTING_PATH})
        features = 16 * width
        self.projection = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dimension))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images.

        Args:
            images: Bx3xHxW in 0..255, grey: the first channel counts.

        Returns:
            vectors Bx`dimension`, fp32.
        """
        features = grey_values(images)
        with autocast_to(self.precision, images.device.type):
            for name in CONTRACTING_PATH:
                features = self.unet[name](features)
            return self.projection(features.amax((2, 3))).float()
