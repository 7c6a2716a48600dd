"""The read-out of a segmentation: ventricular function of every case, and its volumes over time."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents

from components.data.acdc import CLASS_NAMES, INFO, read_info
from components.data.geometry import slices_last
from components.data.reader import FRAME_SECONDS
from components.data.transforms import LoadVolumed
from components.data.volume_metadata import FRAME, case_name, files_of, header_spacing_mm
from components.data.volumes import PREDICTION_POSTFIX
from components.evaluation.function import (
    NAN,
    body_surface_m2,
    find_phases,
    heart_rate_per_min,
    measure_function,
    volumes_ml,
)
from components.evaluation.reports import Row, write_csv
from components.evaluation.wall import SEGMENTS, thickening_percent, wall_thickness_mm

logger = logging.getLogger(__name__)

CURVE_COLUMNS = ("frame", "time_ms", "lv_ml", "rv_ml", "myo_ml")
WALL_COLUMNS = ("case", "segment", "name", "ed_mm", "es_mm", "thickening_percent")
NOT_YET = ("predicted_dice", "flag", "reason")  # columns that are left empty
_DECIMALS = 2


@dataclass
class _Case:
    """The frames of a series, of an ACDC patient, or a single volume."""

    name: str
    info: dict[str, str] = field(default_factory=dict)  # what the Info.cfg beside it says
    frames: list[int] = field(default_factory=list)  # their numbers, from 1
    items: list[dict[Hashable, Any]] = field(default_factory=list)  # what loads the labels of each, for `LoadVolumed`
    volumes: list[dict[str, float]] = field(default_factory=list)  # in ml, of each frame
    frame_seconds: float = NAN
    is_series: bool = False

    def add(self, frame: int, item: dict[Hashable, Any], volumes: dict[str, float]) -> None:
        self.frames.append(frame)
        self.items.append(item)
        self.volumes.append(volumes)

    def curve(self, name: str) -> list[float]:
        return [volumes[name] for volumes in self.volumes]

    def phases(self) -> tuple[int | None, int | None, str]:
        """Return the indices of the frames at ED and at ES, None where there is none, and what tells them."""
        named = [int(self.info[phase]) if self.info.get(phase, "").isdecimal() else None for phase in ("ED", "ES")]
        ed, es = (self.frames.index(frame) if frame in self.frames else None for frame in named)
        if ed is not None or es is not None:
            return ed, es, INFO
        if len(self.frames) == 1:
            return 0, None, "only frame"
        return *find_phases(self.curve("LV")), "LV volume"


class FunctionReport:
    """Ignite handler that measures ventricular function on what a `SegmentationEvaluator` has segmented.

    A case is a series; a patient in ACDC's layout, with the frames that there are; or any other volume on its own,
    which counts as end-diastole. ED and ES are the frames that the `Info.cfg` beside the images names, else those in
    which the left ventricle is largest and smallest, also for the right one. Labels are never read.

    `function.csv` has a row for each case, sorted by name, with the measures of `measure_function`, empty where they
    are unknown, and the columns of `NOT_YET`, which are empty. `wall_thickness.csv` has a row for each case and each of
    `SEGMENTS`. A series also has `<case>_volumes.csv`, with the volumes in each frame.

    Args:
        output_dir: folder of the tables, which `SavePredictiond` has saved the label maps in.
        class_names: names of the foreground classes, in the order of their labels; RV, Myo and LV are among them.
        heart_rate: beats per minute of all cases; None to take it from the frame time where the frames cover the cycle.
        slice_axis: as for `SlicesLastd`.

    Raises:
        ValueError: when a class is missing, or the heart rate is no positive number.
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
        self._measured: dict[str, list[dict[str, float]]] = defaultdict(list)
        self._frame_seconds: dict[str, float] = {}

    def attach(self, engine: Engine) -> None:
        """Register the handler on an evaluator, after its postprocessing."""
        engine.add_event_handler(Events.STARTED, self._forget)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Write the tables of the files that were segmented."""
        cases = self._cases(engine.segmented)
        rows, walls = [], []
        for case in sorted(cases, key=lambda case: case.name):
            rows.append(self._row(case))
            walls += self._wall_rows(case)
            if case.is_series:
                write_csv(self.output_dir / f"{case.name}_volumes.csv", CURVE_COLUMNS, _curve_rows(case))
        if rows:
            write_csv(self.output_dir / "wall_thickness.csv", WALL_COLUMNS, walls)
            path = write_csv(self.output_dir / "function.csv", tuple(rows[0]), rows)
            logger.info("Ventricular function of %d cases: %s", len(rows), path)

    def _forget(self, _: Engine) -> None:
        self._measured.clear()
        self._frame_seconds.clear()

    def _collect(self, engine: Engine) -> None:
        output: Any = engine.state.output
        for item in output:
            labels = item["pred"]
            (file,) = files_of(labels)
            spacing = header_spacing_mm(labels)
            self._measured[file].append(volumes_ml(np.asarray(labels[0].cpu()), spacing, self.class_names))
            self._frame_seconds[file] = float(labels.meta.get(FRAME_SECONDS, NAN))

    def _cases(self, files: Iterable[str]) -> list[_Case]:
        """Group the files to cases."""
        cases: dict[Path, _Case] = {}
        for file in files:
            path, measured = Path(file), self._measured[file]
            folder, name = path.parent, case_name(path)
            info = read_info(folder) if (folder / INFO).is_file() else {}
            item: dict[Hashable, Any] = {"label": str(self.output_dir / f"{name}_{PREDICTION_POSTFIX}.nii.gz")}
            of_patient = re.fullmatch(rf"{re.escape(folder.name)}_frame(\d+)", name)
            if info and of_patient:
                cases.setdefault(folder, _Case(folder.name, info)).add(int(of_patient[1]), item, measured[0])
                continue
            is_series = len(measured) > 1
            cases[path] = _Case(name, info if is_series else {}, is_series=is_series)
            cases[path].frame_seconds = self._frame_seconds[file]
            for frame, volumes in enumerate(measured):
                cases[path].add(frame + 1, item | {FRAME: frame} if is_series else item, volumes)
        return list(cases.values())

    def _row(self, case: _Case) -> Row:
        ed, es, found_by = case.phases()
        heart_rate = self.heart_rate or heart_rate_per_min(case.frame_seconds, case.curve("LV"))
        measures = measure_function(
            None if ed is None else case.volumes[ed],
            None if es is None else case.volumes[es],
            heart_rate=heart_rate,
            surface_m2=body_surface_m2(*(_number(case.info.get(name)) for name in ("Height", "Weight"))),
        )
        return {
            "case": case.name,
            "frames": len(case.frames),
            "ed_frame": "" if ed is None else case.frames[ed],
            "es_frame": "" if es is None else case.frames[es],
            "ed_es_by": found_by,
            **{name: _as_text(value) for name, value in measures.items()},
            **dict.fromkeys(NOT_YET, ""),
        }

    def _wall_rows(self, case: _Case) -> list[Row]:
        ed, es, _ = case.phases()
        thickness = [np.full(len(SEGMENTS), NAN) if n is None else self._wall_mm(case.items[n]) for n in (ed, es)]
        columns = [*thickness, thickening_percent(*thickness)]
        return [
            {
                "case": case.name,
                "segment": number,
                "name": name,
                **{key: _as_text(float(value)) for key, value in zip(WALL_COLUMNS[3:], values, strict=True)},
            }
            for number, (name, *values) in enumerate(zip(SEGMENTS, *columns, strict=True), start=1)
        ]

    def _wall_mm(self, item: dict[Hashable, Any]) -> np.ndarray:
        loaded: Any = LoadVolumed("label", num_classes=len(self.class_names) + 1)(item)["label"]
        labels: Any = slices_last(loaded, self.slice_axis)
        classes = {name: self.class_names.index(name) + 1 for name in CLASS_NAMES}
        return wall_thickness_mm(labels[0].numpy(), labels.affine.numpy(), classes)


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
