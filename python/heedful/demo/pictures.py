"""The demo's pictures, drawn with matplotlib into PNG files."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  (after the choice of backend)
from matplotlib.colors import PowerNorm  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

INK, TORCH, HEEDFUL, WARNING = "#333333", "#f2a65a", "#1f4e79", "#b03030"
SHOWN = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5"}  # how blanks are written along the axes
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def loss_curves(path: Path, torchs: list[float], ours: list[float], limit: float, first: int, title: str) -> None:
    """Both loss curves, and below them their difference step by step, with the limit that holds for the first steps."""
    steps = range(1, len(ours) + 1)
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(8, 5.6), sharex=True, height_ratios=[2.4, 1], layout="constrained"
        )
        top.plot(steps, torchs, color=TORCH, linewidth=4, label="torch.nn.MultiheadAttention")
        top.plot(steps, ours, color=HEEDFUL, linewidth=1, label="after heedful.swap(model)")
        top.set(ylabel="cross-entropy per character", title=title)
        top.legend(frameon=False)
        differences = [abs(a - b) for a, b in zip(torchs, ours)]
        bottom.plot(steps, differences, ".", color=HEEDFUL, markersize=2.5)
        bottom.set_yscale("symlog", linthresh=1e-7)  # linear below: equal losses are at 0
        bottom.set_yticks([0, 1e-6, 1e-4, 1e-2])
        bottom.plot([1, first], [limit, limit], color=WARNING, linewidth=1.5)
        bottom.text(1, 1.6 * limit, f" limit for the first {first} steps", color=WARNING, fontsize=9)
        bottom.set(xlabel="training step", ylabel="their difference")
        bottom.set_ylim(-2e-8, max(30 * limit, 3 * max(differences)))
        bottom.set_xlim(1, max(len(ours), 2))
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (top, bottom):
            axes.grid(color="#e6e6e6", linewidth=0.6)
            axes.set_axisbelow(True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def attention_maps(path: Path, text: str, maps: Tensor, title: str) -> None:
    """Weights [layers, heads, S, S] over the text's S characters: one row of panels a layer, one column a head."""
    layers, heads, length, _ = maps.shape
    ticks, labels = range(length), [SHOWN.get(c, c) for c in text]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    seen = maps.masked_fill(later, math.nan).numpy()  # NaN is not drawn
    small = {"labelsize": 8, "length": 0, "pad": 2}
    with plt.rc_context(STYLE | {"axes.spines.top": True, "axes.spines.right": True, "axes.linewidth": 0.4}):
        figure, panels = plt.subplots(
            layers, heads, figsize=(0.6 + 3 * heads, 1.6 + 3 * layers), squeeze=False, layout="constrained"
        )
        for layer, row in enumerate(panels):
            for head, axes in enumerate(row):
                image = axes.imshow(seen[layer, head], cmap="magma_r", norm=PowerNorm(0.5, 0, 1))
                axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9, pad=3)
                axes.set_xticks(ticks, labels, family="monospace")
                axes.set_yticks(ticks, labels, family="monospace")
                axes.tick_params(**small)
        figure.supylabel("the character that attends")
        figure.suptitle(title, fontsize=13)
        where = {"location": "bottom", "shrink": 0.5, "aspect": 40, "pad": 0.02}
        bar = figure.colorbar(image, ax=panels, ticks=[0, 0.1, 0.25, 0.5, 1], **where)
        bar.set_label("its attention to each character up to itself")
        bar.outline.set_linewidth(0.4)
        figure.savefig(path, dpi=110)
        plt.close(figure)
