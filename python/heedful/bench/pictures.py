"""The bench's pictures, drawn with matplotlib into PNG files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  (after the choice of backend)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402

from .peers import OURS, PEERS  # noqa: E402
from .rows import SHORT  # noqa: E402

INK, GRID, LIMIT = "#333333", "#e6e6e6", "#b03030"
COLOURS = ["#1f4e79", "#f2a65a", "#d9c08a", "#8c6bb1", "#2a9d8f", "#74c476", "#a1d99b", "#e76f51", "#999999"]
LOOKS = {name: {"color": colour} for name, colour in zip(PEERS, COLOURS)}
MARKERS = dict(zip(PEERS, "osv^DPX<>"))
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
MIB, LEAST = 2**20, 3  # as many lengths make a curve

Found = dict[str, Any]


def draw(found: Found, out: Path) -> list[Path]:
    """Writes all that there are figures for; returns the files."""
    paths = []
    with plt.rc_context(STYLE):
        for direction in ("forward", "backward"):
            if groups := curves(found["rows"], direction):
                paths.append(_speed(out / f"speed_{direction}.png", groups, direction))
        if found["rows"]:
            paths.append(_shares(out / "share_of_the_limit.png", found["rows"]))
        if found["memory"]:
            paths.append(_memory(out / "memory.png", found["memory"]))
    return paths


def curves(rows: list[Found], direction: str) -> dict[str, list[Found]]:
    """Rows that differ in length alone, under a title."""
    groups: dict[str, list[Found]] = {}
    for row in rows:
        if direction in row:
            decodes = row["Sq"] == 1
            heads = f"{row['Hq']} heads" + (f" on {row['Hk']}" if row["Hk"] != row["Hq"] else "")
            what = "one query on a cache" if decodes else row["form"]
            groups.setdefault(f"{what}, {SHORT[row['dtype']]}, B {row['B']}, {heads}, D {row['D']}", []).append(row)
    groups = {title: sorted(group, key=lambda row: row["Sk"]) for title, group in groups.items()}
    return {title: group for title, group in groups.items() if len(group) >= LEAST}


def _speed(path: Path, groups: dict[str, list[Found]], direction: str) -> Path:
    """Time above, rate below, against S: a column a group."""
    size = (0.9 + 3.6 * len(groups), 6.4)
    figure, panels = plt.subplots(2, len(groups), figsize=size, squeeze=False, sharex="col", layout="constrained")
    for (title, rows), (top, bottom) in zip(groups.items(), panels.T):
        for name in _names(rows, direction):
            points = [(row["Sk"], row[direction]["peers"][name]) for row in rows]
            points = [(s, entry) for s, entry in points if "seconds" in entry]
            x = [s for s, _ in points]
            top.plot(x, [1e3 * entry["seconds"] for _, entry in points], label=name, **_look(name))
            bottom.plot(x, [entry["gflops"] for _, entry in points], **_look(name))
        limits = [(row["Sk"], row[direction]) for row in rows]
        x = [s for s, _ in limits]
        least = [entry["limit"]["seconds"] for _, entry in limits]
        label = {"color": LIMIT, "linestyle": "--", "linewidth": 1, "label": "the limit"}
        top.plot(x, [1e3 * seconds for seconds in least], **label)
        bottom.plot(x, [entry["flops"] / seconds / 1e9 for (_, entry), seconds in zip(limits, least)], **label)
        top.set(title=title, yscale="log", xscale="log")
        bottom.set(xlabel="keys" if "cache" in title else "S", ylim=(0, None))
        for axes in (top, bottom):
            axes.grid(color=GRID, linewidth=0.6)
        _lengths(bottom, x)
    panels[0, 0].set_ylabel(f"{direction}, ms")
    panels[1, 0].set_ylabel(f"{direction}, GF/s")
    _legend(figure, panels.ravel())
    return _save(figure, path)


def _shares(path: Path, rows: list[Found]) -> Path:
    """A line a row, a mark a peer."""
    shown = [d for d in ("forward", "backward") if any(d in row for row in rows)]
    size = (2.6 + 4 * len(shown), 1.6 + 0.19 * len(rows))
    figure, panels = plt.subplots(1, len(shown), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for direction, axes in zip(shown, panels[0]):
        for name in reversed(_names(rows, direction)):
            entries = [row.get(direction, {"peers": {}})["peers"].get(name, {}) for row in rows]
            points = [(entry["share"], y) for y, entry in enumerate(entries) if "share" in entry]
            size, order = (38, 3) if name == OURS else (16, 2)
            axes.scatter(*zip(*points), marker=MARKERS[name], s=size, zorder=order, label=name, **LOOKS[name])
        axes.axvline(1, color=LIMIT, linestyle="--", linewidth=1)
        axes.set(title=direction, xlabel="share of the limit", xlim=(0, None))
        axes.grid(color=GRID, linewidth=0.6)
    panels[0, 0].set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    panels[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    _legend(figure, panels.ravel())
    return _save(figure, path)


def _memory(path: Path, rows: list[Found]) -> Path:
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for direction, axes in zip(("forward", "backward"), panels):
        for name in PEERS:
            points = [(row["Sq"], row[direction].get(name, {}).get("bytes")) for row in rows]
            points = [(s, n / MIB) for s, n in points if n is not None]
            if points:
                axes.plot(*zip(*points), label=name, **_look(name))
        title = "forward" if direction == "forward" else "forward and backward"
        axes.set(title=title, xlabel="S", xscale="log", yscale="log")
        axes.grid(color=GRID, linewidth=0.6)
        _lengths(axes, [row["Sq"] for row in rows])
    panels[0].set_ylabel("peak beyond the inputs, MiB")
    row = rows[0]
    figure.suptitle(f"{row['form']}, {row['dtype']}, B {row['B']}, {row['Hq']} heads, D {row['D']}", fontsize=10)
    _legend(figure, panels)
    return _save(figure, path)


def _names(rows: list[Found], direction: str) -> list[str]:
    """Peers that have a time in one of the rows."""
    timed = {n for row in rows for n, e in row.get(direction, {"peers": {}})["peers"].items() if "seconds" in e}
    return [name for name in PEERS if name in timed]


def _look(name: str) -> dict[str, Any]:
    width, order = (2.4, 4) if name == OURS else (1.1, 3)
    return LOOKS[name] | {"marker": MARKERS[name], "markersize": 3.5, "linewidth": width, "zorder": order}


def _lengths(axes: Axes, lengths: Iterable[int]) -> None:
    ticks = sorted(set(lengths))
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _legend(figure: Any, panels: Iterable[Axes]) -> None:
    """One for all panels, below them, in the order of the peers."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    order = [name for name in (*PEERS, "the limit") if name in found]
    columns = max(2, int(figure.get_size_inches()[0] / 1.5))  # each takes that many inches
    figure.legend([found[name] for name in order], order, loc="outside lower center", ncols=columns)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
