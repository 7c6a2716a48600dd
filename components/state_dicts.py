"""Reading weights from files of any origin."""

import pickle
from collections.abc import Mapping

import torch


def read_state_dict(path: str, *, kind: str, way_out: str) -> Mapping[str, torch.Tensor]:
    """Read a flat state dict onto the CPU, weights only.

    Args:
        path: an existing file.
        kind: what the file should be, such as `SAM checkpoint`, for messages.
        way_out: what to do when it is not, for messages.

    Returns:
        tensors by key.

    Raises:
        ValueError: when the file cannot be read or holds anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}): expected a file saved by torch.save; {way_out}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a {kind}: expected a flat state dict of tensors; {way_out}")
    return state
