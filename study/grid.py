"""What a study consists of: methods, numbers of labelled patients and splits, from a JSON file."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUNDLES = Path(__file__).parents[1] / "bundles"
_METHOD_KEYS = {"title", "bundle", "overlays", "knobs", "labelled_patients"}
_GRID_KEYS = {"_desc_", "methods", "labelled_patients", "splits"}


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation.

    Args:
        method: key of the method in the grid; names the cell's folder.
        title: of the method, in tables.
        bundle: folder below `bundles`.
        labelled_patients: patients to train on; 0 to score the bundle's `head_checkpoint` as it is.
        split: seed of the split by patient.
        overlays: names of configs that go on top of the bundle's own.
        knobs: top-level keys of the configs to set.
    """

    method: str
    title: str
    bundle: str
    labelled_patients: int
    split: int
    overlays: tuple[str, ...] = ()
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The cell's folder, relative to the study's."""
        return f"{self.method}/patients_{self.labelled_patients}/split_{self.split}"


def read_grid(path: str | Path) -> list[Cell]:
    """Read a grid and list its cells.

    Args:
        path: of a JSON file with `methods` (each with its `title`, `bundle`, and where needed `overlays`, `knobs` and
            `labelled_patients`), `labelled_patients` for the methods that have none of their own, and `splits`.

    Returns:
        the cells, split by split, so that an unfinished study already compares its methods.

    Raises:
        ValueError: when a key is unknown or missing, or a bundle or overlay does not exist.
    """
    grid = json.loads(Path(path).read_text())
    _check_keys(grid, f"{path}", required=_GRID_KEYS - {"_desc_"}, known=_GRID_KEYS)
    cells = []
    for split, (name, method) in itertools.product(grid["splits"], grid["methods"].items()):
        where = f"method {name} of {path}"
        _check_keys(method, where, required={"title", "bundle"}, known=_METHOD_KEYS)
        overlays = tuple(method.get("overlays", ()))
        for config in ("train", *overlays):
            if not (file := BUNDLES / method["bundle"] / "configs" / f"{config}.json").is_file():
                raise ValueError(f"{where} needs {file}, which does not exist: correct its bundle or overlays")
        cells += [
            Cell(name, method["title"], method["bundle"], count, split, overlays, method.get("knobs", {}))
            for count in method.get("labelled_patients", grid["labelled_patients"])
        ]
    return cells


def _check_keys(given: dict[str, Any], where: str, *, required: set[str], known: set[str]) -> None:
    if unknown := given.keys() - known:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(sorted(known))}")
    if missing := required - given.keys():
        raise ValueError(f"{where}: {', '.join(sorted(missing))} missing")
