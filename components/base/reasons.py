"""Errors in one sentence: what MONAI's wrappers hide."""

from __future__ import annotations

import re

import torch

_NO_MEMORY = ("MemoryError", "DefaultCPUAllocator")  # in the text of errors that MONAI or torch make of others


def error_message(error: BaseException) -> str:
    """Return in one line why something failed, without what MONAI's `Compose` and `SaveImage` put around it."""
    while str(error).startswith("applying transform") and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    if writing := re.match(r"\w+ cannot find a suitable writer for (.+)\.\n", text):
        return f"{writing[1]} cannot be written: {text.splitlines()[-1]}"
    text = " ".join(text.split())
    return (
        text if text and isinstance(error, ValueError | OSError | RuntimeError) else f"{type(error).__name__}: {text}"
    )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that led to it, is a lack of memory."""
    while error is not None:
        if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(w in str(error) for w in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
