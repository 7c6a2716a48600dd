"""DICOM studies: the short-axis cine among a study's series, as one 4D array with its affine.

dicom2nifti and SimpleITK turn one series into one volume. Here a stack is often ten series, of a slice each, among
others that are none of it, and time is an axis; so the grouping is this module's own, on what pydicom reads.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from components.dicom.images import DicomImage, images_of, is_dicom, pixels_of, require_pydicom, study_of

FEWEST_SLICES = 4  # of a stack; perfusion has three
EVEN_SHARE = 0.05  # of the distance of slices by which it may differ from slice to slice
SAME_POSITION_MM = 0.1
OFFSET_MM = 1.0  # by which slices may lie beside the line through the first and the last one
SAME_DIRECTION = 1 - 1e-4  # cosine, 0.8 degrees
ACROSS_BODY = 0.94  # cosine, 20 degrees, from which on a stack is axial, coronal or sagittal, and no short axis
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

Positions = list[list[DicomImage]]  # the images at each position, sorted along the normal


class DicomStack(NamedTuple):
    """A short-axis cine."""

    slices: Positions  # each in the order of time
    affine: np.ndarray  # 4x4, of (column, row, slice) in mm, to RAS
    frame_seconds: float  # nan if unknown
    left_out: list[str]  # the study's other series, in words

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Columns, rows, slices and frames."""
        rows, columns = self.slices[0][0].size_hw
        return columns, rows, len(self.slices), len(self.slices[0])


def study_folders(files: Iterable[Path], root: Path) -> list[Path]:
    """Return the folder of each study, the outermost that holds only its files.

    Args:
        files: DICOM files of any studies below `root`; those of no study, such as a DICOMDIR, do not matter.
        root: the outermost folder that may be a study's.

    Raises:
        OptionalImportError: without pydicom.
        ValueError: when studies are not in folders of their own.
    """
    require_pydicom()
    studies_below: dict[Path, set[str]] = defaultdict(set)
    within: dict[str, list[str]] = defaultdict(list)
    for file in files:
        study = study_of(file)
        if study:
            within[study].append(str(file.parent))
            for folder in file.parents:
                studies_below[folder].add(study)
    folders = []
    for parents in within.values():
        folder = Path(os.path.commonpath(parents))
        studies = studies_below[folder]
        if len(studies) > 1:
            raise ValueError(
                f"{folder} holds {len(studies)} DICOM studies: expected each one in a folder of its own, whose name "
                "becomes that of its case"
            )
        while folder != root and len(studies_below[folder.parent]) == 1:
            folder = folder.parent
        folders.append(folder)
    return sorted(folders)


def read_stack(folder: Path) -> DicomStack:
    """Find the short-axis cine of a study.

    Images of one orientation, size and pixel spacing belong together. A stack is one series of them with at least 4
    positions, or all series of a single position; of several the one of most slices, then the latest. Where two series
    lie at one position, as after a breath-hold that was repeated, the later one counts. Images that follow each
    other in time are ordered by trigger time, else by temporal position, else by their number. Phase images are left
    out.

    Args:
        folder: of the study, searched with all folders below.

    Raises:
        OptionalImportError: without pydicom.
        ValueError: when there is no short-axis cine, or its slices are missing, unevenly spaced, not above each other,
            or of different numbers of frames.
    """
    require_pydicom()
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file() and is_dicom(path)))
    return _read_stack(folder, files, max((path.stat().st_mtime_ns for path in files), default=0))


@functools.lru_cache(maxsize=2)  # it is asked for when a study is found, read and written
def _read_stack(folder: Path, files: tuple[Path, ...], _changed_ns: int) -> DicomStack:
    images = [image for path in files for image in images_of(path)]
    candidates = [stack for group in _by_geometry(images) for stack in _stacks(group)]
    candidates.sort(key=lambda stack: (len(stack), _latest(stack)), reverse=True)
    fit = [stack for stack in candidates if len(stack) >= FEWEST_SLICES and _is_cine(stack) and _is_oblique(stack)]
    if not fit:
        found = "; ".join(map(_in_words, candidates)) or "no image with a position"
        raise ValueError(
            f"{folder} has no short-axis cine: expected at least {FEWEST_SLICES} parallel slices of several frames "
            f"each, oblique to the body's axes; found {found}"
        )
    chosen = fit[0]
    _refuse_gaps(folder, chosen)
    slices = [_in_time(folder, images) for images in chosen]
    counts = [len(images) for images in slices]
    if len(set(counts)) > 1:
        listed = ", ".join(f"{n} at {images[0].across_mm:.1f} mm" for n, images in zip(counts, slices, strict=True))
        raise ValueError(f"{folder}: expected as many frames in every slice of {_in_words(chosen)}, received {listed}")
    used = {image.series for images in slices for image in images}
    left_out = {image.series: f"{image.series_number} '{image.name}'" for image in images if image.series not in used}
    return DicomStack(slices, _affine(slices), _frame_seconds(slices), list(left_out.values()))


def read_voxels(stack: DicomStack) -> np.ndarray:
    """Read a stack's grey values, rescaled as its files say.

    Returns:
        (columns, rows, slices, frames), as stored or float32.

    Raises:
        ValueError: for a file that cannot be decoded.
    """
    places: dict[Path, list[tuple[int, int, int]]] = defaultdict(list)
    for depth, images in enumerate(stack.slices):
        for time, image in enumerate(images):
            places[image.path].append((depth, time, image.frame or 0))
    voxels = np.zeros(stack.shape, np.uint8)
    for path, of_file in places.items():
        pixels = pixels_of(path)
        if pixels.dtype != voxels.dtype:
            voxels = voxels.astype(np.result_type(voxels, pixels))
        for depth, time, frame in of_file:
            voxels[:, :, depth, time] = pixels[frame].T
    return voxels


def _by_geometry(images: Iterable[DicomImage]) -> list[list[DicomImage]]:
    """Group images by orientation, size and pixel spacing."""
    groups: list[list[DicomImage]] = []
    for image in images:
        for group in groups:
            first = group[0]
            if (
                first.size_hw == image.size_hw
                and np.allclose(first.spacing_mm, image.spacing_mm, rtol=1e-3)
                and (np.sum(first.axes * image.axes, axis=1) > SAME_DIRECTION).all()
            ):
                group.append(image)
                break
        else:
            groups.append([image])
    return groups


def _stacks(group: Sequence[DicomImage]) -> list[Positions]:
    """Return the stacks of a geometry: each series of several positions, and those of a single one together."""
    by_series: dict[str, list[DicomImage]] = defaultdict(list)
    for image in group:
        by_series[image.series].append(image)
    stacks, single = [], []
    for images in by_series.values():
        positions = _by_position(images)
        if len(positions) > 1:
            stacks.append(positions)
        else:
            single.extend(images)
    together = _by_position(single)
    for images in together:
        latest = max(images, key=lambda image: (image.series_number, image.series)).series
        images[:] = [image for image in images if image.series == latest]
    return [*stacks, together] if together else stacks


def _by_position(images: Iterable[DicomImage]) -> Positions:
    positions: Positions = []
    for image in sorted(images, key=lambda image: image.across_mm):
        if positions and image.across_mm - positions[-1][0].across_mm < SAME_POSITION_MM:
            positions[-1].append(image)
        else:
            positions.append([image])
    return positions


def _latest(stack: Positions) -> int:
    return max(image.series_number for images in stack for image in images)


def _is_cine(stack: Positions) -> bool:
    return all(len(images) > 1 for images in stack)


def _is_oblique(stack: Positions) -> bool:
    return bool(np.abs(np.cross(*stack[0][0].axes)).max() < ACROSS_BODY)


def _in_words(stack: Positions) -> str:
    names = sorted({image.name for images in stack for image in images})
    frames = sorted({len(images) for images in stack})
    of_frames = f"{frames[0]}" if len(frames) == 1 else f"{frames[0]} to {frames[-1]}"
    kind = "" if _is_oblique(stack) else ", across a body axis"
    more = f" and {len(names) - 1} more series" if len(names) > 1 else ""
    plural = ["s" if many else "" for many in (len(stack) > 1, frames[-1] > 1)]
    return f"'{names[0]}'{more}: {len(stack)} slice{plural[0]} of {of_frames} frame{plural[1]}{kind}"


def _refuse_gaps(folder: Path, stack: Positions) -> None:
    """Raise an error that names the positions where these are not evenly spaced along a line."""
    places = np.array([images[0].across_mm for images in stack])
    steps = np.diff(places)
    usual = float(np.median(steps))
    listed = ", ".join(f"{place:.1f}" for place in places)
    wide = np.flatnonzero(steps > 1.5 * usual)
    if wide.size:
        between = ", ".join(f"{places[n]:.1f} and {places[n + 1]:.1f}" for n in wide)
        raise ValueError(
            f"{folder} lacks slices of {_in_words(stack)}: expected one every {usual:.1f} mm, none is between {between}"
            f"; positions in mm: {listed}; copy the missing series"
        )
    if (np.abs(steps - usual) > EVEN_SHARE * usual).any():
        raise ValueError(
            f"{folder} has unevenly spaced slices of {_in_words(stack)}: expected one every {usual:.1f} mm; positions "
            f"in mm: {listed}; keep one stack in the folder"
        )
    corners = np.array([images[0].position for images in stack])
    line = corners[0] + np.linspace(0, 1, len(corners))[:, None] * (corners[-1] - corners[0])
    offsets = np.linalg.norm(corners - line, axis=1)
    if offsets.max() > OFFSET_MM + EVEN_SHARE * usual:
        raise ValueError(
            f"{folder} has slices of {_in_words(stack)} that do not lie above each other: their first pixels are up to "
            f"{offsets.max():.1f} mm beside a line, expected at most {OFFSET_MM:g}; was the stack planned anew midway?"
        )


def _in_time(folder: Path, images: Sequence[DicomImage]) -> list[DicomImage]:
    """Return the images of one position in the order of time."""
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
        f"{folder} has {len(images)} images of '{images[0].name}' at {images[0].across_mm:.1f} mm that nothing orders: "
        "expected trigger times, temporal positions or numbers of instances"
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
    """Return the median time from frame to frame over the slices, each of other heart beats; nan if unknown."""
    times = [[image.times[0] for image in images] for images in slices]
    if any(time is None for of_slice in times for time in of_slice):
        return float("nan")
    steps = np.diff(np.array(times, np.float64), axis=1)
    return float(np.median(steps)) / 1000 if (steps > 0).all() else float("nan")
