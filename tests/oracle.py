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
from typing import Any

import torch
from torch import Tensor

from oracle_scores import (
    ALIKE,
    TILE,
    Similarity,
    combine,
    distances,
    dropout_factors,
    per_head,
    per_kv_head,
    seen_pairs,
)

ROUNDED, COMPUTED = 2.0, 16.0
SMALLEST = 1e-300  # of the weight of a pair that is there: below, it would count as none
ANYTHING = 1e30  # the magnitude of what two scores that rounding may swap leave open
PER_HEAD = ("scales", "sinks", "slopes", "table")  # [Hq], the table [N, Hq]; or a batch dimension in front


@dataclass
class Truth:
    """Values and magnitudes, by name: out, lse, and with a gradient given also dq, dk, dv, dbias, dscales and so on."""

    values: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, Tensor] = field(default_factory=dict)
    computed: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, value: Tensor, rounded: Tensor, computed: Tensor) -> None:
        self.values[name], self.rounded[name], self.computed[name] = value, rounded, computed

    def parts(self) -> tuple[dict[str, Tensor], ...]:
        return self.values, self.rounded, self.computed

    def bound(self, name: str, dtype: torch.dtype) -> Tensor:
        """How far rounding may move the value `name` in a computation whose inputs have `dtype`."""
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        rounding = ROUNDED * torch.finfo(dtype).eps * self.rounded[name]
        rounding += COMPUTED * torch.finfo(compute).eps * self.computed[name]
        # A weight below 2^-115 (2^-1011 in float64) may vanish, whatever it is multiplied by: by 2^20 at most here.
        # Half types end sooner.
        tiny = (
            torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps + 2**31 * torch.finfo(compute).smallest_normal
        )
        return torch.where(rounding == 0, 0.0, rounding + tiny)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    infinite_is_nan: bool = False,
    **arguments: Any,
) -> Truth:
    """Attention of q [B, Hq, Sq, D] over k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]; with dout [B, Hq, Sq, Dv] its gradients.

    The arguments are those of torch.ops.heedful.attention_forward. A score of +inf makes lse = +inf and its own weight
    NaN; with `infinite_is_nan` it makes the whole row NaN, which is all that a kernel in blocks can promise.
    """
    compute = torch.float64 if q.dtype is torch.float64 else torch.float32
    wide = ("bias", *PER_HEAD)
    q, k, v, dout, dlse = (x if x is None else x.detach().cpu().to(torch.float64) for x in (q, k, v, dout, dlse))
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            arguments[name] = x.detach().cpu().to(torch.float64 if name in wide else x.dtype)
    arguments |= {"dout": dout, "dlse": dlse, "infinite_is_nan": infinite_is_nan, "swapping": torch.finfo(compute).eps}
    return (_packed if arguments.get("q_offsets") is not None else _dense)(q, k, v, **arguments)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    table: Tensor | None = None,
    buckets: Tensor | None = None,
    q_lengths: Tensor | None = None,
    q_starts: Tensor | None = None,
    seed: Tensor | None = None,
    q_start: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    similarity: str = "dot",
    normalizer: str = "softmax",
    dropout_p: float = 0.0,
    first_sequence: int = 0,
    dout: Tensor | None,
    dlse: Tensor | None,
    infinite_is_nan: bool,
    swapping: float,
    **masks: Any,
) -> Truth:
    (batch, heads, queries, width), (_, kv_heads, keys, _) = q.shape, k.shape
    sizes = (batch, heads, queries, keys)
    kh, vh = per_head(k, heads), per_head(v, heads)
    seen = seen_pairs(sizes, q_lengths=q_lengths, q_starts=q_starts, q_start=q_start, **masks)
    if bias is not None:
        seen &= bias != -math.inf

    # Scores, the magnitudes of their terms, and their derivatives by t = factor x similarity: [B, Hq, Sq, Sk]. A pair
    # that is not seen may well have NaN here.
    if scale is None:
        scale = 1 / math.sqrt(width) if width and similarity == "dot" else 1.0
    factor = _by_pair(torch.full((1,), scale, dtype=torch.float64) if scales is None else scales)
    alike = Similarity(similarity, q, kh)
    score, size = factor * alike.value, factor.abs() * alike.size
    slope, slope_error = torch.ones_like(score), torch.zeros_like(score)
    if softcap is not None:
        tanh = (score / softcap).tanh()
        slope = 1 - tanh.square()
        slope_error = 1 + 2 * tanh.abs() * slope / softcap * size  # of 1 - tanh^2 itself, and of t within it
        score, size = softcap * tanh, slope * size + softcap * tanh.abs()
    _, _, ahead = distances(batch, queries, keys, q_starts, q_start)
    if bias is not None:
        score, size = score + bias, size + bias.abs() * (1 + width / ALIKE)
    if slopes is not None:
        far = _by_pair(slopes) * ahead.abs()
        score, size = score - far, size + far.abs()
    if table is not None:
        reach = len(buckets) // 2
        bucket = buckets[ahead.clamp(-reach, reach) + reach].expand(batch, 1, queries, keys)[:, 0]  # [B, Sq, Sk]
        rows = table.expand(batch, *table.shape[-2:])
        learned = rows[torch.arange(batch)[:, None, None], bucket].permute(0, 3, 1, 2)
        score, size = score + learned, size + learned.abs()
    present = seen & (score != -math.inf)
    score = score.where(present, -math.inf)
    size = size.where(present, 0)

    # One score more in each row that exists, -inf where there is no sink.
    sink = torch.full(sizes[:3], -math.inf, dtype=torch.float64)
    if sinks is not None:
        exists = torch.ones(batch, 1, queries, dtype=torch.bool)
        if q_lengths is not None:
            exists = torch.arange(queries) < q_lengths[:, None, None]
        sink = torch.where(exists, _by_pair(sinks).squeeze(-1), sink)
    every = torch.cat((score, sink[..., None]), -1)
    alive = (every != -math.inf).any(-1)
    spread = torch.cat((size, sink.abs().where(sink != -math.inf, 0)[..., None]), -1).amax(-1) + 1  # [B, Hq, Sq]
    loose = torch.zeros_like(score)
    if normalizer == "hard":
        top = every.amax(-1, keepdim=True)
        first = (score == top) & present
        p = (first & (first.cumsum(-1) == 1)).double().where(~top.isnan(), math.nan).where(present, 0)
        lse = top.squeeze(-1)
        # Where rounding decides, either is right. Cosines tie by chance of rounding alone.
        near = top - every <= COMPUTED * swapping * 2 * spread[..., None]
        unsure = near if similarity == "cosine" else near & (every != top)
        rivals = unsure.any(-1, keepdim=True) & (near.sum(-1, keepdim=True) > 1)
        loose = (near & rivals)[..., :-1].double() * ANYTHING
    else:
        lse = every.logsumexp(-1)
        if infinite_is_nan:
            lse = lse.where(lse != math.inf, math.nan)
        p = (score - lse[..., None]).exp().where(present, 0)
    p_size = torch.maximum(p, torch.tensor(SMALLEST, dtype=torch.float64)).where(present, 0)
    kept = torch.ones_like(p) if not dropout_p else dropout_factors(sizes, seed, dropout_p, first_sequence)
    weight, weight_size = p * kept, p_size * kept
    out, out_size = combine(weight, vh, present), combine(weight_size, vh.abs(), present)

    truth = Truth()
    truth.put("out", out, out_size, spread[..., None] * out_size + combine(loose, vh.abs(), present))
    truth.put("lse", lse, torch.zeros_like(lse), (spread + lse.abs()).where(alive, 0))
    if dout is None:
        return truth

    def put_v() -> None:
        weights = (weight, weight_size, weight_size * spread[..., None] + loose)
        rows = (dout, dout.abs(), dout.abs())
        parts = (combine(w.mT, x, present.mT) for w, x in zip(weights, rows, strict=True))
        truth.put("dv", *(per_kv_head(x, kv_heads) for x in parts))

    parameters = {"bias": bias, "scales": scales, "sinks": sinks, "slopes": slopes, "table": table}
    if normalizer == "hard":
        for name, x in {"q": q, "k": k, **parameters}.items():
            if x is not None:
                truth.put("d" + name, *[torch.zeros_like(x)] * 3)
        put_v()
        return truth

    dlse = torch.zeros_like(lse) if dlse is None else dlse
    delta = (dout * out).sum(-1) - dlse  # [B, Hq, Sq]
    delta_size = (dout.abs() * out_size).sum(-1) + dlse.abs()
    ds = (p * (kept * (dout @ vh.mT) - delta[..., None])).where(present, 0)
    ds_size = (p_size * (kept * (dout.abs() @ vh.abs().mT) + delta_size[..., None])).where(present, 0)
    ds_spread = ds_size * (spread * (1 + v.shape[-1] / ALIKE))[..., None]
    of_scores = (ds, ds_size, ds_spread)
    dt = tuple(x.where(present, 0) for x in (ds * slope, ds_size * slope, ds_spread * slope + ds_size * slope_error))

    factors = (factor, factor.abs(), factor.abs())
    for name in ("q", "k"):
        parts = [
            alike.gradient(name, x * by, present, magnitude=n > 0)
            for n, (x, by) in enumerate(zip(dt, factors, strict=True))
        ]
        truth.put("d" + name, *(per_kv_head(x, kv_heads) if name == "k" else x for x in parts))
    put_v()

    def summed(x: Tensor, like: Tensor) -> Tensor:
        """[B, Hq, Sq, Sk] or [B, Hq, Sq] in the shape of a parameter, [Hq] or [B, Hq]."""
        return x.flatten(2).sum(2).sum_to_size(like.shape)

    if bias is not None:
        truth.put("dbias", *(x.sum_to_size(bias.shape) for x in of_scores))
    if scales is not None:
        by = (alike.value, alike.size, alike.size)
        parts = (summed((x * y).where(present, 0), scales) for x, y in zip(dt, by, strict=True))
        truth.put("dscales", *parts)
    if sinks is not None:
        there = sink != -math.inf
        p_sink = (sink - lse).exp()
        parts = (-p_sink * delta, p_sink * delta_size, p_sink * delta_size * spread)
        truth.put("dsinks", *(summed(x.where(there, 0), sinks) for x in parts))
    if slopes is not None:
        by = (-ahead.abs(), ahead.abs(), ahead.abs())
        truth.put("dslopes", *(summed(x * y.double(), slopes) for x, y in zip(of_scores, by, strict=True)))
    if table is not None:
        truth.put("dtable", *(_in_buckets(x, bucket, table) for x in of_scores))
    return truth


def _by_pair(x: Tensor) -> Tensor:
    """[Hq] or [B, Hq] beside [B, Hq, Sq, Sk]."""
    return torch.atleast_2d(x)[:, :, None, None]


def _in_buckets(x: Tensor, bucket: Tensor, table: Tensor) -> Tensor:
    """[B, Hq, Sq, Sk] summed over the pairs of each bucket, in the table's shape."""
    batch, heads = x.shape[:2]
    total = torch.zeros(batch, table.shape[-2], heads, dtype=torch.float64)
    for b in range(batch):
        total[b].index_add_(0, bucket[b].flatten(), x[b].permute(1, 2, 0).flatten(0, 1))
    return total.sum_to_size(table.shape)


def _packed(q: Tensor, k: Tensor, v: Tensor, *, q_offsets: Tensor, k_offsets: Tensor, **arguments: Any) -> Truth:
    """One sequence after the other; what lies outside of all has out 0, lse -inf and gradients 0."""
    (_, heads, rows, _), shared = q.shape, ("bias", *PER_HEAD)
    gradients = {"dq": q, "dk": k, "dv": v} | {"d" + n: arguments[n] for n in shared if arguments.get(n) is not None}
    shapes = {"out": (1, heads, rows, v.shape[-1]), "lse": (1, heads, rows)}
    if arguments["dout"] is not None:
        shapes |= {name: x.shape for name, x in gradients.items()}
    truth = Truth()
    for name, shape in shapes.items():
        truth.put(name, *(torch.zeros(shape, dtype=torch.float64) for _ in range(3)))
    truth.values["lse"].fill_(-math.inf)

    for b in range(len(q_offsets) - 1):
        (q0, q1), (k0, k1) = q_offsets[b : b + 2].tolist(), k_offsets[b : b + 2].tolist()
        where = {name: (slice(None), slice(None), slice(q0, q1)) for name in ("out", "lse", "dq", "dout", "dlse")}
        where |= {name: (slice(None), slice(None), slice(k0, k1)) for name in ("dk", "dv")}
        own = dict(arguments)
        for name, x in arguments.items():
            if not isinstance(x, Tensor):
                continue
            if name in ("dout", "dlse"):
                own[name] = x[where[name]]
                continue
            at = [slice(None)] * x.dim()
            batched = {"scales": 2, "sinks": 2, "slopes": 2, "table": 3}.get(name, x.dim())
            if name not in ("bits", "buckets") and x.dim() == batched and x.shape[0] > 1:
                at[0] = slice(b, b + 1)
            if name in ("mask", "bias", "tiles"):
                unit = TILE if name == "tiles" else 1
                for n, length in ((2, q1 - q0), (3, k1 - k0)):
                    at[n] = slice(0, -(-length // unit)) if x.shape[n] > 1 or name == "tiles" else slice(None)
            own[name] = x[tuple(at)]
            if name in shared:
                where["d" + name] = tuple(at)
        alone = _dense(q[where["dq"]], k[where["dk"]], v[where["dv"]], first_sequence=b, **own)
        for whole, part in zip(truth.parts(), alone.parts(), strict=True):
            for name, x in part.items():
                if name in ("out", "lse"):
                    whole[name][where[name]] = x
                else:
                    whole[name][where[name]] += x
    return truth
