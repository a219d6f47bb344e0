#!/usr/bin/env python3
"""heedful beside torch's own attention on this machine's CPU, forward and backward, as a Markdown table.

Both are timed in turns in one process, so that they meet the same noise; the best of several runs counts. Results are
compared before they are timed. Run it on a quiet machine: on two cores, whatever runs beside it halves its figures.

    python benchmarks/beside_torch.py [--threads N] [--only SUBSTRING] [--repeats N]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import heedful

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ALLOWED = {F32: 1e-4, BF16: 6e-2, F16: 6e-2}  # difference from torch, relative to the largest value

# name, dtype, B, Hq, Hk, Sq, Sk, D, form
CASES = [
    ("short sequences", F32, 32, 12, 12, 64, 64, 64, "full"),
    ("ViT", F32, 1, 12, 12, 197, 197, 64, "full"),
    ("full", F32, 1, 12, 12, 1024, 1024, 64, "full"),
    ("causal", F32, 1, 12, 12, 1024, 1024, 64, "causal"),
    ("causal, grouped heads", F32, 1, 16, 2, 2048, 2048, 64, "causal"),
    ("full, long", F32, 1, 4, 4, 4096, 4096, 128, "full"),
    ("causal, long", F32, 1, 4, 4, 4096, 4096, 128, "causal"),
    ("padded batch", F32, 8, 12, 12, 512, 512, 64, "padding"),
    ("bool mask", F32, 1, 12, 12, 1024, 1024, 64, "mask"),
    ("bias with its gradient", F32, 1, 12, 12, 1024, 1024, 64, "bias"),
    ("window of 256", F32, 1, 4, 4, 4096, 4096, 64, "window"),
    ("one query on a cache", F32, 8, 32, 8, 1, 4096, 128, "full"),
    ("full", BF16, 1, 12, 12, 1024, 1024, 64, "full"),
    ("causal", BF16, 1, 12, 12, 1024, 1024, 64, "causal"),
    ("one query on a cache", BF16, 8, 32, 8, 1, 4096, 128, "full"),
    ("full", F16, 1, 12, 12, 1024, 1024, 64, "full"),
    ("causal", F16, 1, 12, 12, 1024, 1024, 64, "causal"),
]
WINDOW = 256


def in_turns(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """The best time of each, in seconds."""
    best = [float("inf")] * len(calls)
    for turn in range(repeats + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn:  # the first warms up
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def measure(
    dtype: torch.dtype, B: int, Hq: int, Hk: int, Sq: int, Sk: int, D: int, form: str, repeats: int
) -> list[float]:
    """heedful's and torch's seconds forward, then backward (none for a single query: it decodes)."""
    q, k, v = (torch.randn(B, h, s, D).to(dtype).requires_grad_() for h, s in ((Hq, Sq), (Hk, Sk), (Hk, Sk)))
    theirs: dict = {"enable_gqa": Hq != Hk}
    ours, function, leaves = dict(theirs), heedful.scaled_dot_product_attention, [q, k, v]
    if form == "causal":
        theirs["is_causal"] = ours["is_causal"] = True
    elif form == "padding":
        theirs["attn_mask"] = ours["attn_mask"] = (torch.arange(Sk) < Sk * 3 // 4).expand(B, 1, 1, Sk)
    elif form == "mask":
        theirs["attn_mask"] = ours["attn_mask"] = torch.rand(B, 1, Sq, Sk) > 0.1
    elif form == "bias":
        leaves.append(torch.randn(1, Hq, Sq, Sk).to(dtype).requires_grad_())
        theirs["attn_mask"] = ours["attn_mask"] = leaves[3]
    elif form == "window":
        i, j = torch.arange(Sq)[:, None], torch.arange(Sk)
        theirs["attn_mask"] = (j <= i) & (j > i - WINDOW)
        ours, function = {"mask": heedful.Causal() & heedful.SlidingWindow(WINDOW - 1, 0)}, heedful.attention

    outs = function(q, k, v, **ours), F.scaled_dot_product_attention(q, k, v, **theirs)
    gradient = torch.randn_like(outs[0])

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    for mine, their in zip((outs[0], *backward(outs[0])), (outs[1], *backward(outs[1])), strict=True):
        if not difference(mine, their) < ALLOWED[dtype]:
            raise SystemExit(
                f"{dtype} {form}: differs from torch by {difference(mine, their):.2g} of the largest value"
            )
    with torch.no_grad():
        times = in_turns(
            repeats, lambda: function(q, k, v, **ours), lambda: F.scaled_dot_product_attention(q, k, v, **theirs)
        )
    return times if Sq == 1 else times + in_turns(repeats, lambda: backward(outs[0]), lambda: backward(outs[1]))


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    kernel = heedful.explain(*(torch.empty(1, 1, 1, 8),) * 3).kernel
    print(f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {args.threads} threads, torch {torch.__version__}, {kernel}\n")
    print("| | dtype | B x Hq/Hk x Sq x Sk x D | forward, ms | x torch | backward, ms | x torch |")
    print("|---|---|---|---|---|---|---|")
    for name, dtype, B, Hq, Hk, Sq, Sk, D, form in CASES:
        if args.only not in name:
            continue
        times = measure(dtype, B, Hq, Hk, Sq, Sk, D, form, args.repeats)
        cells = [
            f"{mine * 1e3:.2f} | {theirs / mine:.2f}" for mine, theirs in zip(times[::2], times[1::2], strict=True)
        ]
        cells += ["- | -"] * (2 - len(cells))
        shape = f"{B} x {Hq}/{Hk} x {Sq} x {Sk} x {D}"
        print(f"| {name} | {str(dtype).removeprefix('torch.')} | {shape} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
