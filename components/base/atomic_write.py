"""Atomic writing: after a crash a path holds the previous file or the whole new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_PARTIAL_PREFIX = ".partial-"


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file to write; on success it replaces `path` in one step.

    Args:
        path: file to create or replace; missing folders are created.

    Yields:
        The temporary file's path: hidden, in the same folder, so that the replacement stays within one file system, and
        with the same suffix, from which writers infer the format.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{_PARTIAL_PREFIX}{os.getpid()}-{target.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut after the rename could leave an empty file
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def save_atomically(content: Any, path: Path) -> None:
    """Save an object by `torch.save`, atomically.

    Args:
        content: tensors and plain types.
        path: file to create or replace.
    """
    with write_atomically(path) as partial:
        torch.save(content, partial)


def remove_partial_files(folder: Path, pattern: str) -> None:
    """Remove the temporary files of processes that were killed while writing.

    Args:
        folder: where they were writing.
        pattern: glob pattern of the final names, such as `model.pt`.
    """
    for path in folder.glob(f"{_PARTIAL_PREFIX}*-{pattern}"):
        path.unlink()
