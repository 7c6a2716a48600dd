"""An app for MONAI Label, assembled from this project's bundles without downloads."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from autosam.folders import DATA_FILE, MODEL
from components.networks.trained_with import resolve_settings
from release.bundles import (
    ENCODER_KNOB,
    PACKED,
    assemble,
    own_bundle,
    set_encoder,
    set_values,
    weights_of,
)

logger = logging.getLogger("serving")

# The app's files and their sources: MONAI Label looks for main.py, and every Python that has the app's folder on its
# path imports sitecustomize.
_FILES = {"main.py": "label_app.py", "sitecustomize.py": "torchvision_operators.py"}
_OTHER_TASKS = ("deepedit", "deepgrow", "detection", "classification")  # MONAI Label infers them from a bundle's name
_CHOSEN = (  # knobs chosen from the labelled cases, or on the command line of the training
    "width",
    "depth",
    "image_size",
    "canvas_size",
    "crop_size",
    "patch_size",
    "slice_axis",
    "normalisation",
    "largest_component",
    "minimum_lv_share",
    "minimum_rv_probability",
    "minimum_wall_mm",
    "slice_smoothing",
)


def assemble_app(app_dir: Path, bundles: Sequence[str] = PACKED) -> tuple[Path, list[str]]:
    """Make the app's folder and put bundles into it, each complete with weights.

    An existing bundle is kept as it is, with its trained model.

    Args:
        app_dir: folder of the app, made if missing.
        bundles: names of bundles, which come with weights trained on phantoms, and folders of trained bundles that
            `autosam new` has made.

    Returns:
        `app_dir`, and the names of the bundles in it.

    Raises:
        FileNotFoundError: if MONAI Label is not installed, or a bundle for a user's own data has not been trained.
        ValueError: if a bundle is unknown, two have one name, or MONAI Label expects another task by a name.
    """
    own = {folder.name: folder for bundle in bundles if (folder := own_bundle(bundle))}
    names = [folder.name if (folder := own_bundle(bundle)) else bundle for bundle in bundles]
    if unknown := set(names) - set(PACKED) - own.keys():
        raise ValueError(
            f"no bundle {', '.join(sorted(unknown))} to serve: expected some of {', '.join(PACKED)}, or folders of "
            "bundles that `autosam new` has made"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"expected bundles of different names, received {', '.join(names)}: rename a folder")
    for name in own:
        if other := next((task for task in _OTHER_TASKS if task in name.lower()), None):
            raise ValueError(f"MONAI Label would use {name} for {other} by its name: rename the bundle's folder")
    if importlib.util.find_spec("monailabel") is None:
        raise FileNotFoundError(
            f"no MONAI Label in {sys.prefix}: make an environment for it with the command in docs/serving.md"
        )
    (app_dir / "model").mkdir(parents=True, exist_ok=True)
    for file, source in _FILES.items():
        shutil.copyfile(Path(__file__).with_name(source), app_dir / file)
    for name in names:
        model = app_dir / "model" / name
        if model.exists():
            logger.info("%s exists and is served with its trained model: remove it to start anew", model)
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
    """Make a bundle for a user's own data train on from its model, and use class indices as label values.

    Args:
        root: the bundle's folder in the app.
        source: its own folder, from which an encoder outside the package is read.
    """
    trained = resolve_settings(str(root / MODEL), {}, {})
    train = root / "configs/train.json"
    knobs = {name: trained[name] for name in _CHOSEN if name in trained and name in json.loads(train.read_text())}
    encoder = weights_of(source).get(ENCODER_KNOB)
    if encoder and weights_of(root)[ENCODER_KNOB] != encoder:  # not the package's encoder
        set_encoder(root, str(encoder))
    set_values(train, {"start_checkpoint": f"$@bundle_root + '/{MODEL}'", **knobs})
    set_values(root / DATA_FILE, {"label_values": list(range(trained["out_channels"]))})
