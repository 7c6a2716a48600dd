"""A buffer on disk for the network outputs of a cine's frames, and their smoothing over time."""

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
    """The network's outputs for the frames of a series, from the first frame to the last.

    They are kept in the hidden folder `.<case>_pred.frames` beside the predictions until `remove`. A killed run
    continues from them when it is started again with the same image and network. Memory holds one frame at a time.

    Args:
        folder: of the predictions, made if missing.
        smoothing: standard deviation in frames of the Gaussian over time, 0 for none. None for a fortieth of the
            number of frames, and for no smoothing of fewer than 10 frames.

    Raises:
        ValueError: when `smoothing` is negative or no number.
    """

    def __init__(self, folder: str, *, smoothing: float | None = None) -> None:
        if smoothing is not None and not smoothing >= 0:
            raise ValueError(
                f"expected frame_smoothing of 0 frames or more, or null for a fortieth of all, received {smoothing!r}"
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
            probe: the network's output for a part of it. Outputs of an earlier run are used only if its probe is equal.
        """
        self._place = self.folder / f".{case}_pred.frames"
        self._network = _bytes_of(probe)
        self._files, self._steps = [], []

    def add(self, image: np.ndarray, predict: Callable[[], np.ndarray]) -> None:
        """Keep the network's output for the next frame.

        Args:
            image: the network's input, of any shape.
            predict: computes the output, an array of floats; called only if the output is not kept already.
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

        In a series that covers the cardiac cycle, the last frame is a neighbour of the first. `is_cycle` judges this by
        the mean absolute difference of frames. In any other series the first and last frames are repeated outwards.
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
