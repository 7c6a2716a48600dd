"""How files reach the disk: whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_PARTIAL_PREFIX = ".partial-"


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file to write; on success it takes the place of `path` in one step.

    Args:
        path: file to create or replace; missing folders are made.

    Yields:
        The temporary file's path: hidden, in the same folder, so that the replacement never crosses file systems, and
        with the same suffix, by which writers choose a format.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{_PARTIAL_PREFIX}{os.getpid()}-{target.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # before the rename: a power cut could else leave an empty file under the new name
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def save_atomically(content: Any, path: Path) -> None:
    """Save an object by `torch.save` so that the path holds the older file or the whole new one, never a part.

    Args:
        content: tensors and plain types.
        path: file to make or replace.
    """
    with write_atomically(path) as partial:
        torch.save(content, partial)


def remove_partial_files(folder: Path, pattern: str) -> None:
    """Remove what killed processes left of files they were writing.

    Args:
        folder: where the files were to be.
        pattern: of the files' names, such as `model.pt`.
    """
    for path in folder.glob(f"{_PARTIAL_PREFIX}*-{pattern}"):
        path.unlink()
