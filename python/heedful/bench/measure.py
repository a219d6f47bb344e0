"""Every row with every peer: checked against float64, then timed in turns, each peer in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from . import agreement, timing
from .peers import OURS, PEERS
from .rows import Row
from .worker import Failed, Worker

PAUSE = 0.06  # seconds between turns: OpenMP's threads look for more work for 10 ms, ONNX Runtime's for 40
BUDGET = 15.0  # seconds of a row's turns in one direction
SLOW = 1.0  # seconds of a call that has one turn only
LOST = "its results are wrong: "

Found = dict[str, Any]


class Bench:
    """The workers of all peers that are installed; within `with`, they live."""

    def __init__(self, names: Iterable[str], threads: int, repeats: int, frugal: bool = False) -> None:
        self.threads, self.repeats, self.frugal = threads, repeats, frugal
        self.missing = {name: PEERS[name].missing for name in names}
        self.workers: dict[str, Worker] = {}

    def __enter__(self) -> Bench:
        torch.set_num_threads(self.threads)
        for name, missing in self.missing.items():
            if not missing:
                self._start(name)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def _start(self, name: str) -> None:
        try:
            self.workers[name] = Worker(name, self.threads, self.frugal)
        except Failed as error:
            self.missing[name] = f"does not start: {error}"
            self.workers.pop(name, None)

    def row(self, row: Row, progress: Callable[[str], None] = lambda text: None) -> Found:
        """Times and errors of every peer, or why there are none, for each direction."""
        self._revive()
        prepared = {name: self._prepare(worker, row, progress) for name, worker in self.workers.items()}
        found: Found = {"name": row.name, **vars(row)}
        inputs, backward = row.draw(), len(row.directions) > 1
        expected = agreement.exact(row, inputs, backward)
        for direction in row.directions:
            peers = {name: {"reason": text} for name, text in self.missing.items() if text}
            for name, worker in self.workers.items():
                progress(f"{row.name}, {direction}: checking {name}")
                peers[name] = {"reason": prepared[name]} if prepared[name] else {}
                if not prepared[name]:
                    peers[name] = self._check(worker, direction, row, inputs, expected)
            found[direction] = {"flops": row.flops(direction), "bytes": row.bytes(direction), "peers": peers}
            ready = [name for name, entry in peers.items() if "reason" not in entry]
            progress(f"{row.name}, {direction}: timing {len(ready)} in turns")
            found[direction] |= self._time(row, direction, ready, peers)
        for worker in self.workers.values():
            if worker.alive:
                worker.ask("forget")
        return found

    def _revive(self) -> None:
        for name in [name for name, worker in self.workers.items() if not worker.alive]:
            self._start(name)

    def _prepare(self, worker: Worker, row: Row, progress: Callable[[str], None]) -> str:
        """Why it cannot run the row; "" where it can."""
        progress(f"{row.name}: preparing {worker.name}")
        try:
            worker.ask("prepare", row)
            return ""
        except Failed as error:
            return str(error)

    def _check(self, worker: Worker, direction: str, row: Row, inputs: Any, expected: agreement.Tensors) -> Found:
        try:
            results = worker.ask("results", direction)
        except Failed as error:
            return {"reason": str(error)}
        tensors = {name: torch.from_numpy(x) for name, x in results.items()}
        share, wrong = agreement.apart(row, inputs, tensors, {name: expected[name] for name in tensors})
        return {"reason": LOST + wrong, "wrong": True} if wrong else {"error": share}

    def _time(self, row: Row, direction: str, ready: list[str], peers: dict[str, Found]) -> Found:
        """Turns of all that are ready, and of what the machine itself reaches; into `peers` go seconds."""
        others, limits = timing.Others(self._cpu_seconds), {"products": 0.0, "reads": 0.0}
        end = time.monotonic() + BUDGET
        seconds, turns = dict.fromkeys(ready, float("inf")), 0
        asked = self.workers[OURS]
        while turns < self.repeats and time.monotonic() < end:
            for kind, dtypes in {"products": {row.dtype, "float32"}, "reads": {"read"}}.items():
                limits[kind] = max(limits[kind], *(asked.ask("limit", what) for what in dtypes))
                time.sleep(PAUSE)
            for name in (name for name in ready if turns == 0 or seconds[name] < SLOW):
                seconds[name] = min(seconds[name], self.workers[name].ask("seconds", direction, timing.BURST))
                time.sleep(PAUSE)
            turns += 1
        least = {"products": row.flops(direction) / limits["products"], "reads": row.bytes(direction) / limits["reads"]}
        bound = max(least, key=least.get)
        for name in ready:
            peers[name] |= {
                "seconds": seconds[name],
                "gflops": row.flops(direction) / seconds[name] / 1e9,
                "share": least[bound] / seconds[name],
            }
        rates = {"products": limits["products"] / 1e9, "reads": limits["reads"] / 1e9}
        return {"limit": {"seconds": least[bound], "by": bound, **rates}, "turns": turns, "others": others.share()}

    def _cpu_seconds(self) -> float:
        return time.process_time() + sum(w.ask("cpu_seconds") for w in self.workers.values() if w.alive)

    def memory(self, row: Row, progress: Callable[[str], None] = lambda text: None) -> Found:
        """Bytes at each peer's peak, beyond the inputs, or why that is not known."""
        self._revive()
        found: Found = {"name": row.name, **vars(row)}
        for direction in row.directions:
            found[direction] = {name: {"reason": text} for name, text in self.missing.items() if text}
            for name, worker in self.workers.items():
                progress(f"{row.name}, {direction}: memory of {name}")
                try:
                    found[direction][name] = {"bytes": worker.ask("peak", row, direction)}
                except Failed as error:
                    found[direction][name] = {"reason": str(error)}
        return found


def run(
    names: list[str],
    chosen: list[Row],
    long: list[Row],
    threads: int,
    repeats: int,
    minutes: float,
    progress: Callable[[str, int], None],
) -> tuple[list[Found], list[Found]]:
    """Times of the rows, one at least, then peak memory of the long ones, until so many minutes are over.

    progress gets what is done now, and how many are done.
    """
    end, done = time.monotonic() + 60 * minutes, 0

    def in_time(some: list[Row]) -> Iterator[tuple[Row, Callable[[str], None]]]:
        nonlocal done
        for row in some:
            if done == 0 or time.monotonic() < end:
                yield row, lambda text, done=done: progress(text, done)
            done += 1

    with Bench(names, threads, repeats) as bench:
        times = [bench.row(*each) for each in in_time(chosen)]
    if not long:
        return times, []
    with Bench(names, threads, repeats, frugal=True) as bench:
        memory = [bench.memory(*each) for each in in_time(long)]
    return times, memory
