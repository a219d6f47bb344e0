"""Whether results agree, before they are timed."""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import Inputs, Row

# Largest difference from float64, relative to the largest value. Half precision: P and the result are rounded, and the
# gradients are sums of such products.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}

TINY = 1e-2  # results below that share of the largest of all are compared with it: dq of one key is 0


def apart(row: Row, inputs: Inputs, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """What of two sets of results differs by more than is allowed, in words; "" where nothing does."""
    wrong, allowed = [], ALLOWED[row.torch_dtype]
    least = TINY * max(x.abs().max().item() for x in theirs.values())
    for name, a in ours.items():
        b = theirs[name]
        if row.form == "varlen":
            a, b = (x * inputs.allowed.transpose(2, 3) for x in (a, b))
        if not (error := difference(a, b, least)) <= allowed:
            wrong.append(f"{name} is off by {error:.1e} of the largest value, allowed {allowed:.0e}")
    return ", ".join(wrong)


def difference(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    """The largest, relative to b's largest value, or to `least` if that is more; NaN where the shapes differ."""
    if a.shape != b.shape:
        return float("nan")
    a, b = a.double(), b.double()
    largest = max(b.abs().max().item(), least)
    return (a - b).abs().max().item() / (largest or 1.0)
