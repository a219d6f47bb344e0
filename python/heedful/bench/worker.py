"""A process for each peer: it does what the parent asks for, and sleeps meanwhile."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import timing
from .peers import PEERS
from .rows import Row

SMALL = Row("float32", 1, 2, 2, 64, 64, 64)  # what a library takes at its first call is not the call's
# Freed memory goes back to the system at once, so that a call's peak does not hide in what an earlier one left.
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class Failed(RuntimeError):
    """What a worker could not do; its text says why."""


class Worker:
    """The parent's end."""

    def __init__(self, name: str, threads: int, frugal: bool = False) -> None:
        self.name, context = name, multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = theirs, name, threads, frugal
        with _environment(_variables(threads) | (FRUGAL if frugal else {})):
            self.process = context.Process(target=_serve, args=arguments, name=f"heedful bench: {name}", daemon=True)
            self.process.start()
        theirs.close()
        self.ask("cpu_seconds")  # it has loaded its library

    def ask(self, method: str, *arguments: Any) -> Any:
        """Raises Failed where it raises, or dies."""
        try:
            self.connection.send((method, arguments))
            done, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise Failed(f"its process died, exit code {self.process.exitcode}") from None
        if not done:
            raise Failed(value)
        return value

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def close(self) -> None:
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()


def _variables(threads: int) -> dict[str, str]:
    """What libraries read before they start: as many threads for all; how these wait for work is left to each."""
    count = str(threads)
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC", "TORCHINDUCTOR_COMPILE_THREADS"), count)
    return counts | {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(connection: Connection, name: str, threads: int, frugal: bool) -> None:
    """The worker's end: methods of Servant, called one after the other."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # for libraries that count processors
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # of what a peer cannot run; the table says it
    logging.disable(logging.WARNING)
    servant: Servant | None = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:  # the parent is done
            return
        try:
            servant = servant or Servant(name, threads, frugal)
            answer = True, getattr(servant, method)(*arguments)
        except Exception as error:
            answer = False, _in_a_line(error)
        connection.send(answer)


def _in_a_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 160 else text[:157] + "..."


class Servant:
    """One peer in a process of its own."""

    def __init__(self, name: str, threads: int, frugal: bool) -> None:
        self.peer = PEERS[name].load(threads, keeps_memory=not frugal)
        self.calls: dict[str, Callable[[], object]] = {}
        self.limits: dict[str, tuple[Callable[[], object], int]] = {}

    def cpu_seconds(self) -> float:
        return time.process_time()

    def prepare(self, row: Row) -> None:
        self.forget()
        self.call = self.peer.prepare(row, row.draw())
        self.call.forward()

    def forget(self) -> None:
        self.call = None
        gc.collect()

    def results(self, direction: str) -> dict[str, Any]:
        """As float32 arrays; raises where the direction cannot run."""
        self.record(direction)
        return {name: x.detach().float().numpy() for name, x in self.call.results(direction).items()}

    def record(self, direction: str) -> None:
        if direction == "backward":
            if self.call.backward is None:
                raise Failed(self.call.no_backward)
            self.call.record()

    def seconds(self, direction: str, burst: float) -> float:
        return timing.least(getattr(self.call, direction), burst)

    def limit(self, what: str) -> float:
        """Operations a second of a matrix product in that dtype, or bytes a second for "read"."""
        if what not in self.limits:
            self.limits[what] = timing.read() if what == "read" else timing.product(getattr(torch, what))
        call, amount = self.limits[what]
        return amount / timing.least(call)

    def peak(self, row: Row, direction: str) -> int:
        """Bytes beyond the inputs at the peak of one forward, or of a forward and its backward, to some hundred KB."""
        for sizes in (SMALL, row):
            self.prepare(sizes)
            self.results(direction)
        if self.call.no_memory:
            raise Failed(self.call.no_memory)
        self.call.graph.clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the peak begins anew
        before = _resident("VmRSS")
        self.record(direction)
        getattr(self.call, direction)()
        return _resident("VmHWM") - before


def _resident(what: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))
