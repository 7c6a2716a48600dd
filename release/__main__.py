"""Package every bundle.

From the repository's root: `python -m release --output_dir dist` for archives that segment the moment they are
unpacked, on the tiny encoder; `--model_type vit_b` (`vit_l`, `vit_h`) for the paper's form, on SAM's own weights,
or `vit_t` on MobileSAM's. `--bundle FOLDER` for a trained bundle that `python -m adapt new` has made.
`--huggingface DIR` writes folders to push to the Hugging Face Hub.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fire

from release.archives import write_archive, write_model_info
from release.bundles import TINY, assemble, assemble_own, bundles_of, check_release_facts, own_bundle
from release.huggingface import write_repository

logger = logging.getLogger("release")


def build(
    output_dir: str | None = None,
    model_type: str = TINY,
    bundle: str | None = None,
    head: str | None = None,
    sam_checkpoint: str | None = None,
    base_url: str = "",
    huggingface: str | None = None,
) -> None:
    """Write `<bundle>_v<version>.zip` of every bundle, and `model_info.json` with their checksums; or for the Hub.

    The same sources give the same bytes.

    Args:
        output_dir: folder of the archives, made if missing; None for no archives.
        model_type: `phantom_unet` for archives with the tiny encoder and a head inside, and for the other bundles;
            `vit_b`, `vit_l`, `vit_h` or `vit_t` for archives named `<bundle>_<model_type>` that download SAM's
            checkpoint, or MobileSAM's.
        bundle: package this one only; also the folder of a bundle for one's own data, with the model it has trained.
        head: a trained `model.pt` to put into the archive of `bundle`, on the encoder of this `model_type`.
        sam_checkpoint: the file that `head` was trained on, where that is not the tiny encoder.
        base_url: address at which the archives will lie; `model_info.json` points there.
        huggingface: folder in which each bundle becomes a folder that is ready to push to the Hugging Face Hub.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if output_dir is None and huggingface is None:
        raise ValueError("expected a folder to write to: give --output_dir DIR for archives, or --huggingface DIR")
    own = own_bundle(bundle) if bundle else None
    if own and (model_type != TINY or head or sam_checkpoint):
        raise ValueError(
            f"{own} has no encoder, and its own model is packed: expected neither model_type, head nor sam_checkpoint"
        )
    if own:
        assemblies: list[Callable[[Path], Path]] = [partial(assemble_own, own)]
    else:
        check_release_facts()
        names = bundles_of(model_type, bundle)
        if head is not None and len(names) != 1:
            raise ValueError(f"a head belongs to one bundle: say which of {', '.join(names)} with --bundle")
        assemblies = [
            partial(assemble, name, model_type=model_type, head=head, sam_checkpoint=sam_checkpoint) for name in names
        ]
    archives = []
    for write_files in assemblies:
        with tempfile.TemporaryDirectory() as folder:
            root = write_files(Path(folder))
            version = json.loads((root / "configs/metadata.json").read_text())["version"]
            if huggingface is not None:
                logger.info("%s", write_repository(root, Path(huggingface)))
            if output_dir is not None:
                archives.append(write_archive(root, Path(output_dir) / f"{root.name}_v{version}.zip"))
                logger.info("%s: %.1f MB", archives[-1], archives[-1].stat().st_size / 1e6)
    if output_dir is not None:
        logger.info("%s", write_model_info(archives, Path(output_dir) / "model_info.json", base_url=base_url))


if __name__ == "__main__":
    fire.Fire(build)
