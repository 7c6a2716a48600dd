"""What a pre-training run took, kept beside its checkpoints: settings, steps, hours, machine, versions."""

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

RECORD_FILENAME = "training.json"
_FOLDERS = ("bundle_root", "ckpt_dir", "output_dir", "export_dir")


class TrainingRecord:
    """Ignite handler that writes `training.json` after every epoch.

    Hours are counted to the end of each epoch, validation included, and go on in a resumed run; what a killed run had
    done of an unfinished epoch is not counted. List it AFTER `components.training.TrainingCheckpoints`, which
    restores the epoch and knows the best one.

    Args:
        ckpt_dir: folder of the file.
        batch_size: images of a step.
        evaluator: the engine that the validation handler runs.
        settings: knobs of the run by name.
    """

    def __init__(self, ckpt_dir: str, *, batch_size: int, evaluator: Evaluator, settings: Mapping[str, Any]) -> None:
        self.path = Path(ckpt_dir) / RECORD_FILENAME
        self.batch_size = batch_size
        self.evaluator = evaluator
        self.settings = dict(settings)
        self._hours_before = 0.0
        self._machines: list[str] = []
        self._commands: list[dict[str, Any]] = []
        self._begun = 0.0

    def attach(self, engine: Engine) -> None:
        """Register the handler on a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Begin to count, in a resumed run from where the file stands."""
        before = {}
        if engine.state.epoch > 0 and self.path.is_file():
            before = json.loads(self.path.read_text())
        self._hours_before = before.get("hours", 0.0)
        self._machines = _with(before.get("hardware", []), machine(self.evaluator.state.device))
        self._commands = list(before.get("commands", []))
        given = command(sys.argv[1:])
        if not self._commands or self._commands[-1]["command"] != given:
            self._commands.append({"from_epoch": engine.state.epoch, "command": given})
        self._begun = time.monotonic()

    def write(self, engine: Engine) -> None:
        """Replace the file by one that counts this epoch."""
        content = {
            "settings": self.settings,
            "epochs": engine.state.epoch,
            "steps": engine.state.iteration,
            "images_seen": engine.state.iteration * self.batch_size,
            "best_epoch": self.evaluator.state.best_metric_epoch,
            "hours": round(self._hours_before + (time.monotonic() - self._begun) / 3600, 4),
            "hardware": self._machines,
            "commands": self._commands,
            "versions": versions(),
        }
        with write_atomically(self.path) as partial:
            partial.write_text(json.dumps(content, indent=4) + "\n")


def command(arguments: Sequence[str]) -> str:
    """Return the command line of a bundle run without the folders that it was told to use, which change nothing."""
    kept, rest = ["python", "-m", "monai.bundle"], iter(arguments)
    for argument in rest:
        name, equals, _ = argument.removeprefix("--").partition("=")
        if name not in _FOLDERS:
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return shlex.join(kept)


def machine(device: torch.device) -> str:
    """Name the hardware that a device stands for: the GPU, or the CPU and how many threads compute on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Return the versions on which a run's numbers depend."""
    return {"torch": torch.__version__, "monai": monai.__version__, "components": components.__version__}


def _with(items: list[str], item: str) -> list[str]:
    return items if item in items else [*items, item]
