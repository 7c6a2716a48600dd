"""Pre-training of the UNet's contracting path without labels, by SimCLR (Chen et al. 2020)."""

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
        transform: the augmentation; takes and returns a dictionary with `image`.
    """

    def __init__(self, transform: Callable[[dict], dict]) -> None:
        self.transform = transform

    def set_random_state(self, seed: int | None = None, state: Any = None) -> TwoViews:
        """Seed the augmentation."""
        if isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed=seed, state=state)
        return self

    def randomize(self, data: Any) -> None:
        """Do nothing: the augmentation draws its own random numbers."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[str, Any]:
        """Return two views of `data["image"]` as `image` and `other`."""
        first, second = (self.transform({"image": data["image"].clone()})["image"] for _ in range(2))
        return {"image": first, "other": second}


class ContrastiveUNet(nn.Module):
    """Map images to vectors for a contrastive loss: a UNet's contracting path, global max pooling, two linear layers.

    Max pooling replaces mean pooling, because the path ends on an instance norm. After it every channel of every image
    has nearly the same mean. The path's keys in the state dict are those of `components.networks.GreyUNet`, which
    accepts a checkpoint of this network as its `start_checkpoint`.

    Args:
        width: as for `components.networks.GreyUNet`.
        precision: as for `components.networks.PromptFreeSam`.
        dimension: length of the vectors.

    Raises:
        ValueError: if the precision is unknown.
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
            images: Bx3xHxW in 0..255, grey; only the first channel is used.

        Returns:
            vectors Bx`dimension`, fp32.
        """
        features = grey_values(images)
        with autocast_to(self.precision, images.device.type):
            for name in CONTRACTING_PATH:
                features = self.unet[name](features)
            return self.projection(features.amax((2, 3))).float()
