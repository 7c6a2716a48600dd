"""Segmentation of many volumes: one that fails does not stop the others."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from monai.engines import SupervisedEvaluator
from torch import Tensor

from components.base.reasons import is_out_of_memory, reason_of
from components.data.volume_metadata import files_of
from components.data.volumes import FAILURE

logger = logging.getLogger(__name__)

_IN_ERROR = 3  # failures that the error at the end repeats


class SegmentationEvaluator(SupervisedEvaluator):
    """MONAI's `SupervisedEvaluator` that goes on after a volume that fails.

    At the end, or when it is stopped, it logs how many volumes were segmented, which files were skipped and why, and
    which volumes failed and why. The error of an only volume is raised as it is, and so is that of a lack of memory.

    Args:
        args: as `SupervisedEvaluator`; the loader gives one volume at a time, of a `VolumeDataset`.
        skipped: reason by path of the files left out before.
        kwargs: as `SupervisedEvaluator`.

    Attributes:
        segmented: the volumes' files.
        failed: reason by file.
    """

    def __init__(self, *args: Any, skipped: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped = skipped or {}
        self.segmented: list[str] = []
        self.failed: dict[str, str] = {}

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]  # as MONAI's own
        """Segment all volumes.

        Args:
            global_epoch: as for `SupervisedEvaluator`.

        Raises:
            RuntimeError: at the end, when a volume has failed.
        """
        self.segmented, self.failed = [], {}
        try:
            super().run(global_epoch)
        finally:
            if self.state.iteration:  # else the run failed before the first volume, and its error is what matters
                self._log()
        if self.failed:
            failures = [_naming(*failure) for failure in self.failed.items()]
            more = f"; and {len(failures) - _IN_ERROR} more, listed above" if len(failures) > _IN_ERROR else ""
            raise RuntimeError(
                f"{len(failures)} of {self.state.epoch_length} volumes failed: {'; '.join(failures[:_IN_ERROR])}{more}"
            )

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict[str, Tensor]:
        if FAILURE in batchdata:
            (path,), (reason,) = batchdata["image"], batchdata[FAILURE]
            self.failed[path] = reason
            return {}
        path = ", ".join(files_of(batchdata["image"]))  # read before the batch is decollated
        try:
            output = super()._iteration(engine, batchdata)
        except Exception as error:
            if engine.state.epoch_length == 1 or is_out_of_memory(error):
                raise
            logger.debug("%s failed", path, exc_info=True)
            self.failed[path] = reason_of(error)
            return {}
        self.segmented.append(path)
        return output

    def _log(self) -> None:
        logger.info("segmented %d of %d volumes", len(self.segmented), self.state.epoch_length)
        logger.debug("segmented: %s", ", ".join(self.segmented))
        by_reason = defaultdict(list)
        for path, reason in self.skipped.items():
            by_reason[reason].append(path)
        for reason, paths in by_reason.items():
            logger.info("skipped %d, %s: %s", len(paths), reason, ", ".join(paths))
        for failure in self.failed.items():
            logger.warning("failed: %s", _naming(*failure))


def _naming(path: str, reason: str) -> str:
    """Return the reason with the path before it, unless it names it itself."""
    return reason if path in reason else f"{path}: {reason}"
