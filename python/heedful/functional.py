"""The functions that users call: they bring arguments into the operators' form and leave the computing to those."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .masks import BOTTOM_RIGHT, Align, Mask, as_mask, at_rank_4, positions

_SDPA = "heedful.scaled_dot_product_attention"


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
    """out_i = sum_j p_ij v_j, where p_ij = exp(s_ij - lse_i), lse_i = log sum_j exp(s_ij), s = scale q k^T + bias.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]: float32, float64, bfloat16 or float16, with any strides; Hq a
        multiple of Hk (query head h reads key/value head h // (Hq / Hk)).
    mask: which pairs may meet: a bool tensor broadcastable to [B, Hq, Sq, Sk] (True: attend), Causal(),
        SlidingWindow(left, right), KeyLengths(n), QueryLengths(n), or several of them joined by &. A masked pair is
        absent: nothing of it, not even a NaN, reaches the results or the gradients.
    bias: added to the scores: broadcastable to [B, Hq, Sq, Sk], of q's dtype or float32; -inf masks.
    align: where query i sits among the keys, for Causal and SlidingWindow: at i ("top-left"), at i + Sk - Sq
        ("bottom-right"; by each sequence's own lengths where given), or at i + n (n an int, or an int tensor [B]).
    scale: 1 / sqrt(D) by default.

    Returns out [B, Hq, Sq, Dv] of q's dtype; with return_lse also lse [B, Hq, Sq], float32 (float64 for float64). A
    query with nothing to attend to has out = 0 and lse = -inf, and gives no gradient. Both are differentiable in q, k,
    v and bias. Raises RuntimeError, TypeError or ValueError that name the argument, what was expected, and what came.
    """
    _check("heedful.attention", ("q", "k", "v"), (q, k, v))
    if bias is not None:
        bias = at_rank_4(bias, "bias")
    if mask is None:
        if align is not BOTTOM_RIGHT:
            positions(align, 0, 0, None, None, q)
        out, lse = ops.forward(q, k, v, None, bias, scale=scale)
    else:
        for name, x in (("q", q), ("k", k)):
            if x.dim() != 4:
                raise RuntimeError(f"heedful.attention: {name}: expected 4 dimensions, got {x.dim()}")
        dense, *others = as_mask(mask).lower(q.shape[2], k.shape[2], q.shape[0], q, align)
        out, lse = ops.forward(q, k, v, dense, bias, *others, scale)
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, with its arguments, shapes, results and errors.

    query [..., Hq, Sq, D], key [..., Hk, Sk, D], value [..., Hk, Sk, Dv], two dimensions or more -> [..., Hq, Sq, Dv].
    Dimensions before the last two broadcast; with enable_gqa, Hq may be a multiple of Hk. attn_mask: bool (True:
    attend), or of query's dtype or float32 (added to the scores), broadcastable to [..., Hq, Sq, Sk]. is_causal: query
    i attends to the keys up to i; not together with attn_mask. Dropout is not supported yet: dropout_p must be 0.
    """
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"{_SDPA}: dropout_p: expected 0, got {dropout_p}: dropout is not supported yet; "
            "torch.nn.functional.scaled_dot_product_attention has it"
        )
    _check(_SDPA, ("query", "key", "value"), (query, key, value))
    right = 0 if is_causal else None
    if attn_mask is None and query.dim() == key.dim() == value.dim() == 4:
        (batch, q_heads, _, _), (k_batch, k_heads, _, _), (v_batch, v_heads, _, _) = query.shape, key.shape, value.shape
        same = batch == k_batch == v_batch and k_heads == v_heads
        if same and (q_heads == k_heads or (enable_gqa and k_heads != 0 and q_heads % k_heads == 0)):
            return ops.forward(query, key, value, right=right, scale=scale)[0]
    return _broadcasting(query, key, value, attn_mask, right, scale, enable_gqa)


def _check(function: str, names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> None:
    for name, x in zip(names, tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: {name}: expected a tensor, got {type(x).__name__}")
        if x.is_nested:
            raise NotImplementedError(
                f"{function}: {name}: expected a dense tensor, got a nested one; pad it "
                "(torch.nested.to_padded_tensor) and pass mask=heedful.KeyLengths(lengths) to heedful.attention"
            )


def _broadcasting(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    right: int | None,
    scale: float | None,
    gqa: bool,
) -> Tensor:
    """Any ranks and any shapes that broadcast, brought to [B, H, S, D]; nothing is copied that strides can express."""
    if not isinstance(attn_mask, Tensor | None):
        raise TypeError(f"{_SDPA}: attn_mask: expected a tensor or None, got {type(attn_mask).__name__}")
    if attn_mask is not None and right is not None:
        raise _error("attn_mask", "None where is_causal is set", "a tensor")
    least = 3 if gqa else 2
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < least:
            raise _error(name, f"at least {least} dimensions", x.dim())
    rank, pairs_rank = max(query.dim(), key.dim(), value.dim()), max(query.dim(), key.dim())
    q, k, v = (x[(None,) * (max(rank, 4) - x.dim())] for x in (query, key, value))

    # The shapes of the scores, and of the result.
    lead, q_heads, kv_heads = q.shape[:-3], q.shape[-3], (k.shape[-3], v.shape[-3])
    if gqa and any(h == 0 or q_heads % h for h in kv_heads):
        raise _error("key, value", f"heads that divide those of query, {q_heads}", kv_heads)
    *pairs_lead, pairs_heads = _broadcast((*lead, q_heads), (*k.shape[:-3], 1 if gqa else kv_heads[0]))
    *lead, heads = _broadcast((*pairs_lead, pairs_heads), (*v.shape[:-3], 1 if gqa else kv_heads[1]))

    mask = bias = None
    if attn_mask is not None:
        pairs = (*pairs_lead, pairs_heads, q.shape[-2], k.shape[-2])[-pairs_rank:]
        mask = _fold_lead(_checked_mask(attn_mask, pairs, query.dtype), lead)
        if mask.dtype is not torch.bool:
            mask, bias = None, mask
    if kv_heads[0] != kv_heads[1]:
        k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
    q, k, v = (x.expand(*lead, *x.shape[-3:]).flatten(0, -4) for x in (_repeat_heads(q, heads), k, v))
    out, _ = ops.forward(q, k, v, mask, bias, right=right, scale=scale)
    return out.unflatten(0, lead) if rank > 4 else out[(0,) * (4 - rank)]


def _checked_mask(mask: Tensor, pairs: Sequence[int], dtype: torch.dtype) -> Tensor:
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        if not (torch.is_autocast_enabled(mask.device.type) and mask.is_floating_point()):
            raise _error("attn_mask", f"bool, torch.float32 or query's {dtype}", mask.dtype)
    if mask.dim() > len(pairs):
        raise _error("attn_mask", f"at most {len(pairs)} dimensions", mask.dim())
    if any(m != 1 and m != n for m, n in zip(reversed(mask.shape), reversed(pairs))):
        raise _error("attn_mask", f"a shape that broadcasts to {list(pairs)}", list(mask.shape))
    return mask


def _fold_lead(mask: Tensor, lead: Sequence[int]) -> Tensor:
    """mask, of at most len(lead) + 3 dimensions -> 4-D: the leading ones in one, or 1 where it is the same for all."""
    mask = mask[(None,) * (len(lead) + 3 - mask.dim())]
    same = all(n == 1 for n in mask.shape[:-3])
    return (mask if same else mask.expand(*lead, *mask.shape[-3:])).flatten(0, -4)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """x [..., h, S, D] -> [..., heads, S, D], each head repeated heads / h times in place."""
    h = x.shape[-3]
    return x if h == heads else x.unsqueeze(-3).expand(*x.shape[:-2], heads // h, *x.shape[-2:]).flatten(-4, -3)


def _broadcast(a: Sequence[int], b: Sequence[int]) -> Sequence[int]:
    if any(m != n and 1 not in (m, n) for m, n in zip(a, b)):
        raise _error("query, key, value", "batch and head dimensions that broadcast", f"{list(a)} and {list(b)}")
    return torch.broadcast_shapes(a, b)


def _error(name: str, expected: str, got: object) -> RuntimeError:
    return RuntimeError(f"{_SDPA}: {name}: expected {expected}, got {got}")
