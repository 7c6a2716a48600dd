"""What a bundle was last trained with, for its evaluation and inference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECORD = "autosam.json"  # in the bundle's folder
_OF_THE_NETWORK = ("model_type", "sam_checkpoint", "trainable_encoder")  # knobs that model.pt does not remember


def read_record(bundle: Path) -> dict[str, Any]:
    """Return the overlays and knobs of a bundle's last training; empty ones if there was none."""
    file = bundle / RECORD
    return json.loads(file.read_text()) if file.is_file() else {"overlays": [], "knobs": {}}


def write_record(bundle: Path, overlays: Sequence[str], options: Mapping[str, Any]) -> None:
    """Note what a bundle is trained with; paths become absolute, since it is evaluated from anywhere."""
    from components.base.atomic_write import write_atomically  # torch comes along, which `autosam --help` does not need
    from components.base.knobs import PATH_ENDINGS

    knobs = {name: str(value) for name, value in options.items()}
    for name, value in knobs.items():
        if name.endswith(PATH_ENDINGS) and not value.startswith(("$", "@", "%")):
            knobs[name] = str(Path(value).expanduser().absolute())
    with write_atomically(bundle / RECORD) as partial:
        partial.write_text(json.dumps({"overlays": list(overlays), "knobs": knobs}, indent=4) + "\n")


def inference_settings(bundle: Path) -> tuple[list[str], dict[str, str]]:
    """Return the overlays and the knobs of a bundle's last training that inference needs as well.

    Overlays that set a part of the training are left out.
    """
    record = read_record(bundle)
    overlays = {name: json.loads((bundle / f"configs/{name}.json").read_text()) for name in record["overlays"]}
    knobs = {knob: value for knob, value in record["knobs"].items() if knob in _OF_THE_NETWORK}
    return [name for name, config in overlays.items() if not any("#" in key for key in config)], knobs


def typed_knobs(typed: Sequence[str]) -> dict[str, str]:
    """Return options as they were typed by name; a switch is true.

    Raises:
        ValueError: if there is something else than options.
    """
    found, rest = {}, list(typed)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise ValueError(f"unexpected {option!r}: give a knob as --knob VALUE, and a name with spaces in quotes")
        name, equals, value = option.removeprefix("--").partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "True"
        found[name] = value
    return found
