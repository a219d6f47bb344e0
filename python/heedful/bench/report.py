"""What was found, as Markdown tables and as words about what failed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch

import heedful

from . import timing
from .peers import OURS, PEERS

MIB = 2**20
QUIET, STEADY = 0.05, 0.1  # what others may take of the processors, and how far the product's rate may move
ABOUT = """\
Peers: their time over heedful's, so above 1 heedful is faster. Share of the limit: what a matrix product of the
dtype (or of float32, where that is faster) would take for the operations, or a read of memory for the bytes of q, k,
v and out, whichever is longer, over heedful's time; both rates are measured between the turns of the row."""

Found = dict[str, Any]
Cells = list[str]


class Notes:
    """Reasons, numbered as they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        return [f"[{i}] {text}  " for i, text in enumerate(self.texts, 1)]


def machine(threads: int, names: Iterable[str] = (OURS,)) -> dict[str, Any]:
    """What the figures hold for."""
    kernel, of_bfloat16 = (
        heedful.explain(*(torch.empty(1, 1, 1, 8, dtype=dtype),) * 3).kernel for dtype in (torch.float, torch.bfloat16)
    )
    peers = [entry for entry in map(PEERS.get, names) if not entry.missing and entry.packages[0] != "torch"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": timing.cpu_name(),
        "threads": threads,
        "kernel": kernel if kernel == of_bfloat16 else f"{kernel}, of bfloat16 {of_bfloat16}",
        "versions": list(dict.fromkeys(["torch " + torch.__version__, *(entry.version for entry in peers)])),
    }


def text(found: Found) -> str:
    """Everything, in Markdown."""
    about, names = found["machine"], found["peers"]
    lines = [f"{about['date']}, {about['cpu']}, {about['threads']} threads, {about['kernel']}"]
    lines += [", ".join(about["versions"]), "", ABOUT]
    notes = Notes()
    for direction in ("forward", "backward"):
        body = [_row(row, direction, names, notes) for row in found["rows"] if direction in row]
        if body:
            others = [name for name in names if name != OURS]
            lines += ["", *table([direction, "ms", "GF/s", "share of the limit", *others], body)]
            lines += ["", _means(found["rows"], direction, others)]
    if found["memory"]:
        lines += ["", "Peak memory beyond the inputs, bytes a token:", "", *_memory(found["memory"], names, notes)]
    return "\n".join([*lines, "", *notes.lines(), *warnings(found)])


def _row(row: Found, direction: str, names: list[str], notes: Notes) -> Cells:
    peers = row[direction]["peers"]
    ours = peers[OURS]
    if "reason" in ours:
        head = [notes.mark(f"{OURS}: {ours['reason']}"), "-", "-"]
    else:
        head = [f"{1e3 * ours['seconds']:.3f}", f"{ours['gflops']:.1f}", f"{ours['share']:.2f}"]
    cells = []
    for name in names:
        if name == OURS:
            continue
        if "reason" in peers[name]:
            cells.append(notes.mark(f"{name}: {peers[name]['reason']}"))
        else:
            cells.append(f"{peers[name]['seconds'] / ours['seconds']:.2f}" if "seconds" in ours else "-")
    return [row["name"], *head, *cells]


def _means(rows: list[Found], direction: str, names: list[str]) -> str:
    texts = []
    for name in names:
        both = [(row[direction]["peers"][name], row[direction]["peers"][OURS]) for row in rows if direction in row]
        ratios = [a["seconds"] / b["seconds"] for a, b in both if "seconds" in a and "seconds" in b]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            texts.append(f"{name} {mean:.2f} ({sum(ratio < 1 for ratio in ratios)} of {len(ratios)} below 1)")
    return f"Geometric means, {direction}: {', '.join(texts) or 'nothing to compare'}."


def _memory(rows: list[Found], names: list[str], notes: Notes) -> list[str]:
    body = []
    for row in rows:
        for direction in ("forward", "backward"):
            cells = []
            for name in names:
                entry = row[direction][name]
                known = "bytes" in entry
                cells.append(f"{entry['bytes'] / row['Sq']:.0f}" if known else notes.mark(f"{name}: {entry['reason']}"))
            body.append([row["name"], direction, *cells])
    return table(["", "", *names], body)


def table(head: Cells, body: list[Cells]) -> list[str]:
    """Markdown that is aligned as text, too."""
    widths = [max(len(cells[i]) for cells in (head, *body)) for i in range(len(head))]

    def line(cells: Cells) -> str:
        return (
            "| "
            + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths)))
            + " |"
        )

    return [line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, body)]


def warnings(found: Found) -> list[str]:
    """What makes the figures doubtful, in words."""
    measured = [row[direction] for row in found["rows"] for direction in ("forward", "backward") if direction in row]
    lines = []
    if disturbed := sum(entry["others"] > QUIET for entry in measured):
        lines.append(
            f"NOTE: others took over {QUIET:.0%} of the processors in {disturbed} of {len(measured)} measurements"
        )
    rates: dict[str, list[float]] = {}
    for row in found["rows"]:
        rates.setdefault(row["dtype"], []).append(row["forward"]["limit"]["products"])
    for dtype, values in rates.items():
        if (drift := 1 - min(values) / max(values)) > STEADY:
            lines.append(
                f"NOTE: the rate of the matrix product moved by {drift:.0%} in {dtype}: the machine was not steady"
            )
    return ["", *lines] if lines else []


def failures(found: Found) -> list[str]:
    """What is wrong: results that do not agree, and heedful not running."""
    failed = []
    for row in found["rows"]:
        for direction in ("forward", "backward"):
            for name, entry in row.get(direction, {"peers": {}})["peers"].items():
                if entry.get("wrong") or (name == OURS and "reason" in entry):
                    failed.append(f"{row['name']}, {direction}, {name}: {entry['reason']}")
    return failed
