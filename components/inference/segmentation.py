"""Segmentation of many volumes, which continues after one that fails."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from components.base.errors import error_message, is_out_of_memory
from components.base.volume_metadata import FRAME, FRAMES, case_name_of, files_of
from components.data.volume_search import FAILURE
from components.inference.cine_buffer import CineBuffer

logger = logging.getLogger(__name__)

_IN_ERROR = 3  # failures that the error at the end repeats


class SegmentationEvaluator(SupervisedEvaluator):
    """MONAI's `SupervisedEvaluator` that continues after a volume that fails.

    A series is loaded frame by frame. After its last frame the network's outputs are smoothed over time. Then each
    frame is postprocessed as a volume of its own.

    At the end, or when it is interrupted, it logs the number of segmented files, and the skipped and failed files with
    their reasons. If there is only one file, its error is raised as it is. A lack of memory is raised at once.

    Args:
        args: as `SupervisedEvaluator`; the data loader yields one volume or frame of a `VolumeDataset` at a time.
        frames: buffer of the network's outputs for the frames of a series; needed for series only.
        skipped: reason by path of the files that the search left out.
        kwargs: as `SupervisedEvaluator`.

    Attributes:
        segmented: the segmented files; a series counts once.
        failed: reason by file.
        has_foreground: whether any class was found, by file.
    """

    def __init__(
        self,
        *args: Any,
        frames: CineBuffer | None = None,
        skipped: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.frames = frames
        self.skipped = skipped or {}
        self.segmented: list[str] = []
        self.failed: dict[str, str] = {}
        self.has_foreground: dict[str, bool] = {}

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]  # as MONAI's own
        """Segment all volumes.

        Args:
            global_epoch: as for `SupervisedEvaluator`.

        Raises:
            RuntimeError: at the end, when a file has failed.
        """
        try:
            self.segment(global_epoch)
        finally:
            if self.state.iteration:  # else the run failed before the first volume, and its error is what matters
                log_outcome(self._files, self.segmented, self.failed, self.skipped, self.empty)
        raise_failures(self._files, self.failed)

    def segment(self, global_epoch: int = 1) -> None:
        """Segment all volumes as `run` does; say nothing at the end, also if a file has failed.

        Args:
            global_epoch: as for `SupervisedEvaluator`.
        """
        self.segmented, self.failed, self.has_foreground = [], {}, {}
        super().run(global_epoch)

    @property
    def empty(self) -> list[str]:
        """The files in which no class was found."""
        return [path for path, found in self.has_foreground.items() if not found]

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict[str, Tensor]:
        frame, frames = (int(batchdata.get(name, default)) for name, default in ((FRAME, 0), (FRAMES, 1)))
        if FAILURE in batchdata:
            (path,), (reason,) = batchdata["image"], batchdata[FAILURE]
            self.failed.setdefault(path, reason)
            return {}
        path = ", ".join(files_of(batchdata["image"]))  # read before the batch is decollated
        if path in self.failed:  # a frame of a series of which another one has failed
            return {}
        try:
            if frames == 1:
                output = super()._iteration(engine, batchdata)
                self._note_foreground(engine, path)
            else:
                output = self._frame_iteration(engine, batchdata, frame, frames)
        except Exception as error:
            if self._files == 1 or is_out_of_memory(error):
                raise
            logger.debug("%s failed", path, exc_info=True)
            self.failed[path] = error_message(error)
            return {}
        if frame == frames - 1:
            self.segmented.append(path)
        return output

    def _frame_iteration(
        self, engine: SupervisedEvaluator, batchdata: dict[str, Any], frame: int, frames: int
    ) -> dict[str, Tensor]:
        """Segment a frame; after the last one postprocess all frames as outputs of the network."""
        if self.frames is None:
            raise ValueError("a series needs a buffer for its frames: give the evaluator `frames`, a CineBuffer")
        image = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)[0]

        def predict(volume: Tensor) -> np.ndarray:
            with torch.no_grad(), engine.mode(engine.network):
                prediction: Any = engine.inferer(volume, engine.network)
            return torch.as_tensor(prediction).float().cpu().numpy()

        if frame == 0:
            middle = image.shape[-1] // 2
            self.frames.start(case_name_of(image), predict(image[..., middle : middle + 1]))
        self.frames.add(image.cpu().numpy(), lambda: predict(image))
        if frame < frames - 1:
            return {}
        for number, prediction in enumerate(self.frames.smoothed()):
            # all frames lie on one grid, so the last one's transforms are inverted for each of them
            of_frame = image.clone()
            of_frame.meta[FRAME] = torch.tensor([number])
            output = MetaTensor(torch.from_numpy(prediction).to(image.device)).copy_meta_from(of_frame)
            engine.state.batch = {**batchdata, "image": of_frame}
            # as in MONAI's evaluator: postprocessing and reports run at these events
            engine.state.output = {"image": of_frame, "pred": output}
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            engine.fire_event(IterationEvents.MODEL_COMPLETED)
            self._note_foreground(engine, ", ".join(files_of(batchdata["image"])))
        self.frames.remove()
        return {}

    def _note_foreground(self, engine: SupervisedEvaluator, path: str) -> None:
        """Note whether the label map of a volume or frame has any voxel of a class; logits have no label map."""
        if isinstance(engine.state.output, list):
            found = any(bool((item[Keys.PRED] > 0).any()) for item in engine.state.output)
            self.has_foreground[path] = self.has_foreground.get(path, False) or found

    @property
    def _files(self) -> int:
        dataset: Any = self.data_loader.dataset  # type: ignore[union-attr]  # of a DataLoader
        return dataset.files


def log_outcome(
    files: int, segmented: Sequence[str], failed: Mapping[str, str], skipped: Mapping[str, str], empty: Sequence[str]
) -> None:
    """Log what became of each file of a run.

    Args:
        files: number of files to segment.
        segmented: the segmented files.
        failed: reason by file.
        skipped: reason by path of the files that the search left out.
        empty: files in which no class was found.
    """
    logger.info("segmented %d of %d volumes", len(segmented), files)
    logger.debug("segmented: %s", ", ".join(segmented))
    by_reason = defaultdict(list)
    for path, reason in skipped.items():
        by_reason[reason].append(path)
    for reason, paths in by_reason.items():
        logger.info("skipped %d, %s: %s", len(paths), reason, ", ".join(paths))
    if empty:
        logger.warning(
            "nothing was found in %d: %s; check that they are of the kind that the model was trained on",
            len(empty),
            ", ".join(empty),
        )
    for failure in failed.items():
        logger.warning("failed: %s", _naming(*failure))


def raise_failures(files: int, failed: Mapping[str, str]) -> None:
    """Raise one error for the files that have failed.

    Args:
        files: number of files to segment.
        failed: reason by file.

    Raises:
        RuntimeError: if a file has failed; of an only file it is the reason as it is.
    """
    if not failed:
        return
    if files == 1:
        raise RuntimeError(next(iter(failed.values())))
    failures = [_naming(*failure) for failure in failed.items()]
    more = f"; and {len(failures) - _IN_ERROR} more, listed above" if len(failures) > _IN_ERROR else ""
    raise RuntimeError(f"{len(failures)} of {files} volumes failed: {'; '.join(failures[:_IN_ERROR])}{more}")


def _naming(path: str, reason: str) -> str:
    """Return the reason, preceded by the path unless it contains it."""
    return reason if path in reason else f"{path}: {reason}"
