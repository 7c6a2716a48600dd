"""The command line of ``python -m monai.bundle run``: what options mean, and which are refused."""

from __future__ import annotations

import ast
import builtins
import contextlib
import difflib
import functools
import inspect
import io
import re
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import fire
from monai.bundle import (
    DEFAULT_EXP_MGMT_SETTINGS,
    ConfigParser,
    ConfigWorkflow,
    ReferenceResolver,
    create_workflow,
    run,
    run_workflow,
)
from monai.bundle import update_kwargs as read_args

from components import is_bundle_command
from components.base.error_line import ErrorLine
from components.training.truth_values import as_truth_value, read_truth_value

_COMMANDS: dict[str, Callable[..., Any]] = {"run": run, "run_workflow": run_workflow}
_ID_SEPARATOR = re.compile("#|::")
_PATH_ENDINGS = ("_dir", "_path", "_root", "_checkpoint")  # a knob so named is a path


def read_command_line(names: MutableMapping[str, Any], debug: bool = False, argv: Sequence[str] | None = None) -> None:
    """Check the command line; give paths the text that was typed, and truth values their meaning.

    A knob is a path if its name ends in ``_dir``, ``_path``, ``_root`` or ``_checkpoint``. python-fire reads values as
    Python (``20230712``, ``1e5``, ``[x]``), and MONAI's parser rewrites ``#`` in every string. So this puts the text
    itself among the resolved values of the config. It stands first in the list of expressions that a run evaluates,
    before any of them uses a path. Dictionaries, and values that begin with ``$``, ``@`` or ``%``, keep their config
    meaning. A path that is mistaken for one is refused, and so is what else cannot be kept.

    ``true`` and ``false``, in small or capital letters, become truth values, and an option that has one in the configs
    takes nothing else; see `components.training.truth_values`.

    In another process than ``python -m monai.bundle`` nothing is checked.

    Args:
        names: what an expression of the config can name, which is ``$globals()`` in the config.
        debug: whether an error's traceback is printed before its last line.
        argv: as for `refuse_unknown_knobs`.

    Raises:
        ValueError: when an option is unknown, or its value cannot be kept or is no truth value.
    """
    if isinstance(sys.excepthook, ErrorLine):
        sys.excepthook.with_traceback = as_truth_value(debug) is True  # it is resolved before this can replace it
    refuse_unknown_knobs(argv)
    arguments, options = _options(argv)
    resolved = names[ReferenceResolver._vars]
    configs = _configs(options)
    for option, value in options.items():
        name = option.removeprefix("+")
        if value is None:
            raise ValueError(
                f"MONAI's runner ignores `--{option} None`: write `--{option} '$None'` for no value, "
                "or leave it out for the configs' own."
            )
        if not name.endswith(_PATH_ENDINGS):
            truth = read_truth_value(name, value, configs)
            if truth is not None:
                resolved[name] = truth
            continue
        text = _typed_value(option, arguments)
        if text is None:
            raise ValueError(f"expected a path after `--{option}`, got nothing: write `--{option} PATH`.")
        if isinstance(value, dict) or _is_for_configs(text):
            _refuse_path_in_config_syntax(option, text, names, set(configs))
            continue
        _refuse_unlikely_path(option, text)
        if not _ID_SEPARATOR.search(option):
            if "#" in text and options.get("tracking") and name in ("output_dir", "bundle_root"):
                raise ValueError(
                    f"MONAI's tracking writes `#` as `::` in `--{option} {text}`: give a path without `#`, or leave "
                    "out --tracking."
                )
            resolved[name] = text
        elif value != text or "#" in text:
            raise ValueError(
                f"`--{option} {text}` cannot be kept as it is: python-fire reads it as {value!r}, and MONAI's parser "
                "writes `#` as `::`. Give a path without `#` that does not read as Python, such as "
                f"`./{text.replace('#', '_')}`."
            )


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
    arguments, options = _options(argv)
    knobs = set(_configs(options))
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


def _options(argv: Sequence[str] | None) -> tuple[list[str], dict[str, Any]]:
    """Return a command's arguments, and by name the values that python-fire reads; none if it is not ours to judge."""
    if argv is None:
        argv = sys.argv if is_bundle_command() else []
    command = _COMMANDS.get(argv[1].replace("-", "_")) if len(argv) > 1 else None
    if command is None:
        return [], {}
    arguments, _ = fire.parser.SeparateFlagArgs(list(argv[2:]))  # what follows the last `--` are flags of fire itself
    return arguments, _bound_arguments(command, arguments)


def _bound_arguments(command: Callable[..., Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Return by name the values that python-fire passes to a command for these arguments, without running it."""
    bound: dict[str, Any] = {}

    @functools.wraps(command)  # fire binds arguments by the signature of the wrapped function
    def record(*values: Any, **options: Any) -> None:
        given = zip(inspect.signature(command).parameters, values, strict=False)
        bound.update({name: value for name, value in given if value is not None}, **options)  # None: by default

    # fire reports superfluous arguments only after the call: the fire that runs the command will do so
    with contextlib.suppress(fire.core.FireExit), contextlib.redirect_stderr(io.StringIO()):
        fire.Fire(record, command=[*arguments, "--"])  # `--`: no flags of fire itself
    return bound


def _as_typed(name: str, arguments: Sequence[str]) -> str:
    """Return the argument that python-fire read as an option of this name; it reads `--nox` as `x` switched off."""
    options = [argument for argument in arguments if argument.startswith("-")]
    typed = {option.lstrip("-").split("=")[0].replace("-", "_"): option for option in options}
    return typed.get(name) or typed[f"no{name}"]


def _typed_value(name: str, arguments: Sequence[str]) -> str | None:
    """Return the text of an option's value; None for a switch, which has none."""
    option = _as_typed(name, arguments)
    if "=" in option:
        return option.partition("=")[2]
    after = len(arguments) - list(reversed(arguments)).index(option)
    return arguments[after] if after < len(arguments) and not fire.core._IsFlag(arguments[after]) else None


def _is_for_configs(text: str) -> bool:
    """Return whether MONAI takes a string for an expression, a macro, or as a whole for a reference."""
    return text.startswith(("$", "%")) or ReferenceResolver.id_matcher.fullmatch(text.replace("#", "::")) is not None


def _refuse_path_in_config_syntax(option: str, text: str, names: Mapping[str, Any], knobs: set[str]) -> None:
    """Raise an error on the path of a file or folder that is there, and on what names something that is not."""
    reason = "a file or folder has that name" if Path(text).exists() else ""
    if text.startswith("$") and not reason:
        reason = _fault_of_expression(text[1:], names)
    if text.startswith("@") and _ID_SEPARATOR.split(text[1:])[0] not in knobs:
        reason = "no config has that key"
    if reason:
        raise ValueError(
            f"`--{option} '{text}'` begins with `{text[0]}`, as what configs refer to or evaluate does, "
            f"but {reason}: write `--{option} './{text}'` for the path."
        )


def _fault_of_expression(expression: str, names: Mapping[str, Any]) -> str:
    """Return what keeps an expression from being evaluated, or the empty string."""
    references = ReferenceResolver.id_matcher
    try:
        tree = ast.parse(references.sub("None", ReferenceResolver.normalize_id(expression)).strip())
    except SyntaxError as error:
        return f"it is no Python ({error.msg})"
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    known = arguments | {node.id for node in used if isinstance(node.ctx, ast.Store)} | set(names) | set(dir(builtins))
    unknown = sorted({node.id for node in used} - known)
    return f"nothing here has the name {', '.join(unknown)}" if unknown else ""


def _refuse_unlikely_path(option: str, text: str) -> None:
    """Refuse a path that is a mistake, such as an unset variable of the shell or a literal `~`."""
    if not text.strip():
        raise ValueError(f"expected a path, got `--{option} '{text}'`: is a variable of the shell unset?")
    if text[0] == "~" and not Path(text).exists():
        raise ValueError(
            f"the shell left `~` as it is in `--{option}={text}`: write `--{option} {text}`, "
            f"or `./{text}` for a folder of that name."
        )
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        raise ValueError(
            f"the quotes are part of the path in `--{option} {text}`: leave them out, as a path keeps its text, or "
            f"write ./{text} if they belong to the name."
        )


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


def _configs(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by top-level key of every file that the command line names.

    Later configs override earlier ones, and the file of arguments overrides them all. Tracking settings come from a
    file as well. A key within another, as a file of arguments may have, has the value None.
    """
    arguments = read_args(options.get("args_file"))
    configs: dict[str, Any] = {}
    tracking = options.get("tracking") or arguments.get("tracking")
    if tracking and not (isinstance(tracking, str) and tracking in DEFAULT_EXP_MGMT_SETTINGS):
        configs |= dict.fromkeys(_tracking_keys(ConfigParser.load_config_files(tracking)))
    config_file = options.get("config_file") or arguments.get("config_file")
    if config_file:
        configs |= ConfigParser.load_config_files(config_file)
    runner_arguments = _runner_arguments()
    for name in arguments.keys() - runner_arguments:
        key, *path = _ID_SEPARATOR.split(name)
        configs[key] = configs.get(key) if path else arguments[name]
    configs.pop(ConfigParser.meta_key, None)
    return configs
