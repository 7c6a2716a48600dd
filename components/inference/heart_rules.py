"""Parts that the rules for hearts share: checks of their settings, and the swap of a class with the background."""

from collections.abc import Sequence

import torch
from torch import Tensor

BACKGROUND = 0


def label_of(name: str, class_names: Sequence[str], *, knob: str) -> int:
    """Return the label of a class that a rule needs.

    Args:
        name: the class.
        class_names: names of the foreground classes, in the order of their labels.
        knob: the knob that is set to 0 to do without the rule, for the message.

    Raises:
        ValueError: if the class is missing.
    """
    if name not in class_names:
        raise ValueError(
            f"expected the class {name}, received {', '.join(class_names)}: set {knob} to 0 to do without the rule"
        )
    return list(class_names).index(name) + 1


def checked_fraction(value: float, *, knob: str, example: float) -> float:
    """Return the value of a knob, if it lies from 0 to 1.

    Raises:
        ValueError: if it does not.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"expected {knob} from 0 to 1, received {value}: give for example {example}")
    return value


def swap_with_background(outputs: Tensor, label: int, where: Tensor) -> Tensor:
    """Swap the outputs of a class and the background, so that probabilities keep their sum.

    Args:
        outputs: logits or probabilities CxHxWxD, background first.
        label: the class.
        where: HxWxD, the voxels to change.

    Returns:
        new outputs CxHxWxD.
    """
    swapped = outputs.clone()
    swapped[BACKGROUND] = torch.where(where, outputs[label], outputs[BACKGROUND])
    swapped[label] = torch.where(where, outputs[BACKGROUND], outputs[label])
    return swapped
