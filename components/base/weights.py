"""Weights of networks: reading them from files of any origin, and random ones that are always the same."""

import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

RANDOM_WEIGHTS_SEED = 20230613

logger = logging.getLogger(__name__)


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


def read_start(path: str, *, kind: str, way_out: str) -> Mapping[str, torch.Tensor]:
    """Read what a network is to start from; arguments as of `read_state_dict`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file cannot be read or holds anything else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {kind} at {path}: {way_out}")
    return read_state_dict(path, kind=kind, way_out=way_out)


def start_from(
    network: nn.Module, state: Mapping[str, torch.Tensor], *, path: str, way_out: str, strict: bool = True
) -> None:
    """Fill a network from the file of another one, and say so.

    Args:
        network: to fill.
        state: as `read_start` returns it.
        path: its file, for messages.
        way_out: what to do when it does not fit, for messages.
        strict: whether the network may have no key that `state` lacks.

    Raises:
        ValueError: when `state` does not fit.
    """
    try:
        network.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this network: {way_out}. {error}") from error
    logger.info("the network starts from %s", path)


@contextmanager
def fixed_random_weights() -> Iterator[None]:
    """Have what is built here begin with the same random weights in every run.

    The global generator is left as it was, so that a head built next is the same whatever the encoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_WEIGHTS_SEED)
        yield
