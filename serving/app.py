"""An app for MONAI Label, assembled with this project's bundles and nothing downloaded."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from adapt.new import DATA_FILE
from components.networks.trained_with import resolve_settings
from release.bundles import (
    ENCODER_KNOB,
    MODEL,
    PACKED,
    assemble,
    own_bundle,
    set_encoder,
    set_values,
    weights_of,
)

logger = logging.getLogger("serving")

# Each file of the app, and what is copied there: MONAI Label looks for main.py, and every Python that has the app's
# folder on its path imports sitecustomize.
_FILES = {"main.py": "label_app.py", "sitecustomize.py": "torchvision_operators.py"}
_OTHER_TASKS = ("deepedit", "deepgrow", "detection", "classification")  # as MONAI Label takes a bundle by its name
_CHOSEN = (  # by its labelled cases, or on the command line of its training
    "width",
    "depth",
    "image_size",
    "canvas_size",
    "crop_size",
    "slice_axis",
    "normalisation",
    "largest_component",
    "slice_smoothing",
)


def assemble_app(app_dir: Path, bundles: Sequence[str] = PACKED) -> tuple[Path, list[str]]:
    """Make the app's folder and put bundles into it, each complete with weights.

    A bundle that is there already is left as it is, with all that it has learned.

    Args:
        app_dir: folder of the app, made if missing.
        bundles: names of the bundles, which come with weights that were trained on phantoms; and folders of trained
            ones that `python -m adapt new` has made.

    Returns:
        `app_dir`, and the names of the bundles there.

    Raises:
        FileNotFoundError: when MONAI Label is not installed, or a bundle for one's own data has not been trained.
        ValueError: for an unknown bundle, two of one name, or a name by which MONAI Label expects another task.
    """
    own = {folder.name: folder for bundle in bundles if (folder := own_bundle(bundle))}
    names = [folder.name if (folder := own_bundle(bundle)) else bundle for bundle in bundles]
    if unknown := set(names) - set(PACKED) - own.keys():
        raise ValueError(
            f"no bundle {', '.join(sorted(unknown))} to serve: expected some of {', '.join(PACKED)}, or folders of "
            "bundles that `python -m adapt new` has made"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"expected bundles of different names, received {', '.join(names)}: rename a folder")
    for name in own:
        if other := next((task for task in _OTHER_TASKS if task in name.lower()), None):
            raise ValueError(f"MONAI Label takes {name} for {other} by its name: rename the bundle's folder")
    if importlib.util.find_spec("monailabel") is None:
        raise FileNotFoundError(
            f"no MONAI Label in {sys.prefix}: set an environment up with pip install -c constraints-label.txt -e "
            "'.[label]'"
        )
    (app_dir / "model").mkdir(parents=True, exist_ok=True)
    for file, source in _FILES.items():
        shutil.copyfile(Path(__file__).with_name(source), app_dir / file)
    for name in names:
        model = app_dir / "model" / name
        if model.exists():
            logger.info("%s is served as it is there, with what it has learned: remove it to start anew", model)
            continue
        partial = app_dir / "model" / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        root = assemble(str(own.get(name, name)), partial)
        if name in own:
            _as_monai_label_expects(root, own[name])
        root.rename(model)
        partial.rmdir()
    return app_dir, names


def _as_monai_label_expects(root: Path, source: Path) -> None:
    """Make a bundle for one's own data train on from its model, and exchange the indices of its classes as labels.

    Args:
        root: the bundle's folder in the app.
        source: its own folder, from which an encoder is read that is no part of the package.
    """
    trained = resolve_settings(str(root / MODEL), {}, {})
    train = root / "configs/train.json"
    knobs = {name: trained[name] for name in _CHOSEN if name in trained and name in json.loads(train.read_text())}
    encoder = weights_of(source).get(ENCODER_KNOB)
    if encoder and weights_of(root)[ENCODER_KNOB] != encoder:  # not that of the package
        set_encoder(root, str(encoder))
    set_values(train, {"start_checkpoint": f"$@bundle_root + '/{MODEL}'", **knobs})
    set_values(root / DATA_FILE, {"label_values": list(range(trained["out_channels"]))})
    set_values(root / "configs/inference.json", {"displayable_configs": {"result_dtype": "uint8"}})
