"""What the encoders that `transformers` builds have in common."""

from typing import Any

import torch
from torch import nn


def import_transformers(family: str) -> Any:
    """Return the package `transformers`.

    Args:
        family: name of the encoders that need it, for the message.

    Raises:
        ImportError: if it is not installed or too old for them.
    """
    try:
        import transformers

        return transformers
    except ImportError as error:
        raise ImportError(
            f"the encoders of {family} need transformers 5.24 or later: pip install 'autosam-bundles[encoders]'"
        ) from error


class TransformersEncoder(nn.Module):
    """An image encoder made of modules of `transformers`, whose code torch.jit.script cannot read: it gets a trace.

    Args:
        image_size: side in pixels of the images that the trace takes.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    def __prepare_scriptable__(self) -> nn.Module:
        """Return a trace for `torch.jit.script`."""
        weight = next(self.parameters())
        images = torch.zeros(2, 3, self.image_size, self.image_size, dtype=weight.dtype, device=weight.device)
        return torch.jit.trace(self, images, check_trace=False)
