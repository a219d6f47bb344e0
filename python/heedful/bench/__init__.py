"""The bench: heedful's speed and memory beside every peer that is installed, and a sweep beside torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import measure, report, rows, sweep
from .peers import OURS, PEERS

EXTRA = "pip install 'heedful[bench]'"
RESULTS, TABLE, SWEEP = "bench.json", "bench.md", "sweep"
REPEATS, QUICK_REPEATS = 7, 2


class CannotRun(RuntimeError):
    """What was asked for is not there."""


@dataclass(frozen=True)
class Settings:
    out: Path
    threads: int
    repeats: int | None = None
    quick: bool = False
    peers: tuple[str, ...] = tuple(PEERS)
    rows: str = ""  # parts of the names of the rows to measure, with commas between them
    minutes: float = float("inf")  # after which no row begins


def run(settings: Settings) -> list[str]:
    """Measures, prints the tables, writes them, the figures as JSON and the pictures; returns what failed, in words."""
    if unknown := [name for name in settings.peers if name not in PEERS]:
        raise CannotRun(f"heedful bench: --peers: expected some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    names = [name for name in PEERS if name == OURS or name in settings.peers]
    chosen = _chosen(rows.quick_rows() if settings.quick else rows.rows(), settings.rows)
    memory = [] if settings.rows else rows.MEMORY[: 2 if settings.quick else None]
    repeats = settings.repeats or (QUICK_REPEATS if settings.quick else REPEATS)
    for name in names:
        if missing := PEERS[name].missing:
            print(f"{name} is {missing}; all peers: {EXTRA}")
    settings.out.mkdir(parents=True, exist_ok=True)
    with _progress(len(chosen) + len(memory)) as show:
        times, peaks = measure.run(names, chosen, memory, settings.threads, repeats, settings.minutes, show)
    if left := len(chosen) + len(memory) - len(times) - len(peaks):
        print(f"{left} of {len(chosen) + len(memory)} rows were left out: {settings.minutes:g} minutes were over.")
    found = {
        "machine": report.machine(settings.threads, names),
        "peers": names,
        "repeats": repeats,
        "rows": times,
        "memory": peaks,
    }
    (settings.out / RESULTS).write_text(json.dumps(found, indent=1))
    text = report.text(found)
    (settings.out / TABLE).write_text(text + "\n")
    print(text, "", sep="\n")
    _wrote(settings.out / RESULTS, settings.out / TABLE, *_draw(found, settings.out))
    return report.failures(found)


def run_sweep(settings: Settings) -> list[str]:
    """As run, for the sweep beside torch."""
    chosen = _chosen(sweep.cells(), settings.rows)
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / f"{SWEEP}.json"
    with _progress(len(chosen)) as show:
        cells = sweep.run(path, chosen, settings.threads, settings.minutes, show)
    text = sweep.report(cells)
    path.with_suffix(".md").write_text(text + "\n")
    print(text, "", sep="\n")
    if len(cells) < len(chosen):
        print(f"{len(chosen) - len(cells)} cells are left: the same command goes on with them.")
    _wrote(path, path.with_suffix(".md"))
    return [f"{cell['name']}, {cell['wrong']}" for cell in cells if "wrong" in cell]


def _chosen(every: list[rows.Row], parts: str) -> list[rows.Row]:
    chosen = [row for row in every if any(part in row.name for part in parts.split(","))]
    if not chosen:
        raise CannotRun(f"heedful bench: --rows: expected part of a name such as {every[0].name!r}, got {parts!r}")
    return chosen


def _draw(found: report.Found, out: Path) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        print(f"The pictures need matplotlib: {EXTRA}")
        return []
    from . import pictures

    return pictures.draw(found, out)


def _wrote(*paths: Path) -> None:
    for path in paths:
        print(f"Wrote {path}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar where rich is installed."""
    if importlib.util.find_spec("rich") is None:
        yield lambda text, done: None
        return
    from rich import progress as rich

    columns = rich.BarColumn(24), rich.MofNCompleteColumn(), rich.TimeElapsedColumn()
    with rich.Progress(*columns, rich.TextColumn("{task.description}"), transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda text, done: bar.update(task, description=text, completed=done)
