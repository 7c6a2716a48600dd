"""Writing of a training run's checkpoints, and resuming from them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import torch
from filelock import FileLock
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.utils.misc import is_scalar
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from components.base.atomic_write import remove_partial_files, save_atomically, write_atomically
from components.base.weights import unwrapped
from components.training.averages import ExponentialMovingAverage
from components.training.checkpoint_folder import (
    MODEL_FILENAME,
    archive_previous_run,
    checkpoint_path,
    is_readable,
    lock_folder,
    newest_readable,
    read_training_checkpoint,
    remove_superseded,
    unlock_folder,
)

logger = logging.getLogger(__name__)


class TrainingCheckpoints:
    """Write the model and the last checkpoints of a training run, and resume from them.

    After every epoch ``checkpoint_epoch=N.pt`` is written with everything that resuming needs; the last two are kept.
    After every validation with the best score so far, the validated network's bare state dict is written as
    ``model.pt``. This may be an average of the network in training. Files are replaced atomically, ``model.pt`` before
    the checkpoint that records its score, so a killed run always leaves a usable folder. If no validation gave a
    score, the last model becomes ``model.pt`` at the end.

    With ``validate_start`` a fresh run validates the network before its first step, as epoch 0. On the validation
    data, the best ``model.pt`` is then at least as good as the initial network.

    With ``keep_last`` every validated network replaces ``model.pt``, whatever its score. Few validation cases choose an
    epoch badly, and a learning rate that falls to 0 makes the last epoch a good choice.

    A resumed run follows its own configuration. Weights, the optimizer's moments, epoch and best score come from the
    checkpoint. Learning rate, schedule, number of epochs and iterations per epoch are those now configured. The state
    of random number generators is not saved: `components.training.EpochSeeds` makes epochs independent of it.

    List this handler AFTER the validation handler, whose score it reads, and AFTER the learning rate handler, whose
    step belongs to the epoch that ends.

    Args:
        ckpt_dir: folder of ``model.pt`` and ``checkpoint_epoch=N.pt``, made if missing.
        network: the network in training; the inner module of a ``DistributedDataParallel`` is saved.
        optimizer: its optimizer.
        lr_scheduler: schedule that depends on the number of its steps only, or None.
        evaluator: the engine that the validation handler runs, or None; its key metric is the score, its network
            becomes ``model.pt``.
        resume: whether to continue from the newest readable checkpoint of ``ckpt_dir``. If False, older checkpoints
            and a copy of their ``model.pt`` are moved to a subfolder ``previous_run_<n>``.
        validate_start: whether ``model.pt`` may be the initial network of a fresh run.
        keep_last: whether ``model.pt`` is the last validated network instead of the best one.
        teacher: exponential moving average of the network, if the training uses one. It is saved as of its last update
            and resumed, but never becomes ``model.pt``.

    Attributes:
        start_score: the score of the initial network, None if it was not validated.
        best_score: the score of ``model.pt``, None before the first.
        best_epoch: its epoch, 0 for the initial network.

    Raises:
        TypeError: if ``lr_scheduler`` follows a metric.
        ValueError: when the run starts, if the checkpoint's epoch is beyond the trainer's ``max_epochs``.
        RuntimeError: when the run starts, if another process trains in ``ckpt_dir``.
    """

    def __init__(
        self,
        *,
        ckpt_dir: str | os.PathLike[str],
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LRScheduler | None = None,
        evaluator: SupervisedEvaluator | None = None,
        resume: bool = False,
        validate_start: bool = False,
        keep_last: bool = False,
        teacher: ExponentialMovingAverage | None = None,
    ) -> None:
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            raise TypeError(
                "lr_scheduler must depend on its number of steps only, got ReduceLROnPlateau, which follows a metric: "
                "use for example monai.optimizers.WarmupCosineSchedule."
            )
        self.ckpt_dir = Path(ckpt_dir)
        self.network = unwrapped(network)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.evaluator = evaluator
        self.resume = resume
        self.validate_start = validate_start
        self.keep_last = keep_last
        self.teacher = teacher
        self.model = self.network if evaluator is None else unwrapped(evaluator.network)
        self.start_score: float | None = None
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self._lock: FileLock | None = None

    def attach(self, engine: Engine) -> None:
        """Register the handler.

        Args:
            engine: the trainer.
        """
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish_epoch)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        """Resume, or prepare the folder for a fresh run and validate its initial network.

        Args:
            engine: the trainer.
        """
        if engine.state.epoch > 0:  # the trainer has run before, as in the rounds of federated learning
            return
        self.start_score = self.best_score = self.best_epoch = None
        if _is_writer():
            self.ckpt_dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.ckpt_dir)
            remove_partial_files(self.ckpt_dir, MODEL_FILENAME)
            remove_partial_files(self.ckpt_dir, "checkpoint_epoch=*.pt")
        resumed = self.resume and self._resume(engine)
        if not resumed and _is_writer():
            archive_previous_run(self.ckpt_dir)
        self._copy_best_to_evaluator()
        idist.barrier()
        if not resumed and self.validate_start and self.evaluator is not None:
            self.evaluator.run(engine.state.epoch)
            if self._choose(engine) and _is_writer():
                self._save_model(engine)
            self.start_score = self.best_score

    def finish_epoch(self, engine: Engine) -> None:
        """Write the model if it is chosen, then the checkpoint of this epoch.

        Args:
            engine: the trainer.
        """
        is_chosen, epoch = self._choose(engine), engine.state.epoch
        if not _is_writer():
            return
        with write_atomically(checkpoint_path(self.ckpt_dir, epoch)) as partial:
            torch.save(self._checkpoint(engine), partial)
            if is_chosen:  # last, so that the replacement of the checkpoint follows at once
                self._save_model(engine)
        remove_superseded(self.ckpt_dir, epoch=epoch)

    def finish(self, engine: Engine) -> None:
        """Write the last model if no validation gave a score.

        Args:
            engine: the trainer.
        """
        if self.best_score is None and engine.state.epoch > 0 and _is_writer():
            path = self.ckpt_dir / MODEL_FILENAME
            save_atomically(self.model.state_dict(), path)
            logger.info("no validation gave a score: the model of the last epoch (%d) is %s", engine.state.epoch, path)
        if self._lock is not None:
            unlock_folder(self._lock)
            self._lock = None
        idist.barrier()

    def _choose(self, engine: Engine) -> bool:
        """Return whether the network validated in this epoch becomes the model, and keep its score."""
        score = self._validated_score(engine)
        is_chosen = score is not None and (self.keep_last or self._is_best(score))
        if is_chosen:
            self.best_score, self.best_epoch = score, engine.state.epoch
        self._copy_best_to_evaluator()
        return is_chosen

    def _save_model(self, engine: Engine) -> None:
        save_atomically(self.model.state_dict(), self.ckpt_dir / MODEL_FILENAME)
        which = "last validation score" if self.keep_last else "best validation score so far"
        logger.info("epoch %d: %s, %g, model saved", engine.state.epoch, which, self.best_score)

    def _checkpoint(self, engine: Engine) -> dict[str, Any]:
        scaler = getattr(engine, "scaler", None)
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule_position": None if self.lr_scheduler is None else self.lr_scheduler.last_epoch,
            "scaler": None if scaler is None else scaler.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.mean.state_dict(),
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "start_score": self.start_score,
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
        }

    def _validated_score(self, engine: Engine) -> float | None:
        """Return the score of this epoch's validation, or None if there was none or it is nan."""
        # an evaluator without data does not reach the epoch it is run for, so equal epochs mean "validated now"
        if self.evaluator is None or self.evaluator.state.epoch != engine.state.epoch:
            return None
        score = self.evaluator.state.metrics.get(self.evaluator.state.key_metric_name)
        if not is_scalar(score):
            return None
        if math.isnan(score):
            logger.warning("epoch %d: the validation score is nan and does not count", engine.state.epoch)
            return None
        return float(score)

    def _is_best(self, score: float) -> bool:
        # MONAI's own comparison would keep a first nan as the best score, which no later one exceeds
        assert self.evaluator is not None
        return self.best_score is None or bool(self.evaluator.metric_cmp_fn(score, self.best_score))

    def _copy_best_to_evaluator(self) -> None:
        if self.evaluator is not None:  # -1, -1 is MONAI's "none so far"
            self.evaluator.state.best_metric = -1 if self.best_score is None else self.best_score
            self.evaluator.state.best_metric_epoch = -1 if self.best_epoch is None else self.best_epoch

    def _resume(self, engine: Engine) -> bool:
        """Restore the newest readable checkpoint and return whether there is one."""
        # one process chooses the checkpoint, so that all continue from the same epoch
        saved = newest_readable(self.ckpt_dir) if _is_writer() else None
        epoch = _broadcast(0 if saved is None else saved["epoch"])
        if epoch == 0:
            logger.warning("no checkpoint to resume from in %s: starting a fresh run", self.ckpt_dir)
            return False
        path = checkpoint_path(self.ckpt_dir, epoch)
        max_epochs = engine.state.max_epochs
        if max_epochs is not None and epoch > max_epochs:
            raise ValueError(
                f"expected a checkpoint within the {max_epochs} epochs of this run, got '{path}': ask for {epoch} or "
                "more with `--epochs`, or start afresh with `--resume False`."
            )
        self._restore(engine, path=path, saved=read_training_checkpoint(path) if saved is None else saved)
        logger.info("resumed from %s: epoch %d of %s, best score %s", path, epoch, max_epochs, self.best_score)
        return True

    def _restore(self, engine: Engine, *, path: Path, saved: dict[str, Any]) -> None:
        configured = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        with _explaining_mismatch(path):
            self.network.load_state_dict(saved["model"], strict=True)
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.teacher is not None:
                if saved.get("teacher") is None:
                    raise ValueError("expected a checkpoint with a teacher's weights, got one of a run without teacher")
                self.teacher.mean.load_state_dict(saved["teacher"], strict=True)
        for group, options in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(options)
        if self.lr_scheduler is not None and saved["schedule_position"] is not None:
            _step_to(self.lr_scheduler, saved["schedule_position"])
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        engine.state.epoch = saved["epoch"]
        # ignite derives the position within an epoch from the iteration: with another epoch length, the old count would
        # shorten the first epoch or end the run early
        length = engine.state.epoch_length
        engine.state.iteration = saved["iteration"] if length is None else saved["epoch"] * length
        self.start_score = saved.get("start_score")
        self._restore_best(saved)

    def _restore_best(self, saved: dict[str, Any]) -> None:
        if saved["best_score"] is None:
            return
        path = self.ckpt_dir / MODEL_FILENAME
        if _broadcast(int(_is_writer() and is_readable(path))):
            self.best_score, self.best_epoch = saved["best_score"], saved["best_epoch"]
        else:
            logger.warning("the best model, %s, is missing or unreadable: the next validated model replaces it", path)


def _is_writer() -> bool:
    return idist.get_rank() == 0


def _broadcast(value: int) -> int:
    """Return the value of the writing process in every process."""
    return int(cast(float, idist.broadcast(value, src=0)))


def _step_to(lr_scheduler: LRScheduler, position: int) -> None:
    """Step a new schedule to a position, so that its learning rate is that of the present configuration."""
    with warnings.catch_warnings():  # torch warns of steps before the optimizer's first, which are intended here
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        for _ in range(position - lr_scheduler.last_epoch):
            lr_scheduler.step()


@contextlib.contextmanager
def _explaining_mismatch(path: Path) -> Iterator[None]:
    """Add the file and the remedy to an error of the network or the optimizer."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"'{path}' does not fit this run: resume with the configuration that wrote it, or start afresh with "
            "`--resume False`."
        )
        raise
