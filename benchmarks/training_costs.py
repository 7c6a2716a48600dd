"""Duration of a whole training, computed from the durations of its parts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Size of a training: one cell of the paper's table, with one labelled patient and its validation.

    Args:
        slices: number of slices of the labelled volumes.
        validation_slices: number of slices of all validation volumes.
        epochs: number of epochs.
        batch_size: slices per training step and per forward pass in validation.
        val_interval: epochs between validations.
        views: number of different augmented views of each slice; they repeat after that many epochs.
    """

    slices: int
    validation_slices: int
    epochs: int
    batch_size: int
    val_interval: int
    views: int


@dataclass(frozen=True)
class Costs:
    """Seconds of each part of a training.

    Args:
        augment: augmenting one slice.
        encode: encoding one image that is not cached, and storing its embedding if there is a cache.
        hit: reading one embedding from the cache.
        step: the head's training step on one batch.
        forward: the head's forward pass on one batch in validation.
    """

    augment: float
    encode: float
    hit: float
    step: float
    forward: float


def head_seconds(plan: Plan, costs: Costs) -> float:
    """Return the seconds spent on the head, which a cache does not reduce."""
    steps = plan.epochs * plan.slices / plan.batch_size
    forwards = _validations(plan) * plan.validation_slices / plan.batch_size
    return steps * costs.step + forwards * costs.forward


def every_step_seconds(plan: Plan, costs: Costs) -> float:
    """Return the seconds of a training without a cache, which augments anew and encodes every slice it uses."""
    shown, validated = plan.epochs * plan.slices, _validations(plan) * plan.validation_slices
    return shown * costs.augment + (shown + validated) * costs.encode + head_seconds(plan, costs)


def cached_seconds(plan: Plan, costs: Costs) -> float:
    """Return the seconds of a training with a cache, which encodes every view and every validation slice once."""
    shown, validated = plan.epochs * plan.slices, _validations(plan) * plan.validation_slices
    new_views = min(plan.views, plan.epochs) * plan.slices
    new = new_views + min(validated, plan.validation_slices)
    looked_up = shown + validated - new
    return new_views * costs.augment + new * costs.encode + looked_up * costs.hit + head_seconds(plan, costs)


def _validations(plan: Plan) -> int:
    return plan.epochs // plan.val_interval
