"""The checkpoint folder of a training run: file names, reading, removing and moving checkpoints."""

from __future__ import annotations

import itertools
import logging
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

MODEL_FILENAME = "model.pt"
CHECKPOINTS_KEPT = 2
CHECKPOINT_KEYS = {
    "model",
    "optimizer",
    "schedule_position",
    "scaler",
    "epoch",
    "iteration",
    "best_score",
    "best_epoch",
}

_LOCK_NAME = ".training.lock"
_CHECKPOINT_NAME = re.compile(r"checkpoint_epoch=([1-9]\d*)\.pt")

logger = logging.getLogger(__name__)


def lock_folder(ckpt_dir: Path) -> FileLock:
    """Reserve a folder for the training of this process, until `unlock_folder` or the end of the process.

    Args:
        ckpt_dir: an existing folder.

    Returns:
        the lock, to be kept.

    Raises:
        RuntimeError: when another process trains in the folder.
    """
    path = ckpt_dir / _LOCK_NAME
    lock = FileLock(path, timeout=0, is_singleton=True)  # one a process, which may train again in the same folder
    try:
        lock.acquire()
    except Timeout:
        owner = path.read_text().strip() or "another process"
        raise RuntimeError(
            f"expected a folder for one training, but {owner} trains in {ckpt_dir}: wait until it ends, or give this "
            "training a folder of its own with --ckpt_dir FOLDER"
        ) from None
    path.write_text(f"process {os.getpid()} on {platform.node()}\n")
    return lock


def unlock_folder(lock: FileLock) -> None:
    """Remove the lock of `lock_folder`."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release(force=True)


def checkpoint_path(ckpt_dir: Path, epoch: int) -> Path:
    """Return the path of an epoch's checkpoint."""
    return ckpt_dir / f"checkpoint_epoch={epoch}.pt"


def checkpoint_epochs(ckpt_dir: Path) -> list[int]:
    """Return the epochs of the folder's checkpoints, by their file names, newest first."""
    matches = (_CHECKPOINT_NAME.fullmatch(path.name) for path in ckpt_dir.iterdir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def remove_superseded(ckpt_dir: Path, *, epoch: int) -> None:
    """Remove all but the last `CHECKPOINTS_KEPT` checkpoints up to an epoch."""
    # checkpoints of later epochs are unreadable files that resuming skipped: they are not counted
    for old in [e for e in checkpoint_epochs(ckpt_dir) if e <= epoch][CHECKPOINTS_KEPT:]:
        checkpoint_path(ckpt_dir, old).unlink()


def archive_previous_run(ckpt_dir: Path) -> None:
    """Move an earlier run's checkpoints and copy its model to a new subfolder, from which that run can be resumed."""
    epochs = checkpoint_epochs(ckpt_dir)
    if not epochs:
        return
    folders = (ckpt_dir / f"previous_run_{n}" for n in itertools.count(1))
    folder = next(folder for folder in folders if not folder.exists())
    folder.mkdir()
    model = ckpt_dir / MODEL_FILENAME
    if model.is_file():  # copied, so that the folder keeps a usable model until this run writes its own
        shutil.copy2(model, folder / MODEL_FILENAME)
    for epoch in epochs:
        path = checkpoint_path(ckpt_dir, epoch)
        path.rename(folder / path.name)
    logger.warning("fresh run: moved %d checkpoint(s) of an earlier run from %s to %s", len(epochs), ckpt_dir, folder)


def read_training_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: a `checkpoint_epoch=N.pt`.

    Returns:
        a dictionary with `CHECKPOINT_KEYS`.

    Raises:
        ValueError: if the file holds something else. Errors of `torch.load` pass through.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict) or CHECKPOINT_KEYS - saved.keys():
        raise ValueError(f"expected a dict with {sorted(CHECKPOINT_KEYS)}, got something else")
    return saved


def newest_readable(ckpt_dir: Path) -> dict[str, Any] | None:
    """Return the newest readable checkpoint of a folder, or None; warn of newer unreadable ones."""
    for epoch in checkpoint_epochs(ckpt_dir):
        path = checkpoint_path(ckpt_dir, epoch)
        try:
            saved = read_training_checkpoint(path)
        except Exception as error:  # torch.load raises many types of errors on damaged files
            logger.warning("skipping the unreadable checkpoint %s (%s: %s)", path, type(error).__name__, error)
            continue
        return {**saved, "epoch": epoch}
    return None


def is_readable(path: Path) -> bool:
    """Return whether a file holds a state dict."""
    try:
        return isinstance(torch.load(path, map_location="cpu", weights_only=True), dict)
    except Exception:  # as above
        return False
