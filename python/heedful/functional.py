"""The functions that users call: they bring arguments into the operators' form and leave the computing to those."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import ops, varlen
from .arguments import Arguments, checked_offsets, lower, straight_through
from .biases import Bias
from .masks import BOTTOM_RIGHT, Align, Mask
from .similarity import Gaussian


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    align: Align = BOTTOM_RIGHT,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    similarity: str | Gaussian = "dot",
    normalizer: str = "softmax",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_i = sum_j p_ij v_j, where p_ij = exp(s_ij - lse_i), lse_i = log sum_j exp(s_ij), s = scale q k^T + bias.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]: float32, float64, bfloat16 or float16, with any strides; Hq a
        multiple of Hk (query head h reads key/value head h // (Hq / Hk)). Or torch's nested tensors of layout jagged,
        [B, H, j, D]: every sequence attends within itself; the results are jagged too.
    mask: which pairs may meet: a bool tensor broadcastable to [B, Hq, Sq, Sk] (True: attend), or a mask such as
        Causal() (see heedful.Mask), or several joined by & and |. A masked pair is absent: nothing of it, not even
        a NaN, reaches the results or the gradients.
    bias: added to the scores: a tensor broadcastable to [B, Hq, Sq, Sk], of q's dtype or float32 (-inf masks), or
        ALiBi(slopes) or RelativeBias(table), or a sum of those.
    align: where query i sits among the keys, for masks and biases by distance: at i ("top-left"), at i + Sk - Sq
        ("bottom-right"; by each sequence's own lengths where given), or at i + n (n an int, or an int tensor [B]).
    softcap: c > 0: c tanh(scale q k^T / c) takes the place of scale q k^T.
    sinks: [Hq] or [B, Hq]: a score for attending to nothing: lse_i = log(exp(sink) + sum_j exp(s_ij)).
    scale: a number, or a tensor [Hq] or [B, Hq]; by default 1 / sqrt(D) for the dot product, 1 otherwise.
    dropout_p, seed: each p_ij is dropped with that probability, the others are divided by what remains of 1; lse is
        that without dropout. Which ones depends on seed (an int, or an int64 tensor, one for all or [B]) and b, h, i, j
        alone; without seed, one is drawn from torch's default generator.
    similarity: "dot", "cosine" (each norm at least 1e-8), or Gaussian(bandwidth), -|q - k|^2 / (2 bandwidth^2).
    normalizer: "softmax"; "hard": p_ij = 1 for the largest score, the first one of equals, and lse_i is that score,
        with a gradient for v alone; "hard-st": the same values with softmax's gradients for all but v.

    Returns out [B, Hq, Sq, Dv] of q's dtype; with return_lse also lse [B, Hq, Sq], float32 (float64 for float64). A
    query with nothing to attend to has out = 0 and lse = -inf, and gives no gradient. Both are differentiable in q, k,
    v and every tensor of floating point among the options. Raises RuntimeError, TypeError, ValueError or
    NotImplementedError that name the argument, what was expected, and what came.
    """
    nested = _check("heedful.attention", q, k, v)
    given = not (mask is bias is softcap is sinks is scale is None and align is BOTTOM_RIGHT)
    if not (given or nested or dropout_p or similarity != "dot" or normalizer != "softmax"):
        out, lse = ops.forward(q, k, v)
        return (out, lse) if return_lse else out

    offsets = None
    if nested:
        (q, k, v), offsets, to_jagged = varlen.from_jagged("heedful.attention", ("q", "k", "v"), q, k, v)
    options = lower(
        q,
        k,
        mask=mask,
        bias=bias,
        align=align,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        similarity=similarity,
        normalizer=normalizer,
        offsets=offsets,
    )
    out, lse = _forward(q, k, v, options)
    if nested:
        out, lse = to_jagged(out), to_jagged(lse) if return_lse else lse
    return (out, lse) if return_lse else out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor | Sequence[int],
    k_offsets: Tensor | Sequence[int] | None = None,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    align: Align = BOTTOM_RIGHT,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    similarity: str | Gaussian = "dot",
    normalizer: str = "softmax",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` within each of N sequences that lie one after the other, without padding.

    q [T, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv].
    q_offsets, k_offsets: int32 or int64 tensors [N + 1], or lists: sequence b is the queries q_offsets[b] to
        q_offsets[b + 1] and the keys k_offsets[b] to k_offsets[b + 1]. k_offsets are by default those of the queries.

    The options are those of :func:`attention`, with B = N, and Sq and Sk the longest sequences' lengths: a mask or bias
    is broadcastable to [N, Hq, Sq, Sk], and i and j count from the beginning of each sequence. "bottom-right" goes by
    each sequence's own lengths.

    Returns out [T, Hq, Dv], and with return_lse lse [T, Hq]. Rows outside of every sequence have out = 0, lse = -inf.
    """
    if _check("heedful.varlen_attention", q, k, v):
        raise TypeError("heedful.varlen_attention: q, k, v: expected packed tensors, got nested: use heedful.attention")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise RuntimeError(f"heedful.varlen_attention: {name}: expected 3 dimensions, got {x.dim()}")
    q, k, v = varlen.packed(q), varlen.packed(k), varlen.packed(v)
    options = lower(
        q,
        k,
        mask=mask,
        bias=bias,
        align=align,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        similarity=similarity,
        normalizer=normalizer,
        offsets=checked_offsets(q_offsets, k_offsets, q),
    )
    out, lse = _forward(q, k, v, options)
    return (varlen.unpacked(out), varlen.unpacked(lse)) if return_lse else varlen.unpacked(out)


def _forward(q: Tensor, k: Tensor, v: Tensor, options: Arguments) -> tuple[Tensor, Tensor]:
    if options.get("normalizer") == "hard-st":
        return straight_through(ops.forward, q, k, v, options)
    return ops.forward(q, k, v, **options)


def _check(function: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """That all are tensors; returns whether one is nested."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: {name}: expected a tensor, got {type(x).__name__}")
    return q.is_nested or k.is_nested or v.is_nested
