"""The front door to the bundles: the command `autosam`, and the same from Python.

>>> import autosam
>>> labels = autosam.segment("volume.nii.gz")

`autosam.load` keeps a bundle's network between calls, and `autosam.measure` gives ventricular function.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autosam.api import Correction, Segmenter, load, measure, segment

__all__ = ["Correction", "Segmenter", "load", "measure", "segment"]


def __getattr__(name: str) -> Any:  # torch and MONAI take seconds to import, which `autosam --help` does not need
    if name in __all__:
        return getattr(importlib.import_module("autosam.api"), name)
    raise AttributeError(f"module 'autosam' has no attribute {name!r}")
