"""Whether results agree with float64, before they are timed."""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import Inputs, Row

# Largest difference from float64, relative to the largest value. Half precision: the weights and the result are
# rounded, and gradients are sums of products of such; nobody who rounds once more is far from twice eps.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
TINY = 0.1  # results below that share of the largest of all are compared with it: dq of one key is 0
BLOCK = 512  # queries at a time

Tensors = dict[str, Tensor]


def exact(row: Row, inputs: Inputs, backward: bool) -> Tensors:
    """out, and dq, dk, dv and perhaps dbias, in float64: the formulas, a block of queries of one head at a time."""
    q, k, v, gradient = (x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.gradient))
    found = {"out": torch.zeros_like(q)}
    if backward:
        found |= {"dq": torch.zeros_like(q), "dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
        if row.form == "bias-gradient":
            found["dbias"] = torch.zeros(inputs.bias.shape, dtype=torch.float64)
    scale, group = row.D**-0.5, row.Hq // row.Hk
    for b in range(row.B):
        for h in range(row.Hq):
            for start in range(0, row.Sq, BLOCK):
                n, kv = slice(start, min(start + BLOCK, row.Sq)), (b, h // group)
                s = scale * q[b, h, n] @ k[kv].T
                if inputs.bias is not None:
                    s += inputs.bias[0, h, n]
                p = s.masked_fill(~_allowed(row, inputs, b, n), -torch.inf).softmax(-1)
                out = found["out"][b, h, n] = p @ v[kv]
                if not backward:
                    continue
                g = gradient[b, h, n]
                ds = p * (g @ v[kv].T - (g * out).sum(-1, keepdim=True))
                found["dq"][b, h, n] = scale * ds @ k[kv]
                found["dk"][kv] += scale * ds.T @ q[b, h, n]
                found["dv"][kv] += p.T @ g
                if "dbias" in found:
                    found["dbias"][0, h, n] += ds
    return found


def _allowed(row: Row, inputs: Inputs, b: int, queries: slice) -> Tensor:
    if row.form == "causal":
        i = torch.arange(queries.start, queries.stop)[:, None] + row.Sk - row.Sq
        return torch.arange(row.Sk) <= i
    if inputs.allowed is None:
        return torch.ones(1, row.Sk, dtype=torch.bool)
    return inputs.allowed.expand(row.B, 1, row.Sq, row.Sk)[b, 0, queries]


def apart(row: Row, inputs: Inputs, results: Tensors, expected: Tensors) -> tuple[float, str]:
    """The largest error of all, relative to what it is allowed to be, and what is over it in words, or ""."""
    wrong, shares, allowed = [], [0.0], ALLOWED[row.torch_dtype]
    least = TINY * max(x.abs().max().item() for x in expected.values())
    for name, a in results.items():
        b = expected[name]
        if row.form == "varlen" and name != "dbias":  # what lies behind a sequence's end is nobody's
            a, b = (x * inputs.allowed.transpose(2, 3) for x in (a, b))
        error = difference(a, b, least)
        shares.append(error / allowed)
        if not error <= allowed:
            wrong.append(f"{name} is off by {error:.1e} of the largest value, allowed {allowed:.0e}")
    return max(shares), ", ".join(wrong)


def difference(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    """The largest, relative to b's largest value, or to `least` if that is more; infinite for NaN and other shapes."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    largest = max(b.abs().max().item(), least)
    error = (a - b).abs().max().item() / (largest or 1.0)
    return error if error == error else float("inf")
