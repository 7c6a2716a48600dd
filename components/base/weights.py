"""Weights of networks: reading and loading them safely, and reproducible random ones."""

import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

RANDOM_WEIGHTS_SEED = 20230613

logger = logging.getLogger(__name__)


def read_state_dict(path: str, *, kind: str, remedy: str, is_key: Callable[[str], bool]) -> Mapping[str, torch.Tensor]:
    """Read the state dict of a file onto the CPU, weights only.

    Files of other programs are unwrapped if this is unambiguous. A dictionary's state dict is taken if it is the only
    one, or the only one with the expected keys. Numbers, texts and optimizer states beside it are ignored. A prefix
    that all keys share, such as `module.`, is removed if all keys are expected without it and none with it.

    Args:
        path: an existing file.
        kind: what the file should be, such as `SAM checkpoint`, for messages.
        remedy: what to do if it is something else, for messages.
        is_key: returns whether a key is expected.

    Returns:
        tensors by key.

    Raises:
        ValueError: if the file cannot be read, has no state dict or several, or has weights that are not finite.
    """
    try:
        content = _content(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({_reason(error)}): expected a file of torch.save or safetensors; "
            f"{remedy}"
        ) from error
    state = _without_prefix(_state_dict_in(content, path=path, kind=kind, remedy=remedy, is_key=is_key), is_key)
    bad = [key for key, value in state.items() if not _is_finite(value)]
    if bad:
        raise ValueError(
            f"{path} has weights that are not finite: NaN or infinite values in {len(bad)} of its {len(state)} tensors "
            f"({join_keys(bad)}). The training that wrote it diverged, or the file is damaged: {remedy}"
        )
    return state


def _content(path: str) -> object:
    """Read a file of torch.save, or tensors by key from a `.safetensors` file, onto the CPU."""
    if Path(path).suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{path} needs safetensors, which comes with transformers: pip install 'autosam-bundles[encoders]'"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RuntimeError(str(error)) from error


def _reason(error: Exception) -> str:
    """Return why a file cannot be read, without torch's advice to load it by running its code."""
    forbidden = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
    if forbidden:
        return f"beside tensors it holds a {forbidden[1]}, which is not loaded since that could run code of the file"
    if "TorchScript" in str(error):
        return "it is an exported TorchScript network, not a state dict"
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return f"{type(error).__name__}: {found[1] if found else error}"


def _state_dict_in(
    content: object, *, path: str, kind: str, remedy: str, is_key: Callable[[str], bool]
) -> Mapping[str, torch.Tensor]:
    """Return the content if it is a state dict, else the only state dict in it, or the only one that fits."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is not a {kind}: expected a state dict of tensors, got a {_name(content)}; {remedy}")
    if _is_state_dict(content):
        return content
    nested = [value for value in content.values() if value and _is_state_dict(value)]
    if len(nested) > 1:
        nested = [state for state in nested if all(map(is_key, _without_prefix(state, is_key)))] or nested
    if len(nested) != 1:
        keys = join_keys([f"{key} ({_name(value)})" for key, value in content.items()])
        raise ValueError(
            f"{path} is not a {kind}: expected a flat state dict of tensors, or a dictionary with exactly one, got a "
            f"dictionary with {len(nested)} of them and the keys {keys}; {remedy}"
        )
    return nested[0]


def _is_state_dict(content: object) -> bool:
    return isinstance(content, Mapping) and all(isinstance(value, torch.Tensor) for value in content.values())


def _name(value: object) -> str:
    return type(value).__name__


def _without_prefix(state: Mapping[str, torch.Tensor], is_key: Callable[[str], bool]) -> Mapping[str, torch.Tensor]:
    """Remove the prefix that all keys share if the keys are expected only without it."""
    parts = next(iter(state), "").split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        if any(map(is_key, state)) or not all(key.startswith(prefix) for key in state):
            break
        stripped = {key.removeprefix(prefix): value for key, value in state.items()}
        if all(map(is_key, stripped)):
            return stripped
    return state


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the inner module of a `DataParallel` or `DistributedDataParallel`, else the network itself."""
    return network.module if isinstance(network, DataParallel | DistributedDataParallel) else network


def key_test(network: nn.Module) -> Callable[[str], bool]:
    """Return a test, for `is_key`, of whether a key begins with the name of a part of a network."""
    names = {name.partition(".")[0] for name, _ in (*network.named_parameters(), *network.named_buffers())}
    return lambda key: key.partition(".")[0] in names


def _is_finite(value: torch.Tensor) -> bool:
    # the sum takes no memory and is never finite for other values; that of finite values may overflow
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def join_keys(keys: Sequence[str], limit: int = 8) -> str:
    """Join the first `limit` keys for a message, and count the rest."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def read_starting_weights(
    path: str, *, kind: str, remedy: str, is_key: Callable[[str], bool]
) -> Mapping[str, torch.Tensor]:
    """Read the weights from which a network starts; arguments as for `read_state_dict`.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: as for `read_state_dict`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {kind} at {path}: {remedy}")
    return read_state_dict(path, kind=kind, remedy=remedy, is_key=is_key)


def load_weights(
    network: nn.Module, state: Mapping[str, torch.Tensor], *, path: str, remedy: str, strict: bool = True
) -> None:
    """Load weights into a network.

    Args:
        network: receives the weights.
        state: as `read_state_dict` returns it.
        path: their file, for messages.
        remedy: what to do if they do not fit, for messages.
        strict: whether every key of the network must be in `state`.

    Raises:
        ValueError: if `state` does not fit; the message names the first keys that are missing, extra or misshapen.
    """
    try:
        network.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this network: {remedy}. {_brief(str(error))}") from error


def _brief(message: str, limit: int = 8) -> str:
    """Shorten the lists of keys in the message of `load_state_dict`; each line is one fault."""
    lines = []
    for line in message.strip().splitlines():
        fault, separator, keys = line.strip().partition(" in state_dict: ")
        lines.append(fault + separator + join_keys(keys.rstrip(". ").split(", "), limit))
    more = f"; {len(lines) - limit} more lines" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + more


def load_starting_weights(
    network: nn.Module, state: Mapping[str, torch.Tensor], *, path: str, remedy: str, strict: bool = True
) -> None:
    """Load the weights from which a network starts, and log their file; as `load_weights`."""
    load_weights(network, state, path=path, remedy=remedy, strict=strict)
    logger.info("the network starts from %s", path)


@contextmanager
def fixed_random_weights() -> Iterator[None]:
    """Give the networks built in this context the same random weights in every run.

    The global random generator is restored, so that a head built afterwards does not depend on the encoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_WEIGHTS_SEED)
        yield
