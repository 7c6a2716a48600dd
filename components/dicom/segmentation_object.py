"""Label maps of a DICOM study's cine as DICOM SEG, which viewers show on the study's own images."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import OptionalImportError, optional_import

import components
from components.base.atomic_write import write_atomically
from components.base.volume_metadata import FRAME, case_name_of, files_of
from components.dicom.images import DicomImage, read_header
from components.dicom.stack import DicomStack, read_stack

pydicom, _ = optional_import("pydicom")
highdicom, HAS_HIGHDICOM = optional_import("highdicom")

logging.getLogger("highdicom").setLevel(logging.WARNING)  # it logs every module that it copies

# SNOMED CT's codes and meanings, all of the category "Anatomical Structure"
SNOMED = {
    "RV": ("53085002", "Right ventricle of heart"),
    "Myo": ("49848007", "Myocardium of left ventricle"),
    "LV": ("87878005", "Left ventricle of heart"),
}
_CATEGORY = ("123037004", "Anatomical Structure")
_MAKER = "autosam-bundles"
_SERIES_NUMBER = 900  # beyond those of scanners
# Attributes that a SEG copies from its images; those that the files lack stay empty, as DICOM allows.
_OF_PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
_OF_STUDY = ("StudyInstanceUID", "StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName")


class SaveDicomSegd(MapTransform):
    """Save the label map of each frame of a DICOM study's cine as `<case>_seg/frame<NN>.dcm`; skip other volumes.

    All frames are one series. Each instance refers to the images of its time, slice by slice. Each frame has a file of
    its own, because highdicom, like most viewers, treats two images at one position as a mistake. Segments are binary,
    one for each class that the frame shows.

    Args:
        keys: item 1xHxWxD on its image's grid, with its metadata.
        output_dir: folder of the files, made if missing.
        class_names: names of the foreground classes, in the order of the labels; those that `SNOMED` lacks are coded
            as some anatomical structure.

    Raises:
        OptionalImportError: for a study, if highdicom is missing.
    """

    def __init__(self, keys: KeysCollection, output_dir: str, class_names: Sequence[str]) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.class_names = tuple(class_names)
        self._stack: DicomStack | None = None
        self._series_uid = ""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save the items of one dictionary and return the dictionary."""
        for key in self.key_iterator(dict(data)):
            labels = data[key]
            folder = Path(files_of(labels)[0])
            if folder.is_dir():
                self._save(labels, folder)
        return dict(data)

    def _save(self, labels: Any, folder: Path) -> None:
        frame = int(labels.meta[FRAME])
        if self._stack is None or frame == 0:
            _require_highdicom(folder)
            self._stack, self._series_uid = read_stack(folder), highdicom.UID()
        segmentation = segmentation_of(
            np.asarray(labels[0].cpu()).astype(np.uint8),
            self._stack,
            frame,
            class_names=self.class_names,
            series_uid=self._series_uid,
        )
        with write_atomically(
            self.output_dir / f"{case_name_of(labels)}_seg" / f"frame{frame + 1:02d}.dcm"
        ) as temporary:
            segmentation.save_as(temporary)


def segmentation_of(
    labels: np.ndarray, stack: DicomStack, frame: int, *, class_names: Sequence[str], series_uid: str
) -> Any:
    """Make the SEG of one frame.

    highdicom takes images of one series, or one multi-frame file, but the slices of a stack may be of ten series. So it
    gets stand-ins with the images' geometry and patient. The references to them are then replaced by the images' own.

    Args:
        labels: (columns, rows, slices), 0 for the background and n for the n-th class.
        stack: the cine.
        frame: index in time, from 0.
        class_names: names of the foreground classes, in the order of the labels.
        series_uid: UID of the SEG's series.

    Returns:
        highdicom's `Segmentation`.
    """
    images = [of_slice[frame] for of_slice in stack.slices]
    header = read_header(images[0].path, stop_before_pixels=True)
    distance_mm = float(np.linalg.norm(stack.affine[:3, 2]))
    stand_ins = [_stand_in(image, header, distance_mm) for image in images]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The string .* person name")  # for names without a family name
        segmentation = highdicom.seg.Segmentation(
            source_images=stand_ins,
            pixel_array=labels.transpose(2, 1, 0),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[_segment(number, name) for number, name in enumerate(class_names, start=1)],
            series_instance_uid=series_uid,
            series_number=_SERIES_NUMBER,
            sop_instance_uid=highdicom.UID(),
            instance_number=frame + 1,
            manufacturer=_MAKER,
            manufacturer_model_name=_MAKER,
            software_versions=components.__version__,
            device_serial_number="-",
            series_description=f"Segmentation of {images[0].name}"[:64],
        )
    _refer_to(segmentation, {str(stand.SOPInstanceUID): image for stand, image in zip(stand_ins, images, strict=True)})
    return segmentation


def _require_highdicom(folder: Path) -> None:
    if not HAS_HIGHDICOM:
        raise OptionalImportError(
            f"{folder} is a DICOM study, and its segmentation needs the package highdicom to be written: "
            "`pip install pydicom highdicom`"
        )


def _segment(number: int, name: str) -> Any:
    category, kind = (
        highdicom.sr.CodedConcept(code, "SCT", meaning) for code, meaning in (_CATEGORY, SNOMED.get(name, _CATEGORY))
    )
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=_MAKER,
            version=components.__version__,
            family=highdicom.sr.CodedConcept("123109", "DCM", "Artificial Intelligence"),
        ),
    )


def _stand_in(image: DicomImage, header: Any, distance_mm: float) -> Any:
    """Return a single-frame image with the position of an image, its patient and study, and a UID of its own."""
    stand = pydicom.Dataset()
    for name in (*_OF_PATIENT, *_OF_STUDY):
        setattr(stand, name, header.get(name, ""))
    for name in ("FrameOfReferenceUID", "PositionReferenceIndicator", "SpecificCharacterSet"):
        if name in header:
            setattr(stand, name, header.get(name))
    stand.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"  # MR Image Storage
    stand.SOPInstanceUID = highdicom.UID()
    stand.SeriesInstanceUID = header.SeriesInstanceUID
    stand.Modality = header.get("Modality", "MR")
    stand.Rows, stand.Columns = image.size_hw
    stand.ImagePositionPatient = _as_decimals(image.position)
    stand.ImageOrientationPatient = _as_decimals(image.axes.ravel())
    stand.PixelSpacing = _as_decimals(image.spacing_mm)
    stand.SpacingBetweenSlices = stand.SliceThickness = _as_decimals([distance_mm])[0]
    return stand


def _as_decimals(values: Sequence[float] | np.ndarray) -> list[str]:
    return [pydicom.valuerep.format_number_as_ds(float(value)) for value in values]


def _refer_to(segmentation: Any, images: Mapping[str, DicomImage]) -> None:
    """Make a SEG refer to the images instead of their stand-ins, whose UIDs are the keys."""
    derivations = [
        item for groups in segmentation.PerFrameFunctionalGroupsSequence for item in groups.DerivationImageSequence
    ]
    sources = {id(source): source for item in derivations for source in item.SourceImageSequence}  # segments share them
    for source in sources.values():
        image = images[str(source.ReferencedSOPInstanceUID)]
        source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = image.class_uid, image.instance_uid
        if image.frame is not None:
            source.ReferencedFrameNumber = image.frame + 1
    by_series: dict[str, dict[str, Any]] = defaultdict(dict)
    for image in images.values():
        by_series[image.series][image.instance_uid] = reference = pydicom.Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = image.class_uid, image.instance_uid
    of_series = []
    for series, references in by_series.items():
        of_series.append(pydicom.Dataset())
        of_series[-1].SeriesInstanceUID = series
        of_series[-1].ReferencedInstanceSequence = list(references.values())
    segmentation.ReferencedSeriesSequence = of_series
    if "SourceImageSequence" in segmentation:
        segmentation.SourceImageSequence = [
            reference for references in by_series.values() for reference in references.values()
        ]
