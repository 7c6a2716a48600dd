"""Weights of networks: reading and loading them safely, and reproducible random ones."""

import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

RANDOM_WEIGHTS_SEED = 20230613

logger = logging.getLogger(__name__)


def read_state_dict(path: str, *, kind: str, remedy: str) -> Mapping[str, torch.Tensor]:
    """Read a flat state dict onto the CPU, weights only.

    Args:
        path: an existing file.
        kind: what the file should be, such as `SAM checkpoint`, for messages.
        remedy: what to do if it is something else, for messages.

    Returns:
        tensors by key.

    Raises:
        ValueError: when the file cannot be read or is no flat state dict of tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}): expected a file saved by torch.save; {remedy}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a {kind}: expected a flat state dict of tensors; {remedy}")
    return state


def read_starting_weights(path: str, *, kind: str, remedy: str) -> Mapping[str, torch.Tensor]:
    """Read the weights from which a network starts; arguments as for `read_state_dict`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file cannot be read or is no flat state dict of tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {kind} at {path}: {remedy}")
    return read_state_dict(path, kind=kind, remedy=remedy)


def load_starting_weights(
    network: nn.Module, state: Mapping[str, torch.Tensor], *, path: str, remedy: str, strict: bool = True
) -> None:
    """Load starting weights into a network, and log their file.

    Args:
        network: receives the weights.
        state: as `read_starting_weights` returns it.
        path: their file, for messages.
        remedy: what to do if they do not fit, for messages.
        strict: whether every key of the network must be in `state`.

    Raises:
        ValueError: when `state` does not fit.
    """
    try:
        network.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this network: {remedy}. {error}") from error
    logger.info("the network starts from %s", path)


@contextmanager
def fixed_random_weights() -> Iterator[None]:
    """Give the networks built in this context the same random weights in every run.

    The global random generator is restored, so that a head built afterwards does not depend on the encoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_WEIGHTS_SEED)
        yield
