"""What an experiment tracked by MLflow (`--tracking mlflow`) holds beyond what MONAI's handler puts into it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from monai.handlers import MLFlowHandler

OUTPUTS = ("metrics.csv", "summary.csv", "*_overlay.png")


def finish_mlflow_runs(handlers: Iterable[object], output_dir: str | os.PathLike[str]) -> None:
    """Add knobs and outputs to the MLflow runs of a workflow that has come to its end, and mark them finished.

    The runner itself adds an `MLFlowHandler` to the handlers of each engine. An evaluation's leaves its run open, so
    that the next one would write into it, and neither knows the knobs nor the files of this project.

    Differs: the runner also announces the executed config as an artifact, by an expression that holds only where
    `output_dir` is an expression itself; here the file is taken from where it was written.

    Args:
        handlers: of an engine that has run; without an `MLFlowHandler` among them nothing is done.
        output_dir: folder of tables, overlays and executed configs, `config_<time>.json`; the newest gives the knobs.
    """
    folder = Path(output_dir)
    for handler in handlers:
        if not isinstance(handler, MLFlowHandler) or handler.cur_run is None:
            continue
        run = handler.cur_run.info
        config = max(folder.glob("config_*.json"))  # the time in its name sorts
        for name, value in json.loads(config.read_text()).items():
            if isinstance(value, bool | int | float | str) and not name.startswith("_"):
                handler.client.log_param(run.run_id, name, value)
        outputs = sorted(path for pattern in OUTPUTS for path in folder.glob(pattern))
        # an earlier run's are not this one's; the runner wrote the config before it started to record
        for path in (config, *(path for path in outputs if path.stat().st_mtime * 1000 >= run.start_time)):
            handler.client.log_artifact(run.run_id, str(path))
        handler.close()
