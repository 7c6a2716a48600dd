"""Section `cohort`: `autosam segment` of a folder, by one process or several workers."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from autosam.cohort import RECORDS
from autosam.folders import DEFAULT
from benchmarks.memory import MIB
from benchmarks.report import Table
from benchmarks.settings import Settings
from components.phantom.dataset import write_phantom_dataset

BASELINE = "one process"
COMMAND = (sys.executable, "-m", "autosam")
_POLL_S = 1.0  # the system takes milliseconds to add up a process's pages

NOTE = """
The whole command on synthetic patients, each a case of two volumes, into a fresh folder. Seconds count from the start
of the first case, `start-up s` is what comes before. One process has all threads, a worker has one. `core s` is
processor time a case, with the start-up. `peak MiB` is the resident memory of all processes together, shared pages
counted once.
"""


@dataclass(frozen=True)
class _Run:
    """The cost of one command: seconds a case, start-up, processor seconds a case, and peak MiB."""

    seconds: float
    start_up: float
    core_seconds: float
    peak_mib: float


def run(settings: Settings) -> Table:
    """Measure the default bundle."""
    table = Table("cohort", BASELINE, NOTE, "a case")
    with tempfile.TemporaryDirectory() as folder:
        compare(table, settings, write_phantom_dataset(f"{folder}/in", **settings.cohort), DEFAULT)
    return table


def compare(table: Table, settings: Settings, images: str, bundle: str) -> None:
    """Segment a folder with each number of workers in turns.

    Args:
        table: the results are added to it.
        settings: sizes of the run.
        images: folder or list of images.
        bundle: a bundle's folder or name.
    """
    names = {workers: BASELINE if workers == 1 else f"ours, {workers} workers" for workers in settings.cohort_workers}
    runs: dict[int, list[_Run]] = {workers: [] for workers in names}
    for _ in range(settings.rounds):
        for workers, done in runs.items():
            done.append(_segment(images, bundle, workers))
    times = {names[workers]: [each.seconds for each in done] for workers, done in runs.items()}
    table.add(bundle, times, {names[workers]: _columns(workers, done) for workers, done in runs.items()})


def _segment(images: str, bundle: str, workers: int) -> _Run:
    """Run the command once."""
    with tempfile.TemporaryDirectory() as output:
        command = [*COMMAND, "segment", images, "-o", output, "--bundle", bundle, "--workers", str(workers)]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        start, peak, spent = time.time(), 0.0, dict[int, float]()
        with Path(output, "shown").open("w+") as shown:
            process = subprocess.Popen(command, env=os.environ | threads, stdout=shown, stderr=shown)
            while process.poll() is None:
                used = {pid: usage for pid in _tree(process.pid) if (usage := _usage(pid))}
                peak = max(peak, sum(mib for mib, _ in used.values()))
                spent |= {pid: seconds for pid, (_, seconds) in used.items()}
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
            shown.seek(0)
            if process.returncode:
                raise RuntimeError(f"autosam segment has failed: {shown.read()}")
        end = time.time()
        records = list(Path(output, RECORDS).glob("*.json"))
        first = min(path.stat().st_mtime - json.loads(path.read_text())["seconds"] for path in records)
    return _Run((end - first) / len(records), first - start, sum(spent.values()) / len(records), peak)


def _columns(workers: int, runs: list[_Run]) -> dict[str, float | str]:
    """Return the further columns of one number of workers: medians, and the highest peak."""
    rate = 60 / statistics.median(each.seconds for each in runs)
    cores = min(os.cpu_count() or 1, torch.get_num_threads() if workers == 1 else workers)
    columns: dict[str, float | str] = {
        "cases a minute": rate,
        "a minute and core": rate / cores,
        "start-up s": statistics.median(each.start_up for each in runs),
    }
    if peak := max(each.peak_mib for each in runs):
        columns |= {"core s": statistics.median(each.core_seconds for each in runs)}
        columns |= {"peak MiB": f"{peak:.0f}", "a minute and GiB": rate * 1024 / peak}
    return columns


def _tree(pid: int) -> Iterator[int]:
    """Yield a process and all below it, as far as the system tells."""
    yield pid
    for children in Path("/proc", str(pid), "task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:  # it has just ended
            continue
        for child in found:
            yield from _tree(int(child))


def _usage(pid: int) -> tuple[float, float] | None:
    """Return a process's resident MiB, with 1/n of each page that n share, and its core seconds; None if unknown."""
    try:
        lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
        ticks = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[11:13]  # see `man 5 proc`
    except OSError:
        return None
    kib = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib * 1024 / MIB, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
