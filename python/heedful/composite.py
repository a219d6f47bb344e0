"""Derivatives that no kernel computes, in plain PyTorch operations, a block of queries at a time.

Forward mode needs the tangents of both operators, double backward the gradients of the second. They are rarely asked
for, so they trade speed for brevity: memory for [B, Hq, BLOCK, Sk] pairs at once, half precision in float32.

    s  = scale * q k^T + bias       p     = exp(s - lse)
    dp = dout v^T                   delta = sum(dout * out) - dlse        ds = p * (dp - delta)

The operators give out = p v and dq = scale * ds k, dk = scale * ds^T q, dv = p^T dout, dbias = ds. Below, dx is the
gradient of x, tx its tangent, and gx the gradient of x where x is what the backward operator takes or gives. Where
there is no bias, its tangent and its gradients are None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .masks import allowed
from .pairs import contract, scores

BLOCK = 128  # queries

Tensors = tuple[Tensor | None, ...]


def forward_jvp(saved: Tensors, options: Mapping[str, Any], tangents: Tensors) -> Tensors:
    """Tangents of (out, lse), given those of q, k, v, bias. saved: the operator's tensors, then its results."""
    call = Call(saved, options)
    tq, tk, tv, tbias = call.widen(tangents)
    total = Total(call)
    for rows in call.blocks():
        ts = rows.linear_scores(tq, tk, tbias)
        tlse = (rows.p * ts).sum(-1, keepdim=True)
        total.rows(out=rows.contract(rows.p * (ts - tlse), call.v) + rows.contract(rows.p, tv), lse=tlse)
    return total.of("out", "lse")


def backward_jvp(saved: Tensors, options: Mapping[str, Any], grads: Tensors, tangents: Tensors) -> Tensors:
    """Tangents of (dq, dk, dv, dbias), given those of q, k, v, bias, dout, dlse, out, lse. grads: (dout, dlse)."""
    call = Call(saved, options)
    tq, tk, tv, tbias = call.widen(tangents[:4])
    total = Total(call)
    for rows in call.blocks():
        g, out, dp, delta, ds = rows.backward(*grads)
        tg, th, tout, tlse = (rows(x) for x in tangents[4:])
        tp = rows.p * (rows.linear_scores(tq, tk, tbias) - tlse)
        tdp = rows.scores(tg, call.v) + rows.scores(g, tv)
        tdelta = (tg * out + g * tout).sum(-1, keepdim=True) - th
        tds = rows.pairs(tp * (dp - delta) + rows.p * (tdp - tdelta))
        total.rows(q=call.scale * (rows.contract(tds, call.k) + rows.contract(ds, tk)))
        total.keys(
            k=call.scale * (rows.gather(tds, rows(call.q)) + rows.gather(ds, rows(tq))),
            v=rows.gather(tp, g) + rows.gather(rows.p, tg),
        )
        total.bias(tds)
    return total.of("q", "k", "v", "bias")


def backward_backward(saved: Tensors, options: Mapping[str, Any], grads: Tensors, ggrads: Tensors) -> Tensors:
    """Gradients of dout, dlse, q, k, v, out, lse, bias, given those of dq, dk, dv, dbias. grads: (dout, dlse)."""
    call = Call(saved, options)
    gq, gk, gv, gbias = call.widen(ggrads)
    total = Total(call)
    for rows in call.blocks():
        g, out, dp, delta, ds = rows.backward(*grads)
        gds = rows.linear_scores(gq, gk, gbias)
        gdp = rows.p * gds
        gdelta = -gdp.sum(-1, keepdim=True)
        gs = rows.pairs(rows.p * (gds * (dp - delta) + rows.scores(g, gv)))
        total.rows(
            dout=rows.contract(gdp, call.v) + rows.contract(rows.p, gv) + out * gdelta,
            dlse=-gdelta,
            q=call.scale * (rows.contract(gs, call.k) + rows.contract(ds, gk)),
            out=g * gdelta,
            lse=-gs.sum(-1, keepdim=True),
        )
        total.keys(k=call.scale * (rows.gather(gs, rows(call.q)) + rows.gather(ds, rows(gq))), v=rows.gather(gdp, g))
        total.bias(gs)
    return total.of("dout", "dlse", "q", "k", "v", "out", "lse", "bias")


class Call:
    """One call of an operator, widened: in the precision that is computed in, k and v with as many heads as q."""

    def __init__(self, saved: Tensors, options: Mapping[str, Any]) -> None:
        q, k, v, mask, bias, q_lengths, k_lengths, q_starts, out, lse = saved
        self.dtype = q.dtype
        self.work = torch.promote_types(q.dtype, torch.float32)
        self.kv_heads = k.shape[1]
        self.group = q.shape[1] // k.shape[1] if k.shape[1] else 1
        self.scale = options["scale"]
        if self.scale is None:
            self.scale = 1 / math.sqrt(q.shape[3]) if q.shape[3] else 1.0
        self.q, self.k, self.v, _ = self.widen((q, k, v, None))
        self.bias, self.out, self.lse = bias, out, lse
        self.masking = (mask, q_lengths, k_lengths, q_starts, options["q_start"], options["left"], options["right"])

    def widen(self, like_q_k_v_bias: Tensors) -> Tensors:
        q, k, v, bias = (None if x is None else x.to(self.work) for x in like_q_k_v_bias)
        return q, k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1), bias

    def blocks(self) -> Iterator[Rows]:
        for start in range(0, max(self.q.shape[2], 1), BLOCK):
            yield Rows(self, start, min(start + BLOCK, self.q.shape[2]))


class Rows:
    """A block of queries and its pairs with every key. A row with nothing to attend to is read as zeros."""

    def __init__(self, call: Call, start: int, stop: int) -> None:
        self.call, self.start, self.count = call, start, stop - start
        q, bias = self.slice(call.q), self.of_bias(call.bias)
        self.seen = allowed(torch.arange(start, stop, device=q.device), call.k.shape[2], *call.masking)
        self.seen = self.seen & (bias != -torch.inf)
        self.seen = self.seen & (call.scale * self.scores(q, call.k) + bias != -torch.inf)
        self.alive = self.seen.any(-1, keepdim=True)
        s = call.scale * self.scores(q, call.k) + bias
        self.p = torch.exp(torch.where(self.seen, s, -torch.inf) - self(call.lse))

    def __call__(self, x: Tensor) -> Tensor:
        """These rows of x [B, Hq, Sq, ...], a column of x [B, Hq, Sq]."""
        x = self.slice(x if x.dim() == 4 else x[..., None])
        return torch.where(self.alive, x.to(self.call.work), 0)

    def slice(self, x: Tensor) -> Tensor:
        return x.narrow(2, self.start, self.count)

    def of_bias(self, bias: Tensor | None) -> Tensor | float:
        return 0.0 if bias is None else bias if bias.shape[2] == 1 else self.slice(bias)

    def pairs(self, x: Tensor) -> Tensor:
        """x [B, Hq, n, Sk], 0 where the pair is not there."""
        return torch.where(self.seen, x, 0)

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        return scores(a, b, self.seen)

    def contract(self, w: Tensor, b: Tensor) -> Tensor:
        """To queries: [B, Hq, n, Sk], [B, Hq, Sk, D] -> [B, Hq, n, D]."""
        return contract(w, b, self.seen)

    def gather(self, w: Tensor, a: Tensor) -> Tensor:
        """To keys: [B, Hq, n, Sk], [B, Hq, n, D] -> [B, Hq, Sk, D]."""
        return contract(w.mT, a, self.seen.mT)

    def linear_scores(self, xq: Tensor, xk: Tensor, xbias: Tensor | None) -> Tensor:
        """The scores' tangent along xq, xk, xbias: also what reaches ds from dq, dk, dbias, whose transpose it is."""
        q, xq = self(self.call.q), self(xq)
        return self.pairs(self.call.scale * (self.scores(xq, self.call.k) + self.scores(q, xk)) + self.of_bias(xbias))

    def backward(self, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """These rows of dout and out, then dp, delta, ds."""
        g, out = self(dout), self(self.call.out)
        dp = self.scores(g, self.call.v)
        delta = (g * out).sum(-1, keepdim=True) - self(dlse)
        return g, out, dp, delta, self.pairs(self.p * (dp - delta))


class Total:
    """What the blocks give, put together: rows one after the other, what belongs to keys added up."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.by_row: dict[str, list[Tensor]] = {}
        self.by_key: dict[str, Tensor] = {}

    def rows(self, **blocks: Tensor) -> None:
        for name, x in blocks.items():
            self.by_row.setdefault(name, []).append(x)

    def keys(self, **blocks: Tensor) -> None:
        for name, x in blocks.items():
            self.by_key[name] = self.by_key[name] + x if name in self.by_key else x

    def bias(self, x: Tensor) -> None:
        if self.call.bias is not None:
            b, h, s, n = self.call.bias.shape
            self.rows(bias=x.sum_to_size(b, h, x.shape[2], n)) if s > 1 else self.keys(bias=x.sum_to_size(b, h, 1, n))

    def of(self, *names: str) -> Tensors:
        return tuple(self._of(name) for name in names)

    def _of(self, name: str) -> Tensor | None:
        if name == "bias" and self.call.bias is None:
            return None
        x = torch.cat(self.by_row[name], 2) if name in self.by_row else self.by_key[name]
        if name == "bias":
            return x.to(self.call.bias.dtype)
        if name in ("lse", "dlse"):
            return x.squeeze(-1)
        if name in ("k", "v"):
            x = x.unflatten(1, (self.call.kv_heads, self.call.group)).sum(2)
        return x.to(self.call.dtype)
