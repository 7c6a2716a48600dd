"""An image encoder with SAM's interface and embeddings fine enough for thin walls: a UNet cut off at stride 4."""

from itertools import pairwise

import torch
from monai.networks.nets.basic_unet import Down, TwoConv, UpCat
from torch import nn

from components.base.layers import use_faster_layers
from components.sam.image_encoder import EMBEDDING_CHANNELS

WIDTH = 16  # channels at full size; they double with every pooling
FINE_CHANNELS = 128  # at stride 4, before the neck
_ACTIVATION = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})
_NORM = ("instance", {"affine": True})


class UNetEncoder(nn.Module):
    """A UNet from pixels to embeddings at a quarter of the image's size.

    A token of SAM's own encoder covers 16x16 pixels. On a heart at 192 pixels that is wider than the myocardium is
    thick; here a token covers 4x4. The blocks are those of MONAI's `BasicUNet`, after Ronneberger et al. 2015, with
    instance norm: down to stride 16, up again to stride 4.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH * 2**level for level in range(5)]
        self.stem = TwoConv(2, 3, widths[0], act=_ACTIVATION, norm=_NORM, bias=True)
        self.down = nn.ModuleList(
            Down(2, fine, coarse, act=_ACTIVATION, norm=_NORM, bias=True) for fine, coarse in pairwise(widths)
        )
        self.up_8 = UpCat(2, widths[4], widths[3], widths[3], act=_ACTIVATION, norm=_NORM, bias=True)
        self.up_4 = UpCat(2, widths[3], widths[2], FINE_CHANNELS, act=_ACTIVATION, norm=_NORM, bias=True)
        self.neck = nn.Sequential(
            nn.Conv2d(FINE_CHANNELS, EMBEDDING_CHANNELS, kernel_size=1, bias=False),
            nn.GroupNorm(1, EMBEDDING_CHANNELS),
        )
        use_faster_layers(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode normalised images.

        Args:
            x: images Bx3xHxW, H and W multiples of 16.

        Returns:
            embeddings Bx256x(H/4)x(W/4).
        """
        x = self.stem(x)
        features = []
        for down in self.down:
            x = down(x)
            features.append(x)
        return self.neck(self.up_4(self.up_8(features[3], features[2]), features[1]))
