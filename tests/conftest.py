"""Backends, hypothesis profiles with a printed seed, and the precision table at the end of a run."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from backends import (
    BACKENDS,
    CUDA,
    EMULATED,
    MOST_EMULATED_SECONDS,
    Backend,
    emulated_operators,
    emulated_seconds,
)
from table import TILES

# Kernels give the same bits for any number of threads (test_determinism.py shows it), so one does, and it leaves the
# other cores to whoever else runs on the machine.
torch.set_num_threads(1)

try:
    import hypothesis
except ImportError:  # benchmarks/gpu_report.py's machines have torch and pytest alone
    hypothesis = None
    collect_ignore = ["test_blocks.py", "test_random.py"]
else:
    hypothesis.settings.register_profile("ci", max_examples=150, deadline=None, print_blob=True)
    hypothesis.settings.register_profile("long", max_examples=5000, deadline=None, print_blob=True)
    hypothesis.settings.load_profile(os.environ.get("HEEDFUL_HYPOTHESIS", "ci"))


MISSING = {backend.name: reason for backend in map(Backend.named, BACKENDS) if (reason := backend.missing())}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Each backend in turn that this machine can run; the run's end names the others."""
    chosen = Backend.named(request.param)
    if chosen.name == EMULATED:
        with emulated_operators():
            yield chosen
        return
    if chosen.isa:
        monkeypatch.setenv("HEEDFUL_CPU_ISA", chosen.isa)
    yield chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of backends that are not here (but for --collect-only); for the emulator those that are not
    marked for it, and the cases that would take it long; and what kernels of bfloat16 leave to others."""
    missing = () if config.option.collectonly else MISSING

    def suits(item: pytest.Item) -> bool:
        return _backend_of(item) not in missing and _suits_emulator(item) and _suits_bf16(item)

    dropped = [item for item in items if not suits(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        kept = set(items) - set(dropped)
        items[:] = [item for item in items if item in kept]
    for item in items:
        if _loses_small_weights(item):
            reason = "tensor cores take weights in float16, those below 6e-5 in part"
            item.add_marker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))


def pytest_collection_finish() -> None:
    """What was collected stays to the end: collections of garbage need not go through it."""
    gc.freeze()


def _backend_of(item: pytest.Item) -> str | None:
    return item.callspec.params.get("backend") if hasattr(item, "callspec") else None


def _loses_small_weights(item: pytest.Item) -> bool:
    """Bounds are relative to each value; CPU kernels hold weights in float32."""
    if _backend_of(item) not in (CUDA, EMULATED) or item.callspec.params.get("dtype") is not torch.float16:
        return False
    case = item.callspec.params.get("case")
    return case is not None and case.sizes == TILES and case.softcap is None and (case.gain == 8.0 or case.scale == 3.0)


def _suits_emulator(item: pytest.Item) -> bool:
    if _backend_of(item) != EMULATED:
        return True
    parameters = item.callspec.params
    if not item.get_closest_marker("cuda_kernels"):
        return False
    case = parameters.get("case")
    return case is None or emulated_seconds(case, parameters.get("dtype", torch.float32)) <= MOST_EMULATED_SECONDS


def _suits_bf16(item: pytest.Item) -> bool:
    if not Backend.named(_backend_of(item) or "").of_bf16:
        return True
    return item.callspec.params.get("dtype", torch.bfloat16) is torch.bfloat16


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test call torch.set_num_threads; restores the number afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dirty_memory() -> Iterator[None]:
    """Every tensor that torch leaves uninitialised holds NaN, so that what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Every run draws new random cases; --hypothesis-seed repeats one. Groups of tests stay in one process."""
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))
    if config.getoption("dist", None) == "load":
        config.option.dist = "loadgroup"


# What the processes of `pytest -n` have measured, for the end of the run.
PRECISION: list[str] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()
    lines = precision.table() if (precision := sys.modules.get("precision")) else []
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["precision"] = lines
    else:
        PRECISION.extend(lines)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    PRECISION.extend(getattr(node, "workeroutput", {}).get("precision", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print which backends there are, what repeats this run, and the geometric means of the precision ratios."""
    terminalreporter.section("backends")
    for name in BACKENDS:
        terminalreporter.write_line(f"{name}: {f'not here: {MISSING[name]}' if name in MISSING else 'here'}")
    seed, profile = config.option.hypothesis_seed, os.environ.get("HEEDFUL_HYPOTHESIS", "ci")
    terminalreporter.section("random cases")
    line = f"HEEDFUL_HYPOTHESIS={profile}  --hypothesis-seed={seed}" if hypothesis else f"none: left {collect_ignore}"
    terminalreporter.write_line(f"torch {torch.__version__}  {line}")
    if PRECISION:
        terminalreporter.section("rms error / torch's in the same dtype, geometric means (at most 1.0)")
        for line in PRECISION:
            terminalreporter.write_line(line)
