"""The command line of ``python -m monai.bundle run``: what options mean, and which are refused."""

from __future__ import annotations

import builtins
import contextlib
import difflib
import inspect
import itertools
import symtable
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import fire
from monai.bundle import DEFAULT_EXP_MGMT_SETTINGS, ConfigParser, ConfigWorkflow, ReferenceResolver, run, run_workflow
from monai.bundle import update_kwargs as read_args

from components import is_bundle_command
from components.base.errors import ErrorLine
from components.base.knobs import PATH_ENDINGS

_TRUTH_VALUES = {"true": True, "false": False}
_NOT_ONLY_TRUTH_VALUES = ("trainable_encoder",)  # what takes this knob judges its value


def _arguments_of(command: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(command).parameters)[:-1]  # the last one takes all other options


_COMMANDS: dict[str, Callable[..., Any]] = {"run": run, "run_workflow": run_workflow}
_RUNNER_ARGUMENTS = {name for command in (run, run_workflow, ConfigWorkflow) for name in _arguments_of(command)}


_judged: ContextVar[Sequence[str] | None] = ContextVar("_judged", default=None)


@contextlib.contextmanager
def judged_as(argv: Sequence[str]) -> Iterator[None]:
    """Let the configs that run within judge a command line as that of ``python -m monai.bundle``.

    Args:
        argv: as for `refuse_unknown_knobs`.
    """
    token = _judged.set(argv)
    try:
        yield
    finally:
        _judged.reset(token)


class _Option(NamedTuple):
    typed: str  # the argument, such as `--output-dir=x`
    text: str | None  # what was typed as its value; None for a switch
    value: Any  # what python-fire makes of the text


def read_command_line(names: MutableMapping[str, Any], debug: bool = False, argv: Sequence[str] | None = None) -> None:
    """Check the command line; give paths the text that was typed, and truth values their meaning.

    A knob is a path if its name ends in one of `PATH_ENDINGS`. python-fire reads values as Python, such as ``20230712``
    or ``1e5``. MONAI's parser rewrites ``#`` in every string. So this puts the text itself among the resolved values of
    the config. It stands first in the list of expressions that a run evaluates, before any of them uses a path.
    Dictionaries, and values that begin with ``$``, ``@`` or ``%``, keep their config meaning. A path that is mistaken
    for one is refused, and so is what else cannot be kept.

    ``true`` and ``false``, in small or capital letters, become truth values. An option that has one in the configs
    takes nothing else. Without this, ``--resume false`` would be a text that is not empty, which counts as true.

    Nothing is checked in another process than ``python -m monai.bundle``, unless within `judged_as`.

    Args:
        names: what an expression of the config can name, which is ``$globals()`` in the config.
        debug: whether an error's traceback is printed before its last line.
        argv: as for `refuse_unknown_knobs`.

    Raises:
        ValueError: when an option is unknown, or its value cannot be kept or is no truth value.
    """
    if isinstance(sys.excepthook, ErrorLine):  # `debug` is resolved before this can replace it
        sys.excepthook.with_traceback = str(debug).strip().lower() == "true"
    refuse_unknown_knobs(argv)
    options = _read_options(argv)
    configs = _read_configs(options)
    for name, option in options.items():
        key = name.removeprefix("+")
        if option.value is None:
            raise ValueError(
                f"MONAI's runner ignores `--{name} None`: write `--{name} '$None'` for no value, "
                "or leave it out for the configs' own."
            )
        is_path = key.endswith(PATH_ENDINGS)
        kept = _typed_path(name, options, names, configs) if is_path else _truth_value(key, option.value, configs)
        if kept is not None:
            names[ReferenceResolver._vars][key] = kept


def check_run_id(argv: Sequence[str] | None = None) -> None:
    """Raise an error if the workflow to run is none, such as the section ``train`` instead of ``training``.

    MONAI resolves any key of the config as a workflow, and ends without an error.

    Args:
        argv: as for `refuse_unknown_knobs`.

    Raises:
        ValueError: when the key is no list of expressions.
    """
    options = _read_options(argv)
    if "run_id" not in options:
        return
    run_id, configs = str(options["run_id"].value), _read_configs(options)
    if run_id not in configs or not isinstance(configs[run_id], list | str) or not run_id:
        target = "components.training.read_command_line"
        workflows = [key for key, value in configs.get().items() if isinstance(value, list) and target in str(value)]
        raise ValueError(f"expected a workflow to run, received '{run_id}': write {' or '.join(workflows)}")


def refuse_unknown_knobs(argv: Sequence[str] | None = None) -> None:
    """Raise an error on a command-line option that is neither a key of the configs nor an argument of the runner.

    MONAI adds an option of unknown name to the config as a new key, so a misspelt option would be ignored silently.
    Only the top-level part of a nested option is judged: ``--network_def#new_argument 1`` is legitimate.
    Overrides made in code are never judged.

    Args:
        argv: the command line, with the program at 0 and the command (``run`` or ``run_workflow``) at 1. If None,
            that of `judged_as`, else ``sys.argv`` if this process is ``python -m monai.bundle``.

    Raises:
        ValueError: when an option is unknown.
    """
    options = _read_options(argv)
    knobs = set(_read_configs(options).get())
    known = _RUNNER_ARGUMENTS | knobs
    for name, option in options.items():
        key = ReferenceResolver.split_id(name.removeprefix("+"))[0]
        if key in known:
            continue
        read_as = "" if option.typed.lstrip("-").split("=")[0] == name else f" (read as '{name}' by python-fire)"
        nearest = difflib.get_close_matches(key, sorted(known), n=1)
        keys = ", ".join(sorted(knob for knob in knobs if not knob.startswith("_")))
        hint = f"Did you mean '--{nearest[0]}'?" if nearest else f"The keys are: {keys}."
        raise ValueError(
            f"expected options that the configs define, got '{option.typed}'{read_as}: no config has the key '{key}'. "
            + hint
        )


def _read_options(argv: Sequence[str] | None) -> dict[str, _Option]:
    """Return a command's options by the names that python-fire binds them to; none if it is not ours to judge."""
    if argv is None:
        argv = _judged.get() or (sys.argv if is_bundle_command() else [])
    command = _COMMANDS.get(argv[1].replace("-", "_")) if len(argv) > 1 else None
    if command is None:
        return {}
    own = _arguments_of(command)
    arguments, _ = fire.parser.SeparateFlagArgs(list(argv[2:]))  # what follows the last `--` are flags of fire itself
    arguments = list(itertools.takewhile(lambda argument: argument != "-", arguments))  # `-` ends a command
    options, by_position = {}, []
    while arguments:
        typed = arguments.pop(0)
        name, equals, text = typed.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not fire.core._IsFlag(typed):
            by_position.append(typed)
        elif equals or (arguments and not fire.core._IsFlag(arguments[0])):
            text = text if equals else arguments.pop(0)
            options[name] = _Option(typed, text, fire.parser.DefaultParseValue(text))
        else:  # a switch is on, or off if its name begins with "no"
            is_on = name in own or not name.startswith("no")
            options[name if is_on else name[2:]] = _Option(typed, None, is_on)
    free = [name for name in own if name not in options]
    for name, text in zip(free, by_position, strict=False):  # fire itself reports what is left over
        options[name] = _Option(text, text, fire.parser.DefaultParseValue(text))
    return {name: option for name, option in options.items() if option.value is not None or name not in own}


def _read_configs(options: Mapping[str, _Option]) -> ConfigParser:
    """Return what the files that the command line names hold, and the keys of tracking settings.

    Later configs override earlier ones, and the file of arguments overrides them all.
    """
    given = {name: options[name].value for name in ("args_file", "tracking", "config_file") if name in options}
    arguments = read_args(given.get("args_file"))
    tracking, config_file = (given.get(name) or arguments.get(name) for name in ("tracking", "config_file"))
    settings: Any = DEFAULT_EXP_MGMT_SETTINGS.get(str(tracking)) or ConfigParser.load_config_files(tracking or {})
    # keys named like an engine are handlers for it, the others become top-level keys of the config
    keys = settings.get("configs", {}).keys() - settings.get("handlers_id", {}).keys()
    configs = ConfigParser(
        {ConfigParser.meta_key: {}, **dict.fromkeys(keys), **ConfigParser.load_config_files(config_file or {})}
    )
    for name in arguments.keys() - _RUNNER_ARGUMENTS:
        configs.set(arguments[name], name)
    return configs


def _truth_value(key: str, value: Any, configs: ConfigParser) -> bool | None:
    """Return the truth value that python-fire has read as text; None where the value is what the configs are to have.

    MONAI takes no other value for something within a key (`train#trainer#amp`), so `true` is refused there.
    """
    if isinstance(value, bool):
        return None
    truth = _TRUTH_VALUES.get(str(value).strip().lower())
    if truth is not None:
        if "::" in ReferenceResolver.normalize_id(key):
            raise ValueError(f"MONAI takes `--{key} {value}` for text: write `--{key} {truth}`.")
        return truth
    is_for_configs = isinstance(value, str) and value.startswith(("$", "@", "%"))
    if isinstance(configs.get(key), bool) and not is_for_configs and key not in _NOT_ONLY_TRUTH_VALUES:
        raise ValueError(
            f"expected True or False, received `--{key} {value}`: write `--{key} True` or `--{key} False`."
        )
    return None


def _typed_path(
    name: str, options: Mapping[str, _Option], names: Mapping[str, Any], configs: ConfigParser
) -> str | None:
    """Return the text of a path; None where the configs have it already. Refuse what is a mistake or cannot be kept."""
    option = options[name]
    text, is_nested = option.text or "", "::" in ReferenceResolver.normalize_id(name)
    is_tracked = "tracking" in options and name.removeprefix("+") in ("output_dir", "bundle_root")
    is_reference = ReferenceResolver.id_matcher.fullmatch(ReferenceResolver.normalize_id(text)) is not None
    is_for_configs = isinstance(option.value, dict) or text.startswith(("$", "%")) or is_reference
    fault = ""
    if option.text is None:
        fault = f"write `--{name} PATH`."
    elif not text.strip():
        fault = "is a variable of the shell unset?"
    elif is_for_configs:
        if reason := _fault_in_configs(text, names, configs):
            fault = f"`{text[0]}` is for configs, but {reason}: write `--{name} './{text}'` for the path."
    elif text[0] == "~" and not Path(text).exists():
        fault = f"the shell left `~` as it is after `=`: write `--{name} {text}`, or `./{text}` for that folder."
    elif len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        fault = f"the quotes are part of the path itself: leave them out, or write ./{text} if they belong to the name."
    elif ("#" in text and (is_nested or is_tracked)) or (is_nested and option.value != text):
        by_monai = f"MONAI's {'parser' if is_nested else 'tracking'} writes `#` as `::`"
        reason = by_monai if "#" in text else f"python-fire reads it as {option.value!r}"
        other = ("" if text.startswith("/") else "./") + text.replace("#", "_")
        fault = f"it cannot be kept as it is: {reason}. Give a path such as `{other}`."
    if fault:
        got = "nothing" if option.text is None else repr(text)
        raise ValueError(f"expected a path after `--{name}`, got {got}: {fault}")
    return None if is_for_configs or is_nested else text


def _fault_in_configs(text: str, names: Mapping[str, Any], configs: ConfigParser) -> str:
    """Return why what looks like a reference or an expression of a config is none, or nothing."""
    if Path(text).exists():
        return "a file or folder has that name"
    text = ReferenceResolver.normalize_id(text)
    if text.startswith("@") and text[1:].split("::")[0] not in configs:
        return "no config has that key"
    if not text.startswith("$"):
        return ""
    expression = ReferenceResolver.id_matcher.sub("None", text[1:]).strip()
    try:
        symbols = symtable.symtable(expression, "", "eval").get_symbols()
    except SyntaxError as error:
        return f"it is no Python ({error.msg})"
    used = {symbol.get_name() for symbol in symbols if not symbol.is_assigned()}
    unknown = sorted(used - names.keys() - set(dir(builtins)))
    return f"nothing here has the name {', '.join(unknown)}" if unknown else ""
