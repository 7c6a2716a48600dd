"""A bundle for a user's own data, and the bundles for ACDC, made from the template."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from adapt.layouts import combine_masks, read_layout
from adapt.survey import survey
from adapt.template import SHIPPED_ENCODER, Instance, knobs_page, needs_sam_decoder, networks
from autosam.folders import DATA_FILE
from components.data.acdc import CLASS_NAMES
from components.data.custom_data import LARGEST_CANVAS, patch_side
from components.sam.checkpoint import weights_file
from components.sam.defaults import default_image_size
from components.sam.encoder import SamEncoder
from components.sam.encoders import ENCODERS, GENERAL_UNET, SAM_SIZE, page_of

REPOSITORY = Path(__file__).parents[1]
FROM_SCRATCH, ON_AN_ENCODER = "unet", "linearhead"  # the networks of volumes and pictures, unless a user chooses


def new_bundle(
    name: str,
    data: str | os.PathLike[str],
    output_dir: str | os.PathLike[str] = "bundles",
    *,
    network: str | None = None,
    model_type: str | None = None,
    sam_checkpoint: str | None = None,
    classes: str | None = None,
    turned: bool | None = None,
) -> tuple[Path, list[str]]:
    """Write a bundle that trains, evaluates and infers on the labelled images of a folder.

    Args:
        name: name of the bundle and its folder; letters, digits and underscores.
        data: the folder, see `adapt.layouts.read_layout`. Masks of single organs become label maps in a folder
            `<name>_data` beside the bundle, see `adapt.layouts.combine_masks`.
        output_dir: where the bundle's folder is made.
        network: name of an entry of `networks.json`; None for `unet` on volumes, and for `linearhead` on pictures or on
            an encoder that is given.
        model_type: the encoder below a head; None for what comes with the package, for pictures `general_unet` below
            heads that take any encoder, else `phantom_unet`.
        sam_checkpoint: file of that encoder, or a folder of the Hugging Face Hub with its `model.safetensors`;
            None for the published one in the bundle's `models` folder.
        classes: names of the classes with commas between them, in the order of the labels' values; None for those of
            the data.
        turned: whether images are mirrored and turned; None to decide by the classes.

    Returns:
        the absolute path of the bundle's folder, and sentences on the data and the chosen settings.

    Raises:
        ValueError: if the name, network, encoder or data are invalid, or the file does not fit the encoder.
        FileExistsError: if the bundle already exists.
        FileNotFoundError: if the data or the encoder's file are missing.
    """
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"expected a name of letters, digits and underscores, received {name!r}")
    bundle = Path(os.path.abspath(output_dir)) / name  # noqa: PTH100  # symbolic links stay in the path
    if bundle.exists():
        raise FileExistsError(f"{bundle} already exists: remove it, or choose another name")
    sam_checkpoint = None if sam_checkpoint is None else weights_file(sam_checkpoint)
    if sam_checkpoint is not None and not Path(sam_checkpoint).is_file():
        page = page_of(model_type)
        raise FileNotFoundError(
            f"there is no encoder checkpoint {sam_checkpoint}: give --checkpoint FILE{page and f', from {page}'}"
        )
    chosen = model_type or SHIPPED_ENCODER
    file = None if sam_checkpoint is None else os.path.abspath(sam_checkpoint)  # noqa: PTH100
    encoder: dict[str, Any] = {"model_type": chosen, "sam_checkpoint": file}
    if network is None and (model_type, sam_checkpoint) != (None, None):
        network = ON_AN_ENCODER
    if network is not None:  # check the arguments before the data are read
        Instance(network, cases="custom", hearts=False, **encoder)
    if sam_checkpoint is not None:
        SamEncoder(chosen, sam_checkpoint, default_image_size(chosen, crop_size=SAM_SIZE))
    folder = Path(os.path.abspath(data))  # noqa: PTH100  # symbolic links stay in the path
    names = None if classes is None else [each.strip() for each in classes.split(",")]
    combined = bundle.with_name(f"{name}_data")
    written = combine_masks(folder, combined)
    folder = combined if written else folder
    try:
        description, said = survey(read_layout(folder), folder, classes=names, turned=turned)
    except Exception:
        if written:
            shutil.rmtree(combined)
        raise
    said += [written] if written else []
    network = network or (ON_AN_ENCODER if description["pictures"] else FROM_SCRATCH)
    takes_any_encoder = (entry := networks()[network])["kind"] == "encoder" and not needs_sam_decoder(entry)
    hearts = description["class_names"] == list(CLASS_NAMES) and not description["pictures"]
    if hearts:
        said.append("RV, Myo and LV: training starts from weights learned on heart phantoms, and mixes phantoms in")
    elif takes_any_encoder and model_type is None and description["pictures"]:
        encoder["model_type"] = GENERAL_UNET
        said.append(
            f"training starts from weights learned on random shapes, and trains the encoder, {GENERAL_UNET}, too"
        )
    elif entry["kind"] == "encoder" and chosen == SHIPPED_ENCODER and sam_checkpoint is None:
        said.append(
            f"{SHIPPED_ENCODER} was trained on hearts only: train its neck along with the head (configs/neck.json)"
        )
    said += filter(None, [ENCODERS[chosen].terms])
    instance = Instance(network, cases="custom", hearts=hearts, **encoder, texts=_texts(name, description, said))
    others = ", ".join(each for each in networks() if each != network)
    said.append(f"the network is {network}; --network also takes {others}")
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bundle.parent, prefix=f".{name}_") as partial:
        whole = Path(partial) / name
        instance.write(whole)
        lines = [f"    {json.dumps(key)}: {_value(value)}" for key, value in description.items()]
        (whole / DATA_FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n")
        whole.rename(bundle)
    return bundle, said


def acdc_bundles() -> dict[Path, str]:
    """Return the text of every file of the ACDC bundles and of `docs/knobs.md`, by path."""
    instances = {f"{network}_acdc": Instance(network, cases="acdc", hearts=True) for network in networks()}
    files = {
        REPOSITORY / "bundles" / bundle / name: text
        for bundle, instance in instances.items()
        for name, text in instance.files().items()
    }
    page = REPOSITORY / "docs/knobs.md"
    configs = {bundle: REPOSITORY / "bundles" / bundle / "configs" for bundle in (*instances, "sambox_acdc")}
    known = {path: text for path, text in files.items() if path.suffix == ".json"}
    return files | {page: knobs_page(page.read_text(), configs, known)}


def _value(value: Any) -> str:
    """Return a value as JSON on one line, or a list of cases as one line for each case."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"        {json.dumps(item)}" for item in value) + "\n    ]"
    return json.dumps(value)


def _texts(name: str, description: dict[str, Any], said: list[str]) -> dict[str, Any]:
    """Return the parts of documents and metadata that describe the data."""
    classes = ["background", *description["class_names"]]
    kind = "2D pictures" if description["pictures"] else "3D volumes"
    grey = "grey values" if description["channels"] == 1 else "colours"
    colours = {"channel_def": {"0": "red", "1": "green", "2": "blue"}} if description["pictures"] else {}
    return {
        "title": name,
        "summary": [f"- {sentence}" for sentence in said],
        "version": "0.1.0",
        "changelog": {"0.1.0": "made by adapt"},
        "classes_about": f"{', '.join(classes[1:])} in {kind}",
        "authors": "the user of autosam new",
        "copyright": "the user's; the template: Apache License 2.0",
        "data_source": "the user's own, see configs/data.json",
        "largest_patch": patch_side(LARGEST_CANVAS, pictures=description["pictures"]),
        "data_type": "Pillow" if description["pictures"] else "nibabel",
        "image_classes": f"{kind}, {grey} of any range",
        "label_map": ", ".join(f"{index} {each}" for index, each in enumerate(classes)),
        "modality": description["modality"] or "n/a",
        **colours,
        "out_channels": str(len(classes)),
        "num_classes": len(classes),
        "class_def": {str(index): each for index, each in enumerate(classes)},
    }
