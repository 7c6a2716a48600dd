"""Ignite handlers for the epochs of a training: seeds, number of steps, progress, validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.engines import Evaluator
from monai.handlers import ValidationHandler

from components.data.slices import SliceDataset
from components.training.mean_teacher import PseudoLabelCutMix
from components.training.phantom_mixing import PhantomMixing


class EpochSeeds:
    """Ignite handler that makes an epoch depend on its number and the seed only, not on what ran before it.

    A run that was killed and resumed therefore ends with the same numbers as an uninterrupted one.

    Args:
        dataset: the training set, set to the number of each epoch before it starts.
        seed: seed of the order in which a `DataLoader` shuffles it.
        prepare_batch: the trainer's. A `PhantomMixing`, also within a `PseudoLabelCutMix`, is set to the first
            phantoms of each epoch.
    """

    def __init__(self, dataset: SliceDataset, seed: int, prepare_batch: Callable[..., Any] | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        while isinstance(prepare_batch, PseudoLabelCutMix):
            prepare_batch = prepare_batch.prepare_batch
        self.phantoms = prepare_batch if isinstance(prepare_batch, PhantomMixing) else None

    def attach(self, engine: Engine) -> None:
        """Register the handler on a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set dataset, seed and phantoms to the engine's epoch, which is not the first after resuming."""
        epoch = engine.state.epoch
        self.dataset.set_epoch(epoch)
        torch.manual_seed(self.seed + epoch)
        if self.phantoms is not None:
            self.phantoms.go_to((epoch - 1) * len(self.dataset))


class StepLimit:
    """Ignite handler that ends the last epoch when the training has made its number of steps.

    Args:
        steps: number of steps of the training. If it is not reached in the last epoch, it has no effect.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def attach(self, engine: Engine) -> None:
        """Register the handler on a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """End the epoch, which is validated and saved like any other."""
        state = engine.state
        if state.epoch == state.max_epochs and state.iteration == self.steps and self.steps % (state.epoch_length or 1):
            engine.terminate_epoch()


class TrainingProgressBar(ProgressBar):
    """ignite's `ProgressBar` over a whole training, with the time left. Differs: ignite's begins anew in each epoch.

    Args: as `ProgressBar`.
    """

    def attach(self, engine: Engine, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Register the bar on a trainer."""
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED, self._close)

    def _open(self, engine: Engine) -> None:
        self._reset((engine.state.max_epochs or 1) * (engine.state.epoch_length or 1))

    def _advance(self, engine: Engine) -> None:
        bar: Any = self.pbar
        bar.update(engine.state.iteration - bar.n)


class LastEpochValidationHandler(ValidationHandler):
    """Validate every ``interval`` epochs and after the last epoch, so that the last model is always validated.

    Differs: MONAI's handler validates after multiples of the interval only, so not after the last of 10 epochs with an
    interval of 4.

    Args:
        interval: number of epochs from one validation to the next.
        validator: the evaluator to run; if None, call ``set_validator`` before training.

    Raises:
        ValueError: if ``interval`` is below 1.
    """

    def __init__(self, interval: int, validator: Evaluator | None = None) -> None:
        if interval < 1:
            raise ValueError(f"interval must be 1 epoch or more, got {interval}: give for example `--val_interval 1`.")
        super().__init__(interval=interval, validator=validator, epoch_level=True)

    def attach(self, engine: Engine) -> None:
        """Register the handler.

        Args:
            engine: the trainer.
        """
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self._is_due), self)

    def _is_due(self, engine: Engine, epoch: int) -> bool:
        return epoch % self.interval == 0 or epoch == engine.state.max_epochs
