"""Faster forms of torch's layers and functions for a CPU."""

import torch
import torch.nn.functional as F
from torch import nn

from components.base.export import in_export


class MaxPool2x2(nn.Module):
    """Halve an image by the largest of 2x2 pixels.

    Source: `torch.nn.MaxPool2d(2)`. Differs: on a CPU, without gradients, it compares four shifted images, which takes
    a small part of the time. The numbers are the same.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Halve images.

        Args:
            images: BxCxHxW, H and W of 2 or more. The last of an odd number of rows or columns is left out.

        Returns:
            BxCx(H//2)x(W//2).
        """
        if torch.jit.is_scripting():  # noqa: SIM108 - only a statement keeps the other branch out of the script
            halved = F.max_pool2d(images, 2)
        else:
            halved = self._halve(images)
        return halved

    @torch.jit.unused
    def _halve(self, images: torch.Tensor) -> torch.Tensor:
        if images.requires_grad or not _computes_here(images):
            return F.max_pool2d(images, 2)
        height, width = (side // 2 * 2 for side in images.shape[-2:])
        rows = torch.maximum(images[..., :height:2, :], images[..., 1:height:2, :])
        return torch.maximum(rows[..., :width:2], rows[..., 1:width:2])


class InstanceNorm2d(nn.InstanceNorm2d):
    """Normalise each channel of each image.

    Source: `torch.nn.InstanceNorm2d` without running statistics. Differs: on a CPU it is a group norm with a group for
    each channel, which has a faster kernel. The numbers differ by rounding.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images BxCxHxW; the shape stays."""
        if torch.jit.is_scripting():
            normalised = F.instance_norm(images, None, None, self.weight, self.bias, True, 0.0, self.eps)
        else:
            normalised = self._normalise(images)
        return normalised

    @torch.jit.unused
    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        if not _computes_here(images):
            return super().forward(images)
        return F.group_norm(images, self.num_features, self.weight, self.bias, self.eps)


def use_faster_layers(network: nn.Module) -> None:
    """Replace poolings and instance norms of MONAI's UNet blocks, in place; names and values of the weights stay.

    Raises:
        ValueError: if a layer has settings that the faster form lacks.
    """
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.MaxPool2d:
                settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
                if settings != (2, 2, 0, 1, False):
                    raise ValueError(f"expected a pooling of 2x2 pixels, received {layer}")
                setattr(parent, name, MaxPool2x2())
            elif type(layer) is nn.InstanceNorm2d:
                if layer.track_running_stats or not layer.affine:
                    raise ValueError(
                        f"expected an instance norm with weights and no running statistics, received {layer}"
                    )
                faster = InstanceNorm2d(layer.num_features, eps=layer.eps, affine=True)
                faster.weight, faster.bias = layer.weight, layer.bias
                setattr(parent, name, faster)


def _computes_here(images: torch.Tensor) -> bool:
    """Return whether a CPU computes the layer now, instead of torch recording it for another engine."""
    return images.device.type == "cpu" and not in_export()


def largest_channel(maps: torch.Tensor, dim: int, *, keepdim: bool = False) -> torch.Tensor:
    """Return the index of the largest channel, the first of equal ones.

    Source: `torch.argmax`. Differs: it is `torch.max`, which a CPU computes several times as fast.

    Args:
        maps: logits or probabilities of any shape.
        dim: the dimension of the channels.
        keepdim: whether this dimension stays, with one channel.
    """
    return maps.max(dim=dim, keepdim=keepdim).indices
