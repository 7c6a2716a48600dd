"""Interleaved timing: each contender runs once per round, so that changes in machine load affect all equally."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MAX_REPEATS = 50


@dataclass(frozen=True)
class Contender:
    """Work to be timed, and a call to warm it up.

    Args:
        run: the work; its result is discarded.
        warm_up: a shorter call with the same tensor shapes; None to warm up with `run`.
    """

    run: Callable[[], object]
    warm_up: Callable[[], object] | None = None


@dataclass(frozen=True)
class Ratio:
    """A contender's time over the baseline's: median over the rounds, smallest and largest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def measure(
    contenders: Mapping[str, Contender],
    *,
    rounds: int,
    turn_seconds: float = 0.0,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time contenders in the order A B A B, after a warm-up call of each.

    Args:
        contenders: the contenders by name.
        rounds: number of turns of each contender.
        turn_seconds: minimum duration of a turn; faster work without a `warm_up` is repeated and its mean is taken.
        synchronize: waits until the device has finished all its work.
        clock: returns the time in seconds.

    Returns:
        seconds of one call in each round, by name.
    """
    repeats = {}
    for name, contender in contenders.items():
        seconds = _seconds(contender.warm_up or contender.run, 1, synchronize, clock)
        if contender.warm_up is None and seconds < turn_seconds:
            seconds = _seconds(contender.run, 1, synchronize, clock)  # the first call includes preparations
        enough = 1 if contender.warm_up else math.ceil(turn_seconds / max(seconds, 1e-9))
        repeats[name] = min(MAX_REPEATS, max(1, enough))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(_seconds(contender.run, repeats[name], synchronize, clock))
    return times


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until a device has finished all its work."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def ratio_of(seconds: list[float], baseline: list[float]) -> Ratio:
    """Compare a contender with a baseline round by round.

    Args:
        seconds: the contender's time in each round.
        baseline: the baseline's time in the same rounds.
    """
    ratios = [mine / theirs for mine, theirs in zip(seconds, baseline, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return process time for one CPU thread, which other processes do not affect, else wall time."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _seconds(
    run: Callable[[], object], repeats: int, synchronize: Callable[[], None], clock: Callable[[], float]
) -> float:
    synchronize()
    start = clock()
    for _ in range(repeats):
        run()
    synchronize()
    return (clock() - start) / repeats
