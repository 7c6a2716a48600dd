"""Logging to MLflow (`--tracking mlflow`) in addition to MONAI's handler."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from monai.handlers import MLFlowHandler

OUTPUTS = ("metrics.csv", "summary.csv", "*_overlay.png")


def finish_mlflow_runs(handlers: Iterable[object], output_dir: str | os.PathLike[str]) -> None:
    """Log knobs and output files to the MLflow runs of a finished workflow, and mark these runs finished.

    MONAI's runner adds an `MLFlowHandler` to the handlers of each engine. An evaluation's handler leaves its run open,
    so the next one would log to the same run. None of them logs this project's knobs and output files.

    Differs: the runner also logs the executed config as an artifact, but only if `output_dir` is an expression. Here
    the file is read from where the runner wrote it.

    Args:
        handlers: handlers of an engine that has run; without an `MLFlowHandler`, nothing is done.
        output_dir: folder of tables, overlays and executed configs, `config_<time>.json`; knobs are read from the
            newest config.
    """
    folder = Path(output_dir)
    for handler in handlers:
        if not isinstance(handler, MLFlowHandler) or handler.cur_run is None:
            continue
        run = handler.cur_run.info
        config = max(folder.glob("config_*.json"))  # the newest: the names sort by time
        for name, value in json.loads(config.read_text()).items():
            if isinstance(value, bool | int | float | str) and not name.startswith("_"):
                handler.client.log_param(run.run_id, name, value)
        outputs = sorted(path for pattern in OUTPUTS for path in folder.glob(pattern))
        # leave out outputs of earlier runs; the config is older than the MLflow run, too, but belongs to it
        for path in (config, *(path for path in outputs if path.stat().st_mtime * 1000 >= run.start_time)):
            handler.client.log_artifact(run.run_id, str(path))
        handler.close()
