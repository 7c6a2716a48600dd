"""DICOM files: their images with their place in the patient and in time, by pydicom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from monai.utils import OptionalImportError, optional_import

pydicom, HAS_PYDICOM = optional_import("pydicom")

_PREAMBLE = 128
_MODALITIES = ("MR", "CT")  # not the SEG of an earlier run, whose frames have a place as well
_PER_FRAME = "PerFrameFunctionalGroupsSequence"
_NO_MAGNITUDE = {"P", "PHASE", "PHASE MAP", "VELOCITY", "I", "R", "IMAGINARY", "REAL"}  # values of ImageType


class DicomImage(NamedTuple):
    """One slice at one time: a file, or a frame of one."""

    path: Path
    frame: int | None  # in a file of several, from 0
    class_uid: str
    instance_uid: str
    study: str
    series: str
    series_number: int
    name: str  # of the series
    size_hw: tuple[int, int]
    spacing_mm: tuple[float, float]  # between rows, between columns
    axes: np.ndarray  # 2x3, LPS: the directions in which columns and rows are counted
    position: np.ndarray  # 3, LPS, mm: the centre of the first pixel
    times: tuple[float | None, ...]  # trigger time in ms, temporal position, number: the first that tells images apart

    @property
    def across_mm(self) -> float:
        """Where the slice lies on its own normal."""
        return float(np.cross(*self.axes) @ self.position)


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM by its content."""
    try:
        with path.open("rb") as file:
            return file.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"
    except OSError:
        return False


def require_pydicom() -> None:
    """Raise an error that names what to install where pydicom is missing."""
    if not HAS_PYDICOM:
        raise OptionalImportError(
            "DICOM files need the package pydicom to be read: `pip install pydicom highdicom`, or convert the study "
            "to NIfTI"
        )


def study_of(path: Path) -> str:
    """Return the UID of the study that a file belongs to, empty where it belongs to none."""
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["StudyInstanceUID"])
    return str(header.get("StudyInstanceUID", ""))


def images_of(path: Path) -> list[DicomImage]:
    """Return the images of a file that have a place in the patient, without phase images."""
    header = pydicom.dcmread(path, stop_before_pixels=True)
    if "Rows" not in header or header.get("Modality") not in _MODALITIES:
        return []
    if _PER_FRAME not in header:
        found = [_image(path, None, [header], header)]
    else:
        found = [_image(path, n, [*groups, header], header) for n, groups in enumerate(_frames_groups(header))]
    return [image for image in found if image is not None]


def pixels_of(path: Path) -> np.ndarray:
    """Return the grey values of a file, (frames, rows, columns)."""
    dataset = pydicom.dcmread(path)
    try:
        pixels = dataset.pixel_array
    except Exception as error:  # each of pydicom's decoders raises its own
        raise ValueError(
            f"{path} cannot be decoded: expected uncompressed pixels, or a package that pydicom can decode them with "
            f"({error})"
        ) from error
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    groups = _frames_groups(dataset) if _PER_FRAME in dataset else [[dataset]]
    slope, intercept = (
        np.array([_first(of_frame, name, default) for of_frame in groups], np.float32)[:, None, None]
        for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )
    return pixels if (slope == 1).all() and (intercept == 0).all() else pixels * slope + intercept


def body_of(path: Path) -> tuple[float, float]:
    """Return the patient's height in cm and weight in kg, nan where the files do not give them."""
    header = pydicom.dcmread(path, stop_before_pixels=True)
    height_m, weight_kg = (float(header.get(name) or "nan") for name in ("PatientSize", "PatientWeight"))
    return 100 * height_m, weight_kg


def _frames_groups(header: Any) -> list[list[Any]]:
    """Return for each frame of a multi-frame file the items of its functional groups, its own first."""
    shared = _items(next(iter(header.get("SharedFunctionalGroupsSequence") or []), None))
    return [[*_items(item), *shared] for item in header.get(_PER_FRAME)]


def _items(groups: Any) -> list[Any]:
    return [element.value[0] for element in groups or [] if element.VR == "SQ" and element.value]


def _image(path: Path, frame: int | None, groups: Sequence[Any], header: Any) -> DicomImage | None:
    """Return one image by what its functional groups or its header say; None if it has no place or is phase."""
    position, orientation, spacing = (
        _first(groups, name) for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    )
    kinds = _first(groups, "FrameType") or header.get("ImageType") or []
    is_phase = not isinstance(kinds, str) and not _NO_MAGNITUDE.isdisjoint(kinds)
    if position is None or orientation is None or spacing is None or is_phase:
        return None
    trigger = _first(groups, "NominalCardiacTriggerDelayTime", _first(groups, "TriggerTime"))
    temporal = _first(groups, "TemporalPositionIndex", _first(groups, "TemporalPositionIdentifier"))
    number = header.get("InstanceNumber") if frame is None else frame
    return DicomImage(
        path=path,
        frame=frame,
        class_uid=str(header.SOPClassUID),
        instance_uid=str(header.SOPInstanceUID),
        study=str(header.get("StudyInstanceUID", "")),
        series=str(header.get("SeriesInstanceUID", "")),
        series_number=int(header.get("SeriesNumber") or 0),
        name=str(header.get("SeriesDescription", "")),
        size_hw=(int(header.Rows), int(header.Columns)),
        spacing_mm=(float(spacing[0]), float(spacing[1])),
        axes=np.array(orientation, np.float64).reshape(2, 3),
        position=np.array(position, np.float64),
        times=tuple(None if value is None else float(value) for value in (trigger, temporal, number)),
    )


def _first(groups: Sequence[Any], name: str, default: Any = None) -> Any:
    """Return the value of an attribute in the first of some data sets that has it."""
    return next((group.get(name) for group in groups if group.get(name) is not None), default)
