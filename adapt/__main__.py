"""Make a bundle for one's own data: `python -m adapt new NAME --data FOLDER --output_dir DIR`."""

import argparse
import sys
from collections.abc import Sequence

from adapt.new import new_bundle


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="adapt", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="write a bundle for a folder of labelled images")
    new.add_argument("name", help="of the bundle")
    new.add_argument("--data", required=True, help="folder with a dataset.json, or with folders images and labels")
    new.add_argument("--output_dir", default="bundles", help="where the bundle's folder is made (default: bundles)")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the command line."""
    options = parse_arguments()
    try:
        bundle, said = new_bundle(options.name, options.data, options.output_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print("\n".join(said))
    print(
        f"\n{bundle} is made. From inside it:\n"
        "  python -m monai.bundle run training --config_file configs/train.json --labelled_cases 5\n"
        "  python -m monai.bundle run evaluating --config_file \"['configs/train.json','configs/evaluate.json']\"\n"
        "  python -m monai.bundle run inferring --config_file configs/inference.json --dataset_dir FOLDER"
    )


if __name__ == "__main__":
    main()
