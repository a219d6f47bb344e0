"""The semantics of heedful's attention, pair by pair, in float64: the truth that every kernel is tested against.

Written from the definition alone and without autograd; it shares no code with heedful, and none with heedful.reference.
Beside each value stands the sum of the magnitudes of its terms, from which follows how far rounding may move it:

    |result - truth| <= ROUNDED * eps(dtype) * rounded + COMPUTED * eps(compute type) * computed

`rounded` counts terms that a kernel may round to the inputs' own dtype (P, dS, out), `computed` everything else.
Where a value has no terms (a query that sees nothing), the bound is zero: the result must be exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROUNDED, COMPUTED = 2.0, 16.0
ALIKE = 64  # so many equal terms in a row round alike and double the error of their sum


@dataclass
class Truth:
    """Values and magnitudes, by name: out, lse, and with a gradient given also dq, dk, dv, dbias."""

    values: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, Tensor] = field(default_factory=dict)
    computed: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, value: Tensor, rounded: Tensor, computed: Tensor) -> None:
        self.values[name], self.rounded[name], self.computed[name] = value, rounded, computed

    def bound(self, name: str, dtype: torch.dtype) -> Tensor:
        """How far rounding may move the value `name` in a computation whose inputs have `dtype`."""
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        rounding = ROUNDED * torch.finfo(dtype).eps * self.rounded[name]
        rounding += COMPUTED * torch.finfo(compute).eps * self.computed[name]
        # A weight below the smallest normal number may vanish, whatever it is multiplied by; half types end sooner.
        tiny = (
            torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps + 2**20 * torch.finfo(compute).smallest_normal
        )
        return torch.where(rounding == 0, 0.0, rounding + tiny)


def seen_pairs(
    sizes: tuple[int, int, int, int],
    *,
    mask: Tensor | None = None,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    q_starts: Tensor | None = None,
    q_start: int = 0,
    left: int | None = None,
    right: int | None = None,
) -> Tensor:
    """bool [B, Hq, Sq, Sk]: may query i see key j, by everything but its score. `sizes` is (B, Hq, Sq, Sk)."""
    batch, _, queries, keys = sizes
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    seen = torch.ones(sizes, dtype=torch.bool)
    for b in range(batch):
        start = q_start if q_starts is None else int(q_starts[b])
        ahead = j - (start + i)  # how far key j lies after query i
        if left is not None:
            seen[b] &= ahead >= -left
        if right is not None:
            seen[b] &= ahead <= right
        if q_lengths is not None:
            seen[b] &= i < int(q_lengths[b])
        if k_lengths is not None:
            seen[b] &= j < int(k_lengths[b])
    return seen if mask is None else seen & mask


def combine(weights: Tensor, rows: Tensor, present: Tensor) -> Tensor:
    """sum_j weights[..., i, j] * rows[..., j, :] over the present pairs alone; NaN where a term is not finite."""
    weights = weights.where(present, 0)
    total = weights.nan_to_num(0, 0, 0) @ rows.nan_to_num(0, 0, 0)
    spoiled = (~weights.isfinite()).any(-1, keepdim=True)
    if not rows.isfinite().all():
        spoiled = spoiled | (present.double() @ (~rows.isfinite()).double() > 0)
    return total.where(~spoiled, math.nan)


def per_head(x: Tensor, heads: int) -> Tensor:
    """[B, Hk, S, D] -> [B, heads, S, D]: query head h reads key/value head h // (heads / Hk)."""
    return x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] else x


def per_kv_head(x: Tensor, heads: int) -> Tensor:
    """The transpose of per_head: [B, Hq, S, D] -> [B, heads, S, D], summed over each group of query heads."""
    return x.reshape(x.shape[0], heads, x.shape[1] // max(heads, 1), *x.shape[2:]).sum(2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    q_starts: Tensor | None = None,
    q_start: int = 0,
    left: int | None = None,
    right: int | None = None,
    scale: float | None = None,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    infinite_is_nan: bool = False,
) -> Truth:
    """Attention of q [B, Hq, Sq, D] over k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]; with dout [B, Hq, Sq, Dv] its gradients.

    The options are those of torch.ops.heedful.attention_forward. A score of +inf makes lse = +inf and its own weight
    NaN; with `infinite_is_nan` it makes the whole row NaN, which is all that a kernel in blocks can promise.
    """
    q, k, v, bias, dout, dlse = (
        x if x is None else x.detach().cpu().to(torch.float64) for x in (q, k, v, bias, dout, dlse)
    )
    mask, q_lengths, k_lengths, q_starts = (
        x if x is None else x.detach().cpu() for x in (mask, q_lengths, k_lengths, q_starts)
    )
    (batch, heads, queries, width), (_, kv_heads, keys, _) = q.shape, k.shape
    if scale is None:
        scale = 1 / math.sqrt(width) if width else 1.0
    seen = seen_pairs(
        (batch, heads, queries, keys),
        mask=mask, q_lengths=q_lengths, k_lengths=k_lengths, q_starts=q_starts, q_start=q_start, left=left, right=right,
    )  # fmt: skip
    if bias is not None:
        seen &= bias != -math.inf
    kh, vh = per_head(k, heads), per_head(v, heads)

    score = scale * (q @ kh.mT)  # [B, Hq, Sq, Sk]; a pair that is not seen may well have NaN here
    size = abs(scale) * (q.abs() @ kh.abs().mT)
    if bias is not None:
        score, size = score + bias, size + bias.abs()
    present = seen & (score != -math.inf)
    score = score.where(present, -math.inf)
    lse = score.logsumexp(-1)  # [B, Hq, Sq]
    if infinite_is_nan:
        lse = lse.where(lse != math.inf, math.nan)
    p = (score - lse[..., None]).exp().where(present, 0)
    out = combine(p, vh, present)

    alive = present.any(-1)
    size = size.where(present, 0) * (1 + width / ALIKE)
    spread = torch.cat((size, torch.zeros(*size.shape[:-1], 1)), -1).amax(-1) + 1  # [B, Hq, Sq]
    out_size = combine(p, vh.abs(), present)
    truth = Truth()
    truth.put("out", out, out_size, spread[..., None] * out_size)
    truth.put("lse", lse, torch.zeros_like(lse), (spread + lse.abs()).where(alive, 0))
    if dout is None:
        return truth

    dlse = torch.zeros_like(lse) if dlse is None else dlse
    dp = dout @ vh.mT  # [B, Hq, Sq, Sk]
    delta = (dout * out).sum(-1) - dlse
    ds = (p * (dp - delta[..., None])).where(present, 0)
    ds_size = p * (dout.abs() @ vh.abs().mT + ((dout.abs() * out_size).sum(-1) + dlse.abs())[..., None])
    ds_size = ds_size.where(present, 0)

    spread_size = ds_size * (spread * (1 + v.shape[-1] / ALIKE))[..., None]

    def gradient(weights: Tensor, rows: Tensor, transposed: bool) -> Tensor:
        """sum over keys (or, transposed, over queries and the heads of a group) of weights x rows."""
        if not transposed:
            return combine(weights, rows, present)
        return per_kv_head(combine(weights.mT, rows, present.mT), kv_heads)

    for name, weights, rounded, computed, rows, factor in (
        ("dq", ds, ds_size, spread_size, kh, scale),
        ("dk", ds, ds_size, spread_size, q, scale),
        ("dv", p, p, p * spread[..., None], dout, 1.0),
    ):
        transposed = name != "dq"
        truth.put(
            name,
            factor * gradient(weights, rows, transposed),
            abs(factor) * gradient(rounded, rows.abs(), transposed),
            abs(factor) * gradient(computed, rows.abs(), transposed),
        )
    if bias is not None:
        truth.put("dbias", *(x.sum_to_size(bias.shape) for x in (ds, ds_size, spread_size)))
    return truth
