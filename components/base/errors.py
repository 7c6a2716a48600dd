"""Errors in one sentence: the last line of a command that fails, and the reasons of files that fail."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from types import TracebackType

import torch

# folders whose errors are sentences for the user
_OWN = tuple(f"{Path(__file__).parents[2] / name}/" for name in ("components", "autosam", "adapt", "release", "study"))
# MONAI's words for what it was doing: the error that led to them says why that failed
_EVALUATED = "Failed to evaluate ConfigExpression:"
_WRAPPERS = ("Failed to instantiate component", "Failed to evaluate", "applying transform")
_REFERENCE = re.compile(r"__local_refs\['([^']*)'\]")  # as MONAI writes `@id` before it evaluates
# torch sends a loader's errors between processes as text: file and source of the last frame, type, message of each
_IN_WORKER = re.compile(
    r'^  File "(.+)", line \d+, in .+\n(?:    (.*)\n)?(?:    .*\n)*([\w.]+)(?:: ([\s\S]*?))?'
    r"\s*(?=\n\n(?:The above exception|During handling)|\Z)",
    re.MULTILINE,
)
_NO_MEMORY = ("MemoryError", "DefaultCPUAllocator")  # in the text of errors that MONAI or torch make of others


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
        if self.with_traceback or not isinstance(error, Exception):
            sys.__excepthook__(kind, error, trace)
        if not isinstance(error, Exception):
            return
        line, is_own = summarize_traceback(error)
        hint = "" if is_own or self.with_traceback else " (--debug True shows the traceback)"
        _close_progress_bars()
        sys.stdout.flush()
        print(f"error: {line}{hint}", file=sys.stderr, flush=True)


def error_message(error: BaseException) -> str:
    """Return in one line why something failed; see `summarize_traceback`."""
    return summarize_traceback(error)[0]


def summarize_traceback(error: BaseException) -> tuple[str, bool]:
    """Find the sentence that matters among an error and those that led to it.

    MONAI's wrappers are left out: the first error that is none of them says why.

    Returns:
        the message with its notes, on one line; and whether this package raised it. If not, the type comes first.
    """
    wrapper = ""
    while str(error).startswith(_WRAPPERS) and (inner := error.__cause__ or error.__context__):
        wrapper, error = str(error), inner
    file, source, kind, text = _sent_by_worker(str(error)) or _describe(error)
    line = " ".join(text.split())
    if file.startswith(_OWN) and source.startswith("raise"):
        return line, True
    if writing := re.match(r"\w+ cannot find a suitable writer for (.+)\.\n", text):  # of MONAI's `SaveImage`
        return f"{writing[1]} cannot be written: {text.splitlines()[-1]}", False
    line = f"{kind}: {line}" if line else kind
    if file == "<string>" and wrapper.startswith(_EVALUATED):  # the expression itself is at fault, not what it called
        expression = " ".join(wrapper.removeprefix(_EVALUATED).split())
        line += ", in the config's expression " + _REFERENCE.sub(r"@\1", expression)
    return line, False


def _describe(error: BaseException) -> tuple[str, str, str, str]:
    """Return the file and the source of the line that raised an error, its type, its message with notes."""
    file, source = "", ""
    for frame in traceback.extract_tb(error.__traceback__, limit=-1):
        file, source = frame.filename, frame.line or ""
    return file, source, type(error).__name__, "\n".join([str(error), *getattr(error, "__notes__", [])])


def _sent_by_worker(message: str) -> tuple[str, str, str, str] | None:
    """Return the same of the error that a loader's process describes in a message; None for other messages."""
    errors = _IN_WORKER.findall(message) if "\nOriginal Traceback" in message else []
    reasons = [error for error in errors if not error[-1].startswith(_WRAPPERS)]  # the last one was raised last
    return reasons[-1] if reasons else None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that led to it, is a lack of memory."""
    while error is not None:
        if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(w in str(error) for w in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def _close_progress_bars() -> None:
    """End the bars that the error interrupted, which else happens at the interpreter's end, and their line."""
    bars = list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else []
    for bar in bars:
        bar.close()
    if bars:
        print(file=sys.stderr)
