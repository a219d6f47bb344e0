"""Rounding errors beside those of torch in the same dtype, both against the float64 truth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import Backend
from cases import PARAMETERS, Case, Problem, build, causal, definition_results, packed, short
from oracle_scores import seen_pairs
from table import FEATURES, TOGETHER

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("out", "dq", "dk", "dv", *(f"d{name}" for name in PARAMETERS))
# The rule is one for low precision. In float32, where a bias wants a gradient, the peer is torch's unfused softmax, and
# that keeps its probabilities for backward; a fused backward takes them from an lse that is rounded to float32.
MEANS_AT_MOST = {torch.float32: 1.75, torch.bfloat16: 1.0, torch.float16: 1.0}
LARGEST_AT_MOST = {torch.float32: 3.0, torch.bfloat16: 2.0, torch.float16: 2.0}
# Kernels for pairs of bfloat16 round P and dS for their products, as torch's fused kernel does; beside it they keep the
# rule but for noise. The other peers multiply in float32.
BF16_MEAN_AT_MOST, BF16_FUSED_MEAN_AT_MOST = 1.3, 1.02
# A head's parameters have one gradient, the sum over all pairs. The op's backward starts from an out that is rounded
# to the inputs' dtype, and their peer, the definition, from one that is not: these sums show it.
SUMS = ("dscales", "dsinks", "dslopes", "dtable")
SUMS_RMS_AT_MOST, SUMS_LARGEST_AT_MOST, SUMS_MEAN_AT_MOST = 4.0, 6.0, 3.0

# Every query sees a key, and torch has every feature, so that torch's own attention is the peer.
BESIDE_TORCH = (
    Case((1, 2, 2, 128, 128, 64, 64), seed=1),
    Case((2, 2, 2, 197, 197, 64, 64), seed=2),
    Case((1, 2, 2, 300, 300, 32, 32), seed=3),
    Case((1, 1, 1, 64, 1024, 64, 64), seed=4),
    Case((1, 1, 1, 257, 65, 128, 128), seed=5),
    Case((2, 4, 4, 17, 33, 40, 40), seed=6),
    Case((1, 2, 2, 129, 129, 17, 33), seed=7),
    Case((1, 6, 2, 100, 150, 64, 64), seed=8),
    Case((2, 2, 2, 128, 128, 64, 64), layouts=("bshd",), seed=9),
    causal((1, 2, 2, 197, 197, 64, 64), seed=10),
    causal((1, 2, 2, 512, 512, 32, 32), seed=11),
    causal((1, 4, 2, 70, 300, 80, 80), seed=12),
    Case((1, 2, 2, 200, 200, 64, 64), left=50, right=0, seed=13),
    Case((2, 2, 2, 128, 128, 64, 64), k_lengths=(100, 65), seed=14),
    Case((2, 2, 2, 100, 128, 64, 64), mask="bhqk", seed=15),
    Case((2, 2, 2, 100, 128, 64, 64), bias="hqk", seed=16),
    Case((2, 4, 4, 100, 128, 32, 32), bias="bhqk", right=30, seed=17),
    Case((2, 2, 2, 64, 64, 64, 64), bias="bk", seed=18),
    Case((2, 2, 2, 100, 128, 64, 64), bias="hqk", wide_bias=True, seed=22),
    Case((1, 2, 2, 128, 128, 64, 64), gain=4.0, seed=19),  # peaked scores
    Case((1, 2, 2, 128, 128, 64, 64), scale=0.01, seed=20),  # nearly uniform weights
    Case((1, 2, 2, 128, 128, 64, 64), shift=3.0, seed=21),  # values far from zero
)
# Those that torch runs fused.
FUSED = tuple(case for case in BESIDE_TORCH if case.bias is None and case.sizes[5] == case.sizes[6])
# torch returns no lse: the peer is heedful.reference in the inputs' dtype (which computes half precision in float32).
BESIDE_REFERENCE = (
    Case((1, 2, 2, 128, 128, 64, 64), seed=31),
    causal((1, 4, 2, 100, 197, 64, 32), seed=32),
    Case((2, 2, 2, 128, 128, 64, 64), right=0, shift=3.0, seed=33),
    *(
        Case((2, 8, 4, 100, 150, 64, 64), **options, right=50, seed=40 + n)
        for n, options in enumerate(FEATURES.values())
        if not {"normalizer", "similarity"} & options.keys()
    ),
    Case((2, 8, 4, 100, 150, 64, 64), similarity="cosine", scale=5.0, right=50, seed=58),
    Case((2, 8, 4, 100, 150, 64, 64), similarity="gaussian", scale=0.06, right=50, seed=59),
    Case((2, 8, 4, 100, 150, 64, 64), scales="bh", similarity="cosine", seed=60),
    Case((2, 8, 4, 100, 150, 8, 64), scales="bh", similarity="gaussian", seed=61),
    Case((2, 8, 4, 100, 150, 64, 64), **TOGETHER, seed=62),
    Case((2, 8, 4, 100, 150, 8, 64), **TOGETHER | {"gain": 1.0}, similarity="gaussian", seed=63),
    packed((8, 4), (64, 64), (70, 130), (64, 100), (9, 33), **TOGETHER, similarity="cosine", seed=64),
)


@dataclass(frozen=True)
class Error:
    """Root mean square and largest error of heedful and of its peer, and one ulp at the truth's largest value."""

    dtype: torch.dtype
    rms: float
    peer_rms: float
    worst: float
    peer_worst: float
    ulp: float

    @classmethod
    def of(cls, got: Tensor, peer: Tensor, truth: Tensor) -> Error:
        mine, theirs = ((x.double().cpu() - truth).abs() for x in (got, peer))
        top = truth.abs().max().item()
        ulp = torch.finfo(got.dtype).eps * 2 ** math.floor(math.log2(top)) if top else 0.0
        rms, peer_rms = (x.square().mean().sqrt().item() for x in (mine, theirs))
        return cls(got.dtype, rms, peer_rms, mine.max().item(), theirs.max().item(), ulp)

    def faults(self, kind: str = "out") -> list[str]:
        """What breaks the rule: rms <= 1.5 x and max <= 2 x (float32: 3 x) the peer's, plus one ulp at the largest."""
        faults, largest = [], SUMS_LARGEST_AT_MOST if kind in SUMS else LARGEST_AT_MOST[self.dtype]
        if not self.rms <= (SUMS_RMS_AT_MOST if kind in SUMS else 1.5) * self.peer_rms + self.ulp:
            faults.append(f"rms error {self.rms:.3g}, torch's {self.peer_rms:.3g}, ulp {self.ulp:.3g}")
        if not self.worst <= largest * self.peer_worst + self.ulp:
            faults.append(f"largest error {self.worst:.3g}, torch's {self.peer_worst:.3g}, ulp {self.ulp:.3g}")
        return faults


def torch_results(problem: Problem) -> dict[str, Tensor]:
    """out and its gradients of torch's own attention, in the inputs' dtype."""
    case, options = problem.case, dict(problem.options)
    batch, heads, _, queries, keys, _, _ = case.sizes
    leaves = [x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    bias, scale = options.pop("bias", None), options.pop("scale", None)
    is_causal = options == {"right": 0}
    seen = None
    if options and not is_causal:
        seen = seen_pairs((batch, heads, queries, keys), **options)
    mask = seen
    if bias is not None:
        leaves.append(bias.to(problem.q.dtype, copy=True).requires_grad_())
        mask = leaves[-1] if seen is None else torch.where(seen, leaves[-1], -math.inf)
    gqa = case.sizes[1] != case.sizes[2]
    out = F.scaled_dot_product_attention(*leaves[:3], mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    gradients = torch.autograd.grad(out, leaves, problem.dout)
    return dict(zip(KINDS, (out.detach(), *gradients), strict=False))


def drawn(case: Case, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """The problem of `case`. Beside torch, lse has no gradient, and a wide bias holds numbers of `dtype`."""
    problem = build(case, dtype, device)
    if case in BESIDE_TORCH:
        problem.dlse = torch.zeros_like(problem.dlse)
        if case.wide_bias:
            problem.options["bias"] = problem.options["bias"].to(dtype).float()
    return problem


def errors_of(got: dict[str, Tensor], peer: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Error]:
    return {name: Error.of(got[name], peer[name], truth[name]) for name in peer}


MEASURED: dict[tuple[str, str, Case], dict[str, Error]] = {}


@cache
def peers_and_truth(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The peer's results and the truth, which are the same for every backend."""
    problem = drawn(case, dtype)
    peer = torch_results(problem) if case in BESIDE_TORCH else definition_results(problem)
    return {kind: peer[kind] for kind in KINDS if kind in peer}, problem.truth().values


def measure(case: Case, dtype: torch.dtype, backend: str, device: str) -> dict[str, Error]:
    """The errors of each tensor of `case`, measured once for each backend, which the caller has forced."""
    key = (backend, short(dtype), case)
    if key not in MEASURED:
        MEASURED[key] = errors_of(drawn(case, dtype, device).results(), *peers_and_truth(case, dtype))
    return MEASURED[key]


def geometric_means(backend: str, dtype: str, cases: tuple[Case, ...] = ()) -> dict[str, float]:
    """By kind of tensor, the geometric mean of the rms ratios measured so far (none where the peer has no error), of
    all cases or of some."""
    means = {}
    measured = [
        found for (*key, case), found in MEASURED.items() if key == [backend, dtype] and case in (cases or [case])
    ]
    for kind in KINDS:
        errors = [found[kind] for found in measured if kind in found]
        logs = [math.log(error.rms / error.peer_rms) for error in errors if error.rms and error.peer_rms]
        if logs:
            means[kind] = math.exp(sum(logs) / len(logs))
    return means


def mean_at_most(kind: str, dtype: torch.dtype, backend: str) -> float:
    if kind in SUMS:
        return SUMS_MEAN_AT_MOST
    return BF16_MEAN_AT_MOST if Backend.named(backend).of_bf16 else MEANS_AT_MOST[dtype]


def table() -> list[str]:
    """One line for each backend and dtype that was measured."""
    lines = []
    for backend, dtype in sorted({key[:2] for key in MEASURED}):
        cells = "  ".join(f"{kind} {mean:.3f}" for kind, mean in geometric_means(backend, dtype).items())
        lines.append(f"{backend:<13} {dtype:<9} {cells}")
    return lines
