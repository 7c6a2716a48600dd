"""Make bundles from the template.

`python -m adapt new NAME --data FOLDER` makes one for your own data; `python -m adapt bundles` writes those for ACDC.
"""

import argparse
import sys
from collections.abc import Sequence

from adapt.new import DEFAULT_NETWORK, acdc_bundles, new_bundle
from adapt.template import SHIPPED_ENCODER, networks


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="adapt", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="write a bundle for a folder of labelled images")
    new.add_argument("name", help="of the bundle")
    new.add_argument("--data", required=True, help="folder: dataset.json, images and labels, or ACDC's layout")
    new.add_argument("--output_dir", default="bundles", help="where the bundle's folder is made (default: bundles)")
    new.add_argument("--network", default=DEFAULT_NETWORK, choices=list(networks()), help="(default: %(default)s)")
    new.add_argument("--model_type", default=SHIPPED_ENCODER, help="encoder: vit_b, ... (default: %(default)s)")
    new.add_argument("--sam_checkpoint", help="file of the encoder, such as SAM's, MobileSAM's, MedSAM's, micro-sam's")
    new.add_argument("--classes", metavar="NAME,NAME", help="names of the classes, in the order of the labels' values")
    new.add_argument(
        "--turned",
        choices=["True", "False"],
        help="whether images may be mirrored and turned (default: by the classes)",
    )
    commands.add_parser("bundles", help="write the bundles for ACDC and the table of docs/knobs.md")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the command line."""
    options = vars(parse_arguments())
    if options.pop("command") == "bundles":
        for path, text in acdc_bundles().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return
    options["turned"] = {"True": True, "False": False}.get(options["turned"])
    try:
        bundle, said = new_bundle(**options)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    others = ", ".join(name for name in networks() if name != options["network"])
    print("\n".join(said))
    print(
        f"the network is {options['network']}; --network also takes {others}\n\n"
        f"{bundle} is made. From inside it:\n"
        "  python -m monai.bundle run training --config_file configs/train.json --labelled_cases 5\n"
        "  python -m monai.bundle run evaluating --config_file \"['configs/train.json','configs/evaluate.json']\"\n"
        "  python -m monai.bundle run inferring --config_file configs/inference.json --dataset_dir FOLDER"
    )


if __name__ == "__main__":
    main()
