"""The swap of a class and the background in a network's outputs."""

import torch
from torch import Tensor

BACKGROUND = 0


def swap_with_background(outputs: Tensor, label: int, where: Tensor) -> Tensor:
    """Swap the outputs of a class and the background, so that probabilities keep their sum.

    Args:
        outputs: logits or probabilities CxHxWxD, background first.
        label: the class.
        where: HxWxD, the voxels to change.

    Returns:
        new outputs CxHxWxD.
    """
    swapped = outputs.clone()
    swapped[BACKGROUND] = torch.where(where, outputs[label], outputs[BACKGROUND])
    swapped[label] = torch.where(where, outputs[BACKGROUND], outputs[label])
    return swapped
