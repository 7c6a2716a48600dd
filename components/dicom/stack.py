"""DICOM studies: the short-axis cine among a study's series, as one 4D array with its affine.

dicom2nifti and SimpleITK turn one series into one volume. Here a stack is often ten series of one slice each, among
other series, and time is an axis. So `series.py` groups the images that pydicom reads. This module chooses one of the
stacks, refuses what is incomplete, and reads it.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from components.base.volume_metadata import is_dead_link
from components.dicom.images import (
    DicomFile,
    DicomImage,
    is_blank,
    is_dicom,
    is_named_dicom,
    pixels_of,
    read_dicom,
    require_pydicom,
    study_of,
)
from components.dicom.series import (
    EVEN_SHARE,
    FEWEST_SLICES,
    SAME_POSITION_MM,
    Candidate,
    Positions,
    by_geometry,
    candidate_stacks,
    have_same_axes,
    in_words,
    is_plain,
    kind_of,
    numbers_in_words,
)

OFFSET_MM = 1.0  # largest distance of a slice from the line through the first and the last one
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NAMED_FILES = 5  # at most, in one message


class DicomStack(NamedTuple):
    """A short-axis cine."""

    slices: Positions  # each sorted by time
    affine: np.ndarray  # 4x4, of (column, row, slice) in mm, to RAS
    frame_seconds: float  # nan if unknown
    chosen: str  # the series that it is made of, in words
    left_out: dict[str, str]  # why the study's other series and files are not read, by what they are called

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Columns, rows, slices and frames."""
        rows, columns = self.slices[0][0].size_hw
        return columns, rows, len(self.slices), len(self.slices[0])


def study_folders(files: Iterable[Path], root: Path) -> tuple[list[Path], dict[Path, str]]:
    """Find the folder of each study: the outermost one that holds only its files.

    Args:
        files: DICOM files of any studies below `root`, by content or name.
        root: the outermost folder that may be a study's.

    Returns:
        the folders. And a reason for each file outside of them that is damaged, or an image without a study. Files
        without images, such as a DICOMDIR, are ignored.

    Raises:
        OptionalImportError: if pydicom is missing.
        ValueError: if studies are not in separate folders.
    """
    require_pydicom()
    studies_below: dict[Path, set[str]] = defaultdict(set)
    within: dict[str, list[str]] = defaultdict(list)
    without: dict[Path, str] = {}
    for file in files:
        study = study_of(file)
        if study:
            within[study].append(str(file.parent))
            for folder in file.parents:
                studies_below[folder].add(study)
        elif reason := _reason_without_study(file):
            without[file] = reason
    folders: list[Path] = []
    for parents in within.values():
        folder = Path(os.path.commonpath(parents))
        studies = studies_below[folder]
        if len(studies) > 1:
            raise ValueError(
                f"{folder} holds {len(studies)} DICOM studies: expected each one in a folder of its own, whose name "
                "becomes the name of its case"
            )
        # damaged files beside a study's folder may be another study
        while folder != root and len(studies_below[folder.parent]) == 1:
            if any(file.is_relative_to(folder.parent) and not file.is_relative_to(folder) for file in without):
                break
            folder = folder.parent
        folders.append(folder)
    outside = {
        file: reason for file, reason in without.items() if not any(file.is_relative_to(folder) for folder in folders)
    }
    return sorted(folders), outside


def _reason_without_study(file: Path) -> str:
    found = read_dicom(file)
    if found.images and not found.damage:
        return (
            "DICOM images without StudyInstanceUID, which an anonymiser may have removed: give the images of each "
            "study one of their own"
        )
    return found.damage


def read_stack(folder: Path) -> DicomStack:
    """Find the short-axis cine of a study.

    Images of one orientation, size and pixel spacing belong together. A series of at least 4 positions is a stack.
    Alike series of a single position form a stack together. Series are alike if ImageType, ScanningSequence,
    SequenceName and name are equal. Numbers of slices in the name do not count. The stack with most slices is taken,
    and of equal ones the latest. Series whose names or sequence are those of tagging, late enhancement, perfusion or
    flow come last.

    A repeated breath-hold gives several alike series at one position. The latest one with the usual number of frames is
    then used. Series alike in only one of name and sequence complete the stack at other positions. Images of one
    position are ordered by trigger time, else by temporal position, else by their number. Phase images are left out.
    Copies of an image count once.

    Args:
        folder: folder of the study, searched with all folders below.

    Raises:
        OptionalImportError: if pydicom is missing.
        ValueError: if there is no short-axis cine. If its slices are missing, unevenly spaced or not in line, or have
            different numbers of frames. If files are damaged that may be of the cine. Those of another series are not
            if it has intact files or other axes, or if the cine is one series.
    """
    require_pydicom()
    files = tuple(sorted(path for path in folder.rglob("*") if _may_be_dicom(path, folder)))
    changed = max((path.stat().st_mtime_ns for path in files if path.exists()), default=0)
    return _read_stack(folder, files, changed)


def _may_be_dicom(path: Path, folder: Path) -> bool:
    """Return whether a file of a study is DICOM, or was before it was damaged; not hidden ones that are not."""
    if is_dead_link(path):
        return is_named_dicom(path)
    if not path.is_file():
        return False
    is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return is_dicom(path) or (not is_hidden and (is_named_dicom(path) or is_blank(path)))


@functools.lru_cache(maxsize=2)  # it is needed when a study is found, read and written
def _read_stack(folder: Path, paths: tuple[Path, ...], _changed_ns: int) -> DicomStack:
    files = [read_dicom(path) for path in paths]
    images, copies = _distinct(folder, files)
    candidates = candidate_stacks(images)
    fit = [candidate for candidate in candidates if candidate.is_short_axis_cine]
    if not fit:
        found = "; ".join(in_words(candidate.positions) for candidate in candidates) or "no image with a position"
        raise ValueError(
            f"{folder} has no short-axis cine: expected at least {FEWEST_SLICES} parallel slices of several frames "
            f"each, oblique to the body's axes; found {found}{_and_damaged(folder, files)}"
        )
    chosen = fit[0].positions
    _refuse_damage(folder, chosen, files)
    _refuse_gaps(folder, chosen)
    counts = [len(images) for images in chosen]
    if len(set(counts)) > 1:
        listed = ", ".join(f"{n} at {images[0].across_mm:.1f} mm" for n, images in zip(counts, chosen, strict=True))
        raise ValueError(f"{folder}: expected as many frames in every slice of {in_words(chosen)}, received {listed}")
    slices = [_in_time(folder, images) for images in chosen]
    left_out = _other_series(fit[0], images) | copies | _unread_files(folder, files, images)
    return DicomStack(slices, _affine(slices), _frame_seconds(slices), _choice(fit), left_out)


def _choice(fit: Sequence[Candidate]) -> str:
    """Return the first stack in words, and the others that nothing but their size and age puts behind it."""
    chosen, *others = (candidate.positions for candidate in fit)
    words = in_words(chosen)
    if not is_plain(chosen):
        words += ", though its name or sequence is not that of a plain cine: none other was found"
    if rivals := [stack for stack in others if is_plain(stack) == is_plain(chosen)]:
        listed = "; ".join(f"{in_words(stack)} in {numbers_in_words(stack)}" for stack in rivals)
        words += f" in {numbers_in_words(chosen)}, and not {listed}; give the study without the wrong one if need be"
    return words


def _distinct(folder: Path, files: Sequence[DicomFile]) -> tuple[list[DicomImage], dict[str, str]]:
    """Return the images, each once, and the reason for each file that is a copy; undamaged files come first."""
    found: dict[tuple, DicomImage] = {}
    copies: dict[str, str] = {}
    for image in (image for file in sorted(files, key=lambda file: bool(file.damage)) for image in file.images):
        # the position and times too, since some anonymisers give all images one UID
        key = (image.instance_uid or image.path, image.frame, tuple(image.position), image.times)
        if found.setdefault(key, image) is not image:
            copies[f"file {image.path.relative_to(folder)}"] = "a copy of a DICOM image that is read"
    return sorted(found.values(), key=lambda image: str(image.path)), copies


def read_voxels(stack: DicomStack) -> np.ndarray:
    """Read a stack's grey values, rescaled by its files' slope and intercept, large values being white.

    Returns:
        (columns, rows, slices, frames), as stored or float32.

    Raises:
        ValueError: if a file cannot be decoded.
    """
    places: dict[Path, list[tuple[int, int, int]]] = defaultdict(list)
    for depth, images in enumerate(stack.slices):
        for time, image in enumerate(images):
            places[image.path].append((depth, time, image.frame or 0))
    voxels = np.zeros(stack.shape, np.uint8)
    is_inverted = np.array([[image.is_inverted for image in images] for images in stack.slices])
    for path, of_file in places.items():
        pixels = pixels_of(path)
        if pixels.dtype != voxels.dtype:
            voxels = voxels.astype(np.result_type(voxels, pixels))
        for depth, time, frame in of_file:
            voxels[:, :, depth, time] = pixels[frame].T
    if is_inverted.any():  # from one value for all, so that slices and frames stay comparable
        voxels = voxels.astype(np.result_type(voxels, np.int32))
        voxels[:, :, is_inverted] = voxels[:, :, is_inverted].max() - voxels[:, :, is_inverted]
    return voxels


def _other_series(chosen: Candidate, images: Sequence[DicomImage]) -> dict[str, str]:
    """Return why the series beside the chosen stack are left out, by their numbers and names."""
    used = {id(image) for of_slice in chosen.positions for image in of_slice}
    series = {image.series for of_slice in chosen.positions for image in of_slice}
    kinds = {kind_of(image) for of_slice in chosen.positions for image in of_slice}
    (geometry,) = [group for group in by_geometry(images) if any(id(image) in used for image in group)]
    of_geometry = {id(image) for image in geometry}
    places = np.array([of_slice[0].across_mm for of_slice in chosen.positions])
    reasons: dict[str, str] = {}
    for image in images:
        if id(image) in used:
            continue
        reason = "not of the short-axis cine"
        if id(image) in of_geometry and np.abs(places - image.across_mm).min() < SAME_POSITION_MM:
            reason = "at slices of the short-axis cine, but of another name, sequence or number of frames"
            if kind_of(image) in kinds and image.series not in series:
                reason = "another breath-hold of a slice: the latest one with the usual number of frames is used"
        reasons.setdefault(f"series {image.series_number} '{image.name}'", reason)
    return reasons


def _unread_files(folder: Path, files: Sequence[DicomFile], images: Sequence[DicomImage]) -> dict[str, str]:
    """Return the reasons for damaged files by their paths, and for other images by their series."""
    read = {image.path for image in images}
    reasons = {}
    for file in files:
        if file.damage:
            reasons[f"file {file.path.relative_to(folder)}"] = file.damage
        elif file.left_out and file.path not in read:
            reasons[f"series {file.series_in_words}"] = file.left_out
    return reasons


def _refuse_damage(folder: Path, chosen: Positions, files: Sequence[DicomFile]) -> None:
    """Raise an error that names the damaged files that are of the stack, or may be."""
    used = {image.path for of_slice in chosen for image in of_slice}
    series = {image.series for of_slice in chosen for image in of_slice}
    intact = {image.instance_uid for file in files if not file.damage for image in file.images}
    others = {file.series for file in files if not file.damage} - series - {""}

    def is_of_another(file: DicomFile) -> bool:
        is_turned = file.axes is not None and not have_same_axes(file.axes, chosen[0][0].axes)
        is_known = bool(file.series) and file.series not in series
        return is_known and (is_turned or len(series) == 1 or file.series in others)

    lost = [
        file
        for file in files
        if file.damage
        and not file.left_out
        and (file.path in used if file.images else file.instance_uid not in intact and not is_of_another(file))
    ]
    if lost:
        raise ValueError(
            f"{folder}: expected every file of the short-axis cine whole, but {in_words(chosen)} may lack slices or "
            f"frames: {_listed(folder, lost)}; or remove what is of another series"
        )


def _and_damaged(folder: Path, files: Sequence[DicomFile]) -> str:
    damaged = [file for file in files if file.damage]
    return f"; beside {_listed(folder, damaged)}" if damaged else ""


def _listed(folder: Path, damaged: Sequence[DicomFile]) -> str:
    """Return the paths of damaged files, below the reason that they share."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for file in damaged:
        by_reason[file.damage].append(str(file.path.relative_to(folder)))
    return "; ".join(
        ", ".join(paths[:_NAMED_FILES])
        + (f" and {len(paths) - _NAMED_FILES} more" if len(paths) > _NAMED_FILES else "")
        + f": {reason}"
        for reason, paths in by_reason.items()
    )


def _refuse_gaps(folder: Path, stack: Positions) -> None:
    """Raise an error that names the positions if they are not evenly spaced along a line."""
    places = np.array([images[0].across_mm for images in stack])
    steps = np.diff(places)
    usual = float(np.median(steps))
    listed = ", ".join(f"{place:.1f}" for place in places)
    wide = np.flatnonzero(steps > 1.5 * usual)
    if wide.size:
        between = ", ".join(f"{places[n]:.1f} and {places[n + 1]:.1f}" for n in wide)
        raise ValueError(
            f"{folder} lacks slices of {in_words(stack)}: expected one every {usual:.1f} mm, none is between {between}"
            f"; positions in mm: {listed}; copy the missing series"
        )
    if (np.abs(steps - usual) > EVEN_SHARE * usual).any():
        raise ValueError(
            f"{folder} has unevenly spaced slices of {in_words(stack)}: expected one every {usual:.1f} mm; positions "
            f"in mm: {listed}; keep one stack in the folder"
        )
    corners = np.array([images[0].position for images in stack])
    line = corners[0] + np.linspace(0, 1, len(corners))[:, None] * (corners[-1] - corners[0])
    offsets = np.linalg.norm(corners - line, axis=1)
    if offsets.max() > OFFSET_MM + EVEN_SHARE * usual:
        raise ValueError(
            f"{folder} has slices of {in_words(stack)} that are not in line: their first pixels are up to "
            f"{offsets.max():.1f} mm beside a line, expected at most {OFFSET_MM:g}; was the stack planned anew midway?"
        )


def _in_time(folder: Path, images: Sequence[DicomImage]) -> list[DicomImage]:
    """Return the images of one position, sorted by time."""
    for kind in range(3):
        times = [image.times[kind] for image in images]
        if None in times or len(set(times)) == 1:
            continue
        if len(set(times)) < len(times):
            raise ValueError(
                f"{folder} has {len(times)} images of '{images[0].name}' at {images[0].across_mm:.1f} mm at only "
                f"{len(set(times))} times: expected one at each; keep one of the images of each time"
            )
        return sorted(images, key=lambda image: image.times[kind])  # type: ignore[arg-type, return-value]
    raise ValueError(
        f"{folder} has {len(images)} images of '{images[0].name}' at {images[0].across_mm:.1f} mm in no known order: "
        "expected trigger times, temporal positions or instance numbers"
    )


def _affine(slices: Positions) -> np.ndarray:
    first, last = slices[0][0], slices[-1][0]
    between_rows, between_columns = first.spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = first.axes[0] * between_columns
    affine[:3, 1] = first.axes[1] * between_rows
    affine[:3, 2] = (last.position - first.position) / (len(slices) - 1)
    affine[:3, 3] = first.position
    return LPS_TO_RAS @ affine


def _frame_seconds(slices: Positions) -> float:
    """Return the median time between frames over all slices, which show different heart beats; nan if unknown."""
    times = [[image.times[0] for image in images] for images in slices]
    if any(time is None for of_slice in times for time in of_slice):
        return float("nan")
    steps = np.diff(np.array(times, np.float64), axis=1)
    return float(np.median(steps)) / 1000 if (steps > 0).all() else float("nan")
