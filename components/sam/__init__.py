"""Segment Anything: its checkpoints, image encoder and decoder, in faster forms."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "defaults": ["default_checkpoint", "default_image_size"],
        "encoder": ["SamEncoder"],
    },
)
