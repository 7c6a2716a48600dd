"""The grid of a study, read from JSON: methods, numbers of labelled cases, splits and ablations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from study.data import ACDC, OWN_COUNTS, StudyData, differences, own_study_data
from study.published import TABLE_1

BUNDLES = Path(__file__).parents[1] / "bundles"
UNLABELLED = "unlabelled"  # the overlay of all bundles for training on cases without labels, too
_CHOSEN_BY_LABELS = "labelled"  # key of configs whose preprocessing is chosen from the labelled cases
LABELLED_CASES, START_CHECKPOINT = "labelled_cases", "start_checkpoint"  # knobs of all bundles that train
_GRID_KEYS = {"_desc_", "methods", "splits", "dataset", "ablations", LABELLED_CASES}
_METHOD_KEYS = {"title", "bundle", "overlays", "knobs", "start", "continues", "paper", LABELLED_CASES}
_START_KEYS = {"overlays", "knobs", "once"}
_ABLATION_KEYS = {"title", "methods", "values", LABELLED_CASES}


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
        bundle: folder below `bundles`, or the absolute path of one elsewhere.
        overlays: names of the configs that are merged after the bundle's own.
        knobs: values by top-level key, which override the configs.
        start: the pre-training that its trainings start from, if that is part of the study.
        continues: key of another method, from whose trained model of the same number and split each training starts.
            With 0 labelled cases there is no such model, and the bundle's own start is taken.
        paper: name of the row in the paper's tables to compare with; None if there is none.
    """

    key: str
    title: str
    bundle: str
    overlays: tuple[str, ...] = ()
    knobs: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    continues: str | None = None
    paper: str | None = None

    @property
    def folder(self) -> Path:
        """The bundle's folder, in which MONAI's runner starts."""
        return BUNDLES / self.bundle

    @property
    def trains(self) -> bool:
        """Whether the bundle can train; one that cannot is only evaluated."""
        return self.config("train").is_file()

    @property
    def trains_without_labels(self) -> bool:
        """Whether it is also trained with 0 labelled cases, on unlabelled ones, instead of only evaluated."""
        return UNLABELLED in self.overlays

    @property
    def data_file(self) -> Path | None:
        """The file that describes the data of a bundle of `autosam new`; None for a bundle for ACDC."""
        file = self.config("data")
        return file if file.is_file() else None

    @property
    def counts(self) -> str:
        """Word for its labelled cases: `cases` of a user's own data, else `patients`."""
        return OWN_COUNTS if self.data_file else ACDC.counts

    @property
    def segments_as_it_comes(self) -> bool:
        """Whether its trainings, like its inference, start from weights that segment these data."""
        parser = ConfigParser({**self.merged("train", "inference", *self.overlays), **self.knobs})
        return parser.get_parsed_content(START_CHECKPOINT, default=None) is not None

    def merged(self, *names: str) -> dict[str, Any]:
        """Return the top-level keys of some of the bundle's configs; values of later ones override."""
        return ConfigParser.load_config_files([str(self.config(name)) for name in names])

    def config(self, name: str) -> Path:
        """Return the path of one of the bundle's configs."""
        return self.folder / "configs" / f"{name}.json"


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
    """One training and its evaluation; only an evaluation with 0 labelled cases, unless it can train without labels.

    Args:
        method: the method, including the knobs of the variant.
        labelled_cases: number of cases to train on, for ACDC patients with both frames; None for all. 0 trains on
            unlabelled ones alone, or evaluates the weights that training would start from.
        split: seed of the split by patient, or `ssl4mis`.
        variant: the ablation's value; None for the unchanged method.
    """

    method: Method
    labelled_cases: int | None
    split: int | str
    variant: Variant | None = None

    @property
    def name(self) -> str:
        """The cell's folder, relative to the study's folder."""
        variant = f"/{self.variant.ablation}_{self.variant.value}" if self.variant else ""
        return f"{self.method.key}{variant}/{self._of_method}"

    @property
    def _of_method(self) -> str:
        """The cell's folder, relative to that of its method."""
        count = "all" if self.labelled_cases is None else self.labelled_cases
        return f"{self.method.counts}_{count}/split_{self.split}"

    @property
    def trains(self) -> bool:
        """Whether it is a training and its evaluation, not only an evaluation."""
        return self.method.trains and (self.labelled_cases != 0 or self.method.trains_without_labels)

    @property
    def starts_from(self) -> str | None:
        """The folder of its preparation, or of the cell that it continues; None for the bundle's own start.

        The folder is relative to the study's.
        """
        if self.method.continues and self.labelled_cases != 0:
            return f"{self.method.continues}/{self._of_method}"
        return self.preparation.name if self.preparation else None

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
    split: int | str | None

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
        methods: methods in the order of the tables.
        cells: cells ordered by split, so that an unfinished study can already compare its methods.
        ablations: the tables in addition to the main one.
        dataset: arguments of `write_phantom_dataset`, for the phantoms to use if no `dataset_dir` is given.
        data: the data that all methods are trained and tested on.
    """

    description: str
    methods: tuple[Method, ...]
    cells: tuple[Cell, ...]
    ablations: tuple[Ablation, ...] = ()
    dataset: Mapping[str, Any] | None = None
    data: StudyData = ACDC


def read_grid(path: str | Path) -> Grid:
    """Read a grid and list its cells.

    Args:
        path: a JSON file with `methods`, `labelled_cases` (a list, null for all) and `splits`; `ablations` and a
            `dataset` of phantoms are optional. A method has a `title` and a `bundle`; `overlays`, `knobs`, `start`,
            `continues`, `paper` and its own `labelled_cases` are optional. An ablation has a `title`, `methods`, and
            `values` with the knobs of each; its own `labelled_cases` are optional. A value without knobs is the method
            unchanged method. A `bundle` with a slash is a path, relative to this file's folder; any other is a folder
            below `bundles`.

    Returns:
        the study.

    Raises:
        ValueError: if a key is unknown or missing. If a named bundle, overlay, method or row of the paper does not
            exist. If two methods have the same title, or different data. If labelled cases are set for a bundle that
            does not train. If there are no weights to evaluate with 0 labelled cases.
    """
    grid = json.loads(Path(path).read_text())
    _check_keys(grid, f"{path}", required={"methods", "splits", LABELLED_CASES}, known=_GRID_KEYS)
    methods = {
        key: _read_method(key, settings, f"{path}", Path(path).resolve().parent)
        for key, settings in grid["methods"].items()
    }
    data = _study_data(list(methods.values()), f"{path}")
    if data.is_own and "dataset" in grid:
        raise ValueError(
            f"{path}: unknown dataset; expected no phantoms, which are hearts, in a study of a user's own data"
        )
    ablations = grid.get("ablations", {})
    counts = {key: settings.get(LABELLED_CASES, grid[LABELLED_CASES]) for key, settings in grid["methods"].items()}
    _check_methods(methods, counts, f"{path}")
    cells: dict[str, Cell] = {}
    for split in grid["splits"]:
        of_split = [Cell(method, count, split) for key, method in methods.items() for count in counts[key]]
        for key, settings in ablations.items():
            _check_ablation(settings, f"ablation {key} of {path}", methods)
            numbers = settings.get(LABELLED_CASES, grid[LABELLED_CASES])
            of_split += _ablation_cells(key, settings, methods, numbers, split)
        cells |= {cell.name: cell for cell in of_split}
    _check_continued(cells, f"{path}")
    return Grid(
        description=grid.get("_desc_", ""),
        methods=tuple(methods.values()),
        cells=tuple(cells.values()),
        ablations=tuple(
            Ablation(key, settings["title"], tuple(settings["values"]), tuple(settings["methods"]))
            for key, settings in ablations.items()
        ),
        dataset=grid.get("dataset"),
        data=data,
    )


def _read_method(key: str, settings: dict[str, Any], path: str, folder: Path) -> Method:
    where = f"method {key} of {path}"
    _check_keys(settings, where, required={"title", "bundle"}, known=_METHOD_KEYS)
    if {"start", "continues"} <= settings.keys():
        raise ValueError(f"{where} has both start and continues: expected one of them, from which its trainings start")
    start, bundle = settings.get("start"), settings["bundle"]
    if start is not None:
        _check_keys(start, f"start of {where}", required={"overlays"}, known=_START_KEYS)
        start = Start(tuple(start["overlays"]), start.get("knobs", {}), once=start.get("once", False))
    method = Method(
        key=key,
        title=settings["title"],
        bundle=str((folder / bundle).resolve()) if "/" in bundle else bundle,
        overlays=tuple(settings.get("overlays", ())),
        knobs=settings.get("knobs", {}),
        start=start,
        continues=settings.get("continues"),
        paper=settings.get("paper"),
    )
    for config in ("evaluate", *method.overlays, *(start.overlays if start else ())):
        if not (file := method.config(config)).is_file():
            raise ValueError(f"{where} needs {file}, which does not exist: correct its bundle or overlays")
    return method


def _study_data(methods: Sequence[Method], path: str) -> StudyData:
    """Return the data of all methods, or raise if they differ."""
    if not methods:
        return ACDC
    first, *others = methods
    for other in others:
        files = [file for file in (first.data_file, other.data_file) if file]
        differing = differences(*files) if len(files) == 2 else []
        if len(files) == 1 or differing:
            described = " and ".join(f"{method.key} ({method.data_file or 'ACDC'})" for method in (first, other))
            what = f", which differ in {', '.join(differing)}" if differing else ""
            raise ValueError(
                f"{path}: expected one data set for all methods, received those of {described}{what}: write a grid for "
                "each"
            )
    file = first.data_file
    return own_study_data(file) if file else ACDC


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
        if method.paper is not None and method.data_file:
            raise ValueError(
                f"method {key} of {path} has paper {method.paper!r}, whose scores are of hearts: leave it out"
            )
        if not method.trains and counts[key] != [0]:
            raise ValueError(
                f"method {key} of {path}: {method.bundle} does not train, so expected {LABELLED_CASES} to be [0], "
                f"received {counts[key]}"
            )
        if method.continues is not None and method.continues not in list(methods)[: list(methods).index(key)]:
            raise ValueError(
                f"method {key} of {path} continues {method.continues}, expected a method that the grid lists before it"
            )
        if method.trains and 0 in counts[key]:
            _check_start_without_labels(method, f"method {key} of {path}")


def _check_start_without_labels(method: Method, where: str) -> None:
    """Raise if a method cannot run with 0 labelled cases."""
    if method.trains_without_labels and _CHOSEN_BY_LABELS in method.merged("train", *method.overlays):
        raise ValueError(f"{where} trains on a user's data, which needs a labelled case: leave out {LABELLED_CASES} 0")
    if method.start is None and not method.segments_as_it_comes:
        raise ValueError(
            f"{where} has 0 in {LABELLED_CASES}, but no weights to start from: set {START_CHECKPOINT} in "
            "its knobs or by an overlay, or leave out 0"
        )


def _check_continued(cells: Mapping[str, Cell], path: str) -> None:
    """Raise if a cell continues a cell that is not in the study."""
    for cell in cells.values():
        if cell.method.continues and cell.starts_from not in (None, *cells):
            raise ValueError(
                f"{path}: {cell.name} starts from {cell.starts_from}, which is not a cell of the study: give method "
                f"{cell.method.continues} the same {LABELLED_CASES}"
            )


def _ablation_cells(
    key: str, settings: dict[str, Any], methods: dict[str, Method], counts: list[int | None], split: int | str
) -> list[Cell]:
    cells = []
    for name in settings["methods"]:
        for value, knobs in settings["values"].items():
            method = replace(methods[name], knobs={**methods[name].knobs, **knobs})
            variant = Variant(key, value) if knobs else None  # without knobs it is the cell of the method itself
            cells += [Cell(method, count, split, variant) for count in counts]
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
