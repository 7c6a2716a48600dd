"""DICOM images with their position in the patient and in time, read by pydicom."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from monai.utils import OptionalImportError, optional_import

from components.base.volume_metadata import DEAD_LINK, is_dead_link

pydicom, HAS_PYDICOM = optional_import("pydicom")

_PREAMBLE = 128
_SUFFIXES = (".dcm", ".dicom", ".ima")
_FIRST_VRS = (b"UL", b"OB", b"CS", b"UI", b"DA", b"TM", b"SH")  # of the elements that may come first
_LARGE = 1 << 16  # bytes of an element that is read on demand only, such as pixels
_MODALITIES = ("MR", "CT")  # without the SEG of an earlier run, whose frames have positions too
_IMAGE_CLASSES = tuple(
    f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("4", "4.1", "4.3", "4.4", "2", "2.1", "2.2")
)  # MR and CT images: classic, enhanced, of colours, converted
_PIXELS = {"PixelData": 0x7FE00010, "FloatPixelData": 0x7FE00008, "DoubleFloatPixelData": 0x7FE00009}
_UNDEFINED_LENGTH = 0xFFFFFFFF  # of compressed pixels
_PER_FRAME = "PerFrameFunctionalGroupsSequence"
_NO_MAGNITUDE = {"P", "PHASE", "PHASE MAP", "VELOCITY", "I", "R", "IMAGINARY", "REAL"}  # values of ImageType
_COPY_AGAIN = "copy it again from its source"


class DicomImage(NamedTuple):
    """One slice at one time: a file, or a frame of one."""

    path: Path
    frame: int | None  # index in a file of several frames, from 0
    class_uid: str
    instance_uid: str
    study: str
    series: str
    series_number: int
    name: str  # of the series
    words: str  # of the names of series, protocol and sequence, and of the sequence's variant, in lower case
    sequence: tuple[str, ...]  # ImageType, ScanningSequence and SequenceName: what the image shows and how it was made
    size_hw: tuple[int, int]
    spacing_mm: tuple[float, float]  # between rows, between columns
    axes: np.ndarray  # 2x3, LPS: directions of increasing columns and rows
    position: np.ndarray  # 3, LPS, mm: the centre of the first pixel
    times: tuple[float | None, ...]  # trigger time in ms, temporal position, number: the first that differs is used
    is_inverted: bool  # whether the smallest value is white

    @property
    def across_mm(self) -> float:
        """Position of the slice along its normal."""
        return float(np.cross(*self.axes) @ self.position)


class DicomFile(NamedTuple):
    """The images of a file, and why it has none or cannot be used."""

    path: Path
    images: list[DicomImage]
    damage: str = ""  # of a file that may have held images; images that remain lack pixels
    left_out: str = ""  # why intact images are not read
    instance_uid: str = ""
    series: str = ""
    series_in_words: str = ""
    axes: np.ndarray | None = None  # as of an image, of a file that lost its pixels and still has them


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM by its content: with the preamble, or from the first element on."""
    try:
        with path.open("rb") as file:
            start = file.read(_PREAMBLE + 4)
    except OSError:
        return False
    return begins_like_dicom(start)


def begins_like_dicom(content: bytes) -> bool:
    """Return whether bytes begin with the preamble and `DICM`, or like a data set without them."""
    return content[_PREAMBLE : _PREAMBLE + 4] == b"DICM" or _begins_with_an_element(content)


def is_named_dicom(path: Path) -> bool:
    """Return whether a file is DICOM by its suffix."""
    return path.suffix.lower() in _SUFFIXES


def is_blank(path: Path) -> bool:
    """Return whether a file with a number in its name, such as `IM0001`, is empty or begins with zeros only."""
    if path.suffix.strip(".0123456789") or not any(letter.isdigit() for letter in path.name):
        return False  # a UID as a name ends in what looks like a suffix
    try:
        with path.open("rb") as file:
            return not file.read(_PREAMBLE + 4).strip(b"\0")
    except OSError:
        return False


def require_pydicom() -> None:
    """Raise an error that names the package to install if pydicom is missing."""
    if not HAS_PYDICOM:
        raise OptionalImportError(
            "DICOM files need the package pydicom to be read: `pip install pydicom highdicom`, or convert the study "
            "to NIfTI"
        )


def read_header(path: Path, **options: Any) -> Any:
    """Return pydicom's data set of a file, with or without the preamble; pixels are read on demand.

    Args:
        path: a file that is DICOM by `is_dicom`.
        options: those of `pydicom.dcmread`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="pydicom")  # `read_dicom` says what is wrong
        return pydicom.dcmread(path, force=True, defer_size=_LARGE, **options)


def study_of(path: Path) -> str:
    """Return the UID of a file's study; empty if it has none or cannot be read."""
    try:
        return str(read_header(path, stop_before_pixels=True, specific_tags=["StudyInstanceUID"]).StudyInstanceUID)
    except Exception:  # pydicom raises many types of errors on damaged files
        return ""


def read_dicom(path: Path) -> DicomFile:
    """Return the images of a file that have a position in the patient, without their pixels.

    Phase images, colours, and images that are neither MR nor CT are left out with the reason. A damaged file has the
    reason too.

    Args:
        path: any file that may be DICOM, by its content or its name.
    """
    if is_dead_link(path):
        return DicomFile(path, [], damage=f"a DICOM file that is {DEAD_LINK}")
    if not is_dicom(path):
        kind = "not DICOM by its content" if path.stat().st_size else "empty"
        return DicomFile(path, [], damage=f"a damaged DICOM file, {kind}: {_COPY_AGAIN}")
    try:
        return _file_of(path, read_header(path))
    except Exception as error:  # likewise
        return DicomFile(path, [], damage=f"a damaged DICOM file, unreadable ({error}): {_COPY_AGAIN}")


def pixels_of(path: Path) -> np.ndarray:
    """Return the grey values of a file, (frames, rows, columns)."""
    try:
        dataset = read_header(path)
        if "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = _encoding_of(dataset)
        pixels = dataset.pixel_array
    except Exception as error:  # each of pydicom's decoders raises errors of its own
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
    """Return the patient's height in cm and weight in kg, nan if unknown."""
    header = read_header(path, stop_before_pixels=True)
    height_m, weight_kg = (float(header.get(name) or "nan") for name in ("PatientSize", "PatientWeight"))
    return 100 * height_m, weight_kg


def _begins_with_an_element(start: bytes) -> bool:
    """Return whether bytes begin like a data set without the preamble, with an element of group 2 or 8."""
    if len(start) < 12:
        return False
    for order in "<>":
        group, element, length = struct.unpack(f"{order}HHI", start[:8])
        if group in (2, 8) and element <= 0x18:
            if start[4:6] in _FIRST_VRS:
                return True
            following = start[8 + length : 12 + length]  # without the type of the value
            if order == "<" and len(following) == 4 and struct.unpack("<HH", following) > (group, element):
                return following[:2] in (b"\2\0", b"\x08\0")
    return False


def _encoding_of(dataset: Any) -> str:
    """Return the transfer syntax of a data set that does not name it, as it was read."""
    implicit, little = getattr(dataset, "original_encoding", None) or (
        dataset.is_implicit_VR,
        dataset.is_little_endian,
    )
    if implicit:
        return str(pydicom.uid.ImplicitVRLittleEndian)
    return str(pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian)


def _file_of(path: Path, header: Any) -> DicomFile:
    meta = header.file_meta
    class_uid = header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID")
    name = f"{header.get('SeriesNumber') or 0} '{header.get('SeriesDescription', '')}'"
    file = DicomFile(
        path,
        [],
        instance_uid=str(header.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID") or ""),
        series=str(header.get("SeriesInstanceUID", "")),
        series_in_words=name,
    )
    if not any(pixels in header for pixels in _PIXELS):
        if class_uid is None or class_uid in _IMAGE_CLASSES:
            damage = f"a damaged DICOM file, cut off before its pixels end: {_COPY_AGAIN}"
            directions = header.get("ImageOrientationPatient") or ()
            axes = np.array(directions, np.float64).reshape(2, 3) if len(directions) == 6 else None
            return file._replace(damage=damage, axes=axes)
        return file
    if header.get("Modality") not in _MODALITIES:
        modality = header.get("Modality") or "unknown"
        return file._replace(left_out=f"DICOM of the modality {modality}: expected {' or '.join(_MODALITIES)}")
    if not str(header.get("PhotometricInterpretation", "MONOCHROME2")).startswith("MONOCHROME"):
        return file._replace(left_out="DICOM images of colours: expected grey values")
    frames = _frames_groups(header) if _PER_FRAME in header else [[]]
    found = [
        _image(path, n if _PER_FRAME in header else None, [*groups, header], header) for n, groups in enumerate(frames)
    ]
    images = [image for image in found if isinstance(image, DicomImage)]
    reasons = [reason for reason in found if isinstance(reason, str)]
    damage = (
        f"a damaged DICOM file, cut off before its pixels end: {_COPY_AGAIN}" if _lacks_pixels(path, header) else ""
    )
    return file._replace(images=images, damage=damage, left_out="" if images else reasons[0] if reasons else "")


def _lacks_pixels(path: Path, header: Any) -> bool:
    """Return whether a file ends within its pixels; compressed ones that are cut off are not found by pydicom."""
    raw = dict(header.items())  # without reading
    element = next(raw[tag] for tag in _PIXELS.values() if tag in raw)
    length = getattr(element, "length", _UNDEFINED_LENGTH)
    if length == _UNDEFINED_LENGTH:
        return False
    frames = int(header.get("NumberOfFrames") or 1)
    expected = frames * header.Rows * header.Columns * int(header.get("BitsAllocated", 16)) // 8
    return length < expected or element.value_tell + length > path.stat().st_size


def _frames_groups(header: Any) -> list[list[Any]]:
    """Return the items of the functional groups of each frame of a multi-frame file, its own before shared ones."""
    shared = _items(next(iter(header.get("SharedFunctionalGroupsSequence") or []), None))
    return [[*_items(item), *shared] for item in header.get(_PER_FRAME)]


def _items(groups: Any) -> list[Any]:
    return [element.value[0] for element in groups or [] if element.VR == "SQ" and element.value]


def _image(path: Path, frame: int | None, groups: Sequence[Any], header: Any) -> DicomImage | str:
    """Return one image from its functional groups or header, or why it is left out."""
    position, orientation, spacing = (
        _first(groups, name) for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    )
    kinds = _values(_first(groups, "FrameType") or header.get("ImageType"))
    if not _NO_MAGNITUDE.isdisjoint(kinds):
        return "DICOM images of phase or one part of complex values: expected magnitudes"
    if not position or not orientation or not spacing:
        return (
            "DICOM images without a place: expected ImagePositionPatient, ImageOrientationPatient and PixelSpacing; "
            "export the study anew with them"
        )
    trigger = _first(groups, "NominalCardiacTriggerDelayTime", _first(groups, "TriggerTime"))
    temporal = _first(groups, "TemporalPositionIndex", _first(groups, "TemporalPositionIdentifier"))
    number = header.get("InstanceNumber") if frame is None else frame
    sequence_name = str(_first(groups, "SequenceName", _first(groups, "PulseSequenceName", ""))).lower()
    variants = _values(_first(groups, "SequenceVariant"))
    is_tagged = str(_first(groups, "Tagging", "NONE")) != "NONE"
    names = [str(header.get(name, "")) for name in ("SeriesDescription", "ProtocolName")]
    is_inverse = header.get("PhotometricInterpretation") == "MONOCHROME1"  # which the shape INVERSE repeats
    return DicomImage(
        path=path,
        frame=frame,
        class_uid=str(header.get("SOPClassUID", "")),
        instance_uid=str(header.get("SOPInstanceUID", "")),
        study=str(header.get("StudyInstanceUID", "")),
        series=str(header.get("SeriesInstanceUID", "")),
        series_number=int(header.get("SeriesNumber") or 0),
        name=names[0],
        words=" ".join([*names, sequence_name, *variants, "tagging" * is_tagged]).lower(),
        sequence=(
            "\\".join(kinds),
            "\\".join(_values(_first(groups, "ScanningSequence"))),
            re.sub(r"_?\d+$", "", sequence_name),  # Siemens' ends with the segments or echoes of the slice
        ),
        size_hw=(int(header.Rows), int(header.Columns)),
        spacing_mm=(float(spacing[0]), float(spacing[1])),
        axes=np.array(orientation, np.float64).reshape(2, 3),
        position=np.array(position, np.float64),
        times=tuple(None if value is None else float(value) for value in (trigger, temporal, number)),
        is_inverted=is_inverse or header.get("PresentationLUTShape") == "INVERSE",
    )


def _values(value: Any) -> tuple[str, ...]:
    """Return the values of an attribute of words, of which there may be none, one or several."""
    several = value if value and not isinstance(value, str) else [value] if value else []
    return tuple(str(one).upper() for one in several)


def _first(groups: Sequence[Any], name: str, default: Any = None) -> Any:
    """Return the value of an attribute in the first data set that has it."""
    return next((group.get(name) for group in groups if group.get(name) is not None), default)
