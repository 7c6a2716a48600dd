"""Runs one cell: MONAI's runner on an unchanged bundle, in a folder with a record of the finished stages."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from monai.bundle import ConfigParser

from components.base.atomic_write import write_atomically
from components.data.cases import Case
from study.grid import LABELLED_CASES, START_CHECKPOINT, Cell, Method, Preparation

logger = logging.getLogger("study")

_RECORD = "cell.json"
_LOG = "log.txt"
_LOCK = "lock"
_PACKAGES = ("autosam-bundles", "monai", "torch", "numpy")
_POLL_S = 0.2  # between checks of a sub-process or a lock
_LAST_LINE = re.compile(r"^error: (.*)$", re.MULTILINE)  # of `components.base.errors`


class CellError(RuntimeError):
    """A stage that failed; the cell's folder records the error until the cell is run again."""


@dataclass(frozen=True)
class Stage:
    """One run of MONAI's runner.

    Args:
        name: the run id in the configs, such as `training`.
        method: the method whose bundle is run.
        configs: names of the bundle's configs, in the order they are merged.
        knobs: values by top-level key or id, which override the configs.
    """

    name: str
    method: Method
    configs: tuple[str, ...]
    knobs: Mapping[str, Any]

    @property
    def arguments(self) -> list[str]:
        """Arguments of `python -m monai.bundle`, to be run in the bundle's folder."""
        files = ",".join(f"'configs/{name}.json'" for name in self.configs)
        settings = [text for name, value in self.knobs.items() for text in (f"--{name}", _as_text(value))]
        return ["run", self.name, "--config_file", f"[{files}]", *settings]

    def parser(self) -> ConfigParser:
        """Read the configs and set the knobs, as the runner does."""
        parser = ConfigParser()
        parser.read_config([str(self.method.config(name)) for name in self.configs])
        parser.update(dict(self.knobs))
        return parser


def list_stages(
    cell: Cell | Preparation, *, dataset_dir: str, output_dir: Path, sam_dir: str | None = None
) -> list[Stage]:
    """List the stages of a cell or preparation, in the order they are run.

    Args:
        cell: the cell or preparation.
        dataset_dir: folder of ACDC, or of a data set in its layout; empty for the folder that `data.json` of a user's
            own data names.
        output_dir: folder of the study.
        sam_dir: folder of SAM's checkpoints; None for each bundle's own `models`.
    """
    folder, method = output_dir / cell.name, cell.method
    knobs: dict[str, Any] = {"dataset_dir": dataset_dir} if dataset_dir else {}
    knobs["output_dir"] = str(folder / "eval")
    if cell.split is not None:
        knobs["split_seed"] = cell.split
    if isinstance(cell, Preparation):
        assert method.start is not None
        knobs |= {"ckpt_dir": str(folder / "models"), **method.start.knobs, "resume": True}
        return [Stage("pretraining", method, ("train", *method.overlays, *method.start.overlays), knobs)]
    knobs |= _encoder_knobs(method, output_dir, sam_dir)
    if not method.trains:
        return [Stage("evaluating", method, ("evaluate", *method.overlays), {**knobs, **method.knobs})]
    start = {START_CHECKPOINT: str(output_dir / cell.starts_from / "models/model.pt")} if cell.starts_from else {}
    knobs |= {"ckpt_dir": str(folder / "models"), **method.knobs}
    evaluate = ("train", "evaluate", *method.overlays)
    if not cell.trains:  # evaluates the weights that a training would start from
        return [Stage("evaluating", method, evaluate, knobs | start)]
    knobs[LABELLED_CASES] = cell.labelled_cases
    return [
        Stage("training", method, ("train", *method.overlays), knobs | {"resume": True} | start),
        Stage("evaluating", method, evaluate, knobs),
    ]


def list_cases_to_score(parser: ConfigParser) -> list[Case]:
    """List the test cases of an evaluation.

    Args:
        parser: the configs that it is run with.

    Returns:
        dictionaries with the paths `image` and `label`.
    """
    own_list = "test" in parser.get()  # a bundle that does not train has its list in `validate`
    return list(parser.get_parsed_content("test#data" if own_list else "validate#dataset#data"))


def run_cell(
    cell: Cell | Preparation,
    *,
    dataset_dir: str,
    output_dir: Path,
    sam_dir: str | None = None,
    environment: Mapping[str, str] | None = None,
    interrupt: threading.Event | None = None,
) -> bool:
    """Run a cell or a preparation, or continue one that was interrupted.

    Its folder below `output_dir` holds `models`, `eval` with the scores of every volume, the log of the runner and the
    merged config of each stage. `cell.json` holds the commands, their seconds and the versions. The folder is locked
    meanwhile. Another process waits until the cell is done, also on another computer if the shared disk supports POSIX
    locks.

    Args:
        cell: the cell or preparation.
        dataset_dir: as for `list_stages`.
        output_dir: folder of the study, whose cells share their embeddings.
        sam_dir: folder of SAM's checkpoints; None for each bundle's own `models`.
        environment: environment variables to set for the runner's sub-process.
        interrupt: once set, from another thread, the sub-process is ended.

    Returns:
        whether anything was run; a finished cell is left as it is.

    Raises:
        CellError: if a stage fails. Its results are kept; the message and `cell.json` hold the error from the log.
        KeyboardInterrupt: if `interrupt` or Ctrl-C ends a stage, which is not recorded as a failure.
        ValueError: if the folder holds the cell with other settings.
    """
    folder = output_dir / cell.name
    stages = list_stages(cell, dataset_dir=dataset_dir, output_dir=output_dir, sam_dir=sam_dir)
    commands = {stage.name: stage.arguments for stage in stages}
    interrupt = interrupt or threading.Event()
    with _locked(folder, interrupt) as lock:
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
        record["interrupted"] |= _has_results(folder)  # the recorded seconds are then too few
        record |= {"bundle": cell.method.bundle, "versions": {name: version(name) for name in _PACKAGES}}
        for stage in stages:
            if stage.name in record["seconds"]:
                continue
            ConfigParser.export_config_file(stage.parser().get(), str(folder / f"{stage.name}.json"), indent=2)
            start = time.monotonic()
            try:
                _run(stage, folder / _LOG, lock=lock, environment=environment or {}, interrupt=interrupt)
            except CellError as error:
                _write_record(folder, record | {"error": str(error)})
                raise
            record["seconds"][stage.name] = round(time.monotonic() - start, 1)
            _write_record(folder, record)
    return True


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read a cell's record; None if none of its stages is done or has failed."""
    file = folder / _RECORD
    return json.loads(file.read_text()) if file.is_file() else None


def is_finished(folder: Path) -> bool:
    """Return whether every stage of a cell is done."""
    record = read_record(folder)
    return record is not None and record["seconds"].keys() == record["commands"].keys()


def last_error(folder: Path) -> str | None:
    """Return the error message of a cell whose last run failed, else None."""
    return (read_record(folder) or {}).get("error")


def has_failed(folder: Path) -> bool:
    """Return whether a cell's last run failed."""
    return last_error(folder) is not None


def _has_results(folder: Path) -> bool:
    """Return whether a cell's folder holds a finished stage or a checkpoint to continue from."""
    record = read_record(folder)
    return bool(record and record["seconds"]) or any((folder / "models").glob("*.pt"))


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with write_atomically(folder / _RECORD) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")


def _encoder_knobs(method: Method, output_dir: Path, sam_dir: str | None) -> dict[str, Any]:
    """Return the knobs for the weights and the embedding cache of a bundle with an encoder."""
    names = ("train" if method.trains else "evaluate", *method.overlays)
    config = {**method.merged(*names), **method.knobs}
    knobs: dict[str, Any] = {}
    if "cache_dir" in config:  # an overlay without cache shows no slice twice
        is_cached = config["cache_dir"] is not None and not config.get("trainable_encoder")
        knobs["cache_dir"] = str(output_dir / "embeddings") if is_cached else None
    checkpoint = config.get("sam_checkpoint")  # else the path of a file, or None for random weights
    if sam_dir is not None and isinstance(checkpoint, dict) and "models_dir" in checkpoint:
        knobs["sam_checkpoint#models_dir"] = sam_dir
    return knobs


def _as_text(value: Any) -> str:
    return "$None" if value is None else str(value)


@contextmanager
def _locked(folder: Path, interrupt: threading.Event) -> Iterator[int]:
    """Lock a cell's folder and yield the lock's file descriptor.

    The runner's sub-process inherits the descriptor. If the study is killed but not the sub-process, the folder stays
    locked until the sub-process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        logged = False
        while not _try_lock(file):
            if not logged:
                logger.info("%s is run by another process: waiting for it", folder)
                logged = True
            if interrupt.wait(_POLL_S):
                raise KeyboardInterrupt
        yield file.fileno()


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _run(stage: Stage, log: Path, *, lock: int, environment: Mapping[str, str], interrupt: threading.Event) -> None:
    """Run a stage in a sub-process, and append its output to the log, with the traceback of an error."""
    command = [sys.executable, "-m", "monai.bundle", *stage.arguments, "--debug", "True"]
    with log.open("a") as file:
        start = file.tell()
        with subprocess.Popen(
            command,
            cwd=stage.method.folder,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
        ) as process:
            try:
                while process.poll() is None and not interrupt.wait(_POLL_S):
                    pass
            finally:
                process.kill()  # no effect on one that has ended
    if process.returncode and (interrupt.is_set() or process.returncode == -signal.SIGINT):
        raise KeyboardInterrupt
    if process.returncode:
        output = log.read_bytes()[start:].decode(errors="replace").strip()
        error = _LAST_LINE.search(output)
        reason = error[1] if error else output[output.rfind("\n") + 1 :]
        raise CellError(f"exit status {process.returncode}: {reason} (whole output: {log})")
