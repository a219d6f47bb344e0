"""Times of calls that take turns, and what the machine itself reaches."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable

import torch

BURST = 0.005  # seconds that a turn lasts at least: short calls are repeated, so that their threads are awake

SIZE, SMALLEST = 2048, 256  # of a matrix product, the largest and the first one tried
LONGEST = 0.2  # seconds of one: torch's own in float16 would take as long as the rest of a row's turns
READ_BYTES = 2**28


def least(call: Callable[[], object], burst: float = BURST) -> float:
    """Seconds of the fastest of the calls that fit into a burst, one at least."""
    best, end = float("inf"), time.perf_counter() + burst
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def in_turns(
    repeats: int, *calls: Callable[[], object], burst: float = BURST, budget: float = float("inf")
) -> list[float]:
    """The best time of each, in seconds, of so many turns after one that warms up.

    Where the warm-up spends the whole budget of seconds, it is what counts; the turns end where it is spent.
    """
    end = time.perf_counter() + budget
    best = [least(call, 0) for call in calls]
    for turn in range(repeats):
        if time.perf_counter() >= end:
            break
        times = [least(call, burst) for call in calls]
        best = times if turn == 0 else [min(a, b) for a, b in zip(best, times)]
    return best


class Others:
    """How much of the machine's processors others took since this was made: only a quiet machine gives true times.

    own: the processor seconds that this program has taken, of all its processes.
    """

    def __init__(self, own: Callable[[], float] = time.process_time) -> None:
        self.own, self.start, self.busy = own, time.perf_counter(), _busy() - own()

    def share(self) -> float:
        """As a share of all processors."""
        seconds = (time.perf_counter() - self.start) * (os.cpu_count() or 1)
        return round(max(0.0, (_busy() - self.own() - self.busy) / seconds), 3)


def _busy() -> float:
    """Seconds that all processors were busy, or stolen by other machines; 0 where the system does not say."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _, _, irq, softirq, steal = (int(n) for n in stat.readline().split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def product(dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A matrix product, and its operations: of SIZE, or less where that would take longer than LONGEST."""
    size = min(SMALLEST, SIZE)
    while True:
        a, b = (torch.randn(size, size).to(dtype) for _ in "ab")
        call = functools.partial(torch.matmul, a, b)
        call()  # the first one starts threads and libraries
        if size >= SIZE or 8 * least(call, 0) > LONGEST:
            return call, 2 * size**3
        size *= 2


def read() -> tuple[Callable[[], object], int]:
    """A read of memory, and its bytes."""
    x = torch.randn(READ_BYTES // 4)
    return x.sum, READ_BYTES


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
