"""Refusal of misspelt options of ``python -m monai.bundle run``."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from monai.bundle import DEFAULT_EXP_MGMT_SETTINGS, ConfigParser, ConfigWorkflow, create_workflow, run, run_workflow
from monai.bundle import update_kwargs as read_args

_COMMANDS: dict[str, Callable[..., Any]] = {"run": run, "run_workflow": run_workflow}
_FLAG = re.compile(r"--|-[a-zA-Z]")  # python-fire's: "-1" and "-.5" are values, "-inf" is not
_ID_SEPARATOR = re.compile("#|::")


def refuse_unknown_knobs(argv: Sequence[str] | None = None) -> None:
    """Raise an error on a command-line option that is neither a key of the configs nor an argument of the runner.

    MONAI adds an option of unknown name to the config as a new key, so a misspelt one would change nothing and say
    nothing. Only the top-level part of a nested option is judged: ``--network_def#new_argument 1`` is legitimate.
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
    options, positionals = parse_options(argv[2:])
    knobs = _knobs(command, options=options, positionals=positionals)
    known = knobs | _runner_arguments()
    for name, (argument, _) in options.items():
        top = _ID_SEPARATOR.split(name.removeprefix("+"))[0]
        if top in known:
            continue
        read_as = "" if argument.lstrip("-").split("=")[0] == name else f" (read as '{name}' by python-fire)"
        nearest = difflib.get_close_matches(top, sorted(known), n=1)
        hint = f" Did you mean '--{nearest[0]}'?" if nearest else ""
        raise ValueError(
            f"expected options that the configs define, got '{argument}'{read_as}: no config has the key '{top}'."
            f"{hint} The keys are: {', '.join(sorted(knob for knob in knobs if not knob.startswith('_')))}."
        )


def parse_options(arguments: Sequence[str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Split arguments into options and positional ones, as python-fire does for a function with ``**kwargs``.

    Convention: ``-`` in a name becomes ``_``; an option followed by another option or by nothing is a switch, true
    unless its name begins with "no"; a value that begins with ``--`` needs the form ``--name=value``.

    Args:
        arguments: what follows the command.

    Returns:
        for every option's name the argument as typed and its value as text; and the positional arguments.
    """
    options: dict[str, tuple[str, str]] = {}
    positionals = []
    remaining = _until_separator(arguments)
    while remaining:
        argument, remaining = remaining[0], remaining[1:]
        if not _FLAG.match(argument):
            positionals.append(argument)
            continue
        name, has_value, value = argument.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not has_value and remaining and not _FLAG.match(remaining[0]):
            value, remaining = remaining[0], remaining[1:]
        elif not has_value:
            value = "True"
            if name.startswith("no"):
                name, value = name.removeprefix("no"), "False"
        options[name] = (argument, value)
    return options, positionals


def _until_separator(arguments: Sequence[str]) -> list[str]:
    """Drop fire's own flags, which follow the last ``--``, and what an isolated ``-`` keeps from the command."""
    own = list(arguments)
    if "--" in own:
        own = own[: len(own) - 1 - own[::-1].index("--")]
    return own[: own.index("-")] if "-" in own else own


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


def _knobs(command: Callable[..., Any], *, options: dict[str, tuple[str, str]], positionals: Sequence[str]) -> set[str]:
    """Return the top-level keys of every file that the command line gives: configs, arguments, tracking settings."""
    from fire.parser import DefaultParseValue  # here, since only a process that fire started comes so far

    given = {name: value for name, (_, value) in options.items()}
    free = (name for name in inspect.signature(command).parameters if name not in given)
    given |= dict(zip(free, positionals, strict=False))
    parsed = {name: DefaultParseValue(value) for name, value in given.items()}

    arguments = dict(read_args(parsed.get("args_file")))
    own = _runner_arguments()
    knobs = {_ID_SEPARATOR.split(name)[0] for name in arguments if name not in own}
    config_file = parsed.get("config_file") or arguments.get("config_file")
    if config_file:
        knobs |= set(ConfigParser.load_config_files(config_file))
    tracking = parsed.get("tracking") or arguments.get("tracking")
    if tracking and not (isinstance(tracking, str) and tracking in DEFAULT_EXP_MGMT_SETTINGS):
        knobs |= _tracking_keys(ConfigParser.load_config_files(tracking))
    return knobs - {ConfigParser.meta_key}
