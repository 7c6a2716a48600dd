"""The default checkpoint and image size of a bundle's image encoder."""

import math
from pathlib import Path

from components.pretrained import pretrained_file
from components.sam.checkpoint import CHECKPOINT_FILES
from components.sam.image_encoder import PATCH_SIZE
from components.sam.sam2_encoder import SAM2_ARCHITECTURES, SIZE_MULTIPLE

PHANTOM_UNET = "phantom_unet"  # the encoder that comes with the package
SAM_SIZE = 1024


def default_checkpoint(models_dir: str, model_type: str) -> str:
    """Return the path at which a bundle expects the checkpoint of a model type.

    Args:
        models_dir: the bundle's `models` folder.
        model_type: `vit_b`, `vit_l`, `vit_h`, `vit_t` or one of SAM 2.1, whose published file belongs there; or
            `phantom_unet`, which comes with the package.

    Returns:
        the path, whether or not a published file is there.

    Raises:
        ValueError: if the model type has no published checkpoint.
    """
    if model_type == PHANTOM_UNET:
        return pretrained_file(f"{PHANTOM_UNET}.pth")
    if model_type not in CHECKPOINT_FILES:
        raise ValueError(
            f"no published SAM checkpoint has model_type {model_type!r} (published: {', '.join(CHECKPOINT_FILES)}): "
            "give --sam_checkpoint a file, or '$None' for an encoder with random weights"
        )
    return str(Path(models_dir) / CHECKPOINT_FILES[model_type])


def size_multiple(model_type: str) -> int:
    """Return the number of pixels of which the side of an encoder's images is a multiple."""
    return SIZE_MULTIPLE if model_type in SAM2_ARCHITECTURES else PATCH_SIZE


def default_image_size(model_type: str, crop_size: int) -> int:
    """Return the side to which an encoder resizes images by default.

    Args:
        model_type: as for `components.sam.SamEncoder`.
        crop_size: side of the images, in pixels.

    Returns:
        1024 for SAM's encoders, with tokens of 16x16 pixels. For `phantom_unet`, with tokens of 4x4 pixels, the images'
        own side, rounded up to a multiple of 16. On hippocampi of 40 pixels, enlarging by 1.5 gave the same validation
        Dice, and by 3 a lower one. For SAM 2.1, with tokens of 4x4 pixels too, rounded up to a multiple of 32.
    """
    if model_type != PHANTOM_UNET and model_type not in SAM2_ARCHITECTURES:
        return SAM_SIZE
    multiple = size_multiple(model_type)
    return multiple * math.ceil(crop_size / multiple)
