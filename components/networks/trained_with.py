"""The record of what a model was trained with, kept in its `model.pt` and compared with what it is used with."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components.base.weights import read_state_dict

RECORD_BYTES = 2048
VIEWS, TRAINED_VIEWS = "test_time_views", "trained_views"  # all other values of a record are compared for equality
_STORED_NAMES: dict[str, str] = {TRAINED_VIEWS: "views_shown"}  # of values that files know by another name
_KEY = "trained_with"
_PAD = b" "

logger = logging.getLogger(__name__)


def encode_record(record: Mapping[str, Any]) -> torch.Tensor:
    """Write a record as JSON.

    Args:
        record: values that JSON has, by name.

    Returns:
        2048 bytes of ASCII, uint8, padded with spaces.

    Raises:
        ValueError: when the text is longer.
    """
    text = json.dumps({_STORED_NAMES.get(name) or name: value for name, value in record.items()}).encode()
    if len(text) > RECORD_BYTES:
        raise ValueError(
            f"expected what a model was trained with in {RECORD_BYTES} bytes of JSON, received {len(text)}: "
            "give shorter class_names"
        )
    return torch.tensor(list(text.ljust(RECORD_BYTES, _PAD)), dtype=torch.uint8)


def decode_record(values: torch.Tensor) -> dict[str, Any]:
    """Read a record.

    Args:
        values: what `encode_record` returned, or an average of equal ones, of any type.

    Returns:
        the record.

    Raises:
        RuntimeError: when it is none, as after averaging different ones.
    """
    try:
        stored: dict[str, Any] = dict(json.loads(bytes(values.detach().cpu().round().int().tolist())))
    except (ValueError, TypeError) as error:
        raise RuntimeError(
            f"expected {_KEY} of a checkpoint to be JSON padded to {RECORD_BYTES} bytes, received something else "
            f"({error}): copy or train it again; models to be averaged must be trained with equal configurations"
        ) from error
    names: dict[str, str] = {stored_name: name for name, stored_name in _STORED_NAMES.items()}
    return {names.get(name, name): value for name, value in stored.items()}


def attach_training_record(network: nn.Module, record: Mapping[str, Any] | None) -> None:
    """Give a network the persistent buffer `trained_with`, the record of what it is trained with.

    The network then refuses to load a state dict of another record, before anything is copied. After loading, it keeps
    its own record, with the larger `trained_views` of the two. A buffer reaches TorchScript, resumed and federated
    trainings like any weight, which a dictionary beside the weights does not.

    Args:
        network: receives the buffer, uint8 of 2048 bytes, and the check.
        record: values that JSON has, by name; None is no value. Values of the same name are compared. `test_time_views`
            is compared with `trained_views`: the number of turned and mirrored views of a slice in training. None for
            no record: nothing is compared, and the record of a loaded file is taken.

    Raises:
        ValueError: when the record is too long.
    """
    given = dict(record or {})
    network.trained_with = nn.Buffer(encode_record(given))
    network.register_load_state_dict_pre_hook(partial(_check_record, given))


def check_trained_views(network: nn.Module) -> None:
    """Check that a training shows its network the views with which it is validated.

    Args:
        network: one of `attach_training_record`, with the weights that it starts from.

    Raises:
        ValueError: when it is shown fewer.
    """
    record = decode_record(network.get_buffer(_KEY))
    views, shown = record.get(VIEWS), record.get(TRAINED_VIEWS)
    if isinstance(views, int) and shown is not None and views > shown:
        raise ValueError(
            f"expected test_time_views of at most {shown}, since this training shows the network {_number(shown)}, "
            f"received {views}: give --test_time_views {shown}, or --phantom_share 0.5 (phantoms are drawn turned and "
            "mirrored), or a file to start from that has seen them"
        )


def find_model(trained: str, pretrained: str | None = None) -> str:
    """Choose the model to use: that of a training, or else the one that comes with the package.

    Args:
        trained: the `model.pt` that a training writes.
        pretrained: the file to take where that is missing; None for no other.

    Returns:
        the path of the file, whether or not it is there.
    """
    if pretrained is None or Path(trained).is_file():
        chosen, reason = trained, "the model of a training"
    else:
        chosen, reason = pretrained, f"since no training has written {trained}"
    logger.info("the model is %s, %s", chosen, reason)
    return chosen


def resolve_settings(
    source: str | nn.Module, overrides: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings with which a trained model is to be used.

    Args:
        source: its `model.pt`, or the network that `torch.jit.load` has read.
        overrides: settings by name; None for that of the training. Others must not contradict the training.
        defaults: settings that replace None where the model has no record of them. A warning names those that
            `overrides` has as None.

    Returns:
        all settings by name, with what else the model's record holds.

    Raises:
        ValueError: when an override contradicts the training, or the file cannot be read.
    """
    stored, name = _stored_record(source)
    if wrong := _contradictions(overrides, stored):
        raise ValueError(
            f"{name} does not fit: {'; '.join(wrong)}. In inference null (on a command line '$None') means as trained"
        )
    chosen = {key: value for key, value in overrides.items() if value is not None}
    known = dict.fromkeys(overrides) | stored | chosen
    assumed = {key: value for key, value in defaults.items() if known.get(key) is None}
    if unknown := {key: value for key, value in assumed.items() if key in overrides}:
        logger.warning("%s has no record of what it was trained with: %s is assumed", name, _listed(unknown))
    return known | assumed


def _stored_record(source: str | nn.Module) -> tuple[dict[str, Any], str]:
    """Return the record of a file or scripted network, empty if there is none, and how messages name it."""
    state: Mapping[str, torch.Tensor] = {}
    if isinstance(source, nn.Module):
        state, name = source.state_dict(), "the exported network"
    else:
        name = source
        if Path(source).is_file():
            remedy = "copy or train it again, or give another one with --ckpt_path FILE"
            state = read_state_dict(source, kind="trained model", remedy=remedy, is_key=_is_key)
    return (decode_record(state[_KEY]) if _KEY in state else {}), name


def _is_key(key: str) -> bool:
    return key.partition(".")[0] in ("encoder", "head", "unet", _KEY)


def _check_record(
    given: Mapping[str, Any],
    network: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    *_reports: list[str],
) -> None:
    """Reject a state dict that was trained with something else, and put the network's own record into it.

    Raises:
        RuntimeError: naming all that differs.
    """
    key = f"{prefix}{_KEY}"
    if key not in state:
        return  # torch reports the missing key
    stored = decode_record(state[key])
    if wrong := _contradictions(given, stored):
        raise RuntimeError("; ".join(wrong))
    record = dict(given or stored)
    if given and TRAINED_VIEWS in {**given, **stored}:
        shown: list[Any] = [each.get(TRAINED_VIEWS) for each in (given, stored)]
        record[TRAINED_VIEWS] = None if None in shown else max(shown)
    state[key] = encode_record(record).to(network.get_buffer(_KEY).device)


def _contradictions(given: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Return a sentence on every given value that contradicts those of a training."""
    sentences = []
    for name, value in given.items():
        trained = stored.get(name)
        if name == VIEWS:
            shown = max(stored.get(TRAINED_VIEWS) or 8, given.get(TRAINED_VIEWS) or 1)
            if isinstance(value, int) and value > shown:
                sentences.append(
                    f"it was trained with {_number(shown)}, received test_time_views {value}: set test_time_views to "
                    f"{shown} or fewer, or give a model that has seen them"
                )
        elif name != TRAINED_VIEWS and None not in (value, trained) and _plain(value) != trained:
            sentences.append(
                f"it was trained with {name} {_plain(trained)}, received {_plain(value)}: set {name} to "
                f"{_plain(trained)}, or give a model trained with {_plain(value)}"
            )
    return sentences


def _plain(value: Any) -> Any:
    """Return a value as JSON would give it back."""
    return json.loads(json.dumps(value))


def _number(shown: int) -> str:
    return f"{shown} of a slice's 8 turned and mirrored views"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
