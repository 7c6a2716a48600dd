"""What `autosam info` shows."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch

import components
from autosam.folders import MODEL, SHIPPED, is_bundle
from autosam.worth import WORTH
from components.base.precision import auto_is_bf16
from components.sam.encoders import SHIPPED as SHIPPED_ENCODERS
from components.sam.encoders import published_encoders

_PACKAGES = ("torch", "monai", "segment-anything", "nibabel")


def describe() -> str:
    """Return versions, device, precision, bundles and encoders as lines of text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"autosam {components.__version__}; "
        + ", ".join(f"{package} {importlib.metadata.version(package)}" for package in _PACKAGES),
        f"device: {name}; precision: {'bf16' if auto_is_bf16(device) else 'fp32'}",
        "",
        "bundles that come with the package: mean Dice in % on real hearts without labels, relative seconds, use",
    ]
    width = max(map(len, WORTH))
    lines += [f"  {name:{width}}  {dice}  {seconds}  {use}" for name, (use, dice, seconds) in WORTH.items()]
    if own := [path for path in sorted(Path().iterdir()) if path.is_dir() and is_bundle(path)]:
        lines += ["", "bundles in this folder:"]
        lines += [f"  {path.name}  {'trained' if (path / MODEL).is_file() else 'not trained'}" for path in own]
    width = max(map(len, SHIPPED_ENCODERS))
    lines += ["", "encoders:", *(f"  {name:{width}}  comes with the package" for name in SHIPPED_ENCODERS)]
    for name, entry in published_encoders().items():
        paths = [path for path in _models(own) if path.name == entry.file]
        found = str(paths[0]) if paths else f"not found: expected {entry.file} in models of a bundle"
        lines.append(f"  {name:{width}}  {found}")
    return "\n".join(lines)


def _models(bundles: list[Path]) -> list[Path]:
    """Return the files in the `models` folders of bundles."""
    return [path for bundle in (*bundles, *SHIPPED.iterdir()) for path in (bundle / "models").glob("*")]
