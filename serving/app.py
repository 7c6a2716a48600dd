"""MONAI Label's `monaibundle` app, assembled with this project's bundles and nothing downloaded."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from release.bundles import COMPLETE, assemble

_SAMPLE_APP = Path("monailabel/sample-apps/monaibundle")
_OPERATORS = Path(__file__).with_name("torchvision_operators.py")


def assemble_app(app_dir: Path, bundles: Sequence[str] = tuple(COMPLETE)) -> Path:
    """Copy MONAI Label's sample app and put bundles into it, each complete with weights that were trained on phantoms.

    A bundle that is there already is left as it is, with all that it has learned.

    Args:
        app_dir: folder of the app, made if missing.
        bundles: names of the bundles.

    Returns:
        `app_dir`.

    Raises:
        FileNotFoundError: when MONAI Label is not installed.
        ValueError: for an unknown bundle.
    """
    if unknown := set(bundles) - COMPLETE.keys():
        raise ValueError(f"no bundle {', '.join(sorted(unknown))} to serve: expected some of {', '.join(COMPLETE)}")
    sample = Path(sysconfig.get_path("data")) / _SAMPLE_APP
    if not (sample / "main.py").is_file():
        raise FileNotFoundError(
            f"no MONAI Label in {sys.prefix}: expected its sample app {sample}; set an environment up with "
            "pip install -c constraints-label.txt -e '.[label]'"
        )
    shutil.copytree(sample, app_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(_OPERATORS, app_dir / "sitecustomize.py")  # which every Python imports that has app_dir on its path
    for bundle in bundles:
        model = app_dir / "model" / bundle
        if not model.exists():
            partial = app_dir / "model" / ".partial"
            shutil.rmtree(partial, ignore_errors=True)
            assemble(bundle, partial).rename(model)
            partial.rmdir()
    return app_dir
