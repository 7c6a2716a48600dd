"""Where a study's cells run: one after the other, in local processes, or on a Dask cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from study.cells import CellError
from study.grid import Cell, Preparation

Task = Cell | Preparation
Result = tuple[Task, str | None]  # what ran, and the error it ended with
RunTask = Callable[[Task], object]


def in_order(cells: Sequence[Cell]) -> list[Task]:
    """List cells with what they need before them, each once."""
    tasks: dict[str, Task] = {}
    for cell in cells:
        for task in (cell.preparation, cell):
            if task is not None:
                tasks.setdefault(task.name, task)
    return list(tasks.values())


def run_serially(tasks: Sequence[Task], run_task: RunTask) -> Iterator[Result]:
    """Run tasks one after the other, and yield each when it has ended."""
    errors: dict[str, str | None] = {}
    for task in tasks:
        needed = name_of_needed(task)
        errors[task.name] = _attempt(task, run_task, errors.get(needed) if needed else None)
        yield task, errors[task.name]


def run_on_dask(tasks: Sequence[Task], run_task: RunTask, client: Any) -> Iterator[Result]:
    """Run tasks on a Dask cluster, and yield each when it has ended, in no order.

    Where workers name a resource `GPU`, a task takes one of it. Workers see the study's and the data's folders under
    the same paths, and have this project installed.

    Args:
        tasks: what to run, each after what it needs.
        run_task: runs one; must be picklable.
        client: a `distributed.Client`.
    """
    from distributed import as_completed

    has_gpus = any("GPU" in worker["resources"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())
    errors: dict[str, Any] = {}
    task_of = {}
    for place, task in enumerate(tasks):
        needed = name_of_needed(task)
        errors[task.name] = client.submit(
            _attempt,
            task,
            run_task,
            errors.get(needed) if needed else None,
            key=task.name,
            pure=False,
            priority=-place,
            resources={"GPU": 1} if has_gpus else None,
        )
        task_of[task.name] = task
    for future in as_completed(errors.values()):
        yield task_of[future.key], future.result()


@contextmanager
def connected(*, workers: int, scheduler: str | None) -> Iterator[Any]:
    """Connect to a Dask cluster by its scheduler's address, or start one of local processes.

    Args:
        workers: local processes, each with its share of the GPUs: a cell has one to itself.
        scheduler: address such as `tcp://10.0.0.1:8786`; None for local processes.

    Raises:
        ValueError: when there are fewer GPUs than processes.
    """
    from distributed import Client, Nanny, Scheduler, SpecCluster

    if scheduler is not None:
        with Client(scheduler) as client:
            yield client
        return
    here = {"host": "127.0.0.1", "dashboard_address": None}
    quiet = {"nthreads": 1, "silence_logs": logging.WARNING}
    options = [{**quiet, **here, "env": environment} for environment in worker_environments(workers)]
    cluster = SpecCluster(
        workers={place: {"cls": Nanny, "options": each} for place, each in enumerate(options)},
        scheduler={"cls": Scheduler, "options": here},
        silence_logs=logging.WARNING,
    )
    with cluster, Client(cluster) as client:
        yield client


def worker_environments(workers: int) -> list[dict[str, str]]:
    """Say which GPU each local process sees, and that it shares the cores with the others.

    Raises:
        ValueError: when there are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < workers:
        raise ValueError(f"expected no more workers than GPUs, one cell each; received {workers} for {gpus} GPUs")
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    return [threads | ({"CUDA_VISIBLE_DEVICES": visible[place]} if gpus else {}) for place in range(workers)]


def name_of_needed(task: Task) -> str | None:
    """Return the name of what has to be run before a task, None for nothing."""
    preparation = task.preparation if isinstance(task, Cell) else None
    return preparation.name if preparation else None


def _attempt(task: Task, run_task: RunTask, error_before: str | None) -> str | None:
    """Run a task unless what it needs has failed; return the error, None for none."""
    if error_before is not None:
        return f"not run, since it starts from {name_of_needed(task)}, which failed"
    try:
        run_task(task)
    except (CellError, ValueError) as error:
        return str(error)
    return None
