"""heedful beside torch over some hundred shapes and forms, in turns in one process: where is it the slower one?

Each cell is small enough for about a second. Results are compared before they are timed. The cells are written to a
JSON file as they come, and those that are there already are not measured again, so a sweep may go on where it stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import agreement, timing
from .peers.ours import Heedful
from .peers.sdpa import Torch
from .report import QUIET, machine, table
from .rows import SHORT, Row

REPEATS, BURST, BUDGET = 2, 0.02, 1.0  # turns, and seconds of each and of all
TRIALS = 3  # how often to try for a moment that others leave alone
DTYPES = tuple(SHORT)
DIMS = (16, 17, 32, 33, 40, 63, 64, 65, 72, 80, 96, 100, 127, 128, 160, 192, 256)
LONGEST = {"float32": 8192, "bfloat16": 2048, "float16": 2048}  # torch's backward of half precision takes seconds there
LENGTHS = (1, 2, 7, 16, 33, 64, 100, 128, 197, 256, 384, 511, 1024, 2048, 4096, 8192)
VARIED = ("window", "padded", "lengths", "mask", "bias", "bias-gradient", "dropout", "varlen")


def cells() -> list[Row]:
    """What is swept, one aspect at a time, in every dtype; no row twice."""
    rows: list[Row] = []
    for dtype in DTYPES:
        for form in ("full", "causal"):
            rows += [Row(dtype, 1, 8, 8, 512, 512, d, form) for d in DIMS]
            rows += [Row(dtype, 1, _heads(s), _heads(s), s, s, 64, form) for s in LENGTHS if s <= LONGEST[dtype]]
            rows += [
                Row(dtype, b, 12, 12, s, s, 64, form) for b, s in ((32, 16), (32, 32), (32, 64), (8, 128), (8, 256))
            ]
            rows += [Row(dtype, b, 1, 1, s, s, 64, form) for b, s in ((1, 64), (1, 256), (1, 1024), (2, 2048))]
            rows += [Row(dtype, 1, *heads, s, s, 64, form) for heads in ((32, 8), (16, 2), (8, 1)) for s in (128, 1024)]
        for heads in ((8, 8), (32, 8), (8, 1)):
            rows += [Row(dtype, 1, *heads, q, k, 128) for q in (1, 4, 8, 16, 24, 48) for k in (128, 1024, 8192)]
        rows += [
            Row(dtype, 8, 32, 8, 1, 2048, 128),
            Row(dtype, 32, 8, 8, 1, 512, 64),
            Row(dtype, 1, 32, 1, 1, 32768, 128),
        ]
        rows += [Row(dtype, 1, 8, 8, q, k, 64) for q, k in ((64, 1024), (1024, 64), (256, 77), (1024, 77))]
        for form in VARIED:
            batches = ((8, 4, 64), (4, 4, 256), (2, 4, 1024)) if form in ("padded", "lengths", "varlen") else ()
            rows += [Row(dtype, b, h, h, s, s, d, form) for b, h, s in batches for d in (64, 128)]
            if not batches:
                rows += [Row(dtype, 1, 8, 8, s, s, d, form) for s in (64, 256, 1024) for d in (64, 128)]
                rows += [Row(dtype, 1, 2, 2, 2048, 2048, 64, form), Row(dtype, 1, 8, 8, 197, 197, 80, form)]
    return list(dict.fromkeys(rows))


def _heads(length: int) -> int:
    return 12 if length <= 1024 else max(1, 8 * 1024**2 // length**2)


def measure(row: Row, threads: int) -> dict[str, Any]:
    """One cell: seconds of both, forward and backward, or what is wrong."""
    inputs, peers = row.draw(), (Heedful(threads), Torch(threads))
    calls = [peer.prepare(row, inputs) for peer in peers]
    cell: dict[str, Any] = {"name": row.name, **vars(row)}
    for direction in row.directions:
        if direction == "backward":
            for call in calls:
                call.record()
        if row.form != "dropout":  # each draws its own
            ours, theirs = (call.results(direction) for call in calls)
            if wrong := agreement.apart(row, inputs, ours, theirs)[1]:
                cell["wrong"] = f"{direction}: {wrong}"
                break
        pair = [getattr(call, direction) for call in calls]
        cell[direction], cell[f"others, {direction}"] = _undisturbed(pair)
    return cell


def _undisturbed(pair: list[Callable[[], object]]) -> tuple[list[float], float]:
    """Their times in turns, and what share of the processors others took meanwhile: of the best of some trials."""
    trials, end = [], time.monotonic() + 2 * BUDGET
    for _ in range(TRIALS):
        others = timing.Others()
        times = timing.in_turns(REPEATS, *pair, burst=BURST, budget=BUDGET)
        trials.append((others.share(), times))
        if trials[-1][0] <= QUIET or time.monotonic() >= end:
            break
        time.sleep(0.2)
    share, times = min(trials, key=lambda trial: trial[0])
    return times, share


def run(
    path: Path, rows: Iterable[Row], threads: int, minutes: float, progress: Callable[[str, int], None]
) -> list[dict]:
    """Measures the rows that are not in the file yet, for so many minutes; returns all that it holds then."""
    end = time.monotonic() + 60 * minutes
    found: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"machine": machine(threads), "cells": []}
    )
    done = {cell["name"] for cell in found["cells"]}
    for i, row in enumerate(rows):
        progress(row.name, i)
        if time.monotonic() >= end:
            break
        if row.name not in done:
            start = time.perf_counter()
            found["cells"].append(measure(row, threads) | {"took": round(time.perf_counter() - start, 2)})
            path.write_text(json.dumps(found, indent=1))
    return found["cells"]


def ratios(cells: list[dict]) -> list[tuple[float, str, dict]]:
    """torch's time over heedful's, direction and cell, the worst first."""
    both = (
        (cell[direction][1] / cell[direction][0], direction, cell)
        for cell in cells
        for direction in ("forward", "backward")
        if direction in cell
    )
    return sorted(both, key=lambda entry: entry[0])


def report(cells: list[dict]) -> str:
    """Markdown: what is wrong, where heedful loses, and a summary for each form and dtype."""
    found = ratios(cells)
    lines = [f"WRONG  {cell['name']}, {cell['wrong']}" for cell in cells if "wrong" in cell]
    disturbed = sum(cell[f"others, {direction}"] > QUIET for _, direction, cell in found)
    if disturbed:
        lines.append(f"{disturbed} were measured while others took over {QUIET:.0%} of the processors.")
    losing = [entry for entry in found if entry[0] < 1]
    lines += [f"{len(losing)} of {len(found)} are slower than torch:", ""]
    body = [[c["name"], d, *(f"{1e3 * s:.3f}" for s in c[d]), f"{ratio:.2f}"] for ratio, d, c in losing]
    lines += table(["", "", "heedful, ms", "torch, ms", "x torch"], body)
    groups: dict[tuple[str, str, str], list[tuple[float, dict]]] = {}
    for ratio, direction, cell in found:
        groups.setdefault((cell["form"], cell["dtype"], direction), []).append((ratio, cell))
    body = []
    for key, group in sorted(groups.items()):
        mean = math.exp(sum(math.log(ratio) for ratio, _ in group) / len(group))
        slower, (worst, cell) = sum(ratio < 1 for ratio, _ in group), group[0]
        body.append([*key, str(len(group)), str(slower), f"{mean:.2f}", f"{worst:.2f}", cell["name"]])
    head = ["form", "dtype", "", "cells", "slower", "x torch, geometric mean", "worst", "which"]
    return "\n".join([*lines, "", *table(head, body)])
