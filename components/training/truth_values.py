"""Options of a command line that are true or false, in whatever way that is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.bundle import ReferenceResolver

TRUTH_VALUES = {"true": True, "false": False}
# knobs that take true, false or something else, which what they are given to judges
NOT_ONLY_TRUTH_VALUES = ("trainable_encoder",)


def as_truth_value(value: Any) -> Any:
    """Return a text that says `true` or `false`, in small or capital letters, as a bool; anything else as it is."""
    return TRUTH_VALUES.get(value.strip().lower(), value) if isinstance(value, str) else value


def read_truth_value(option: str, value: Any, configs: Mapping[str, Any]) -> bool | None:
    """Return the truth value that an option gives to the configs and that python-fire has read as text.

    Without this, `--resume false` would be a text that is not empty, which counts as true.

    Args:
        option: its name, which is a key of the configs, or of something in them (`train#trainer#amp`).
        value: what python-fire reads.
        configs: all keys of the config files and their values.

    Returns:
        the truth value; None where the value is what the configs are to have.

    Raises:
        ValueError: when the configs have a truth value and the option gives none. When an option for something within
            a key is written otherwise than `True` or `False`, since it cannot be replaced there.
    """
    *path, last = ReferenceResolver.split_id(option)
    truth = as_truth_value(value)
    if isinstance(truth, bool):
        if truth is value or not path:
            return None if truth is value else truth
        raise ValueError(f"MONAI takes `--{option} {value}` for text: write `--{option} {truth}`.")
    is_for_configs = isinstance(value, str) and value.startswith(("$", "@", "%"))
    if (
        isinstance(_value_of(configs, [*path, last]), bool)
        and not is_for_configs
        and option not in NOT_ONLY_TRUTH_VALUES
    ):
        raise ValueError(
            f"expected True or False, received `--{option} {value}`: write `--{option} True` or `--{option} False`."
        )
    return None


def _value_of(configs: Any, path: list[str]) -> Any:
    """Return what the configs have at a place, or None."""
    for key in path:
        if isinstance(configs, list) and key.isdecimal() and int(key) < len(configs):
            configs = configs[int(key)]
        elif isinstance(configs, Mapping):
            configs = configs.get(key)
        else:
            return None
    return configs
