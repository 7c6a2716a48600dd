"""Find the stacks among a study's images. A stack is one series of several slices, or similar series of one slice."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from components.dicom.images import DicomImage

FEWEST_SLICES = 4  # of a stack; perfusion has three
EVEN_SHARE = 0.05  # tolerance of the distance between slices, as a share of it
SAME_POSITION_MM = 0.1
SAME_DIRECTION = 1 - 1e-4  # cosine, 0.8 degrees
ACROSS_BODY = 0.94  # cosine, 20 degrees: a stack closer to a body axis is axial, coronal or sagittal, not short-axis
# Words of a series' name that number its slices or breath-holds, beside single letters and Roman numerals
_NUMBERING = frozenset(
    (
        *("slice", "slices", "slc", "sl", "pos", "loc", "bas", "basal", "base", "mid", "middle", "apex", "apical"),
        *("again", "repeat", "repeated", "rep", "rpt", "redo", "new", "try", "bh", "breathhold"),
    )
)
_NO_PLAIN_CINE = re.compile(
    "(?<![a-z])(tag|grid|spamm|csp|lge|delay|psir|perf|flow|venc|map|molli|dense|strain|scout|mp(?![a-z]))"
)  # words of a series' names and sequence; MP is the variant with prepared magnetisation

Positions = list[list[DicomImage]]  # the images at each position, sorted along the normal


class Candidate(NamedTuple):
    """Images that may be a stack, and the words that tell its kind."""

    positions: Positions
    kind: tuple[str, ...] = ()

    @property
    def is_short_axis_cine(self) -> bool:
        """Whether it has enough slices, which have several frames each and are oblique to the body's axes."""
        return len(self.positions) >= FEWEST_SLICES and _is_cine(self.positions) and _is_oblique(self.positions)


def candidate_stacks(images: Iterable[DicomImage]) -> list[Candidate]:
    """Return the stacks that images may be, the best one first; see `read_stack`."""
    found = [candidate for group in by_geometry(images) for candidate in _candidates(group)]
    return sorted(found, key=_rank, reverse=True)


def by_geometry(images: Iterable[DicomImage]) -> list[list[DicomImage]]:
    """Group images by orientation, size and pixel spacing."""
    groups: list[list[DicomImage]] = []
    for image in images:
        for group in groups:
            first = group[0]
            if (
                first.size_hw == image.size_hw
                and np.allclose(first.spacing_mm, image.spacing_mm, rtol=1e-3)
                and have_same_axes(first.axes, image.axes)
            ):
                group.append(image)
                break
        else:
            groups.append([image])
    return groups


def have_same_axes(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether the directions of columns and rows, 2x3, are those of another image."""
    return bool((np.sum(one * other, axis=1) > SAME_DIRECTION).all())


def _candidates(group: Sequence[DicomImage]) -> list[Candidate]:
    """Return the stacks of one geometry: each series of several positions, and similar series of one position."""
    by_series: dict[tuple, list[DicomImage]] = defaultdict(list)
    for image in group:
        by_series[image.series, image.sequence].append(image)
    several, single = [], defaultdict(list)
    for images in by_series.values():
        positions = _by_position(images)
        if len(positions) > 1:
            several.append(Candidate(positions, kind_of(images[0])))
        else:
            single[kind_of(images[0])].append(images)
    alike = [Candidate(_one_series_each(of_kind), kind) for kind, of_kind in single.items()]
    alike.sort(key=_rank, reverse=True)
    return [*several, *_completed(alike)]


def _rank(candidate: Candidate) -> tuple[bool, bool, int, int]:
    """Return what tells the better one of two stacks, most important first."""
    positions = candidate.positions
    return _is_cine(positions), is_plain(positions), len(positions), _latest(positions)


def numbers_in_words(stack: Positions) -> str:
    """Return the first and the last number of a stack's series."""
    numbers = sorted({image.series_number for images in stack for image in images})
    return f"series {numbers[0]}" + (f" to {numbers[-1]}" if len(numbers) > 1 else "")


def kind_of(image: DicomImage) -> tuple[str, ...]:
    """Return what similar series share: the words of their name without numbers, and their sequence."""
    words = re.findall(r"[^\W\d_]+", image.name.lower())
    name = [word for word in words if len(word) > 1 and word not in _NUMBERING and not re.fullmatch("[ivx]+", word)]
    return (" ".join(name), *image.sequence)


def is_plain(stack: Positions) -> bool:
    """Return whether the names and the sequence of a stack say nothing against a cine of plain grey values."""
    return not any(_NO_PLAIN_CINE.search(image.words) for images in stack for image in images)


def _one_series_each(series: Sequence[list[DicomImage]]) -> Positions:
    """Return the positions of alike series. Each has the latest series with the usual number of frames.

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


def _completed(alike: list[Candidate]) -> list[Candidate]:
    """Complete the first stack by others at other positions, if all slices are then there.

    The others must be plain cines with as many frames, and have the same name or sequence.
    """
    if not alike:
        return []
    first, together, rest = alike[0], alike[0].positions, []
    for other in alike[1:]:
        is_alike = other.kind[0] == first.kind[0] or other.kind[1:] == first.kind[1:]
        is_cine = is_plain(first.positions) and is_plain(other.positions) and _is_cine(other.positions)
        frames = {len(images) for images in (*first.positions, *other.positions)}
        merged = _by_position(image for images in (*together, *other.positions) for image in images)
        is_beside = len(merged) == len(together) + len(other.positions)
        if is_alike and is_cine and len(frames) == 1 and is_beside and (_is_whole(merged) or not _is_whole(together)):
            together = merged
        else:
            rest.append(other)
    return [Candidate(together, first.kind), *rest] if _is_whole(together) else alike


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


def in_words(stack: Positions) -> str:
    """Describe a stack by its series' names, slices, frames and place."""
    first_of_kind = {kind_of(image): image.name for images in reversed(stack) for image in images}
    names = sorted(set(first_of_kind.values()))
    more = len({image.name for images in stack for image in images}) - len(names)
    frames = sorted({len(images) for images in stack})
    of_frames = f"{frames[0]}" if len(frames) == 1 else f"{frames[0]} to {frames[-1]}"
    kind = "" if _is_oblique(stack) else ", across a body axis"
    others = f" and {more} more series" if more else ""
    plural = ["s" if many else "" for many in (len(stack) > 1, frames[-1] > 1)]
    quoted = ", ".join(f"'{name}'" for name in names)
    return f"{quoted}{others}: {len(stack)} slice{plural[0]} of {of_frames} frame{plural[1]}{kind}"
