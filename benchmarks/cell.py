"""What a whole training costs, computed from the costs of its parts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """One cell of the paper's table: one labelled patient, validated on the validation patients.

    Args:
        slices: of the labelled volumes.
        validation_slices: of all validation volumes.
        epochs: length of training.
        batch_size: slices a step, and slices at a time in validation.
        val_interval: epochs between validations.
        views: augmented views of each slice, after which none is new.
    """

    slices: int
    validation_slices: int
    epochs: int
    batch_size: int
    val_interval: int
    views: int


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts.

    Args:
        augment: augmenting one slice.
        encode: encoding one image that is new, and storing its embedding where there is a cache.
        hit: looking one embedding up.
        step: the head's training step on one batch.
        forward: the head's forward pass on one batch in validation.
    """

    augment: float
    encode: float
    hit: float
    step: float
    forward: float


def head_seconds(plan: Plan, costs: Costs) -> float:
    """Sum the head's own work, which no cache spares."""
    steps = plan.epochs * plan.slices / plan.batch_size
    forwards = _validations(plan) * plan.validation_slices / plan.batch_size
    return steps * costs.step + forwards * costs.forward


def every_step_seconds(plan: Plan, costs: Costs) -> float:
    """Sum a training that augments afresh and encodes whenever it needs an embedding."""
    shown, validated = plan.epochs * plan.slices, _validations(plan) * plan.validation_slices
    return shown * costs.augment + (shown + validated) * costs.encode + head_seconds(plan, costs)


def cached_seconds(plan: Plan, costs: Costs) -> float:
    """Sum a training that augments and encodes every view, and every validation slice, once."""
    shown, validated = plan.epochs * plan.slices, _validations(plan) * plan.validation_slices
    new_views = min(plan.views, plan.epochs) * plan.slices
    new = new_views + min(validated, plan.validation_slices)
    looked_up = shown + validated - new
    return new_views * costs.augment + new * costs.encode + looked_up * costs.hit + head_seconds(plan, costs)


def _validations(plan: Plan) -> int:
    return plan.epochs // plan.val_interval
