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
_RESET_PEAK = "5"  # as `man 5 proc` has it
MIB = 2**20

Work = Callable[[], object]


def peak_mib(prepare: Callable[[], Work]) -> float | None:
    """Measure in a fresh process by how much memory in use rises while some work is done.

    Resident memory on a CPU, allocated tensors on a GPU.

    Args:
        prepare: called in that process, builds networks and input and returns the work; must pickle.

    Returns:
        MiB; None where the system does not tell.
    """
    # Processes fork from a server that has imported everything and run nothing, which saves seconds each.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["benchmarks.__main__"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_here, prepare, torch.get_num_threads()).result()


def _peak_here(prepare: Callable[[], Work], threads: int) -> float | None:
    """Prepare work, do it, and measure this process's peak meanwhile.

    On a CPU that is the kernel's `VmHWM`, reset before the work: `ru_maxrss` would begin at the peak of the process
    that started this one, and include what building the network took.
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
    """Make glibc give back what building has freed, which the work would else use without a trace."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_mib(name: str) -> float:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024
