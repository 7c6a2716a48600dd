"""Run a study and write its report.

From the repository's root: `python -m study run --config study/quick.json --output_dir DIR`, with `--dataset_dir ACDC`
where the study is of real patients. Killed and started again it goes on where it was. `python -m study report` with the
same arguments writes the report of what is finished so far.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fire

from components.phantom.dataset import write_phantom_dataset
from study.cells import error_of, is_finished, run_cell
from study.costs import cost_table, remaining_seconds
from study.engines import Result, Task, connected, in_order, name_of_needed, run_on_dask, run_serially
from study.grid import Grid, read_grid
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
    """Run what is not finished of a study, then write `report.html`, its tables and its figures.

    Args:
        config: JSON file of the grid.
        output_dir: where each cell has a folder.
        dataset_dir: of ACDC, or a data set in its layout; may be left out where the grid names phantoms.
        sam_dir: folder of SAM's checkpoints; by default each bundle's `models`.
        only: run those cells only whose folder begins with this.
        workers: cells at a time, in as many local processes, each with a GPU of its own where there are any.
        scheduler: address of a Dask cluster to run on instead, such as `tcp://10.0.0.1:8786`.
        threads: CPU threads of a cell; by default all cores, shared out between local workers.
        retry: run cells again that ended with an error; else they are reported and left.
        dry_run: list what would run and what it would cost instead.
    """
    _log_to_terminal()
    output = Path(output_dir).resolve()
    grid = read_grid(config)
    dataset = _dataset(grid, dataset_dir, output)
    tasks = [task for task in in_order(grid.cells) if task.name.startswith(only)]
    if dry_run:
        _show_costs(tasks, dataset, output, at_a_time=workers)
        return
    broken = {} if retry else _broken(tasks, output)
    for name, why in broken.items():
        logger.error("%s is broken, --retry runs it again: %s", name, why)
    waiting = [
        task
        for task in tasks
        if not is_finished(output / task.name) and broken.keys().isdisjoint({task.name, name_of_needed(task)})
    ]
    logger.info("%d of %d runs to do", len(waiting), len(tasks))
    run_task = partial(run_cell, dataset_dir=dataset, output_dir=output, sam_dir=sam_dir, threads=threads)
    failed = list(broken)
    at_a_time = workers if scheduler is None else 1
    for count, (task, error) in enumerate(_results(waiting, run_task, workers, scheduler), start=1):
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
        output_dir: of the study.
        dataset_dir: as in `run`.
        sam_dir: as in `run`.
    """
    _log_to_terminal()
    output, grid = Path(output_dir).resolve(), read_grid(config)
    dataset = _dataset(grid, dataset_dir, output)
    logger.info("report: %s", write_report(grid, output, dataset_dir=dataset, sam_dir=sam_dir))


def _results(tasks: Sequence[Task], run_task: Any, workers: int, scheduler: str | None) -> Iterator[Result]:
    if workers == 1 and scheduler is None:
        yield from run_serially(tasks, run_task)
        return
    with connected(workers=workers, scheduler=scheduler) as client:
        yield from run_on_dask(tasks, run_task, client)


def _broken(tasks: Sequence[Task], output: Path) -> dict[str, str]:
    """Return what ended with an error when it was last run, and the error."""
    errors = {task.name: error_of(output / task.name) for task in tasks}
    return {name: error for name, error in errors.items() if error is not None}


def _dataset(grid: Grid, dataset_dir: str, output: Path) -> str:
    """Return the data set's folder, of phantoms once they are drawn."""
    if dataset_dir:
        return str(Path(dataset_dir).resolve())
    if grid.dataset is None:
        raise ValueError("dataset_dir is not set, and the study's config names no phantoms: give --dataset_dir PATH")
    return write_phantom_dataset(str(output / "phantoms"), **grid.dataset)


def _show_costs(tasks: Sequence[Task], dataset: str, output: Path, *, at_a_time: int) -> None:
    logging.getLogger("components").setLevel(logging.ERROR)  # of networks that are timed with random weights
    table = cost_table(tasks, dataset_dir=dataset, output_dir=output)
    total = 60 * float(table["minutes left"].sum())
    print(table.to_markdown(index=False, floatfmt=".1f"))
    print(f"\n{_duration(total / at_a_time)} left, {at_a_time} at a time. An estimate: nothing was run.")


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _log_to_terminal() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)


if __name__ == "__main__":
    fire.Fire({"run": run, "report": report})
