"""torch.nn.functional.scaled_dot_product_attention, computed by heedful: torch's broadcasting, shapes and errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, varlen
from .arguments import Arguments, dropout

_SDPA = "heedful.scaled_dot_product_attention"
_NAMES = ("query", "key", "value")


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
    Dimensions before the last two broadcast; with enable_gqa, Hq may be a multiple of Hk. Or all three nested tensors
    of layout jagged [B, H, j, D], without attn_mask. attn_mask: bool (True: attend), or of query's dtype or float32
    (added to the scores), broadcastable to [..., Hq, Sq, Sk]. is_causal: query i attends to the keys up to i; not
    together with attn_mask. dropout_p: each weight is dropped with that probability, the others are divided by
    1 - dropout_p; torch.manual_seed decides which, though not the same ones as torch drops.
    """
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        name, x = next((n, x) for n, x in zip(_NAMES, (query, key, value)) if not isinstance(x, Tensor))
        raise TypeError(f"{_SDPA}: {name}: expected a tensor, got {type(x).__name__}")
    options: Arguments = {}
    if is_causal:
        options["right"] = 0
    if scale is not None:
        options["scale"] = scale
    if dropout_p != 0.0:
        options |= _dropout(dropout_p, query)
    if query.is_nested or key.is_nested or value.is_nested:
        return _jagged(query, key, value, attn_mask, options, enable_gqa)
    q, k, v = query.shape, key.shape, value.shape
    if len(q) == len(k) == len(v) == 4 and (attn_mask is None or _fits(attn_mask, query, key, is_causal)):
        same = q[0] == k[0] == v[0] and k[1] == v[1]
        if same and (q[1] == k[1] or (enable_gqa and k[1] != 0 and q[1] % k[1] == 0)):
            if attn_mask is not None:
                options["mask" if attn_mask.dtype is torch.bool else "bias"] = attn_mask
            return ops.forward(query, key, value, **options)[0]
    return _broadcasting(query, key, value, attn_mask, options, enable_gqa)


def _fits(mask: Tensor, query: Tensor, key: Tensor, is_causal: bool) -> bool:
    """Whether the operator takes the mask as it is, at the cost of a glance."""
    if is_causal or not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype not in (torch.bool, query.dtype):
        return False
    return all(m == 1 or m == n for m, n in zip(mask.shape, (*query.shape[:3], key.shape[2])))


def _dropout(p: float, like: Tensor) -> Arguments:
    try:
        return dropout(p, None, 1, like)
    except ValueError:  # torch's is a RuntimeError
        raise _error("dropout_p", "a number from 0 to 1", p) from None


def _jagged(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, options: Arguments, gqa: bool
) -> Tensor:
    tensors, (q_offsets, k_offsets), to_jagged = varlen.from_jagged(_SDPA, _NAMES, query, key, value)
    if attn_mask is not None:
        raise _error("attn_mask", "None beside nested tensors (heedful.attention takes masks)", "a mask")
    if not gqa and query.shape[1] != key.shape[1]:
        raise _error("key, value", f"the heads of query, {query.shape[1]}, without enable_gqa", key.shape[1])
    return to_jagged(ops.forward(*tensors, q_offsets=q_offsets, k_offsets=k_offsets, **options)[0])


def _broadcasting(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    options: Arguments,
    gqa: bool,
) -> Tensor:
    """Any ranks and any shapes that broadcast, brought to [B, H, S, D]; nothing is copied that strides can express."""
    if not isinstance(attn_mask, Tensor | None):
        raise TypeError(f"{_SDPA}: attn_mask: expected a tensor or None, got {type(attn_mask).__name__}")
    if attn_mask is not None and "right" in options:
        raise _error("attn_mask", "None where is_causal is set", "a tensor")
    least = 3 if gqa else 2
    for name, x in zip(_NAMES, (query, key, value)):
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
    out, _ = ops.forward(q, k, v, mask=mask, bias=bias, **options)
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
