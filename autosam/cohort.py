"""A cohort: cases that are segmented one by one, each with a record, so that a later run goes on from there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ignite.engine import Engine
from tqdm import tqdm

import components
from components.base.atomic_write import remove_partial_files, write_atomically
from components.base.errors import error_message
from components.base.knobs import PATH_ENDINGS
from components.base.volume_metadata import ITK_SUFFIXES, case_name_of_item, other_of_pair, volume_suffix
from components.data.acdc import INFO, frame_of_patient
from components.data.prediction_writer import prediction_name
from components.data.volume_search import VolumeDataset
from components.evaluation.reports import Row
from components.function.report import write_tables
from components.inference.model_loader import ModelCheckpointLoader
from components.inference.segmentation import log_outcome, raise_failures
from components.sam.encoder import fingerprint

RECORDS = "records"  # folder in that of the results
_RUN = "$@evaluator.run()"  # the expression of a workflow that segments all cases at once
_WITHOUT_EFFECT = ("batch_size", "debug", "device", "num_workers", "run")  # knobs on which labels do not depend
_LISTS = ("segmented", "empty")  # of images, in a record
_LOCK_S = 5.0  # after which another run holds it, and not a process that is ending
_VOXELS_OF_HEADER = (".raw", ".zraw", ".raw.gz")

logger = logging.getLogger("autosam")


@dataclass(frozen=True)
class Case:
    """A unit of segmentation and measurement: a volume, a series, or the frames of a patient in ACDC's layout.

    Attributes:
        name: the case name of its first image.
        items: items of `find_volumes`.
    """

    name: str
    items: Sequence[Mapping[str, Any]]

    @property
    def files(self) -> list[str]:
        """The images; a series is one."""
        return list(dict.fromkeys(str(item["image"]) for item in self.items))


@dataclass
class Record:
    """The result of a case, kept as `records/<case>.json` in the folder of the results.

    Attributes:
        case: its name.
        image: SHA-256 of its image files.
        model: SHA-256 of the network's weights.
        settings: knobs that matter to the result; of the rest of the configs, and of a patient's `Info.cfg`, a SHA-256.
        seconds: that it took.
        outputs: its label maps, names of files in the folder of the results.
        segmented: the segmented images.
        empty: those of them in which no class was found.
        failed: reason by image.
        rows: rows of `function.csv`.
        walls: rows of `wall_thickness.csv`.
    """

    case: str
    image: str = ""
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    outputs: list[str] = field(default_factory=list)
    segmented: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    walls: list[Row] = field(default_factory=list)

    def write(self, output: Path) -> None:
        """Write it whole or not at all."""
        with write_atomically(_path(output, self.case)) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    def done_before(self, output: Path) -> Record | None:
        """Return the record of an earlier run with the same image, model and settings whose label maps are there."""
        try:
            before = Record(**json.loads(_path(output, self.case).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none, or that of another version
            return None
        same = all(getattr(before, name) == getattr(self, name) for name in ("image", "model", "settings", "outputs"))
        is_done = same and not before.failed and all((output / name).is_file() for name in before.outputs)
        return before if is_done else None


def _path(output: Path, case: str) -> Path:
    return output / RECORDS / f"{case}.json"


class CaseSegmenter:
    """A workflow of a bundle that segments case after case, and writes a record of each.

    Args:
        workflow: MONAI's workflow `inferring` or `measuring`, initialised. All of it is run but its evaluator.
        shows_progress: whether there is a progress bar over the frames of a case.

    Attributes:
        cases: all cases, in the order in which they are found.
        skipped: reason by path of the files that the search left out.
        output: folder of the results.
    """

    def __init__(self, workflow: Any, *, shows_progress: bool = True) -> None:
        self._parser = workflow.parser
        self._shows_progress = shows_progress
        self._parser[workflow.run_id] = [each for each in self._parser[workflow.run_id] if each != _RUN]
        workflow.run()
        dataset = self._parser.get_parsed_content("dataset")
        self._preprocessing = dataset.transform
        self._settings = _settings(workflow.run_id, self._parser.get(), self._resolved)
        self.cases = _cases(dataset.data)
        self.skipped: Mapping[str, str] = dataset.skipped
        self.output = Path(self._parser.get_parsed_content("output_dir"))

    def __call__(self, case: Case) -> tuple[Record, bool]:
        """Segment a case unless it is done; return its record, and whether it was done before.

        Raises:
            OSError: if the record cannot be written.
            ValueError: if there is no model, or it does not fit.
        """
        content, facts = _content(case, self.output)
        record = Record(case.name, content, self._model, {**self._settings, **facts})
        record.outputs = [prediction_name(item) for item in {str(item["image"]): item for item in case.items}.values()]
        if before := record.done_before(self.output):
            return before, True
        evaluator, report, start = *self._evaluator(case), time.monotonic()
        try:
            evaluator.segment()
            record.failed = dict(evaluator.failed)
        except Exception as error:
            logger.info("%s failed", case.name, exc_info=True)
            record.failed = dict.fromkeys(case.files, error_message(error)) | evaluator.failed
        record.segmented = [file for file in evaluator.segmented if file not in record.failed]
        record.empty = evaluator.empty
        if report and record.segmented:
            record.rows, record.walls = report.rows, report.walls
        record.seconds = round(time.monotonic() - start, 2)
        record.write(self.output)
        return record, False

    @property
    def _resolved(self) -> dict[str, Any]:
        """What MONAI's parser has made of the configs so far, by id."""
        return self._parser.ref_resolver.resolved_content

    @functools.cached_property
    def _model(self) -> str:
        """The fingerprint of the network, which is loaded."""
        network = self._parser.get_parsed_content("network")
        engine = Engine(lambda *_: None)
        handlers = self._parser.get_parsed_content("handlers")
        loaders = [each for each in handlers if isinstance(each, ModelCheckpointLoader)]
        for loader in loaders:
            loader.attach(engine)  # it loads the weights when an engine starts
        engine.run([None])
        self._handlers = [each for each in handlers if each not in loaders] if self._shows_progress else []
        self._shared = dict(self._resolved)
        return bytes(fingerprint(network.state_dict()).tolist()).hex()

    def _evaluator(self, case: Case) -> tuple[Any, Any]:
        """Return a new evaluator of a case with the network that is loaded, and its report of function or None."""
        self._parser.parse(reset=True)  # since MONAI's parser puts what it has made into the configs
        dataset = VolumeDataset(list(case.items), self._preprocessing)
        self._resolved.update({**self._shared, "dataset": dataset, "handlers": self._handlers})
        evaluator = self._parser.get_parsed_content("evaluator")
        report = self._resolved.get("function_report")
        if report:
            report.writes_tables = False
        return evaluator, report


def _cases(items: Iterable[Mapping[str, Any]]) -> list[Case]:
    """Group the items of a data list into cases."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        image, name = str(item["image"]), case_name_of_item(item)
        is_of_patient = frame_of_patient(image, name) is not None
        key = str(Path(image).parent / name.rpartition("_frame")[0]) if is_of_patient else image
        groups.setdefault(f"{key} {is_of_patient}", []).append(item)
    return [Case(case_name_of_item(group[0]), group) for group in groups.values()]


def _content(case: Case, output: Path) -> tuple[str, dict[str, str]]:
    """Return the SHA-256 of a case's image files, and by name that of the `Info.cfg` beside them if there is one."""
    images = [path for file in case.files for path in _files_of_image(Path(file), output)]
    facts = [path for file in case.files if (path := Path(file).parent / INFO).is_file()]
    return _sha256(images), {INFO: _sha256(facts[:1])} if facts else {}


def _files_of_image(path: Path, output: Path) -> list[Path]:
    """Return the files that hold an image; those of a DICOM study without results in its folder."""
    if path.is_dir():
        return sorted(
            each for each in path.rglob("*") if each.is_file() and output.resolve() not in each.resolve().parents
        )
    suffix = volume_suffix(path)
    voxels = [path.with_suffix(each) for each in _VOXELS_OF_HEADER] if suffix in ITK_SUFFIXES else []
    return [each for each in (path, other_of_pair(path), *voxels) if each and each.is_file()]


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _settings(workflow: str, config: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of the configs matters to the result; the model's own record is part of its fingerprint."""
    settings: dict[str, Any] = {"version": components.__version__, "workflow": workflow}
    rest: dict[str, Any] = {}
    for name, value in config.items():
        if name.startswith("_") or name.endswith(PATH_ENDINGS) or name in _WITHOUT_EFFECT:
            continue
        known = resolved[name] if isinstance(resolved.get(name), bool) else value  # `true` was typed
        is_expression = isinstance(known, str) and known.startswith(("$", "@", "%"))
        is_plain = known is None or isinstance(known, int | float | str)
        (settings if is_plain and not is_expression else rest)[name] = known
    settings["configs"] = hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()
    return settings


Result = tuple[Case, Record, bool]  # a case that has ended, its record, and whether it was done before
Runner = Callable[[Sequence[Case]], Iterator[Result]]  # segments cases in any order


class Cohort:
    """The cases of a workflow, segmented with a record of each and tables of all.

    Args:
        workflow: as for `CaseSegmenter`.
        runner: segments the cases elsewhere, in any order; None for one after the other in this process.

    Attributes:
        segmented: number of images that were segmented.
        done_before: number of images that an earlier run had segmented.
        skipped: reason by path of the files that the search left out.
    """

    def __init__(self, workflow: Any, runner: Runner | None = None) -> None:
        self._segmenter = CaseSegmenter(workflow)
        self._runner = runner or (lambda cases: ((case, *self._segmenter(case)) for case in cases))
        self.segmented = self.done_before = 0
        self.skipped = self._segmenter.skipped

    def run(self) -> None:
        """Segment all cases that are not done, and write the tables of all from their records.

        Raises:
            RuntimeError: at the end, when an image has failed. At once, when another run writes to the same folder.
        """
        cases, output = self._segmenter.cases, self._segmenter.output
        with _only_run_in(output):
            for folder in (output, output / RECORDS):
                remove_partial_files(folder, "*")
            records = self._segment(cases, output)
            rows, walls = (
                sorted((row for each in records for row in getattr(each, name)), key=lambda row: str(row["case"]))
                for name in ("rows", "walls")
            )
            write_tables(output, rows, walls)
        raise_failures(_images(cases), _failed(records))

    def _segment(self, cases: Sequence[Case], output: Path) -> list[Record]:
        """Segment the cases that are not done; return the records of all in their order."""
        records: dict[str, Record] = {}
        try:
            bar = tqdm(self._runner(cases), "Cases", len(cases), disable=len(cases) == 1 or None)
            for case, record, is_done_before in bar:
                if not record.model:  # that of a case with which its process has died
                    record.write(output)
                records[case.name] = record
                if is_done_before:
                    self.done_before += len(record.segmented)
                else:
                    self.segmented += len(record.segmented)
        finally:
            ordered = [records[case.name] for case in cases if case.name in records]
            if ordered:
                segmented, empty = ([file for each in ordered for file in getattr(each, name)] for name in _LISTS)
                log_outcome(_images(cases), segmented, _failed(ordered), self.skipped, empty)
        return ordered


@contextlib.contextmanager
def _only_run_in(output: Path) -> Iterator[None]:
    """Keep other runs from a folder of results; the system ends this when the process dies."""
    (output / RECORDS).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / RECORDS / ".lock", timeout=_LOCK_S):
            yield
    except Timeout as error:
        raise RuntimeError(
            f"another run writes to {output}: expected a folder of its own; wait for it, or give another --output"
        ) from error


def _images(cases: Sequence[Case]) -> int:
    return sum(len(case.files) for case in cases)


def _failed(records: Iterable[Record]) -> dict[str, str]:
    return {file: reason for record in records for file, reason in record.failed.items()}
