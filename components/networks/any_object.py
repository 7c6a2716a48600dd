"""Starting weights that segment objects of any kind, and how they become those of a network with classes of its own."""

from collections.abc import Iterable, Mapping

import torch

from components.networks.trained_with import encode_record

_RECORD = encode_record({"class_names": ["object"]}).tolist()  # it distinguishes such a file


def is_of_any_object(state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a state dict was trained to tell objects of any kind from their background."""
    return "trained_with" in state and state["trained_with"].tolist() == _RECORD


def for_classes(
    state: Mapping[str, torch.Tensor], last_layer: Iterable[str], out_channels: int
) -> dict[str, torch.Tensor]:
    """Convert the weights of a network for background and object: every class starts as the object.

    Args:
        state: the weights.
        last_layer: keys of weight and bias of the layer that makes the logits; their first axis has length 2.
        out_channels: number of classes, background included.

    Returns:
        the state dict, with new values for these keys.
    """
    widened = dict(state)
    for key in last_layer:
        background, thing = state[key]
        widened[key] = torch.stack([background, *[thing] * (out_channels - 1)])
    return widened
