"""DICOM studies: the short-axis cine among a study's series, as one 4D array with its affine.

dicom2nifti and SimpleITK turn one series into one volume. Here a stack is often ten series of one slice each, among
other series, and time is an axis. So this module groups the images itself, from what pydicom reads.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter, defaultdict
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

FEWEST_SLICES = 4  # of a stack; perfusion has three
EVEN_SHARE = 0.05  # tolerance of the distance between slices, as a share of it
SAME_POSITION_MM = 0.1
OFFSET_MM = 1.0  # largest distance of a slice from the line through the first and the last one
SAME_DIRECTION = 1 - 1e-4  # cosine, 0.8 degrees
ACROSS_BODY = 0.94  # cosine, 20 degrees: a stack closer to a body axis is axial, coronal or sagittal, not short-axis
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Words of a series' name that number its slices or breath-holds, beside single letters and Roman numerals
_NUMBERING = frozenset(
    (
        *("slice", "slices", "slc", "sl", "pos", "loc", "bas", "basal", "base", "mid", "middle", "apex", "apical"),
        *("again", "repeat", "repeated", "rep", "rpt", "redo", "new", "try", "bh", "breathhold"),
    )
)
_NO_PLAIN_CINE = re.compile(
    "(?<![a-z])(tag|grid|spamm|csp|lge|delay|psir|perf|flow|venc|map|molli|dense|strain|scout)"
)  # words of a series' name
_NAMED_FILES = 5  # at most, in one message

Positions = list[list[DicomImage]]  # the images at each position, sorted along the normal


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


class _Candidate(NamedTuple):
    """Images that may be a stack, and the words that tell its kind."""

    positions: Positions
    kind: tuple[str, ...] = ()


def study_folders(files: Iterable[Path], root: Path) -> tuple[list[Path], dict[Path, str]]:
    """Find the folder of each study: the outermost one that holds only its files.

    Args:
        files: DICOM files of any studies below `root`, by content or name.
        root: the outermost folder that may be a study's.

    Returns:
        the folders. And the reason for each file outside of them that is damaged, or an image without a study; files
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

    Images of one orientation, size and pixel spacing belong together. A stack is one series of them with at least 4
    positions, or all alike series of a single position. Series are alike if ImageType, ScanningSequence, SequenceName
    and the series' name are equal, except for what numbers slices. The stack with most slices is taken, and of equal
    ones the latest. Series named as tagging, late enhancement, perfusion or flow come last.

    If several alike series have one position, as after a repeated breath-hold, the latest one with the usual number of
    frames is used. Series alike in only one of name and sequence complete the stack at other positions. Images of one
    position are ordered by trigger time, else by temporal position, else by their number. Phase images are left out.
    Copies of an image count once.

    Args:
        folder: folder of the study, searched with all folders below.

    Raises:
        OptionalImportError: if pydicom is missing.
        ValueError: if there is no short-axis cine. If its slices are missing, unevenly spaced or not in line, or have
            different numbers of frames. If files are damaged that may be of the cine.
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
    candidates = [candidate for group in _by_geometry(images) for candidate in _candidates(group)]
    candidates.sort(key=_rank, reverse=True)
    fit = [
        candidate
        for candidate in candidates
        if len(candidate.positions) >= FEWEST_SLICES
        and _is_cine(candidate.positions)
        and _is_oblique(candidate.positions)
    ]
    if not fit:
        found = "; ".join(_in_words(candidate.positions) for candidate in candidates) or "no image with a position"
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
        raise ValueError(f"{folder}: expected as many frames in every slice of {_in_words(chosen)}, received {listed}")
    slices = [_in_time(folder, images) for images in chosen]
    left_out = _other_series(fit[0], images) | copies | _unread_files(folder, files, images)
    doubt = "" if _is_plain(chosen) else ", though its name is not that of a plain cine: none other was found"
    return DicomStack(slices, _affine(slices), _frame_seconds(slices), _in_words(chosen) + doubt, left_out)


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


def _candidates(group: Sequence[DicomImage]) -> list[_Candidate]:
    """Return the stacks of a geometry: each series of several positions, and alike series of one position together."""
    by_series: dict[tuple, list[DicomImage]] = defaultdict(list)
    for image in group:
        by_series[image.series, image.sequence].append(image)
    several, single = [], defaultdict(list)
    for images in by_series.values():
        positions = _by_position(images)
        if len(positions) > 1:
            several.append(_Candidate(positions, _kind(images[0])))
        else:
            single[_kind(images[0])].append(images)
    alike = [_Candidate(_one_series_each(of_kind), kind) for kind, of_kind in single.items()]
    alike.sort(key=_rank, reverse=True)
    return [*several, *_completed(alike)]


def _rank(candidate: _Candidate) -> tuple[bool, bool, int, int]:
    """Return what tells the better one of two stacks, most important first."""
    positions = candidate.positions
    return _is_cine(positions), _is_plain(positions), len(positions), _latest(positions)


def _kind(image: DicomImage) -> tuple[str, ...]:
    """Return what alike series have in common: the words of their name without numbering, and their sequence."""
    words = re.findall(r"[^\W\d_]+", image.name.lower())
    name = [word for word in words if len(word) > 1 and word not in _NUMBERING and not re.fullmatch("[ivx]+", word)]
    return (" ".join(name), *image.sequence)


def _is_plain(stack: Positions) -> bool:
    """Return whether the name of a stack says nothing against a cine of plain grey values."""
    return not any(_NO_PLAIN_CINE.search(image.name.lower()) for images in stack for image in images)


def _one_series_each(series: Sequence[list[DicomImage]]) -> Positions:
    """Return the positions of alike series: at each the latest series that has the usual number of frames.

    A series of another number of frames, such as a still image between the slices, counts only in place of a slice that
    is missing. Then the number of frames is refused.
    """
    frames = Counter(len(images) for images in series)
    usual = max(frames, key=lambda count: (count > 1, frames[count], count))
    ordered = sorted(series, key=lambda images: (images[0].series_number, images[0].series))
    positions = _latest_at_each([images for images in ordered if len(images) == usual])
    places = np.array([images[0].across_mm for images in positions])
    step = float(np.median(np.diff(places))) * (1 - EVEN_SHARE) if len(places) > 1 else SAME_POSITION_MM
    others = _latest_at_each([images for images in ordered if len(images) != usual])
    lacking = [images for images in others if np.abs(places - images[0].across_mm).min() >= step]
    return sorted([*positions, *lacking], key=lambda images: images[0].across_mm)


def _latest_at_each(series: Iterable[list[DicomImage]]) -> Positions:
    """Return of series of one position, sorted by age, the latest one at each position."""
    together = _by_position(image for images in series for image in images)
    order = {id(image): n for n, images in enumerate(series) for image in images}
    for images in together:
        latest = max(order[id(image)] for image in images)
        images[:] = [image for image in images if order[id(image)] == latest]
    return together


def _completed(alike: list[_Candidate]) -> list[_Candidate]:
    """Complete the first stack by others at other positions, if all slices are then there.

    Only stacks with as many frames and the same name or sequence are taken, and none that is no plain cine.
    """
    if not alike:
        return []
    first, together, rest = alike[0], alike[0].positions, []
    for other in alike[1:]:
        is_alike = other.kind[0] == first.kind[0] or other.kind[1:] == first.kind[1:]
        is_cine = _is_plain(first.positions) and _is_plain(other.positions) and _is_cine(other.positions)
        frames = {len(images) for images in (*first.positions, *other.positions)}
        merged = _by_position(image for images in (*together, *other.positions) for image in images)
        is_beside = len(merged) == len(together) + len(other.positions)
        if is_alike and is_cine and len(frames) == 1 and is_beside and (_is_whole(merged) or not _is_whole(together)):
            together = merged
        else:
            rest.append(other)
    return [_Candidate(together, first.kind), *rest] if _is_whole(together) else alike


def _is_whole(stack: Positions) -> bool:
    """Return whether a stack has enough slices, evenly spaced."""
    if len(stack) < FEWEST_SLICES:
        return False
    steps = np.diff([images[0].across_mm for images in stack])
    return bool((np.abs(steps - np.median(steps)) <= EVEN_SHARE * np.median(steps)).all())


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
    """Return whether most slices have several frames; `_read_stack` refuses the stack if others have one."""
    return 2 * sum(len(images) > 1 for images in stack) > len(stack)


def _is_oblique(stack: Positions) -> bool:
    return bool(np.abs(np.cross(*stack[0][0].axes)).max() < ACROSS_BODY)


def _in_words(stack: Positions) -> str:
    first_of_kind = {_kind(image): image.name for images in reversed(stack) for image in images}
    names = sorted(set(first_of_kind.values()))
    more = len({image.name for images in stack for image in images}) - len(names)
    frames = sorted({len(images) for images in stack})
    of_frames = f"{frames[0]}" if len(frames) == 1 else f"{frames[0]} to {frames[-1]}"
    kind = "" if _is_oblique(stack) else ", across a body axis"
    others = f" and {more} more series" if more else ""
    plural = ["s" if many else "" for many in (len(stack) > 1, frames[-1] > 1)]
    quoted = ", ".join(f"'{name}'" for name in names)
    return f"{quoted}{others}: {len(stack)} slice{plural[0]} of {of_frames} frame{plural[1]}{kind}"


def _other_series(chosen: _Candidate, images: Sequence[DicomImage]) -> dict[str, str]:
    """Return why the series beside the chosen stack are left out, by their numbers and names."""
    used = {id(image) for of_slice in chosen.positions for image in of_slice}
    series = {image.series for of_slice in chosen.positions for image in of_slice}
    kinds = {_kind(image) for of_slice in chosen.positions for image in of_slice}
    (geometry,) = [group for group in _by_geometry(images) if any(id(image) in used for image in group)]
    of_geometry = {id(image) for image in geometry}
    places = np.array([of_slice[0].across_mm for of_slice in chosen.positions])
    reasons: dict[str, str] = {}
    for image in images:
        if id(image) in used:
            continue
        reason = "not of the short-axis cine"
        if id(image) in of_geometry and np.abs(places - image.across_mm).min() < SAME_POSITION_MM:
            reason = "at slices of the short-axis cine, but of another name, sequence or number of frames"
            if _kind(image) in kinds and image.series not in series:
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
    """Raise an error that names the damaged files that are of the stack, or whose series is unknown."""
    used = {image.path for of_slice in chosen for image in of_slice}
    series = {image.series for of_slice in chosen for image in of_slice}
    intact = {image.instance_uid for file in files if not file.damage for image in file.images}
    others = {file.series for file in files if not file.damage} - series - {""}
    lost = [
        file
        for file in files
        if file.damage
        and not file.left_out
        and (file.path in used if file.images else file.series not in others and file.instance_uid not in intact)
    ]
    if lost:
        raise ValueError(
            f"{folder}: expected every file of the short-axis cine whole, but {_in_words(chosen)} may lack slices or "
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
            f"{folder} has slices of {_in_words(stack)} that are not in line: their first pixels are up to "
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
