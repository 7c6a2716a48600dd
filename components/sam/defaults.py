"""The default checkpoint and image size of a bundle's image encoder."""

import math
from pathlib import Path

from components.pretrained import pretrained_file
from components.sam.encoders import SHIPPED, encoder_type, page_of, published_encoders


def default_checkpoint(models_dir: str, model_type: str) -> str:
    """Return the path at which a bundle expects the checkpoint of a model type.

    Args:
        models_dir: the bundle's `models` folder.
        model_type: one whose published file belongs there, or one of `SHIPPED`, which come with the package.

    Returns:
        the path, whether or not a published file is there.

    Raises:
        ValueError: if the model type has no file that anyone can download.
    """
    if model_type in SHIPPED:
        return pretrained_file(f"{model_type}.pth")
    published = published_encoders()
    if model_type not in published:
        page = page_of(model_type)
        raise ValueError(
            f"no published checkpoint has model_type {model_type!r} (published: {', '.join(published)}): "
            + (f"get its file from {page} and " if page else "")
            + "give --sam_checkpoint a file, or '$None' for an encoder with random weights"
        )
    return str(Path(models_dir) / str(published[model_type].file))


def default_image_size(model_type: str, crop_size: int) -> int:
    """Return the side to which an encoder resizes images by default.

    Args:
        model_type: as for `components.sam.SamEncoder`.
        crop_size: side of the images, in pixels.

    Returns:
        the side at which the encoder was trained, such as 1024 for SAM's encoders. For those with tokens of 4x4 pixels,
        the images' own side, rounded up to the encoder's multiple. With `phantom_unet` on hippocampi of 40 pixels,
        enlarging by 1.5 gave the same validation Dice, and by 3 a lower one.

    Raises:
        ValueError: if there is no such encoder.
    """
    entry = encoder_type(model_type)
    return entry.default_size or entry.size_multiple * math.ceil(crop_size / entry.size_multiple)
