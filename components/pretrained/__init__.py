"""Weights in the package: encoders, heads and UNets, trained on phantoms of hearts and on random shapes."""

from pathlib import Path


def pretrained_file(name: str) -> str:
    """Return the path of a file of weights in this package.

    Args:
        name: `phantom_unet.pth` (in SAM's own layout), `vit_head.pt`, `cnn_head.pt`, `linear_head.pt`,
            `deeplab_head.pt`, `click_head.pt`, `unet.pt`; or `general_unet.pth`, `general_linear_head.pt` or
            `general_click_head.pt`, for objects of any kind.

    Returns:
        its path.

    Raises:
        FileNotFoundError: if there is no such file; the message lists the existing ones.
    """
    folder = Path(__file__).parent
    present = sorted(path.name for path in folder.iterdir() if path.suffix in (".pth", ".pt"))
    if name not in present:
        raise FileNotFoundError(
            f"no pretrained file {name!r} in {folder}: expected one of {', '.join(present) or '(none is there)'}; "
            "bundles/phantom_encoder, unet_acdc and general_encoder make them"
        )
    return str(folder / name)
