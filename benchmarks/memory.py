"""Peak memory of one forward pass, measured in a fresh process."""

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.contenders import silence_random_weights

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see `man 5 proc`
MIB = 2**20

Work = Callable[[], object]


def peak_mib(prepare: Callable[[], Work]) -> float | None:
    """Measure in a fresh process how much memory some work adds.

    This is resident memory on a CPU, memory of allocated tensors on a GPU.

    Args:
        prepare: called in that process; builds networks and inputs and returns the work. It must be picklable.

    Returns:
        MiB; None if the system does not report it.
    """
    # Processes fork from a server that has imported everything but run nothing, which saves seconds for each.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["benchmarks.__main__"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_here, prepare, torch.get_num_threads()).result()


def _peak_here(prepare: Callable[[], Work], threads: int) -> float | None:
    """Prepare the work, do it, and measure this process's peak memory meanwhile.

    On a CPU, the peak is the kernel's `VmHWM`, reset before the work. `ru_maxrss` cannot be reset: it would include the
    peaks of the parent process and of building the network.
    """
    torch.set_num_threads(threads)
    silence_random_weights()
    work = prepare()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if not CLEAR_REFS.exists():
        return None
    _return_freed_memory()
    CLEAR_REFS.write_text(_RESET_PEAK)
    resident = _status_mib("VmRSS")
    work()
    return _status_mib("VmHWM") - resident


def _return_freed_memory() -> None:
    """Make glibc return freed memory to the system: the work could reuse it without raising the peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_mib(name: str) -> float:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024
