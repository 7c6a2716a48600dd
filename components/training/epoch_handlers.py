"""Handlers of a training's epochs: what each depends on, and after which of them it is validated."""

from __future__ import annotations

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.handlers import ValidationHandler

from components.data.slices import SliceDataset
from components.training.phantom_mixing import PhantomMixing


class EpochSeeds:
    """Ignite handler by which an epoch depends on its number and the seed alone, not on what ran before it.

    So a run that was killed and resumed ends with the numbers of an unbroken one.

    Args:
        dataset: the training set, turned to the views of the epoch about to start.
        seed: of the order in which a `DataLoader` shuffles it.
        phantoms: the trainer's `prepare_batch` if that mixes phantoms in, turned to those of the epoch.
    """

    def __init__(self, dataset: SliceDataset, seed: int, phantoms: PhantomMixing | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.phantoms = phantoms

    def attach(self, engine: Engine) -> None:
        """Register the handler on a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Turn to the engine's epoch, which after resuming is not the first."""
        epoch = engine.state.epoch
        self.dataset.set_epoch(epoch)
        torch.manual_seed(self.seed + epoch)
        if self.phantoms is not None:
            self.phantoms.go_to((epoch - 1) * len(self.dataset))


class LastEpochValidationHandler(ValidationHandler):
    """Validate every ``interval`` epochs and after the last epoch, so that the last model never goes unseen.

    Differs: MONAI's handler validates in multiples of the interval only; 10 epochs at interval 4 end with two unseen.

    Args:
        interval: number of epochs from one validation to the next.
        validator: the evaluator to run; if None, call ``set_validator`` before training.
        exec_at_start: also validate before the first epoch.

    Raises:
        ValueError: when ``interval`` is below 1.
    """

    def __init__(self, interval: int, validator: Evaluator | None = None, *, exec_at_start: bool = False) -> None:
        if interval < 1:
            raise ValueError(f"interval must be 1 epoch or more, got {interval}: give for example `--val_interval 1`.")
        super().__init__(interval=interval, validator=validator, epoch_level=True, exec_at_start=exec_at_start)

    def attach(self, engine: Engine) -> None:
        """Register the handler.

        Args:
            engine: the trainer.
        """
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self._is_due), self)
        if self.exec_at_start:
            engine.add_event_handler(Events.STARTED, self)

    def _is_due(self, engine: Engine, epoch: int) -> bool:
        return epoch % self.interval == 0 or epoch == engine.state.max_epochs
