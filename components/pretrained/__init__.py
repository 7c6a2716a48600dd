"""Weights that come with the package, trained on phantoms: an encoder, a start for each head, a UNet; one on shapes."""

from pathlib import Path


def pretrained_file(name: str) -> str:
    """Return the path of a file of weights in this package.

    Args:
        name: `phantom_unet.pth` (in SAM's own layout), `vit_head.pt`, `cnn_head.pt`, `linear_head.pt`,
            `unet.pt`, or `shape_unet.pt`, which knows objects of any kind.

    Returns:
        its path.

    Raises:
        FileNotFoundError: when there is no such file; its message lists the existing ones.
    """
    folder = Path(__file__).parent
    present = sorted(path.name for path in folder.iterdir() if path.suffix in (".pth", ".pt"))
    if name not in present:
        raise FileNotFoundError(
            f"no pretrained file {name!r} in {folder}: expected one of {', '.join(present) or '(none is there)'}; "
            "bundles/phantom_encoder, unet_acdc and shape_unet make them"
        )
    return str(folder / name)
