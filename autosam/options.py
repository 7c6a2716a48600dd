"""Command lines made of functions: their arguments become options, and their docstrings the help."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_type_hints

import typer

SETTINGS: dict[str, Any] = {  # of all command lines; `--output_dir` and `--output-dir` are one
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
}
KNOB_OPTIONS = {"encoder": "--model_type", "checkpoint": "--sam_checkpoint"}  # as these arguments' knobs are called


def command_line(
    about: str | None,
    *functions: Callable[..., Any],
    positional: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
) -> typer.Typer:
    """Return a command line.

    Args:
        about: help of several commands; its first paragraph is shown.
        functions: the commands. One alone needs no name on the command line.
        positional: names of arguments that are given without a name.
        aliases: further names of options, such as `--model_type`, by argument.
    """
    app = typer.Typer(help=(about or "").partition("\n\n")[0], **SETTINGS)
    for function in functions:
        app.command()(_with_options(function, positional, aliases or {}))
    return app


def _with_options(
    function: Callable[..., Any], positional: tuple[str, ...], aliases: Mapping[str, str]
) -> Callable[..., None]:
    """Return a command: the help of each option is what the docstring says of the argument."""
    about, _, rest = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
    helps = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", rest.partition("\n\n")[0], flags=re.MULTILINE))
    signature, types = inspect.signature(function), get_type_hints(function)
    parameters = []
    for name, parameter in signature.parameters.items():
        kind: Any = typer.Argument if name in positional else typer.Option
        names = (f"--{name}", aliases[name]) if name in aliases else ()
        text = " ".join(helps[name].split())
        parameters.append(parameter.replace(annotation=Annotated[types[name], kind(*names, help=text)]))

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)

    wrapped: Any = command
    wrapped.__doc__ = about
    wrapped.__signature__ = signature.replace(parameters=parameters, return_annotation=None)
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
