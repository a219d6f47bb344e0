#!/usr/bin/env python3
"""What each score feature costs beside the plain kernel, what empty tiles save, and what memory a long call takes.

    python benchmarks/features.py cost [--threads N] [--repeats N]      time over that of the plain call
    python benchmarks/features.py blocks [--threads N] [--repeats N]    time against the share of tiles kept
    python benchmarks/features.py memory                                peak memory beyond the inputs, a process a row
    python benchmarks/features.py contexts [--threads N]                time and memory of very long contexts

Each prints Markdown tables. Every call takes turns with the plain one in one process; its ratio is the median of those
of neighbours, which a drift of the machine leaves alone, its time the best one. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

import heedful
from heedful.bench.timing import cpu_name, in_turns

SIZES = {"B": 1, "H": 4, "S": 4096, "D": 64}
LONG = {"B": 1, "H": 2, "S": 16384, "D": 64}
CONTEXT = {"B": 1, "H": 1, "D": 64}
WINDOW = 256
MIB = 2**20


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


Call = tuple[Callable[[], dict], list[Tensor]]  # the options of a call, and the parameters that want a gradient


def features(H: int, S: int) -> dict[str, Call]:
    """By name: the options of a call, made anew for each, and the parameters among them that want a gradient."""
    slopes, table, sinks, scale, bandwidth = leaf(H), leaf(32, H), leaf(H), leaf(H), torch.full((H,), 8.0)
    bandwidth.requires_grad_()
    return {
        "plain": (dict, []),
        "softcap": (lambda: {"softcap": 30.0}, []),
        "ALiBi": (lambda: {"bias": heedful.ALiBi(slopes)}, [slopes]),
        "T5's bias": (lambda: {"bias": heedful.RelativeBias(table)}, [table]),
        "sinks": (lambda: {"sinks": sinks}, [sinks]),
        "dropout": (lambda: {"dropout_p": 0.1, "seed": 1}, []),
        "scale per head": (lambda: {"scale": scale}, [scale]),
        "cosine": (lambda: {"similarity": "cosine", "scale": 10.0}, []),
        "Gaussian": (lambda: {"similarity": heedful.Gaussian(bandwidth)}, [bandwidth]),
        "hard": (lambda: {"normalizer": "hard"}, []),
    }


def beside(plain: Callable[[], object], call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of the call, the best; the median of its ratios to the plain one right before it."""
    turns = [in_turns(0, plain, call) for _ in range(repeats + 1)][1:]
    return min(seconds for _, seconds in turns), statistics.median(b / a for a, b in turns)


def rows(calls: dict[str, Call], repeats: int, H: int, S: int, D: int, B: int) -> Iterator[str]:
    """A row of the table for each call, of which the first one is plain."""
    q, k, v = (torch.randn(B, H, S, D).requires_grad_() for _ in range(3))
    gradient = torch.randn(B, H, S, D)

    def forward(options: Callable[[], dict]) -> Callable[[], Tensor]:
        return lambda: heedful.attention(q, k, v, **options())

    def backward(options: Callable[[], dict], parameters: list[Tensor]) -> Callable[[], object]:
        out, inputs = forward(options)(), [q, k, v, *parameters]
        return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True, allow_unused=True)

    options, parameters = next(iter(calls.values()))
    plain_forward, plain_backward = forward(options), backward(options, parameters)
    for name, (options, parameters) in calls.items():
        with torch.no_grad():
            forwards = beside(plain_forward, forward(options), repeats)
        backwards = beside(plain_backward, backward(options, parameters), repeats)
        yield f"| {name} | " + " | ".join(f"{t * 1e3:.1f} | {ratio:.3f}" for t, ratio in (forwards, backwards)) + " |"


def cost(repeats: int) -> None:
    for mask in (None, heedful.Causal()):
        calls = {
            name: (lambda m=mask, o=options: {"mask": m, **o()}, parameters)
            for name, (options, parameters) in features(SIZES["H"], SIZES["S"]).items()
        }
        print(f"\n| {'full' if mask is None else 'causal'} | forward, ms | x plain | backward, ms | x plain |")
        print("|---|---|---|---|---|")
        print(*rows(calls, repeats, **SIZES), sep="\n")


def blocks(repeats: int) -> None:
    tiles, generator = SIZES["S"] // 64, torch.Generator().manual_seed(0)
    calls: dict[str, Call] = {"no mask": (dict, [])}
    order = torch.randperm(tiles * tiles, generator=generator)
    for share in (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0):
        kept = (order < share * tiles * tiles).view(tiles, tiles)
        dense = kept.repeat_interleave(64, 0).repeat_interleave(64, 1)
        mask = heedful.BlockMask.from_tensor(dense)
        calls[f"{share:.1%}"] = (lambda mask=mask: {"mask": mask}, [])
    print("\n| tiles kept | forward, ms | x no mask | backward, ms | x no mask |\n|---|---|---|---|---|")
    print(*rows(calls, repeats, **SIZES), sep="\n")


def long_biases() -> dict[str, Callable[[], object]]:
    """Biases that broadcast, at LONG's sizes."""
    B, H, S = LONG["B"], LONG["H"], LONG["S"]
    return {
        "none": lambda: None,
        "[1, 1, 1, Sk]": lambda: leaf(1, 1, 1, S),
        "[B, 1, 1, Sk]": lambda: leaf(B, 1, 1, S),
        "[1, Hq, 1, Sk]": lambda: leaf(1, H, 1, S),
        "[1, Hq, Sq, 1]": lambda: leaf(1, H, S, 1),
        "[1, Hq, 1, 1]": lambda: leaf(1, H, 1, 1),
        "ALiBi, slopes [Hq]": lambda: heedful.ALiBi(leaf(H)),
        "T5's table [32, Hq]": lambda: heedful.RelativeBias(leaf(32, H)),
        "table of 2049 distances [2049, Hq]": lambda: heedful.RelativeBias.clipped(leaf(2049, H)),
    }


def one_call(B: int, H: int, S: int, D: int, options: Callable[[], dict]) -> tuple[float, float, float]:
    """Seconds forward and backward, and peak MiB beyond the inputs, of the first call in this process."""
    q, k, v = (torch.randn(B, H, S, D).requires_grad_() for _ in range(3))
    small = [torch.randn(1, H, 64, D).requires_grad_() for _ in range(3)]
    heedful.attention(*small).sum().backward()  # what torch takes at its first call is not the call's
    given = options()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    out = heedful.attention(q, k, v, **given)
    forward = time.perf_counter() - start
    out.sum().backward()
    backward = time.perf_counter() - start - forward
    return forward, backward, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory_row(name: str) -> None:
    B, H, S, _ = LONG.values()
    forward, backward, peak = one_call(**LONG, options=lambda: {"bias": long_biases()[name]()})
    print(f"| {name} | {peak:.0f} | {B * H * S * S * 4 / MIB:.0f} | {forward + backward:.1f} |")


def contexts() -> dict[str, tuple[int, float, Callable[[], dict]]]:
    """By name: S, the pairs that meet, and the options of a call."""
    S, many = 2**17, 2**20
    window = heedful.SlidingWindow(WINDOW - 1, 0)
    return {
        f"full, {S} tokens": (S, S * S, dict),
        f"causal, {S} tokens": (S, S * S / 2, lambda: {"mask": heedful.Causal()}),
        f"window of {WINDOW}, {many} tokens": (many, many * WINDOW, lambda: {"mask": window}),
    }


def contexts_row(name: str) -> None:
    B, H, D = CONTEXT.values()
    S, pairs, options = contexts()[name]
    forward, backward, peak = one_call(B, H, S, D, options)
    rate = 4 * B * H * pairs * D / 1e9
    print(
        f"| {name} | {forward:.1f} | {rate / forward:.0f} | {backward:.1f} | {2.5 * rate / backward:.0f} "
        f"| {7 * B * H * S * D * 4 / MIB:.0f} | {peak:.0f} | {B * H * S * S * 4 / MIB:.0f} |"
    )


def each_in_a_process(what: str, rows: Iterable[str], threads: int) -> None:
    sys.stdout.flush()
    for row in rows:
        subprocess.run([sys.executable, __file__, what, "--threads", str(threads), "--row", row], check=True)


def memory(threads: int) -> None:
    print(f"\nInputs, out and gradients: {7 * LONG['B'] * LONG['H'] * LONG['S'] * LONG['D'] * 4 / MIB:.0f} MiB.")
    print("\n| bias that wants a gradient | peak, MiB | Sq x Sk scores, MiB | seconds |\n|---|---|---|---|")
    each_in_a_process("memory", long_biases(), threads)


def long_contexts(threads: int) -> None:
    print("\n| | forward, s | GF/s | backward, s | GF/s | inputs, out and gradients, MiB | peak, MiB | scores, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    each_in_a_process("contexts", contexts(), threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "blocks", "memory", "contexts"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.row:
        return {"memory": memory_row, "contexts": contexts_row}[args.what](args.row)
    kernel = heedful.explain(*(torch.empty(1, 1, 1, 8),) * 3).kernel
    sizes = {"memory": LONG, "contexts": CONTEXT}.get(args.what, SIZES)
    print(f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {args.threads} threads, torch {torch.__version__}, {kernel}")
    print(f"float32, {' x '.join(f'{name} {n}' for name, n in sizes.items())}")
    if args.what in ("cost", "blocks"):
        {"cost": cost, "blocks": blocks}[args.what](args.repeats)
    else:
        {"memory": memory, "contexts": long_contexts}[args.what](args.threads)


if __name__ == "__main__":
    main()
