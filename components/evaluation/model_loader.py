"""Loading of a trained model for evaluation and inference."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from ignite.engine import Engine
from monai.handlers import CheckpointLoader

logger = logging.getLogger(__name__)


class ModelCheckpointLoader(CheckpointLoader):
    """MONAI's ``CheckpointLoader`` with errors that name the file and say how to obtain it.

    The class name must contain ``CheckpointLoader``: by it MONAI's federated client finds the loaders to disable.

    Args: as ``monai.handlers.CheckpointLoader``; ``load_path`` is a bare state dict such as ``model.pt``.

    Raises:
        FileNotFoundError: when the run starts and ``load_path`` is no file.
        RuntimeError: when the run starts and ``load_path`` cannot be read (not a checkpoint, truncated, ...).
    """

    def attach(self, engine: Engine) -> None:
        """Register the handler, which logs by this module's name: the bundles' logging.conf silences the engines."""
        super().attach(engine)
        self.logger = logger

    def __call__(self, engine: Engine) -> None:
        """Load the file into the objects of ``load_dict``.

        Args:
            engine: the engine that starts.
        """
        if not Path(self.load_path).is_file():
            raise FileNotFoundError(
                f"expected a trained model at '{self.load_path}', found no such file. Train first with `python -m "
                "monai.bundle run training --config_file configs/train.json`, or say where the model is with "
                "`--ckpt_path <file>` or `--ckpt_dir <folder>`."
            )
        try:
            super().__call__(engine)
        except Exception as error:
            try:  # if the file is readable, it does not fit this network, and the first error says why
                torch.load(self.load_path, map_location="cpu", weights_only=True)
            except Exception as reading_error:
                raise RuntimeError(
                    f"expected a state dict that `torch.load(weights_only=True)` can read at '{self.load_path}', got "
                    f"{type(reading_error).__name__}: {reading_error}. The file is damaged or no checkpoint: copy or "
                    "train it again, or give another one with `--ckpt_path <file>`."
                ) from reading_error
            error.add_note(
                f"'{self.load_path}' was read but does not fit: use the configuration that trained it, or give another "
                "file with `--ckpt_path <file>`."
            )
            raise
