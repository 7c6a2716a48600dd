"""Atomic writing: after a crash, a path holds either the previous file or the complete new one."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PARTIAL_PREFIX = ".partial-"


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file to write; on success it replaces `path` in one step.

    Args:
        path: file to create or replace; missing folders are created.

    Yields:
        Path of a hidden temporary file in the same folder, so that the replacement stays within one file system. It has
        the same suffix, from which writers infer the format.

    Raises:
        OSError: if there is no space; the message names the file and the free space. Other errors pass through.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{_PARTIAL_PREFIX}{os.getpid()}-{target.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut after the rename could leave an empty file
        partial.replace(target)
    except (OSError, RuntimeError) as error:
        if not _is_full(error):
            raise
        free = shutil.disk_usage(target.parent).free / 2**20
        raise OSError(
            f"{target} cannot be written: the disk, or a quota on it, is full ({free:.0f} MiB free). An older file of "
            "that name is unchanged. Free some space, or write to another folder."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _is_full(error: Exception) -> bool:
    # torch's archive writer reports a full disk only as an unexpected position in its file
    return getattr(error, "errno", None) in _NO_SPACE or "unexpected pos" in str(error)


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
        folder: folder of the files.
        pattern: glob pattern of the final names, such as `model.pt`.
    """
    for path in folder.glob(f"{_PARTIAL_PREFIX}*-{pattern}"):
        path.unlink()
