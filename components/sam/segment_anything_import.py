"""The one place that imports the `segment_anything` package."""

import importlib
import importlib.util
import sys
import types
from typing import Any


def import_from_segment_anything(submodule: str) -> Any:
    """Import `segment_anything.<submodule>` without running `segment_anything/__init__.py`.

    That file imports torchvision for the predictor, which no bundle needs and which is often absent or built for
    another torch. While the submodule is imported, an empty stand-in takes the package's place, so the modules loaded
    are the very ones that an ordinary `import segment_anything` finds later.

    Args:
        submodule: dotted name below the package, such as `modeling` or `build_sam`.

    Returns:
        the imported module.

    Raises:
        ModuleNotFoundError: when the package is not installed.
    """
    name = f"segment_anything.{submodule}"
    if "segment_anything" in sys.modules:
        return importlib.import_module(name)
    spec = importlib.util.find_spec("segment_anything")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("segment_anything is not installed: pip install segment-anything")
    stand_in = types.ModuleType("segment_anything")
    stand_in.__path__ = list(spec.submodule_search_locations)
    sys.modules["segment_anything"] = stand_in
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["segment_anything"]
