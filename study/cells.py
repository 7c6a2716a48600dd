"""Running one cell: MONAI's runner on an unchanged bundle, in a folder that remembers what was done."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from components.base.atomic_write import write_atomically
from study.grid import Cell, Method, Preparation

logger = logging.getLogger("study")

_RECORD = "cell.json"
_LOG = "log.txt"
_LOCK = "lock"
_PACKAGES = ("autosam-bundles", "monai", "torch", "numpy")
_RAISED = re.compile(r"^[\w.]+(Error|Exception): .*$", re.MULTILINE)


class CellError(RuntimeError):
    """A bundle's run that failed, in a folder that says so until it is tried again."""


@dataclass(frozen=True)
class Stage:
    """One run of MONAI's runner.

    Args:
        name: of the stage, which is the config's run id, such as `training`.
        method: whose bundle runs.
        configs: names of its configs.
        knobs: top-level keys and ids of the configs to set.
    """

    name: str
    method: Method
    configs: tuple[str, ...]
    knobs: Mapping[str, Any]

    @property
    def arguments(self) -> list[str]:
        """What to give to `python -m monai.bundle`, from inside the bundle's folder."""
        files = ",".join(f"'configs/{name}.json'" for name in self.configs)
        settings = [text for name, value in self.knobs.items() for text in (f"--{name}", _as_text(value))]
        return ["run", self.name, "--config_file", f"[{files}]", *settings]

    def parser(self) -> ConfigParser:
        """Read the configs with the knobs set, as the runner does."""
        parser = ConfigParser()
        parser.read_config([str(self.method.config(name)) for name in self.configs])
        parser.update(dict(self.knobs))
        return parser


def stages_of(
    cell: Cell | Preparation, *, dataset_dir: str, output_dir: Path, sam_dir: str | None = None
) -> list[Stage]:
    """List what a cell or preparation runs, one after the other.

    Args:
        cell: which.
        dataset_dir: of ACDC, or a data set in its layout.
        output_dir: of the study.
        sam_dir: folder of SAM's checkpoints; None for each bundle's own `models`.
    """
    folder, method = output_dir / cell.name, cell.method
    knobs: dict[str, Any] = {"dataset_dir": dataset_dir, "output_dir": str(folder / "eval")}
    if cell.split is not None:
        knobs["split_seed"] = cell.split
    if isinstance(cell, Preparation):
        assert method.start is not None
        knobs |= {"ckpt_dir": str(folder / "models"), **method.start.knobs, "resume": True}
        return [Stage("pretraining", method, ("train", *method.overlays, *method.start.overlays), knobs)]
    knobs |= _encoder_knobs(method, output_dir, sam_dir)
    if not method.trains:
        return [Stage("evaluating", method, ("evaluate", *method.overlays), {**knobs, **method.knobs})]
    start = str(output_dir / cell.preparation.name / "models/model.pt") if cell.preparation else None
    knobs |= {"ckpt_dir": str(folder / "models"), **method.knobs}
    evaluate = ("train", "evaluate", *method.overlays)
    if cell.labelled_patients == 0:
        knobs["validate#handlers#0#load_path"] = start or "$@head_checkpoint"  # instead of what was trained
        return [Stage("evaluating", method, evaluate, knobs)]
    knobs["labelled_patients"] = cell.labelled_patients
    training = knobs | {"resume": True} | ({"start_checkpoint": start} if start else {})
    return [
        Stage("training", method, ("train", *method.overlays), training),
        Stage("evaluating", method, evaluate, knobs),
    ]


def run_cell(
    cell: Cell | Preparation,
    *,
    dataset_dir: str,
    output_dir: Path,
    sam_dir: str | None = None,
    threads: int | None = None,
) -> bool:
    """Run a cell or a preparation, or go on where it was left.

    Its folder below `output_dir` holds `models`, `eval` with the scores of every volume, the log of the runner, the
    whole config of each stage, and `cell.json` with the commands, their seconds and the versions. While it runs no
    other process begins the same cell, be it another computer's on a shared disk that knows POSIX locks.

    Args:
        cell: which.
        dataset_dir: of ACDC, or a data set in its layout.
        output_dir: of the study; embeddings are shared between its cells.
        sam_dir: folder of SAM's checkpoints; None for each bundle's own `models`.
        threads: of each process; None for as many as torch takes by itself.

    Returns:
        whether anything was run: a finished cell is left as it is.

    Raises:
        CellError: when a run fails; what it had done is kept, and the log's end is in the message and in `cell.json`.
        ValueError: when the folder holds the cell with other settings.
    """
    folder = output_dir / cell.name
    stages = stages_of(cell, dataset_dir=dataset_dir, output_dir=output_dir, sam_dir=sam_dir)
    commands = {stage.name: stage.arguments for stage in stages}
    with _locked(folder) as lock:
        fresh: dict[str, Any] = {"commands": commands, "seconds": {}, "interrupted": False}
        record = (read_record(folder) if _has_results(folder) else None) or fresh
        if record["commands"] != commands:
            raise ValueError(
                f"{folder} holds this cell with other settings: its {_RECORD} says which. Give another --output_dir, "
                "or remove that folder to run the cell anew"
            )
        if is_finished(folder):
            return False
        record.pop("error", None)
        record["interrupted"] |= _has_results(folder)  # then the seconds are not those of the whole
        record |= {"bundle": cell.method.bundle, "versions": {name: version(name) for name in _PACKAGES}}
        for stage in stages:
            if stage.name in record["seconds"]:
                continue
            ConfigParser.export_config_file(stage.parser().get(), str(folder / f"{stage.name}.json"), indent=2)
            start = time.monotonic()
            try:
                _run(stage, folder / _LOG, lock=lock, threads=threads)
            except CellError as error:
                _write_record(folder, record | {"error": str(error)})
                raise
            record["seconds"][stage.name] = round(time.monotonic() - start, 1)
            _write_record(folder, record)
    return True


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read what was done of a cell; None when no stage of it is done and none has failed."""
    file = folder / _RECORD
    return json.loads(file.read_text()) if file.is_file() else None


def is_finished(folder: Path) -> bool:
    """Say whether every stage of a cell is done."""
    record = read_record(folder)
    return record is not None and record["seconds"].keys() == record["commands"].keys()


def error_of(folder: Path) -> str | None:
    """Return the error that a cell's last run ended with, None for none."""
    return (read_record(folder) or {}).get("error")


def has_failed(folder: Path) -> bool:
    """Say whether a cell's last run ended with an error."""
    return error_of(folder) is not None


def _has_results(folder: Path) -> bool:
    """Say whether a cell holds anything that another run would go on from."""
    record = read_record(folder)
    return bool(record and record["seconds"]) or any((folder / "models").glob("*.pt"))


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with write_atomically(folder / _RECORD) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")


def _encoder_knobs(method: Method, output_dir: Path, sam_dir: str | None) -> dict[str, Any]:
    """Say where a bundle with SAM's encoder finds its weights and keeps its embeddings."""
    names = ("train" if method.trains else "evaluate", *method.overlays)
    config = ConfigParser.load_config_files([str(method.config(name)) for name in names])
    knobs: dict[str, Any] = {}
    if "cache_dir" in config:
        frozen = not method.knobs.get("trainable_encoder")
        knobs["cache_dir"] = str(output_dir / "embeddings") if frozen else None
    if sam_dir is not None and "models_dir" in (config.get("sam_checkpoint") or {}):
        knobs["sam_checkpoint#models_dir"] = sam_dir
    return knobs


def _as_text(value: Any) -> str:
    return "$None" if value is None else str(value)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold a cell's folder and yield the lock's descriptor.

    A runner inherits it, so that one whose study was killed holds the folder until it ends by itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s is run by another process: waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _run(stage: Stage, log: Path, *, lock: int, threads: int | None) -> None:
    command = [sys.executable, "-m", "monai.bundle", *stage.arguments]
    environment = dict(os.environ)
    if threads is not None:
        environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with log.open("a") as file:
        start = file.tell()
        done = subprocess.run(
            command,
            cwd=stage.method.config("evaluate").parents[1],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            check=False,
        )
    if done.returncode:
        said = log.read_bytes()[start:].decode(errors="replace").strip()
        cause = _RAISED.search(said)  # of a chain of exceptions the first
        why = cause[0] if cause else said[said.rfind("\n") + 1 :]
        raise CellError(f"exit status {done.returncode}: {why} (all of it: {log})")
