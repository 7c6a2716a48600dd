"""The grid of a study, read from JSON: methods, numbers of labelled patients, splits and ablations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from study.published import TABLE_1

BUNDLES = Path(__file__).parents[1] / "bundles"
_GRID_KEYS = {"_desc_", "methods", "labelled_patients", "splits", "dataset", "ablations"}
_METHOD_KEYS = {"title", "bundle", "overlays", "knobs", "labelled_patients", "start", "paper"}
_START_KEYS = {"overlays", "knobs", "once"}
_ABLATION_KEYS = {"title", "methods", "labelled_patients", "values"}


@dataclass(frozen=True)
class Start:
    """A method's pre-training: the `pretraining` run of its bundle, whose checkpoint its trainings start from.

    Args:
        overlays: names of the configs that turn the bundle's training into this pre-training, such as `pretrain`.
        knobs: values by top-level key, which override the configs.
        once: whether all splits share one pre-training, since it uses no patients; else each split has its own.
    """

    overlays: tuple[str, ...]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    once: bool = False


@dataclass(frozen=True)
class Method:
    """A row of the study's tables.

    Args:
        key: name of the folder of its cells.
        title: its name in the tables.
        bundle: folder below `bundles`.
        overlays: names of the configs that are merged after the bundle's own.
        knobs: values by top-level key, which override the configs.
        start: the pre-training that its trainings start from, if that is part of the study.
        paper: name of the row in the paper's tables to compare with; None if there is none.
    """

    key: str
    title: str
    bundle: str
    overlays: tuple[str, ...] = ()
    knobs: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    paper: str | None = None

    @property
    def trains(self) -> bool:
        """Whether the bundle can train; one that cannot is only evaluated."""
        return self.config("train").is_file()

    def config(self, name: str) -> Path:
        """Return the path of one of the bundle's configs."""
        return BUNDLES / self.bundle / "configs" / f"{name}.json"


@dataclass(frozen=True)
class Variant:
    """One value of an ablation.

    Args:
        ablation: key of the ablation, such as `depth`.
        value: its name in the tables, such as `2`.
    """

    ablation: str
    value: str


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation; with 0 labelled patients, only an evaluation.

    Args:
        method: the method, including the knobs of the variant.
        labelled_patients: number of patients to train on, None for all; 0 to evaluate the weights that training would
            start from.
        split: seed of the split by patient.
        variant: the ablation's value, None for the method without changes.
    """

    method: Method
    labelled_patients: int | None
    split: int
    variant: Variant | None = None

    @property
    def name(self) -> str:
        """The cell's folder, relative to the study's folder."""
        count = "all" if self.labelled_patients is None else self.labelled_patients
        variant = f"/{self.variant.ablation}_{self.variant.value}" if self.variant else ""
        return f"{self.method.key}{variant}/patients_{count}/split_{self.split}"

    @property
    def preparation(self) -> Preparation | None:
        """The pre-training that this cell starts from, None if there is none."""
        start = self.method.start
        return Preparation(self.method, None if start.once else self.split) if start else None


@dataclass(frozen=True)
class Preparation:
    """The pre-training that cells of a method start from.

    Args:
        method: a method with a `start`.
        split: seed of the split whose training patients it uses; None if it uses no patients.
    """

    method: Method
    split: int | None

    @property
    def name(self) -> str:
        """The preparation's folder, relative to the study's folder."""
        return f"{self.method.key}/start" + ("" if self.split is None else f"/split_{self.split}")


@dataclass(frozen=True)
class Ablation:
    """A table that compares the values of one setting, with all other settings unchanged.

    Args:
        key: its name in the grid, such as `depth`.
        title: title of the table.
        values: names of the values in the tables.
        methods: keys of the methods that are varied.
    """

    key: str
    title: str
    values: tuple[str, ...]
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A study.

    Args:
        description: the purpose of the study.
        methods: in the order of the tables.
        cells: ordered by split, so that an unfinished study can already compare its methods.
        ablations: the tables in addition to the main one.
        dataset: arguments of `write_phantom_dataset`, for the phantoms to use if no `dataset_dir` is given.
    """

    description: str
    methods: tuple[Method, ...]
    cells: tuple[Cell, ...]
    ablations: tuple[Ablation, ...] = ()
    dataset: Mapping[str, Any] | None = None


def read_grid(path: str | Path) -> Grid:
    """Read a grid and list its cells.

    Args:
        path: a JSON file with `methods` (each has a `title`, a `bundle`, and optionally `overlays`, `knobs`,
            `labelled_patients`, `start` and `paper`), `labelled_patients` (a list, null for all patients; the default
            for methods) and `splits`; optionally `ablations` (each has a `title`, `methods`, `values` with the knobs of
            each value, and optionally `labelled_patients`) and a `dataset` of phantoms. A value without knobs is the
            method without changes.

    Returns:
        the study.

    Raises:
        ValueError: when a key is unknown or missing; a bundle, an overlay, an ablation's method or a row of the paper
            does not exist; two methods have the same title; or labelled patients are set for a bundle that does not
            train.
    """
    grid = json.loads(Path(path).read_text())
    _check_keys(grid, f"{path}", required={"methods", "labelled_patients", "splits"}, known=_GRID_KEYS)
    methods = {key: _read_method(key, settings, f"{path}") for key, settings in grid["methods"].items()}
    counts = {key: _counts(settings, grid) for key, settings in grid["methods"].items()}
    _check_methods(methods, counts, f"{path}")
    ablations = grid.get("ablations", {})
    cells: dict[str, Cell] = {}
    for split in grid["splits"]:
        of_split = [Cell(method, count, split) for key, method in methods.items() for count in counts[key]]
        for key, settings in ablations.items():
            _check_ablation(settings, f"ablation {key} of {path}", methods)
            of_split += _ablation_cells(key, settings, grid, methods, split)
        cells |= {cell.name: cell for cell in of_split}
    return Grid(
        description=grid.get("_desc_", ""),
        methods=tuple(methods.values()),
        cells=tuple(cells.values()),
        ablations=tuple(
            Ablation(key, settings["title"], tuple(settings["values"]), tuple(settings["methods"]))
            for key, settings in ablations.items()
        ),
        dataset=grid.get("dataset"),
    )


def _read_method(key: str, settings: dict[str, Any], path: str) -> Method:
    where = f"method {key} of {path}"
    _check_keys(settings, where, required={"title", "bundle"}, known=_METHOD_KEYS)
    start = settings.get("start")
    if start is not None:
        _check_keys(start, f"start of {where}", required={"overlays"}, known=_START_KEYS)
        start = Start(tuple(start["overlays"]), start.get("knobs", {}), once=start.get("once", False))
    method = Method(
        key=key,
        title=settings["title"],
        bundle=settings["bundle"],
        overlays=tuple(settings.get("overlays", ())),
        knobs=settings.get("knobs", {}),
        start=start,
        paper=settings.get("paper"),
    )
    for config in ("evaluate", *method.overlays, *(start.overlays if start else ())):
        if not (file := method.config(config)).is_file():
            raise ValueError(f"{where} needs {file}, which does not exist: correct its bundle or overlays")
    return method


def _check_methods(methods: Mapping[str, Method], counts: Mapping[str, list[int | None]], path: str) -> None:
    titles = [method.title for method in methods.values()]
    if repeated := {title for title in titles if titles.count(title) > 1}:
        raise ValueError(f"{path}: several methods have the title {', '.join(sorted(repeated))}: give each its own")
    for key, method in methods.items():
        if method.paper is not None and method.paper not in TABLE_1:
            raise ValueError(
                f"method {key} of {path}: the paper's table 1 has no row {method.paper!r}, expected one of "
                f"{', '.join(TABLE_1)}"
            )
        if not method.trains and counts[key] != [0]:
            raise ValueError(
                f"method {key} of {path}: {method.bundle} does not train, so expected labelled_patients to be [0], "
                f"received {counts[key]}"
            )


def _counts(settings: Mapping[str, Any], grid: Mapping[str, Any]) -> list[int | None]:
    return settings.get("labelled_patients", grid["labelled_patients"])


def _ablation_cells(
    key: str, settings: dict[str, Any], grid: dict[str, Any], methods: dict[str, Method], split: int
) -> list[Cell]:
    cells = []
    for name in settings["methods"]:
        for value, knobs in settings["values"].items():
            method = replace(methods[name], knobs={**methods[name].knobs, **knobs})
            variant = Variant(key, value) if knobs else None  # without knobs it is the cell of the method itself
            cells += [Cell(method, count, split, variant) for count in _counts(settings, grid)]
    return cells


def _check_ablation(settings: dict[str, Any], where: str, methods: dict[str, Method]) -> None:
    _check_keys(settings, where, required={"title", "methods", "values"}, known=_ABLATION_KEYS)
    if unknown := set(settings["methods"]) - methods.keys():
        raise ValueError(f"{where} names {', '.join(sorted(unknown))}, expected some of {', '.join(methods)}")


def _check_keys(given: dict[str, Any], where: str, *, required: set[str], known: set[str]) -> None:
    if unknown := given.keys() - known:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(sorted(known))}")
    if missing := required - given.keys():
        raise ValueError(f"{where}: {', '.join(sorted(missing))} missing")
