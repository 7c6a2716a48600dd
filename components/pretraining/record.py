"""Record of a pre-training run beside its checkpoints: settings, steps, hours, hardware, commands, versions."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator

import components
from components.base.atomic_write import write_atomically

TRAINING_RECORD_FILENAME = "training.json"
EXPORT_RECORD_FILENAME = "record.json"
_FOLDER_OPTIONS = ("bundle_root", "ckpt_dir", "output_dir", "export_dir", "sam_checkpoint")


class TrainingRecord:
    """Ignite handler that writes `training.json` after every epoch.

    Hours are counted to the end of each epoch, validation included, and continue in a resumed run. An unfinished epoch
    of a killed run is not counted. List this handler AFTER `components.training.TrainingCheckpoints`, which restores
    the epoch and determines the best one.

    Args:
        ckpt_dir: folder of the file.
        batch_size: images per step.
        evaluator: the engine that the validation handler runs.
        settings: knobs of the run by name.
        sam_checkpoint: the file that the encoder started from, or None. If the record of its export is beside it, that
            record's training is copied.
    """

    def __init__(
        self,
        ckpt_dir: str,
        *,
        batch_size: int,
        evaluator: Evaluator,
        settings: Mapping[str, Any],
        sam_checkpoint: str | None = None,
    ) -> None:
        self.path = Path(ckpt_dir) / TRAINING_RECORD_FILENAME
        self.batch_size = batch_size
        self.evaluator = evaluator
        self.settings = dict(settings)
        self._encoder = {}
        if sam_checkpoint is not None:
            exported = Path(sam_checkpoint).with_name(EXPORT_RECORD_FILENAME)
            if exported.is_file():
                self._encoder = {"encoder": json.loads(exported.read_text())["training"]}
        self._hours_before = 0.0
        self._hardware: list[str] = []
        self._commands: list[dict[str, Any]] = []
        self._start_seconds = 0.0

    def attach(self, engine: Engine) -> None:
        """Register the handler on a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Start the clock; a resumed run continues the existing file."""
        before = {}
        if engine.state.epoch > 0 and self.path.is_file():
            before = json.loads(self.path.read_text())
        self._hours_before = before.get("hours", 0.0)
        self._hardware = before.get("hardware", [])
        hardware = hardware_name(self.evaluator.state.device)
        if hardware not in self._hardware:
            self._hardware.append(hardware)
        self._commands = before.get("commands", [])
        command = command_without_folders(sys.argv[1:])
        if not self._commands or self._commands[-1]["command"] != command:
            self._commands.append({"from_epoch": engine.state.epoch, "command": command})
        self._start_seconds = time.monotonic()

    def write(self, engine: Engine) -> None:
        """Write the file anew, with this epoch counted."""
        content = {
            "settings": self.settings,
            **self._encoder,
            "epochs": engine.state.epoch,
            "steps": engine.state.iteration,
            "images_seen": engine.state.iteration * self.batch_size,
            "best_epoch": self.evaluator.state.best_metric_epoch,
            "hours": round(self._hours_before + (time.monotonic() - self._start_seconds) / 3600, 4),
            "hardware": self._hardware,
            "commands": self._commands,
            "versions": package_versions(),
        }
        with write_atomically(self.path) as partial:
            partial.write_text(json.dumps(content, indent=4) + "\n")


def command_without_folders(arguments: Sequence[str]) -> str:
    """Return the command line of a bundle run without folders, which do not affect results; a file keeps its name."""
    kept, remaining = ["python", "-m", "monai.bundle"], iter(arguments)
    for argument in remaining:
        name, equals, _ = argument.removeprefix("--").partition("=")
        if name not in _FOLDER_OPTIONS:
            kept.append(Path(argument).name if Path(argument).is_absolute() else argument)
        elif not equals:
            next(remaining, None)  # the option's value
    return shlex.join(kept)


def hardware_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def package_versions() -> dict[str, str]:
    """Return the versions of the packages on which a run's results depend."""
    return {"torch": torch.__version__, "monai": monai.__version__, "components": components.__version__}
