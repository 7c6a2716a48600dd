"""Package every bundle.

From the repository's root: `python -m release --output_dir dist` for archives that segment as soon as they are
unpacked; `--model_type vit_b` (`vit_l`, `vit_h`, `vit_t`) for the paper's form, on SAM's own weights. `--bundle FOLDER`
packages a trained bundle of `autosam new`. `--huggingface DIR` writes folders for the Hugging Face Hub.
`--pictures` draws the pictures of the cards anew.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

from adapt.template import SHIPPED_ENCODER, encoders, networks
from autosam.options import command_line
from release.archives import write_archive, write_model_info
from release.bundles import PACKED, assemble, check_release_facts, own_bundle, picture_of, take_encoder_along
from release.huggingface import write_repository
from release.picture import CORRECTION, draw_correction, draw_picture

logger = logging.getLogger("release")


def build(
    output_dir: str | None = None,
    model_type: str = SHIPPED_ENCODER,
    bundle: str | None = None,
    model: str | None = None,
    encoder_url: str = "",
    base_url: str = "",
    huggingface: str | None = None,
    pictures: bool = False,
) -> list[Path]:
    """Write `<bundle>_v<version>.zip` of every bundle and `model_info.json` with checksums, or folders for the Hub.

    The same sources give the same bytes.

    Args:
        output_dir: folder of the archives, made if missing; None for no archives.
        model_type: `phantom_unet` for archives with the shipped weights; `vit_b`, `vit_l`, `vit_h` or `vit_t` for
            archives named `<bundle>_<model_type>` that download SAM's checkpoint, or MobileSAM's.
        bundle: the only bundle to package, by name, or by folder for a user's own data.
        model: a trained `model.pt` for the archive of `bundle`; None for the package's, or for the one that a bundle
            for a user's own data has trained.
        encoder_url: address of the file of your own encoder, if it is too large for an archive.
        base_url: address of the archives, for `model_info.json`.
        huggingface: folder in which each bundle becomes a folder that is ready to push to the Hugging Face Hub.
        pictures: whether to draw the pictures of the cards anew first, into `release/pictures`, and that
            of `docs/correcting.md`.

    Returns:
        the archives.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if pictures:
        for name in PACKED:
            logger.info("%s", draw_picture(name, picture_of(name)))
        logger.info("%s", draw_correction(CORRECTION))
    elif output_dir is None and huggingface is None:
        raise ValueError("expected a folder to write to: give --output_dir DIR for archives, or --huggingface DIR")
    if model_type not in (known := (SHIPPED_ENCODER, *encoders())):
        raise ValueError(f"unknown model_type {model_type!r}: expected one of {', '.join(known)}")
    if bundle is None or not own_bundle(bundle):
        check_release_facts()
    with_encoder = [f"{name}_acdc" for name, network in networks().items() if network["kind"] == "encoder"]
    names = [bundle] if bundle else PACKED if model_type == SHIPPED_ENCODER else with_encoder
    if model is not None and len(names) != 1:
        raise ValueError(f"a model belongs to one bundle: choose one of {', '.join(names)} with --bundle")
    archives: list[Path] = []
    if output_dir is None and huggingface is None:
        return archives
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            root = assemble(name, Path(folder), model_type=model_type, model=model)
            take_encoder_along(root, encoder_url)
            version = json.loads((root / "configs/metadata.json").read_text())["version"]
            if huggingface is not None:
                logger.info("%s", write_repository(root, Path(huggingface)))
            if output_dir is not None:
                archives.append(write_archive(root, Path(output_dir) / f"{root.name}_v{version}.zip"))
                logger.info("%s: %.1f MB", archives[-1], archives[-1].stat().st_size / 1e6)
    if output_dir is not None:
        logger.info("%s", write_model_info(archives, Path(output_dir) / "model_info.json", base_url=base_url))
    return archives


if __name__ == "__main__":
    command_line(__doc__, build)()
