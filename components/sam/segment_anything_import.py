"""Import of the `segment_anything` package without torchvision."""

import importlib
import importlib.util
import sys
import types
from typing import Any


def import_from_segment_anything(submodule: str) -> Any:
    """Import `segment_anything.<submodule>` without running `segment_anything/__init__.py`.

    That file imports torchvision for the predictor, which no bundle uses. torchvision is often absent or built for
    another version of torch. While the submodule is imported, an empty module replaces the package. Later imports of
    `segment_anything` find the same submodules by `import`, but not as attributes of the package.

    Args:
        submodule: dotted name below the package, such as `modeling` or `build_sam`.

    Returns:
        the imported module.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    name = f"segment_anything.{submodule}"
    if "segment_anything" in sys.modules:
        return importlib.import_module(name)
    spec = importlib.util.find_spec("segment_anything")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("segment_anything is not installed: pip install segment-anything")
    placeholder = types.ModuleType("segment_anything")
    placeholder.__path__ = list(spec.submodule_search_locations)
    sys.modules["segment_anything"] = placeholder
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["segment_anything"]
