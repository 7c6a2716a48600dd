"""Make bundles from the template.

`python -m adapt new NAME --data FOLDER` makes one for your own data, as `autosam new` does; `python -m adapt bundles`
writes those for ACDC.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from adapt.new import acdc_bundles, new_bundle
from autosam.options import KNOB_OPTIONS, command_line


def new(
    name: str,
    data: str,
    output_dir: str = "bundles",
    network: str | None = None,
    encoder: str | None = None,
    checkpoint: str | None = None,
    classes: str | None = None,
    turned: str | None = None,
) -> None:
    """Make a bundle for your own labelled images.

    Args:
        name: name of the bundle.
        data: folder of dataset.json, images and labels, or of ACDC's layout.
        output_dir: where the bundle's folder is made.
        network: unet, or a head: linearhead, cnnhead, deeplabhead, autosam; by default the data decide.
        encoder: encoder of a head: vit_b, sam2.1_hiera_tiny, dinov3_vits, ...; by default a shipped one.
        checkpoint: its file, or the folder of the Hugging Face Hub; the knob sam_checkpoint of the configs.
        classes: names of the classes, in the order of the labels' values: a,b.
        turned: True or False, whether images may be mirrored and turned; by default the classes decide.

    Raises:
        ValueError: if an option is invalid, or as `new_bundle`.
        OSError: as `new_bundle`.
    """
    if turned not in (known := {None: None, "True": True, "False": False}):
        raise ValueError(f"expected --turned True or False, received {turned}")
    bundle, said = new_bundle(
        name,
        data,
        output_dir,
        network=network,
        model_type=encoder,
        sam_checkpoint=checkpoint,
        classes=classes,
        turned=known[turned],
    )
    print("\n".join(said))
    print(f"{bundle} is made\nnext:    autosam train {shlex.quote(str(Path(output_dir) / name))} --labelled 5")


def bundles() -> None:
    """Write the bundles for ACDC and the table of docs/knobs.md."""
    for path, text in acdc_bundles().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> None:
    """Run the command line."""
    try:
        command_line(__doc__, new, bundles, positional=("name",), aliases=KNOB_OPTIONS)(prog_name="adapt")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
