"""The last line of a command that fails: `error: ...`, the sentence that matters, on one line."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from types import TracebackType

_PACKAGE = str(Path(__file__).parents[1])
_CHAINED = re.compile(
    r"\n\n?(?:The above exception was the direct cause of the following exception"
    r"|During handling of the above exception, another exception occurred):\n\n"
)
_TRACEBACK = re.compile(r"^(?:Original )?Traceback \(most recent call last\):\n", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.+)", line \d+, in .+\n(?:    (.*)\n)?', re.MULTILINE)
# MONAI's words for what it was doing: the error it was raised from says why that failed
_WRAPPERS = (
    "RuntimeError: Failed to instantiate component",
    "RuntimeError: Failed to evaluate",
    "RuntimeError: applying",
)
_EXPRESSION = re.compile(r"Failed to evaluate ConfigExpression: (.*)", re.DOTALL)
_REFERENCE = re.compile(r"__local_refs\['([^']*)'\]")  # as MONAI writes `@id` before it evaluates


class ErrorLine:
    """An exception hook that prints an error as one line, the last on the screen.

    An error that this package raises is its message. Any other also has its type, and how to see its traceback.

    Args:
        with_traceback: whether the traceback is printed before that line. `components.training.read_command_line` sets
            it to the knob `debug`; commands that do not read that knob keep their tracebacks.
    """

    def __init__(self, with_traceback: bool = True) -> None:
        self.with_traceback = with_traceback

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print what the interpreter passes to `sys.excepthook`; an interruption as usual."""
        if not isinstance(error, Exception):
            sys.__excepthook__(kind, error, trace)
            return
        if self.with_traceback:
            sys.__excepthook__(kind, error, trace)
        line, is_own = summarize_traceback("".join(traceback.format_exception(error)))
        hint = "" if is_own or self.with_traceback else " (--debug True shows the traceback)"
        _close_progress_bars()
        sys.stdout.flush()
        print(f"error: {line}{hint}", file=sys.stderr, flush=True)


def summarize_traceback(text: str) -> tuple[str, bool]:
    """Find the sentence that matters in a traceback.

    Args:
        text: as `traceback.format_exception` makes it; an error of a loader's process has a traceback in its message.

    Returns:
        the message with its notes, on one line; and whether this package raised it. If not, the type comes first.
    """
    blocks = [_TRACEBACK.split(block)[-1] for block in _CHAINED.split(text)]
    block, expression = blocks.pop(), ""
    while blocks and _error_of(block).startswith(_WRAPPERS):
        found = _EXPRESSION.search(_error_of(block))
        block, expression = blocks.pop(), found[1] if found else ""
    frames = _FRAME.findall(block)
    file, source = frames[-1] if frames else ("", "")
    error = _error_of(block)
    if file.startswith(_PACKAGE) and source.startswith("raise"):
        _, _, error = error.partition(": ")
        return " ".join(error.split()), True
    if file == "<string>" and expression:  # the expression itself is at fault, not what it called
        error += ", in the config's expression " + _REFERENCE.sub(r"@\1", expression)
    return " ".join(error.split()), False


def _error_of(block: str) -> str:
    """Return what follows the frames of a traceback, which are indented: the type, the message, the notes."""
    lines = block.splitlines()
    start = next((number for number, line in enumerate(lines) if line and not line.startswith(" ")), 0)
    return "\n".join(lines[start:])


def _close_progress_bars() -> None:
    """End the bars that the error interrupted, which else happens at the interpreter's end, and their line."""
    bars = list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else []
    for bar in bars:
        bar.close()
    if bars:
        print(file=sys.stderr)
