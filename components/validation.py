"""When a training run is validated."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.handlers import ValidationHandler


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
