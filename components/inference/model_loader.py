"""Loading of a trained model for evaluation and inference."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.handlers import CheckpointLoader

from components.base.weights import key_test, load_weights, read_state_dict, unwrapped

logger = logging.getLogger(__name__)

_REMEDY = "use the configuration that trained it, or give another file with `--ckpt_path FILE`"


class ModelCheckpointLoader(CheckpointLoader):
    """MONAI's ``CheckpointLoader`` for a network, with errors that name the file and say how to obtain it.

    The class name must contain ``CheckpointLoader``, since MONAI's federated client finds the loaders to disable by it.

    Args:
        load_path: a state dict such as ``model.pt``, bare or wrapped as `components.base.weights.read_state_dict`
            unwraps it, such as a ``checkpoint_epoch=N.pt`` of a training.
        load_dict: one network, by any name.
        map_location: ignored: the file is read onto the CPU, and the network stays on its device.
        strict: whether every key of the network must be in the file, and no other.

    Raises:
        FileNotFoundError: when the run starts, if ``load_path`` is not a file.
        ValueError: if ``load_dict`` is not one network. When the run starts, if ``load_path`` cannot be read (not a
            checkpoint, truncated, ...), has weights that are not finite, or does not fit.
    """

    def __init__(
        self, load_path: str, load_dict: dict[str, torch.nn.Module], map_location: Any = None, strict: bool = True
    ) -> None:
        super().__init__(load_path=load_path, load_dict=load_dict, map_location=map_location, strict=strict)
        if len(load_dict) != 1 or not isinstance(next(iter(load_dict.values())), torch.nn.Module):
            raise ValueError(f"load_dict must be one network by name, received {', '.join(load_dict)}")

    def attach(self, engine: Engine) -> None:
        """Register the handler; it logs by this module's name, since the bundles' logging.conf silences the engines."""
        super().attach(engine)
        self.logger = logger

    def __call__(self, engine: Engine) -> None:  # noqa: ARG002 - ignite passes it
        """Load the file into the network.

        Args:
            engine: the engine that starts.
        """
        if not Path(self.load_path).is_file():
            raise FileNotFoundError(
                f"expected a trained model at '{self.load_path}', found no such file. Train first with `python -m "
                "monai.bundle run training --config_file configs/train.json`, or say where the model is with "
                "`--ckpt_path FILE`."
            )
        network = unwrapped(next(iter(self.load_dict.values())))
        state = read_state_dict(self.load_path, kind="trained model", remedy=_REMEDY, is_key=key_test(network))
        load_weights(network, state, path=self.load_path, remedy=_REMEDY, strict=self.strict)
        self.logger.info("Restored all variables from %s", self.load_path)
