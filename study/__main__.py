"""Run a study and write its report.

From the repository's root: `python -m study run --config study/quick.json --output_dir DIR`, with `--dataset_dir ACDC`
if the study uses ACDC's patients; bundles for a user's own data name their folder. The same command continues a study
that was killed. `python -m study report` with the same arguments writes the report of the cells that are finished so
far.

`python -m study calibrate --output_dir DIR` repeats the calibration of the predicted Dice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from autosam.options import command_line
from components.phantom.dataset import write_phantom_dataset
from study.calibration import calibrate
from study.cells import is_finished, last_error, run_cell
from study.clicks import clicks
from study.execution import (
    Task,
    chosen_tasks,
    required_task,
    run_locally,
    run_on_dask,
    thread_limits,
    with_preparations,
    worker_environments,
)
from study.grid import Grid, read_grid
from study.progress import progress_table, remaining_seconds
from study.report import write_report

logger = logging.getLogger("study")


def run(
    config: str,
    output_dir: str,
    dataset_dir: str = "",
    sam_dir: str | None = None,
    only: str = "",
    workers: int = 1,
    scheduler: str | None = None,
    threads: int | None = None,
    retry: bool = False,
    dry_run: bool = False,
) -> None:
    """Run the unfinished cells of a study, then write `report.html`, its tables and its figures.

    Args:
        config: JSON file of the grid.
        output_dir: folder of the study, in which each cell has its own folder.
        dataset_dir: folder of ACDC, or of a data set in its layout. It is not needed if the grid defines phantoms, or
            if `data.json` of the bundles names a user's own data.
        sam_dir: folder of SAM's checkpoints; by default each bundle's `models`.
        only: run only the cells whose folder begins with this, and the cells that they start from.
        workers: cells to run at a time on this computer, each on a GPU of its own if there are any.
        scheduler: address of a Dask cluster to run on instead, such as `tcp://10.0.0.1:8786`.
        threads: CPU threads of a cell; by default the local workers share all cores equally.
        retry: run failed cells again; by default they are reported and skipped.
        dry_run: only list the cells and, judged by the finished ones, how long the others take.
    """
    _log_to_terminal()
    output = Path(output_dir).resolve()
    grid = read_grid(config)
    dataset = _dataset(grid, dataset_dir, output)
    tasks = chosen_tasks(with_preparations(grid.cells), only)
    if dry_run:
        _show_progress(tasks, output, at_a_time=workers)
        return
    broken = {} if retry else _last_errors(tasks, output)
    for name, last in broken.items():
        logger.error("%s is broken, --retry runs it again: %s", name, last)
    waiting = _waiting(tasks, output, broken)
    logger.info("%d of %d runs to do", len(waiting), len(tasks))
    run_task = partial(run_cell, dataset_dir=dataset, output_dir=output, sam_dir=sam_dir)
    if scheduler is None:
        results = run_locally(waiting, run_task, worker_environments(workers, threads))
    else:
        results = run_on_dask(waiting, partial(run_task, environment=thread_limits(threads)), scheduler)
    failed = list(broken)
    at_a_time = workers if scheduler is None else 1
    for count, (task, error) in enumerate(results, start=1):
        if error is not None:
            failed.append(task.name)
            logger.error("%s failed: %s", task.name, error)
        left = remaining_seconds([task for task in waiting if task.name not in failed], output)
        left_text = "" if left is None else f", about {_duration(left / at_a_time)} of work left"
        logger.info("%d of %d: %s%s", count, len(waiting), task.name, left_text)
    logger.info("report: %s", write_report(grid, output, dataset_dir=dataset, sam_dir=sam_dir))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed, --retry tries them again: {', '.join(failed)}")


def report(config: str, output_dir: str, dataset_dir: str = "", sam_dir: str | None = None) -> None:
    """Write the report of a study's finished cells.

    Args:
        config: JSON file of the grid.
        output_dir: folder of the study.
        dataset_dir: as in `run`.
        sam_dir: as in `run`.
    """
    _log_to_terminal()
    output, grid = Path(output_dir).resolve(), read_grid(config)
    dataset = _dataset(grid, dataset_dir, output)
    logger.info("report: %s", write_report(grid, output, dataset_dir=dataset, sam_dir=sam_dir))


def _last_errors(tasks: Sequence[Task], output: Path) -> dict[str, str]:
    """Return the error message of each task whose last run failed, by the task's name."""
    errors = {task.name: last_error(output / task.name) for task in tasks}
    return {name: error for name, error in errors.items() if error is not None}


def _waiting(tasks: Sequence[Task], output: Path, broken: Iterable[str]) -> list[Task]:
    """List the tasks to run: unfinished ones that are not broken and do not start from one that is left out."""
    waiting, left_out = [], set(broken)
    for task in tasks:
        if is_finished(output / task.name):
            continue
        if task.name in left_out or required_task(task) in left_out:
            left_out.add(task.name)
        else:
            waiting.append(task)
    return waiting


def _dataset(grid: Grid, dataset_dir: str, output: Path) -> str:
    """Return the data set's folder, empty for that of `data.json`; write the grid's phantoms if no folder is given."""
    if dataset_dir:
        return str(Path(dataset_dir).resolve())
    if grid.data.is_own:
        return ""
    if grid.dataset is None:
        raise ValueError("dataset_dir is not set, and the study's config defines no phantoms: give --dataset_dir PATH")
    return write_phantom_dataset(str(output / "phantoms"), **grid.dataset)


def _show_progress(tasks: Sequence[Task], output: Path, *, at_a_time: int) -> None:
    print(progress_table(tasks, output).to_markdown(index=False, floatfmt=".1f", missingval=""))
    left = remaining_seconds(tasks, output)
    if left is None:
        print("\nThe time is unknown until a cell is finished: run one with --only NAME, then ask again.")
    else:
        print(f"\nAbout {_duration(left / at_a_time)} left with {at_a_time} at a time, judged by the finished cells.")


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _log_to_terminal() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)


if __name__ == "__main__":
    _log_to_terminal()
    command_line(__doc__, run, report, calibrate, clicks)()
