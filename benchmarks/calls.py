#!/usr/bin/env python3
"""What a call costs around its kernel: one query and one key, heedful's functions in turns with torch's.

    python benchmarks/calls.py [--threads N] [--turns N]

Prints a Markdown table of microseconds, the best call of all turns. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import heedful
from heedful.bench.timing import cpu_name, in_turns

D = 64

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def functions() -> dict[str, tuple[Call, Call]]:
    """By name: heedful's and torch's."""
    causal, window = heedful.Causal(), heedful.SlidingWindow(16, 0)
    torchs, seen = F.scaled_dot_product_attention, torch.ones(1, 1, dtype=torch.bool)
    is_causal = lambda q, k, v: torchs(q, k, v, is_causal=True)  # noqa: E731
    return {
        "scaled_dot_product_attention(q, k, v)": (heedful.scaled_dot_product_attention, torchs),
        "scaled_dot_product_attention(q, k, v, is_causal=True)": (
            lambda q, k, v: heedful.scaled_dot_product_attention(q, k, v, is_causal=True),
            is_causal,
        ),
        "attention(q, k, v)": (heedful.attention, torchs),
        "attention(q, k, v, mask=Causal())": (lambda q, k, v: heedful.attention(q, k, v, mask=causal), is_causal),
        "attention(q, k, v, mask=SlidingWindow(16, 0))": (
            lambda q, k, v: heedful.attention(q, k, v, mask=window),
            lambda q, k, v: torchs(q, k, v, attn_mask=seen),
        ),
    }


def ways(call: Call) -> dict[str, Callable[[], object]]:
    """The call without a gradient, recorded, and with its backward."""
    plain = [torch.randn(1, 1, 1, D) for _ in range(3)]
    leaves = [x.clone().requires_grad_() for x in plain]
    return {
        "no gradient": lambda: call(*plain),
        "recorded": lambda: call(*leaves),
        "with backward": lambda: call(*leaves).sum().backward(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {args.threads} threads, torch {torch.__version__}")
    print(f"float32, B 1 x H 1 x S 1 x D {D}; microseconds: heedful, torch in turns with it\n")
    table = {name: tuple(map(ways, pair)) for name, pair in functions().items()}
    kinds = list(ways(heedful.attention))
    print(f"| | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for name, (ours, torchs) in table.items():
        cells = []
        for kind in kinds:
            seconds = in_turns(args.turns, ours[kind], torchs[kind])
            cells.append(", ".join(f"{x * 1e6:.1f}" for x in seconds))
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
