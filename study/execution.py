"""Execution of a study's cells, on this computer or on a Dask cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch

from study.cells import CellError
from study.grid import Cell, Preparation

Task = Cell | Preparation
Result = tuple[Task, str | None]  # a task that has ended, with the error message if it failed


def with_preparations(cells: Sequence[Cell]) -> list[Task]:
    """List cells and their preparations, each task once and after the one that it starts from."""
    by_name: dict[str | None, Task] = {cell.name: cell for cell in cells}
    tasks: dict[str, Task] = {}

    def add(task: Task) -> None:
        if isinstance(task, Cell) and (start := task.preparation or by_name.get(task.starts_from)):
            add(start)
        tasks.setdefault(task.name, task)

    for cell in cells:
        add(cell)
    return list(tasks.values())


def required_task(task: Task) -> str | None:
    """Return the name of the preparation or cell that a task starts from, None if there is none."""
    return task.starts_from if isinstance(task, Cell) else None


def chosen_tasks(tasks: Sequence[Task], beginning: str) -> list[Task]:
    """List the tasks whose name has a given beginning, and those that they start from.

    Args:
        tasks: each after the one that it starts from.
        beginning: beginning of the names; empty for all tasks.
    """
    names: set[str | None] = {task.name for task in tasks if task.name.startswith(beginning)}
    for task in reversed(tasks):
        if task.name in names:
            names.add(required_task(task))
    return [task for task in tasks if task.name in names]


def run_locally(
    tasks: Sequence[Task], run_task: Callable[..., object], environments: Sequence[Mapping[str, str]]
) -> Iterator[Result]:
    """Run tasks on this computer, and yield each when it has ended.

    A free worker takes the first task that does not wait for the one that it starts from. If the caller stops early, as
    by Ctrl-C, the running tasks are interrupted.

    Args:
        tasks: tasks to run, each after the one that it starts from, if that is to be run too.
        run_task: called in a thread as `run_task(task, environment=..., interrupt=...)`. It waits for a sub-process
            with these environment variables, and ends it when the event `interrupt` is set.
        environments: environment variables of each worker; see `worker_environments`.
    """
    waiting, unfinished = list(tasks), {task.name for task in tasks}
    idle = list(environments)
    running: dict[Future[str | None], tuple[Task, Mapping[str, str]]] = {}
    errors: dict[str | None, str | None] = {}
    interrupt = threading.Event()
    with ThreadPoolExecutor(len(environments)) as pool:
        try:
            while waiting or running:
                ready = [task for task in waiting if required_task(task) not in unfinished]
                for task in ready[: len(idle)]:
                    waiting.remove(task)
                    environment = idle.pop(0)
                    run = partial(run_task, environment=environment, interrupt=interrupt)
                    future = pool.submit(_attempt, task, run, errors.get(required_task(task)))
                    running[future] = task, environment
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task, environment = running.pop(future)
                    idle.append(environment)
                    unfinished.remove(task.name)
                    errors[task.name] = future.result()
                    yield task, errors[task.name]
        finally:
            interrupt.set()


def run_on_dask(tasks: Sequence[Task], run_task: Callable[[Task], object], scheduler: str) -> Iterator[Result]:
    """Run tasks on a Dask cluster, and yield each when it has ended, in no order.

    If workers declare a resource `GPU`, each task takes one. Workers must see the study's and the data's folders under
    the same paths, and have this project installed.

    Args:
        tasks: tasks to run, each after the one that it starts from, if that is to be run too.
        run_task: runs one task; must be picklable.
        scheduler: address of the cluster, such as `tcp://10.0.0.1:8786`.

    Raises:
        ModuleNotFoundError: if Dask is not installed.
    """
    try:
        from distributed import Client, as_completed
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--scheduler needs Dask, which is not installed: pip install -c constraints.txt 'dask[distributed]'"
        ) from error
    with Client(scheduler) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        resources = {"GPU": 1} if any("GPU" in worker["resources"] for worker in workers) else None
        futures: dict[str | None, Any] = {}
        for place, task in enumerate(tasks):
            error_of_start = futures.get(required_task(task))
            options = {"key": task.name, "pure": False, "priority": -place, "resources": resources}
            futures[task.name] = client.submit(_attempt, task, run_task, error_of_start, **options)
        task_of = {task.name: task for task in tasks}
        for future in as_completed(futures.values()):
            yield task_of[future.key], future.result()


def worker_environments(workers: int, threads: int | None = None) -> list[dict[str, str]]:
    """Share out GPUs and cores between local workers: list the environment variables of each.

    Args:
        workers: sub-processes at a time.
        threads: CPU threads of each; None for an equal share of the cores, and for torch's own choice with one worker.

    Raises:
        ValueError: if `workers` is not positive, or there are fewer GPUs than workers.
    """
    gpus = torch.cuda.device_count()
    if workers < 1:
        raise ValueError(f"expected workers to be 1 or more, received {workers}")
    if 0 < gpus < workers:
        raise ValueError(f"expected no more workers than GPUs, one cell each; received {workers} for {gpus} GPUs")
    if threads is None and workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    gpu_of = [{"CUDA_VISIBLE_DEVICES": visible[place]} if gpus else {} for place in range(workers)]
    return [thread_limits(threads) | gpu for gpu in gpu_of]


def thread_limits(threads: int | None) -> dict[str, str]:
    """Return the environment variables that limit a process to a number of CPU threads; empty for None."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {} if threads is None else {name: str(threads) for name in names}


def _attempt(task: Task, run_task: Callable[[Task], object], error_of_start: str | None) -> str | None:
    """Run a task unless the one that it starts from has failed; return the error message, None for success."""
    if error_of_start is not None:
        return f"not run, since it starts from {required_task(task)}, which failed"
    try:
        run_task(task)
    except (CellError, ValueError) as error:
        return str(error)
    return None
