"""A series' frames between the network and their labels: kept on disk, and smoothed over time."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from components.base.atomic_write import write_atomically
from components.inference.cycle import FEWEST_OF_A_CURVE, is_cycle

FRAMES_PER_SIGMA = 40  # of the smoothing that is chosen by the number of frames
_REACH = 3.0  # standard deviations at which the Gaussian ends


class CineBuffer:
    """What the network says of a series' frames, from the first frame to the last.

    It lies in the hidden folder `.<case>_pred.frames` beside the predictions until `remove`. So a run that was killed
    goes on where it was when it is started again, as long as image and network are the same; and no more frames are in
    memory than the smoothing spans.

    Args:
        folder: of the predictions, made if missing.
        smoothing: standard deviation in frames of the Gaussian over time, 0 for none; None for one by the number of
            frames: a fortieth of it, and none where there are fewer than 10.

    Raises:
        ValueError: when `smoothing` is negative or no number.
    """

    def __init__(self, folder: str, *, smoothing: float | None = None) -> None:
        if smoothing is not None and not smoothing >= 0:
            raise ValueError(
                f"expected frame_smoothing of 0 frames or more, or null to go by their number, received {smoothing!r}"
            )
        self.folder = Path(folder)
        self.smoothing = smoothing
        self._place = self.folder
        self._network = b""
        self._files: list[Path] = []
        self._steps: list[float] = []  # from each frame to the next
        self._previous = np.empty(0)

    def start(self, case: str, probe: np.ndarray) -> None:
        """Begin with a series.

        Args:
            case: its name.
            probe: what the network says of a part of it. Where this differs from an earlier run's, nothing that was
                kept from that run is used.
        """
        self._place = self.folder / f".{case}_pred.frames"
        self._network = _bytes_of(probe)
        self._files, self._steps = [], []

    def add(self, image: np.ndarray, predict: Callable[[], np.ndarray]) -> None:
        """Keep what the network says of the next frame.

        Args:
            image: what it is shown, of any shape.
            predict: computes what it says, an array of floats; called only if that is not kept already.
        """
        key = hashlib.sha256(self._network + _bytes_of(image)).hexdigest()
        path = self._place / f"{key}.npy"
        if path.is_file():
            frame = np.load(path)
        else:
            frame = predict()
            with write_atomically(path) as partial_file:
                np.save(partial_file, frame)
        if self._files:
            self._steps.append(_difference(self._previous, frame))
        self._files.append(path)
        self._previous = frame

    def smoothed(self) -> Iterator[np.ndarray]:
        """Yield the frames in their order, each averaged with its neighbours in time.

        The first and the last frame are neighbours where the series covers the heart's cycle (`is_cycle`, by the mean
        absolute difference of frames), else they are neighbours of their own.
        """
        count = len(self._files)
        sigma = self.smoothing
        if sigma is None:
            sigma = count / FRAMES_PER_SIGMA if count >= FEWEST_OF_A_CURVE else 0
        if not sigma:
            yield from map(np.load, self._files)
            return
        reach = int(np.ceil(_REACH * sigma))
        offsets = np.arange(-reach, reach + 1)
        weights = np.exp(-0.5 * (offsets / sigma) ** 2)
        weights /= weights.sum()
        is_cyclic = is_cycle(self._steps, _difference(self._previous, np.load(self._files[0])))
        for frame in range(count):
            neighbours = (frame + offsets) % count if is_cyclic else (frame + offsets).clip(0, count - 1)
            weighted = zip(weights.astype(np.float32), neighbours, strict=True)
            yield sum(weight * np.load(self._files[neighbour]) for weight, neighbour in weighted)

    def remove(self) -> None:
        """Remove what is kept of the series."""
        shutil.rmtree(self._place, ignore_errors=True)
        self._files, self._steps, self._previous = [], [], np.empty(0)


def _difference(frame: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(frame - other).mean())


def _bytes_of(array: np.ndarray) -> bytes:
    return repr((array.shape, array.dtype)).encode() + np.ascontiguousarray(array).tobytes()
