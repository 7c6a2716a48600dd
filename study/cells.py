"""Running one cell: MONAI's runner on an unchanged bundle, in a folder that remembers what was done."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from components.files import write_atomically
from study.grid import BUNDLES, Cell

_RECORD = "cell.json"
_LOG = "log.txt"
_PACKAGES = ("autosam-bundles", "monai", "torch", "numpy")
_RAISED = re.compile(r"^[\w.]+(Error|Exception): .*$", re.MULTILINE)
_LOAD_START = {"validate#handlers#0#load_path": "$@head_checkpoint"}  # instead of what was trained


class CellError(RuntimeError):
    """A bundle's run that failed."""


def run_cell(cell: Cell, *, dataset_dir: str, output_dir: Path) -> bool:
    """Train and evaluate a cell, or go on where it was left.

    The cell's folder below `output_dir` holds `models`, `eval`, the log of the runner, and `cell.json` with the
    commands, their seconds, the versions and the stages that are done.

    Args:
        cell: which.
        dataset_dir: of ACDC, or a data set in its layout.
        output_dir: of the study; embeddings are shared between its cells.

    Returns:
        whether anything was run: a finished cell is left as it is.

    Raises:
        CellError: when a run fails; what it had done is kept, and the log's end is in the message.
        ValueError: when the folder holds the cell with other settings.
    """
    folder = output_dir / cell.name
    commands = _commands(cell, dataset_dir=dataset_dir, output_dir=output_dir)
    record = read_record(folder) or {"commands": commands, "seconds": {}, "interrupted": False}
    if record["commands"] != commands:
        raise ValueError(
            f"{folder} holds this cell with other settings: its {_RECORD} says which. Give another --output_dir, or "
            "remove that folder to run the cell anew"
        )
    if finished(record):
        return False
    record["interrupted"] |= (folder / _LOG).exists()  # then the seconds are not those of the whole
    for stage, command in commands.items():
        if stage in record["seconds"]:
            continue
        start = time.monotonic()
        _run(command, BUNDLES / cell.bundle, folder / _LOG)
        record["seconds"][stage] = round(time.monotonic() - start, 1)
        record["versions"] = {name: version(name) for name in _PACKAGES}
        with write_atomically(folder / _RECORD) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n")
    return True


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read what was done of a cell; None when no stage of it is done."""
    file = folder / _RECORD
    return json.loads(file.read_text()) if file.is_file() else None


def finished(record: dict[str, Any] | None) -> bool:
    """Say whether every stage of a cell is done."""
    return record is not None and record["seconds"].keys() == record["commands"].keys()


def _commands(cell: Cell, *, dataset_dir: str, output_dir: Path) -> dict[str, list[str]]:
    """List the runner's arguments for each stage."""
    folder = output_dir / cell.name
    knobs: dict[str, Any] = {
        "dataset_dir": dataset_dir,
        "ckpt_dir": str(folder / "models"),
        "output_dir": str(folder / "eval"),
        "split_seed": cell.split,
        **({} if cell.knobs.get("trainable_encoder") else {"cache_dir": str(output_dir / "embeddings")}),
        **cell.knobs,
    }
    if cell.labelled_patients == 0:
        return {"evaluating": _arguments("evaluating", cell, knobs | _LOAD_START)}
    knobs["labelled_patients"] = cell.labelled_patients
    return {
        "training": _arguments("training", cell, knobs | {"resume": True}),
        "evaluating": _arguments("evaluating", cell, knobs),
    }


def _arguments(stage: str, cell: Cell, knobs: dict[str, Any]) -> list[str]:
    configs = ["train", *(["evaluate"] if stage == "evaluating" else []), *cell.overlays]
    files = ",".join(f"'configs/{name}.json'" for name in configs)
    settings = [text for name, value in knobs.items() for text in (f"--{name}", _as_text(value))]
    return ["run", stage, "--config_file", f"[{files}]", *settings]


def _as_text(value: Any) -> str:
    return "$None" if value is None else str(value)


def _run(arguments: list[str], bundle: Path, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "monai.bundle", *arguments]
    with log.open("a") as file:
        start = file.tell()
        done = subprocess.run(command, cwd=bundle, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        said = log.read_bytes()[start:].decode(errors="replace").strip()
        cause = _RAISED.search(said)  # of a chain of exceptions the first
        why = cause[0] if cause else said[said.rfind("\n") + 1 :]
        raise CellError(f"exit status {done.returncode}: {why} (all of it: {log})")
