"""The functions that users call, in plain PyTorch operations on any device: the oracle for every kernel.

They take memory for all Sq x Sk scores, may be differentiated any number of times, and compute half precision in
float32. What they compute is written in definition.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import definition, varlen
from .arguments import checked_offsets, lower, straight_through


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`heedful.attention`, with the same options and results."""
    out, lse = _forward(q, k, v, lower(q, k, **options))
    return (out, lse) if return_lse else out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor | Sequence[int],
    k_offsets: Tensor | Sequence[int] | None = None,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`heedful.varlen_attention`, with the same options and results."""
    q, k, v = varlen.packed(q), varlen.packed(k), varlen.packed(v)
    offsets = checked_offsets(q_offsets, k_offsets, q)
    out, lse = (varlen.unpacked(x) for x in _forward(q, k, v, lower(q, k, **options, offsets=offsets)))
    return (out, lse) if return_lse else out


def _forward(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise RuntimeError(f"heedful.attention: q: expected heads a multiple of {kv_heads} (those of k), got {heads}")
    if arguments.get("normalizer") == "hard-st":
        return straight_through(_whole, q, k, v, arguments)
    return _whole(q, k, v, **arguments)


def _whole(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    tensors = {"q": q, "k": k, "v": v} | {n: arguments[n] for n in definition.TENSORS if n in arguments}
    out, lse = definition.whole(tensors, {n: x for n, x in arguments.items() if n not in tensors})
    return out.to(q.dtype), lse
