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

if TYPE_CHECKING:
    from autosam.cohort import Case, CaseSegmenter, Record, Result

_ATTEMPTS = 2
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_DIED = (EOFError, OSError, pickle.UnpicklingError)  # what a broken pipe raises


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
        self._process = subprocess.Popen(
            [sys.executable, "-m", "autosam.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C is the parent's, which ends it
        )
        self._job: Job | None = job

    def ask(self, case: Case) -> Any:
        """Return the answer for a case; raise one of `_DIED` if the process ends before."""
        assert self._process.stdin and self._process.stdout
        if self._job:
            pickle.dump(self._job, self._process.stdin)
            self._job = None
        pickle.dump(pickle.dumps(case), self._process.stdin)  # read when the log is set up, since it imports MONAI
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def end(self) -> str:
        """End the process and return how it has ended."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]  # on which it ends by itself
        code = self._process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"

    def kill(self) -> None:
        self._process.kill()


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
        self._workers = workers

    def __call__(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Yield each case when it has ended.

        Raises:
            RuntimeError: if a process cannot start, with its reason.
        """
        waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in cases:
            waiting.put(case)
        count = min(self._workers, len(cases))
        tqdm.write(f"{len(cases)} cases, {count} workers of one thread", file=sys.stderr)
        answers: queue.SimpleQueue[tuple[Case, Any]] = queue.SimpleQueue()
        running: dict[int, _Worker] = {}
        stopped = threading.Event()
        for place in range(count):
            arguments = (place, running, waiting, answers, stopped)
            threading.Thread(target=self._serve, args=arguments, daemon=True).start()
        try:
            for ended in range(len(cases)):
                case, answer = answers.get()
                if isinstance(answer, str):
                    raise RuntimeError(answer)
                record, is_done, peak_mb = answer
                if not ended and peak_mb:
                    text = f"after its first case a worker has taken {peak_mb} MB: {count} take {count * peak_mb} MB"
                    tqdm.write(text, file=sys.stderr)
                yield case, record, is_done
        finally:
            stopped.set()
            for worker in list(running.values()):
                worker.kill()

    def _serve(
        self,
        place: int,
        running: dict[int, _Worker],
        waiting: queue.SimpleQueue[Case],
        answers: queue.SimpleQueue[tuple[Case, Any]],
        stopped: threading.Event,
    ) -> None:
        """Hand cases to one process after the other, until there are none or the run has stopped."""
        with contextlib.suppress(queue.Empty):
            while True:
                case, answer, reason = waiting.get_nowait(), None, ""
                for _ in range(_ATTEMPTS):
                    if stopped.is_set():
                        return
                    worker = running.get(place) or _Worker(self._job, self._environment(place))
                    running[place] = worker
                    try:
                        answer = worker.ask(case)
                        break
                    except _DIED:
                        reason = running.pop(place).end()
                answers.put((case, answer or (_lost(case, f"{_ATTEMPTS} times, at last with {reason}"), False, 0)))
        if place in running:
            running.pop(place).end()

    def _environment(self, place: int) -> dict[str, str]:
        """Return the environment variables of a process: its number of threads, and its device."""
        import torch

        if "device" in self._job.run.options or not (devices := torch.cuda.device_count()):
            return _ONE_THREAD
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        return {**_ONE_THREAD, "CUDA_VISIBLE_DEVICES": visible[place % len(visible)]}


class DaskWorkers:
    """Segment the cases of a job on a Dask cluster, each as a task.

    Its workers must see all files under the same paths, have this project installed, and run one task at a time
    (`--nthreads 1`). Dask gives the case of a lost worker to another one.

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
                    record, is_done = future.result()
                except KilledWorker as error:
                    record, is_done = _lost(case, f"with its worker: {error}"), False
                yield case, record, is_done


def _lost(case: Case, how: str) -> Record:
    """Return the record of a case with which every process has died."""
    from autosam.cohort import Record

    return Record(case.name, failed=dict.fromkeys(case.files, f"its process ended {how}; memory may be lacking"))


def _segment_on_dask(job: bytes, case: Case) -> tuple[Record, bool]:
    """Segment a case in a worker of Dask, which keeps the job's network."""
    segmenter, folder = _loaded(job)
    with contextlib.chdir(folder):
        return segmenter(case)


@functools.lru_cache(maxsize=1)
def _loaded(pickled: bytes) -> tuple[CaseSegmenter, Path]:
    from autosam.cohort import CaseSegmenter

    job, folder = pickle.loads(pickled)
    with contextlib.chdir(folder):
        return job.run(job.log, use=CaseSegmenter), folder


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

        segmenter = CaseSegmenter(workflow)
        segmenter.shows_progress = False
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
