"""Report of ventricular function: the measures of every case, and its volumes over time."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from PIL import Image

from components.base.volume_metadata import CASE, FRAME, case_name_of, files_of, header_spacing_mm
from components.data.acdc import CLASS_NAMES, INFO, frame_of_patient, read_info
from components.data.geometry import slices_last
from components.data.prediction_writer import prediction_name
from components.data.reader import FRAME_SECONDS, HEIGHT_CM, WEIGHT_KG
from components.data.transforms import LoadVolumed
from components.evaluation.overlays import foreground_extent
from components.evaluation.reports import Row, write_csv
from components.function.measures import (
    NAN,
    body_surface_m2,
    find_phases,
    heart_rate_per_min,
    measure_function,
    volumes_ml,
)
from components.function.page import (
    draw_bulls_eyes,
    draw_curve,
    draw_frames,
    save_cine,
    write_case_page,
    write_summary_page,
)
from components.function.plausibility import faults_of_curve, faults_of_labels, faults_of_measures
from components.function.quality import FLAG, FLAG_BELOW, POOR_BELOW, Dice, expected_dice, predicted_dice
from components.function.wall import SEGMENTS, thickening_percent, wall_thickness_mm

logger = logging.getLogger(__name__)

CURVE_COLUMNS = ("frame", "time_ms", "lv_ml", "rv_ml", "myo_ml")
WALL_COLUMNS = ("case", "segment", "name", "ed_mm", "es_mm", "thickening_percent")
_DECIMALS = 2


class _Volume(NamedTuple):
    """A frame with its labels, both `(H,W,D)`, slices last; the affine in mm."""

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    spacing_mm: tuple[float, ...]


@dataclass
class _Case:
    """The frames of a series, of an ACDC patient, or a single volume."""

    name: str
    info: dict[str, str] = field(default_factory=dict)  # fields of the Info.cfg beside it, else of its own files
    frames: list[int] = field(default_factory=list)  # frame numbers, from 1
    items: list[dict[Hashable, Any]] = field(default_factory=list)  # they load each frame with its labels
    volumes: list[dict[str, float]] = field(default_factory=list)  # in ml, of each frame
    dice: list[Dice] = field(default_factory=list)  # predicted Dice of each frame
    frame_seconds: float = NAN
    is_series: bool = False

    def add(self, frame: int, item: dict[Hashable, Any], volumes: dict[str, float], dice: Dice) -> None:
        self.frames.append(frame)
        self.items.append(item)
        self.volumes.append(volumes)
        self.dice.append(dice)

    def curve(self, name: str) -> list[float]:
        return [volumes[name] for volumes in self.volumes]

    def phases(self) -> tuple[int | None, int | None, str]:
        """Return the indices of the ED and ES frames, None if missing, and how they were found."""
        named = [int(self.info[phase]) if self.info.get(phase, "").isdecimal() else None for phase in ("ED", "ES")]
        ed, es = (self.frames.index(frame) if frame in self.frames else None for frame in named)
        if ed is not None or es is not None:
            return ed, es, INFO
        if len(self.frames) == 1:
            return 0, None, "only frame"
        return *find_phases(self.curve("LV")), "LV volume"

    def phase_dice(self) -> dict[str, Dice]:
        """Return the predicted Dice at ED and at ES, if there are these frames."""
        named = zip(("ED", "ES"), self.phases(), strict=False)
        return {phase: self.dice[index] for phase, index in named if isinstance(index, int)}


class FunctionReport:
    """Ignite handler that measures ventricular function in the label maps of a `SegmentationEvaluator`.

    A case is a series, a patient in ACDC's layout with the frames that exist, or any other volume, which counts as
    end-diastole. ED and ES are the frames that the `Info.cfg` beside the images names. Otherwise, for both ventricles,
    they are the frames in which the left ventricle is largest and smallest. Labels of the data set are never read.

    `function.csv` has a row for each case, sorted by name, with the measures of `measure_function`; unknown ones are
    empty. `predicted_dice` is the lower one of ED and ES (`quality.py`). A `flag` with its `reason` marks a low Dice,
    implausible anatomy (`plausibility.py`), and a single slice, which holds no whole ventricle. Cases with a predicted
    Dice below `POOR_BELOW` are named in a warning at the end. `wall_thickness.csv` has a row for each case and each of
    `SEGMENTS`. A series also has `<case>_volumes.csv`, with the volumes in each frame, and `<case>_cine.webp`, with all
    frames. `<case>.html` is the page of a case, and `function.html` links to these pages, flagged cases first.

    Args:
        output_dir: folder of the tables, in which `SavePredictiond` has saved the label maps.
        class_names: names of the foreground classes, in the order of their labels; RV, Myo and LV are among them.
        heart_rate: beats per minute of all cases; None to take it from the frame time if the frames cover the cycle.
        slice_axis: as for `SlicesLastd`.

    Attributes:
        writes_tables: whether the tables over all cases are written at the end; else only the files of each case.
        rows: rows of `function.csv` of the last run.
        walls: rows of `wall_thickness.csv` of the last run.

    Raises:
        ValueError: if a class is missing, or the heart rate is not a positive number.
    """

    def __init__(
        self,
        output_dir: str,
        *,
        class_names: Sequence[str] = CLASS_NAMES,
        heart_rate: float | None = None,
        slice_axis: int | None = None,
    ) -> None:
        missing = [name for name in CLASS_NAMES if name not in class_names]
        if missing:
            raise ValueError(
                f"expected a model of the classes {', '.join(CLASS_NAMES)}, received one of {', '.join(class_names)}: "
                "ventricular function cannot be measured without them"
            )
        if heart_rate is not None and not heart_rate > 0:
            raise ValueError(f"expected heart_rate in beats per minute, above 0, received {heart_rate!r}")
        self.output_dir = Path(output_dir)
        self.class_names = tuple(class_names)
        self.heart_rate = heart_rate
        self.slice_axis = slice_axis
        self.writes_tables = True
        self.rows: list[Row] = []
        self.walls: list[Row] = []
        self._measured: dict[str, list[dict[str, float]]] = defaultdict(list)
        self._dice: dict[str, list[Dice]] = defaultdict(list)
        self._names: dict[str, str] = {}
        self._frame_seconds: dict[str, float] = {}
        self._body: dict[str, dict[str, str]] = {}

    def attach(self, engine: Engine) -> None:
        """Register the handler on an evaluator, after its postprocessing."""
        engine.add_event_handler(Events.STARTED, self._forget)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._predict_dice)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Measure the files that were segmented, and write their tables."""
        self.rows, self.walls = [], []
        for case in sorted(self._cases(engine.segmented), key=lambda case: case.name):
            phases = self._phases(case)
            row = self._row(case, phases)
            wall_mm = {phase: self._wall_mm(volume) for phase, volume in phases.items()}
            self.rows.append(row)
            self.walls += _wall_rows(case, wall_mm)
            if case.is_series:
                write_csv(self.output_dir / f"{case.name}_volumes.csv", CURVE_COLUMNS, _curve_rows(case))
            self._write_page(case, row, phases, wall_mm)
        if self.writes_tables:
            write_tables(self.output_dir, self.rows, self.walls)

    def _forget(self, _: Engine) -> None:
        self._measured.clear()
        self._dice.clear()
        self._names.clear()
        self._frame_seconds.clear()
        self._body.clear()

    def _predict_dice(self, engine: Engine) -> None:
        """Keep the predicted Dice of a volume or frame after the network's forward pass."""
        output, inferer = cast(Any, engine.state.output), cast(Any, engine).inferer
        (prediction,) = output["pred"]
        (file,) = files_of(output["image"])
        probabilities = prediction if inferer.test_time_views > 1 else prediction.softmax(dim=0)
        self._dice[file].append(predicted_dice(expected_dice(probabilities)))

    def _collect(self, engine: Engine) -> None:
        output: Any = engine.state.output
        for item in output:
            labels = item["pred"]
            (file,) = files_of(labels)
            self._names[file] = case_name_of(labels)
            spacing = header_spacing_mm(labels)
            self._measured[file].append(volumes_ml(np.asarray(labels[0].cpu()), spacing, self.class_names))
            self._frame_seconds[file] = float(labels.meta.get(FRAME_SECONDS, NAN))
            self._body[file] = {
                "Height": str(float(labels.meta.get(HEIGHT_CM, NAN))),
                "Weight": str(float(labels.meta.get(WEIGHT_KG, NAN))),
            }

    def _cases(self, files: Iterable[str]) -> list[_Case]:
        """Group the files into cases."""
        cases: dict[Path, _Case] = {}
        for file in files:
            path, measured, dice = Path(file), self._measured[file], self._dice[file]
            folder, name = path.parent, self._names[file]
            info = read_info(folder) if (folder / INFO).is_file() else {}
            item: dict[Hashable, Any] = {
                "image": file,
                "label": str(self.output_dir / prediction_name({"image": file, CASE: name})),
            }
            if (frame_number := frame_of_patient(file, name)) is not None:
                patient_name = name.rpartition("_frame")[0]
                patient = cases.setdefault(folder / patient_name, _Case(patient_name, info))
                patient.add(frame_number, item, measured[0], dice[0])
                continue
            is_series = len(measured) > 1
            cases[path] = _Case(name, self._body[file] | (info if is_series else {}), is_series=is_series)
            cases[path].frame_seconds = self._frame_seconds[file]
            for frame, volumes in enumerate(measured):
                cases[path].add(frame + 1, item | {FRAME: frame} if is_series else item, volumes, dice[frame])
        return list(cases.values())

    def _row(self, case: _Case, phases: Mapping[str, _Volume]) -> Row:
        ed, es, found_by = case.phases()
        heart_rate = self.heart_rate or heart_rate_per_min(case.frame_seconds, case.curve("LV"))
        measures = measure_function(
            None if ed is None else case.volumes[ed],
            None if es is None else case.volumes[es],
            heart_rate=heart_rate,
            surface_m2=body_surface_m2(*(_number(case.info.get(name)) for name in ("Height", "Weight"))),
        )
        lowest = min((dice.volume for dice in case.phase_dice().values()), default=NAN)
        reasons = self._reasons(case, phases, measures)
        return {
            "case": case.name,
            "frames": len(case.frames),
            "ed_frame": "" if ed is None else case.frames[ed],
            "es_frame": "" if es is None else case.frames[es],
            "ed_es_by": found_by,
            **{name: _as_text(value) for name, value in measures.items()},
            "predicted_dice": _as_text(lowest),
            "flag": FLAG if reasons else "",
            "reason": "; ".join(reasons),
        }

    def _reasons(self, case: _Case, phases: Mapping[str, _Volume], measures: Mapping[str, float]) -> list[str]:
        """Return the reasons to check a case, the most important first."""
        is_flat = any(volume.labels.shape[2] == 1 for volume in phases.values())
        reasons = ["one slice: no volume"] if is_flat else []
        reasons += [
            f"{phase}: the predicted Dice of {dice.volume:.2f} is below {FLAG_BELOW}"
            for phase, dice in case.phase_dice().items()
            if dice.volume < FLAG_BELOW
        ]
        classes = self._classes
        for phase, volume in phases.items():
            reasons += [f"{phase}: {fault}" for fault in faults_of_labels(volume.labels, classes)]
        reasons += faults_of_measures(measures)
        if case.is_series:
            reasons += faults_of_curve({name: case.curve(name) for name in ("LV", "RV")})
        return reasons

    def _phases(self, case: _Case) -> dict[str, _Volume]:
        """Load the ED and ES frames, if there are any."""
        ed, es, _ = case.phases()
        return {phase: self._load(case.items[index]) for phase, index in (("ED", ed), ("ES", es)) if index is not None}

    def _load(self, item: Mapping[Hashable, Any]) -> _Volume:
        loaded = LoadVolumed(["image", "label"], num_classes=len(self.class_names) + 1)(item)
        image, labels = (slices_last(loaded[key], self.slice_axis) for key in ("image", "label"))
        affine = cast(MetaTensor, labels).affine.numpy()
        return _Volume(image[0].numpy(), labels[0].numpy(), affine, header_spacing_mm(labels))

    @property
    def _classes(self) -> dict[str, int]:
        """Label of RV, Myo and LV."""
        return {name: self.class_names.index(name) + 1 for name in CLASS_NAMES}

    def _wall_mm(self, volume: _Volume) -> np.ndarray:
        return wall_thickness_mm(volume.labels, volume.affine, self._classes)

    def _draw(self, volumes: Iterable[_Volume], shown: Sequence[_Volume]) -> list[Image.Image]:
        """Draw volumes of one grid, cropped to the labels of those that are to be shown whole."""
        spacing_mm = shown[0].spacing_mm
        return draw_frames(
            ((volume.image, volume.labels) for volume in volumes),
            foreground_extent([volume.labels for volume in shown], spacing_mm),
            spacing_mm=spacing_mm,
            classes={name: label for label, name in enumerate(self.class_names, start=1)},
        )

    def _write_page(
        self, case: _Case, row: Row, phases: Mapping[str, _Volume], wall_mm: Mapping[str, np.ndarray]
    ) -> None:
        figures: dict[str, Figure | Image.Image] = {}
        cine = None
        if case.is_series:
            cine = f"{case.name}_cine.webp"
            pictures = self._draw(map(self._load, case.items), list(phases.values()))
            save_cine(self.output_dir / cine, pictures, case.frame_seconds)
            known = not math.isnan(case.frame_seconds)
            time = [1000 * case.frame_seconds * (frame - 1) if known else frame for frame in case.frames]
            curves = {name: case.curve(name) for name in self.class_names}
            marks = {phase: n for phase, n in zip(("ED", "ES"), case.phases(), strict=False) if isinstance(n, int)}
            figures["Volumes over time"] = draw_curve(time, curves, unit="ms" if known else "", marks=marks)
            drawn = {phase: pictures[n] for phase, n in marks.items()}
        else:
            drawn = {phase: self._draw([volume], [volume])[0] for phase, volume in phases.items()}
        figures |= {f"Contours at {phase}": picture for phase, picture in drawn.items()}
        thickness = {f"{phase}, mm": values for phase, values in wall_mm.items()}
        if len(wall_mm) == 2:
            thickness["thickening, %"] = thickening_percent(wall_mm["ED"], wall_mm["ES"])
        figures["Wall thickness"] = draw_bulls_eyes(thickness)
        slices = {phase: dice.slices for phase, dice in case.phase_dice().items()}
        path = self.output_dir / f"{case.name}.html"
        write_case_page(path, row, slice_dice=slices, figures=figures, classes=self.class_names, cine=cine)


def write_tables(output_dir: Path, rows: Sequence[Row], walls: Sequence[Row]) -> None:
    """Write `wall_thickness.csv`, `function.html` and last `function.csv`; warn of poor cases.

    Args:
        output_dir: folder of the tables.
        rows: a row of `function.csv` for each case, sorted by name; without any nothing is written.
        walls: rows of `wall_thickness.csv`, in the same order.
    """
    if not rows:
        return
    write_csv(output_dir / "wall_thickness.csv", WALL_COLUMNS, walls)
    write_summary_page(output_dir / "function.html", rows, {str(row["case"]): f"{row['case']}.html" for row in rows})
    path = write_csv(output_dir / "function.csv", tuple(rows[0]), rows)
    logger.info("Ventricular function of %d cases: %s", len(rows), path)
    dice = {str(row["case"]): _number(str(row["predicted_dice"])) for row in rows}
    if poor := [f"{case} ({value:.2f})" for case, value in dice.items() if value < POOR_BELOW]:
        logger.warning(
            "the predicted Dice is below %g in %d: %s; do not use their values, and check that they are of the kind "
            "that the model was trained on",
            POOR_BELOW,
            len(poor),
            ", ".join(poor),
        )


def _wall_rows(case: _Case, wall_mm: Mapping[str, np.ndarray]) -> list[Row]:
    ed, es = (wall_mm.get(phase, np.full(len(SEGMENTS), NAN)) for phase in ("ED", "ES"))
    return [
        {
            "case": case.name,
            "segment": number,
            "name": name,
            **{key: _as_text(float(value)) for key, value in zip(WALL_COLUMNS[3:], values, strict=True)},
        }
        for number, (name, *values) in enumerate(
            zip(SEGMENTS, ed, es, thickening_percent(ed, es), strict=True), start=1
        )
    ]


def _curve_rows(case: _Case) -> list[Row]:
    return [
        {
            "frame": frame,
            "time_ms": _as_text(1000 * case.frame_seconds * (frame - 1)),
            **{f"{name.lower()}_ml": _as_text(volumes[name]) for name in CLASS_NAMES},
        }
        for frame, volumes in zip(case.frames, case.volumes, strict=True)
    ]


def _as_text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.{_DECIMALS}f}"


def _number(text: str | None) -> float:
    try:
        return float(text or NAN)
    except ValueError:
        return NAN
