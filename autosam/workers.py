"""Processes that segment the cases of a cohort, on this computer or on a Dask cluster.

`python -m autosam.workers` is one of them: it receives a job and then cases on standard input, and answers each.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from autosam.runner import BundleRun

if TYPE_CHECKING:  # it imports MONAI, which is to be imported when the log is set up
    from autosam.cohort import Case, CaseSegmenter, Record, Result

_ATTEMPTS = 2
_LEAST_MB = 400  # of a worker's memory, without what it shares; measured with the smallest volumes and bundles
_MEMORY = Path("/proc/meminfo")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_DIED = (EOFError, OSError, pickle.UnpicklingError)  # what a broken pipe raises
_DASK_TASK = threading.Lock()  # a network and the working directory are for one task at a time


@dataclass(frozen=True)
class Job:
    """What a process needs to segment cases.

    Attributes:
        run: the run of a bundle's workflow.
        log: the file of its log.
        verbose: whether the log is shown as well.
    """

    run: BundleRun
    log: Path
    verbose: bool = False


class _Worker:
    """A sub-process that segments one case at a time."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "autosam.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
            start_new_session=True,  # Ctrl-C is the parent's, which ends it
        )
        self._unsent = [pickle.dumps(job)]

    def ask(self, case: Case) -> Any:
        """Return the answer for a case; raise one of `_DIED` if the process ends before."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.writelines([*self._unsent, pickle.dumps(pickle.dumps(case))])
        self.process.stdin.flush()
        self._unsent = []
        return pickle.load(self.process.stdout)

    def end(self) -> str:
        """Let the process end and return how it has ended."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        code = self.process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


class LocalWorkers:
    """Segment the cases of a job in processes of one thread each, which take case after case.

    With several CUDA devices, each process has one of them. A process that dies is replaced. Its case is tried once
    more, and has failed if that process dies as well. If this process dies, the others end at once.

    Args:
        job: the job.
        workers: number of processes.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, job: Job, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"expected --workers to be 1 or more, received {workers}")
        self._job = job
        self._count = workers
        self._waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Case, Any]] = queue.SimpleQueue()
        self._running: dict[int, _Worker] = {}  # by place
        self._stopped = threading.Event()

    def __call__(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Yield each case when it has ended.

        Raises:
            ValueError: if the memory that is available is less than these processes need at least.
            RuntimeError: if a process cannot start, with its reason.
        """
        count = min(self._count, len(cases))
        least, available = count * _LEAST_MB, _available_mb()
        if available is not None and least > available:
            raise ValueError(
                f"{count} workers need at least {least} MB of memory, and {available} MB are available: "
                f"expected --workers to be at most {max(1, available // _LEAST_MB)}"
            )
        for case in cases:
            self._waiting.put(case)
        begin = f"{len(cases)} cases, {count} workers of one thread, which take at least {least} MB"
        tqdm.write(begin, file=sys.stderr)
        for place in range(count):
            threading.Thread(target=self._serve, args=[place], daemon=True).start()
        is_memory_known = False
        try:
            for _ in cases:
                case, answer = self._answers.get()
                if isinstance(answer, str):
                    raise RuntimeError(answer)
                record, is_done, peak_mb = answer
                if peak_mb and not is_done and not is_memory_known:
                    taken = f"after its first case a worker has taken {peak_mb} MB: {count} take {count * peak_mb} MB"
                    tqdm.write(taken, file=sys.stderr)
                    is_memory_known = True
                yield case, record, is_done
        finally:
            self._stopped.set()
            for worker in list(self._running.values()):
                worker.process.kill()

    def _serve(self, place: int) -> None:
        """Hand cases to one process after the other, until there are none or the run has stopped."""
        while not self._stopped.is_set():
            try:
                case = self._waiting.get_nowait()
            except queue.Empty:
                break
            try:
                self._answers.put((case, self._answer(place, case)))
            except Exception as error:  # else the run would wait forever
                self._answers.put((case, f"a worker cannot start: {error}"))
        if place in self._running:
            self._running.pop(place).end()

    def _answer(self, place: int, case: Case) -> Any:
        reason = "no attempt"
        for _ in range(_ATTEMPTS):
            if self._stopped.is_set():
                break
            if place not in self._running:
                self._running[place] = _Worker(self._job, self._environment(place))
            try:
                return self._running[place].ask(case)
            except _DIED:
                reason = self._running.pop(place).end()
        return _lost(case, f"{_ATTEMPTS} times, at last with {reason}"), False, 0

    def _environment(self, place: int) -> dict[str, str]:
        """Return the environment variables of a process: its number of threads, and its device."""
        import torch

        if "device" in self._job.run.options or not (devices := torch.cuda.device_count()):
            return _ONE_THREAD
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        return {**_ONE_THREAD, "CUDA_VISIBLE_DEVICES": visible[place % len(visible)]}


class DaskWorkers:
    """Segment the cases of a job on a Dask cluster, each as a task.

    Its workers must see all files under the same paths, and have this project installed. Dask gives the case of a lost
    worker to another one.

    Args:
        job: the job.
        scheduler: address of the cluster, or its scheduler file.
    """

    def __init__(self, job: Job, scheduler: str) -> None:
        self._job = job
        self._scheduler = scheduler

    def __call__(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Yield each case when it has ended.

        Raises:
            ModuleNotFoundError: if Dask is not installed.
        """
        try:
            from distributed import Client, KilledWorker, as_completed
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "--scheduler needs Dask, which is not installed: pip install 'autosam-bundles[study]'"
            ) from error
        is_file = Path(self._scheduler).is_file()
        with Client(**{"scheduler_file" if is_file else "address": self._scheduler}) as client:
            count = len(client.scheduler_info(n_workers=-1)["workers"])
            tqdm.write(f"{len(cases)} cases, {count} workers of {self._scheduler}", file=sys.stderr)
            job = pickle.dumps((self._job, Path.cwd()))
            futures = {client.submit(_segment_on_dask, job, case, pure=False): case for case in cases}
            for future in as_completed(futures):
                case = futures[future]
                try:
                    yield case, *future.result()
                except KilledWorker as error:
                    yield case, _lost(case, f"with its worker: {error}"), False


def _available_mb() -> int | None:
    """Return how much memory new processes can have; None if the system does not tell."""
    lines = _MEMORY.read_text().splitlines() if _MEMORY.is_file() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _lost(case: Case, how: str) -> Record:
    """Return the record of a case with which every process has died."""
    from autosam.cohort import Record

    return Record(case.name, failed=dict.fromkeys(case.files, f"its process ended {how}; memory may be lacking"))


def _segment_on_dask(job: bytes, case: Case) -> tuple[Record, bool]:
    """Segment a case in a worker of Dask, which keeps the job's network."""
    _, folder = pickle.loads(job)
    with _DASK_TASK, contextlib.chdir(folder):
        return _segmenter(job)(case)


@functools.lru_cache(maxsize=1)
def _segmenter(pickled: bytes) -> CaseSegmenter:
    from autosam.cohort import CaseSegmenter

    job, _ = pickle.loads(pickled)
    return job.run(job.log, use=CaseSegmenter)


def _main() -> None:
    """Answer cases until standard input ends, as it does when the parent dies."""
    import resource

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed is no answer
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                requests.put(pickle.load(sys.stdin.buffer))
        finally:
            os._exit(0)

    def answer(content: Any) -> None:
        pickle.dump(content, answers)
        answers.flush()

    def serve(workflow: Any) -> None:
        from autosam.cohort import CaseSegmenter

        segmenter = CaseSegmenter(workflow, shows_progress=False)
        while True:
            done = segmenter(pickle.loads(requests.get()))
            answer((*done, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))

    threading.Thread(target=receive, daemon=True).start()
    job: Job = requests.get()
    try:
        job.run(job.log, verbose=job.verbose, use=serve)
    except Exception as error:
        from components.base.errors import error_message

        answer(error_message(error))
    os._exit(1)  # the thread still reads


if __name__ == "__main__":
    _main()
