"""Refusal of misspelt options of ``python -m monai.bundle run``."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fire
from monai.bundle import DEFAULT_EXP_MGMT_SETTINGS, ConfigParser, ConfigWorkflow, create_workflow, run, run_workflow
from monai.bundle import update_kwargs as read_args

_COMMANDS: dict[str, Callable[..., Any]] = {"run": run, "run_workflow": run_workflow}
_ID_SEPARATOR = re.compile("#|::")


def refuse_unknown_knobs(argv: Sequence[str] | None = None) -> None:
    """Raise an error on a command-line option that is neither a key of the configs nor an argument of the runner.

    MONAI adds an option of unknown name to the config as a new key, so a misspelt option would be ignored silently.
    Only the top-level part of a nested option is judged: ``--network_def#new_argument 1`` is legitimate.
    Overrides made in code are never judged.

    Args:
        argv: the command line, with the program at 0 and the command (``run`` or ``run_workflow``) at 1. If None,
            ``sys.argv``, and only if this process is ``python -m monai.bundle``.

    Raises:
        ValueError: when an option is unknown.
    """
    if argv is None:
        if not _is_bundle_command():
            return
        argv = sys.argv
    command = _COMMANDS.get(argv[1].replace("-", "_")) if len(argv) > 1 else None
    if command is None:
        return
    arguments, _ = fire.parser.SeparateFlagArgs(list(argv[2:]))  # what follows the last `--` are flags of fire itself
    options = _bound_arguments(command, arguments)
    knobs = _knobs(options)
    known = knobs | _runner_arguments()
    for name in options:
        key = _ID_SEPARATOR.split(name.removeprefix("+"))[0]
        if key in known:
            continue
        argument = _as_typed(name, arguments)
        read_as = "" if argument.lstrip("-").split("=")[0] == name else f" (read as '{name}' by python-fire)"
        nearest = difflib.get_close_matches(key, sorted(known), n=1)
        hint = f" Did you mean '--{nearest[0]}'?" if nearest else ""
        raise ValueError(
            f"expected options that the configs define, got '{argument}'{read_as}: no config has the key '{key}'."
            f"{hint} The keys are: {', '.join(sorted(knob for knob in knobs if not knob.startswith('_')))}."
        )


def _bound_arguments(command: Callable[..., Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Return by name the values that python-fire passes to a command for these arguments, without running it."""
    bound: dict[str, Any] = {}

    @functools.wraps(command)  # fire binds arguments by the signature of the wrapped function
    def record(*values: Any, **options: Any) -> None:
        bound.update(zip(inspect.signature(command).parameters, values, strict=False), **options)

    # fire reports superfluous arguments only after the call: the fire that runs the command will do so
    with contextlib.suppress(fire.core.FireExit), contextlib.redirect_stderr(io.StringIO()):
        fire.Fire(record, command=[*arguments, "--"])  # `--`: no flags of fire itself
    return bound


def _as_typed(name: str, arguments: Sequence[str]) -> str:
    """Return the argument that python-fire read as an option of this name; it reads `--nox` as `x` switched off."""
    options = [argument for argument in arguments if argument.startswith("-")]
    typed = {option.lstrip("-").split("=")[0].replace("-", "_"): option for option in options}
    return typed.get(name) or typed[f"no{name}"]


def _is_bundle_command() -> bool:
    # `python -m` leaves its module's name here, also under torchrun; a host or a test that imports MONAI has another
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == "monai.bundle.__main__"


def _runner_arguments() -> set[str]:
    """Return the names that MONAI's runner takes for itself, experiment tracking included."""
    functions = (run, run_workflow, create_workflow, ConfigWorkflow)
    parameters = [p for function in functions for p in inspect.signature(function).parameters.values()]
    names = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    for settings in DEFAULT_EXP_MGMT_SETTINGS.values():
        names |= _tracking_keys(settings)
    return names | {ConfigParser.meta_key}


def _tracking_keys(settings: dict[str, Any]) -> set[str]:
    # keys named like an engine are handlers for it, the others become top-level keys of the config
    return set(settings.get("configs", {})) - set(settings.get("handlers_id", {}))


def _knobs(options: Mapping[str, Any]) -> set[str]:
    """Return the top-level keys of every file that the command line names: configs, arguments, tracking settings."""
    arguments = read_args(options.get("args_file"))
    runner_arguments = _runner_arguments()
    knobs = {_ID_SEPARATOR.split(name)[0] for name in arguments if name not in runner_arguments}
    config_file = options.get("config_file") or arguments.get("config_file")
    if config_file:
        knobs |= set(ConfigParser.load_config_files(config_file))
    tracking = options.get("tracking") or arguments.get("tracking")
    if tracking and not (isinstance(tracking, str) and tracking in DEFAULT_EXP_MGMT_SETTINGS):
        knobs |= _tracking_keys(ConfigParser.load_config_files(tracking))
    return knobs - {ConfigParser.meta_key}
