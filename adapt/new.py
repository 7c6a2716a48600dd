"""A bundle for a user's own data, made from the template."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from string import Template
from typing import Any

from adapt.layouts import read_layout
from adapt.survey import survey

TEMPLATE = Path(__file__).parent / "template"


def new_bundle(
    name: str, data: str | os.PathLike[str], output_dir: str | os.PathLike[str] = "bundles"
) -> tuple[Path, list[str]]:
    """Write a bundle that trains, evaluates and infers on the labelled images of a folder.

    Args:
        name: of the bundle and of its folder; letters, digits and underscores.
        data: the folder, see `adapt.layouts.read_layout`.
        output_dir: where the bundle's folder is made.

    Returns:
        the bundle's folder, and sentences on what was seen and chosen.

    Raises:
        ValueError: for another name, or data that cannot be used.
        FileExistsError: when the bundle is there already.
        FileNotFoundError: when the data are not there.
    """
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"expected a name of letters, digits and underscores, received {name!r}")
    bundle = Path(output_dir) / name
    if bundle.exists():
        raise FileExistsError(f"{bundle} is there already: remove it, or give another name")
    folder = Path(os.path.abspath(data))  # noqa: PTH100  # links are followed, and stay as they are named
    description, said = survey(read_layout(folder), folder)
    shutil.copytree(TEMPLATE, bundle, ignore=shutil.ignore_patterns("__pycache__"))
    lines = [f"    {json.dumps(key)}: {_value(value)}" for key, value in description.items()]
    (bundle / "configs/data.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    metadata_file = bundle / "configs/metadata.json"
    metadata = _metadata(json.loads(metadata_file.read_text()), name, description)
    metadata_file.write_text(json.dumps(metadata, indent=4) + "\n")
    readme = bundle / "docs/README.md"
    summary = "\n".join(f"- {sentence}" for sentence in said)
    channels = metadata["network_data_format"]["inputs"]["image"]["num_channels"]
    text = Template(readme.read_text()).safe_substitute(name=name, summary=summary, channels=channels)
    readme.write_text(text)
    return bundle, said


def _value(value: Any) -> str:
    """Return JSON of one line, or of one line for each case of a list of cases."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"        {json.dumps(item)}" for item in value) + "\n    ]"
    return json.dumps(value)


def _metadata(metadata: dict[str, Any], name: str, description: dict[str, Any]) -> dict[str, Any]:
    """Return a bundle's metadata with what its data are."""
    classes = description["class_names"]
    kind = "2D pictures" if description["pictures"] else "3D volumes"
    label_map = ", ".join(f"{index} {each}" for index, each in enumerate(["background", *classes]))
    metadata |= {
        "name": name,
        "task": f"Segmentation of {', '.join(classes)} in {kind}",
        "authors": "the user of python -m adapt new",
        "copyright": "the user's; the template: Apache License 2.0",
        "data_source": "the user's own, see configs/data.json",
        "data_type": "Pillow" if description["pictures"] else "nibabel",
        "image_classes": f"{kind}, {'grey values' if description['channels'] == 1 else 'colours'} of any range",
        "label_classes": f"label map: {label_map}",
        "pred_classes": f"label map: {label_map}",
    }
    formats = metadata["network_data_format"]
    channels = {1: ["grey"], 3: ["red", "green", "blue"]}[description["channels"]]
    if not description["pictures"]:
        channels = ["slice before", "slice", "slice after"]
    formats["inputs"]["image"] |= {
        "modality": description["modality"] or "n/a",
        "num_channels": len(channels),
        "channel_def": {str(index): each for index, each in enumerate(channels)},
    }
    formats["outputs"]["pred"]["num_channels"] = len(classes) + 1
    formats["outputs"]["pred"]["channel_def"] = {
        str(index): each for index, each in enumerate(["background", *classes])
    }
    return metadata
