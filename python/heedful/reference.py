"""What attention is, in plain PyTorch operations on any device: the oracle for every kernel.

    s   = scale * q_i . k_j + bias_ij                   -inf where a mask forbids the pair
    p   = exp(s - lse),  lse = log(sum_j exp(s))
    out = sum_j p * v_j

A pair whose score is -inf is absent: it takes no part, forward or backward, whatever its numbers are. A query with
nothing to attend to gives out = 0, lse = -inf and zero gradients. It takes memory for Sq x Sk scores; it can be
differentiated any number of times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .masks import BOTTOM_RIGHT, Align, Mask, allowed, as_mask, at_rank_4
from .pairs import contract, scores


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    align: Align = BOTTOM_RIGHT,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`heedful.attention`, with the same arguments and results. Half precision is computed in float32."""
    (_, q_heads, _, head_dim), kv_heads = q.shape, k.shape[1]
    if q_heads != kv_heads and (kv_heads == 0 or q_heads % kv_heads):
        raise RuntimeError(f"heedful.attention: q: expected heads a multiple of {kv_heads} (those of k), got {q_heads}")
    work = torch.promote_types(q.dtype, torch.float32)
    scale = scale if scale is not None else 1 / math.sqrt(head_dim) if head_dim else 1.0
    bias = 0.0 if bias is None else at_rank_4(bias, "bias").to(work)
    group = q_heads // kv_heads if kv_heads else 1
    queries, keys, values = q.to(work), k.to(work), v.to(work)
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)

    seen = _seen(mask, q, k, align)
    with torch.no_grad():  # a score can be -inf by itself, and is by a bias of -inf even where the product is NaN
        seen = seen & (bias != -torch.inf) & (scale * scores(queries, keys, seen) + bias != -torch.inf)
    s = torch.where(seen, scale * scores(queries, keys, seen) + bias, -torch.inf)
    alive = seen.any(-1, keepdim=True)
    lse = torch.where(alive, s, 0).logsumexp(-1, keepdim=True)
    out = contract(torch.exp(s - lse), values, seen).to(q.dtype)
    lse = torch.where(alive, lse, -torch.inf).squeeze(-1)
    return (out, lse) if return_lse else out


def _seen(mask: Mask | Tensor | None, q: Tensor, k: Tensor, align: Align) -> Tensor:
    rows = torch.arange(q.shape[2], device=q.device)
    lowered = as_mask(Mask() if mask is None else mask).lower(q.shape[2], k.shape[2], q.shape[0], q, align)
    return allowed(rows, k.shape[2], *lowered)
