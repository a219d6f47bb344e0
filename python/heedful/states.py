"""What attention leaves behind besides its result: states that merge, and the weights themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from . import composite, definition
from .arguments import lower


def merge_states(outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys, of attention over n disjoint parts of them.

        lse = log sum_n exp(lse_n),  out = sum_n exp(lse_n - lse) out_n

    outs: n tensors [..., Dv], or one [n, ..., Dv]. lses: n tensors [...], or one [n, ...]; natural logarithms, as
        heedful.attention returns them with return_lse. Where there are sinks, exactly one part is to hold them.

    Returns out [..., Dv] and lse [...] in their dtypes, computed in float32 at least and differentiable any number of
    times. A part with an lse of -inf takes no part, whatever its out is; if all have, out = 0 and lse = -inf, with zero
    gradients. Raises TypeError or ValueError for dtypes and shapes that do not fit.
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    if outs.dim() < 2 or outs.shape[:-1] != lses.shape:
        expected = f"{list(outs.shape[:-1])}, as outs without its last dimension"
        raise _error(ValueError, "lses", expected, list(lses.shape))
    work = torch.promote_types(torch.promote_types(outs.dtype, lses.dtype), torch.float32)
    there = lses != -torch.inf
    some = there.any(0)
    s = torch.where(there, lses.to(work), -torch.inf)
    lse = torch.where(some, s, 0).logsumexp(0)
    out = (torch.exp(s - lse)[..., None] * torch.where(there[..., None], outs.to(work), 0)).sum(0)
    return out.to(outs.dtype), torch.where(some, lse, -torch.inf).to(lses.dtype)


def attention_weights(
    q: Tensor, k: Tensor, *, top_k: int | None = None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """p_ij of :func:`heedful.attention`, [B, Hq, Sq, Sk] in q's dtype, 0 for pairs that are not there.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D]; the options are those of heedful.attention, except dropout and return_lse.
    top_k: of each query only its largest weights, in descending order, and the keys that they belong to: float and
        int64 [B, Hq, Sq, top_k], with weight 0 and index -1 where a query sees fewer keys. It is computed a block of
        queries at a time, so that memory stays far below Sq x Sk, in reverse mode too (torch.func's transforms keep
        what they record).

    The weights are differentiable in q, k and every floating-point tensor among the options. With sinks, those of a
    query add up to less than 1.
    """
    for name in ("dropout_p", "seed"):
        if name in options:
            raise TypeError(f"heedful.attention_weights: {name}: expected none, as weights are those before dropout")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"heedful.attention_weights: top_k: expected an int of 1 or more, or None, got {top_k!r}")
    arguments = lower(q, k, **options)
    tensors = {"q": q, "k": k} | {n: arguments.pop(n) for n in definition.TENSORS if n in arguments}
    tensors, length = definition.widened(tensors), q.shape[2]
    starts = range(0, max(length, 1), composite.BLOCK)
    blocks = [definition.rows(tensors, start, min(start + composite.BLOCK, length)) for start in starts]
    if top_k is None:
        return torch.cat([_weights(block, arguments, i)[0] for block, i in zip(blocks, starts)], 2).to(q.dtype)

    def largest(block: definition.Tensors, start: int) -> tuple[Tensor, Tensor]:
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return _largest(block, arguments, start, top_k)
        return checkpoint(_largest, block, arguments, start, top_k, use_reentrant=False, preserve_rng_state=False)

    values, indices = zip(*map(largest, blocks, starts))
    return torch.cat(values, 2).to(q.dtype), torch.cat(indices, 2)


def _largest(tensors: definition.Tensors, options: definition.Options, start: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest weights of each query of a block, and their keys."""
    p, seen = _weights(tensors, options, start)
    missing = max(top_k - p.shape[3], 0)
    indices = torch.where(seen, p.detach(), -1).topk(top_k - missing, -1).indices
    there = seen.gather(-1, indices)
    values = torch.where(there, p.gather(-1, indices), 0)
    return pad(values, (0, missing)), pad(torch.where(there, indices, -1), (0, missing), value=-1)


def _weights(tensors: definition.Tensors, options: definition.Options, start: int) -> tuple[Tensor, Tensor]:
    """p of a block of queries, 0 where it is not there, and where it is."""
    if options.get("normalizer") == "hard-st":
        p, seen = _weights(tensors, {**options, "normalizer": "hard"}, start)
        soft, _ = _weights(tensors, {**options, "normalizer": "softmax"}, start)
        return p + (soft - soft.detach()), seen
    p, _, seen = definition.weights(tensors, options, start)
    return torch.where(seen, p, 0), seen


def _stacked(name: str, x: Tensor | Sequence[Tensor]) -> Tensor:
    expected = "a floating-point tensor or a sequence of them, one for each part"
    parts = [x] if isinstance(x, Tensor) else list(x) if isinstance(x, Sequence) else []
    if not parts or not all(isinstance(y, Tensor) and y.is_floating_point() for y in parts):
        got = [str(y.dtype) if isinstance(y, Tensor) else type(y).__name__ for y in parts] or type(x).__name__
        raise _error(TypeError, name, expected, got)
    if any(y.shape != parts[0].shape for y in parts):
        raise _error(ValueError, name, "tensors of one shape", [list(y.shape) for y in parts])
    return x if isinstance(x, Tensor) else torch.stack(parts)


def _error(kind: type[Exception], name: str, expected: str, got: Any) -> Exception:
    return kind(f"heedful.merge_states: {name}: expected {expected}, got {got}")
