"""What attention is, in plain PyTorch operations: the one definition that the reference and all derivatives come from.

For sequence b, head h, query i at position_i = i + q_start, key j:

    t   = factor * similarity(q_i, k_j)            dot product, cosine, or -|q_i - k_j|^2 / 2 (gaussian)
    s   = softcap * tanh(t / softcap)              where there is a softcap, else t
    s   = s + bias_ij - slope_h * |j - position_i| + table[bucket(j - position_i), h]
    p   = exp(s - lse),  lse = log(sum_j exp(s) [+ exp(sink_h)])
    out = sum_j z p v_j                            z = 1, or what dropout makes of it

A pair that a mask forbids, or whose score is -inf, is absent: it takes no part, forward or backward, whatever its
numbers are. A query with nothing to attend to, sink included, gives out = 0, lse = -inf and zero gradients.

Everything here can be differentiated any number of times, in every mode, and works under vmap. It takes memory for
each pair of the queries it is given, so it is called with a block of them where there are many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .dropout import keep_factors
from .masks import allowed
from .pairs import contract, scores

DIFFERENTIABLE = ("q", "k", "v", "bias", "scales", "sinks", "slopes", "table")
TENSORS = (
    *DIFFERENTIABLE,
    *("buckets", "mask", "tiles", "bits", "q_lengths", "k_lengths", "q_starts", "q_offsets", "k_offsets", "seed"),
)
OPTIONS = {
    "q_start": 0,
    "left": None,
    "right": None,
    "scale": None,
    "softcap": None,
    "similarity": "dot",
    "normalizer": "softmax",
    "dropout_p": 0.0,
    "dropout_batch": 0,  # where vmap has made one batch of several, dropout counts sequences modulo this
    "allow_tf32": False,  # whether kernels for GPUs may round what products of float32 take to TensorFloat-32
}
EPS = 1e-8  # cosine: norms are no less
_MASKING = ("mask", "tiles", "bits", "q_lengths", "k_lengths", "q_starts")

Tensors = Mapping[str, Tensor | None]
Options = Mapping[str, Any]


# ---- attention, of a block of queries


def attention(tensors: Tensors, options: Options, start: int = 0, sequence: int = 0) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, n, Dv], lse [B, Hq, n]) of the queries start .. start + n: those of :func:`rows`.

    tensors: by the names in TENSORS, None or missing where there is none, as :func:`widened`; not packed (see
    :func:`sequences`). options: by the names in OPTIONS. sequence: the first one's index, which dropout counts.
    """
    p, lse, seen = weights(tensors, options, start)
    if options.get("dropout_p"):
        batch, heads, n, k_length = p.shape
        indices = torch.arange(start, start + n, device=p.device)
        of_batch = torch.arange(sequence, sequence + batch, device=p.device)
        if options.get("dropout_batch"):
            of_batch = of_batch % options["dropout_batch"]
        p = p * keep_factors(tensors["seed"], options["dropout_p"], indices, k_length, heads, of_batch).to(p.dtype)
    return contract(p, _per_head(tensors["v"], p.shape[1]), seen), lse


def weights(tensors: Tensors, options: Options, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(p [B, Hq, n, Sk], lse [B, Hq, n], the pairs that p is of: elsewhere it means nothing); else as attention."""
    options = OPTIONS | dict(options)
    q, k = tensors["q"], _per_head(tensors["k"], tensors["q"].shape[1])
    (batch, heads, n, _), k_length = q.shape, k.shape[2]
    indices = torch.arange(start, start + n, device=q.device)

    seen = allowed(
        indices,
        k_length,
        **{name: tensors.get(name) for name in _MASKING},
        **{name: options[name] for name in ("q_start", "left", "right")},
    )
    added = biases(tensors, options, indices, k_length)
    for bias in added:
        seen = seen & (bias != -torch.inf)
    with torch.no_grad():  # a score can be -inf by itself
        seen = seen & (_scores(q, k, tensors, options, added, seen) != -torch.inf)
    s = torch.where(seen, _scores(q, k, tensors, options, added, seen), -torch.inf)

    # The sink is one more key, the last one, and of no value.
    sink = q.new_full((), -torch.inf) if tensors.get("sinks") is None else _of_heads(tensors["sinks"])
    if tensors.get("q_lengths") is not None:
        sink = torch.where(indices[:, None] < tensors["q_lengths"][:, None, None, None], sink, -torch.inf)
    sink = sink.expand(batch, heads, n, 1)
    alive = seen.any(-1, keepdim=True) | (sink != -torch.inf)
    every = torch.where(alive, torch.cat((s, sink), -1), 0)
    if options["normalizer"] == "hard":
        lse, best = every.detach().max(-1, keepdim=True)
        seen = seen & (best == torch.arange(k_length, device=q.device))
        p = seen.to(q.dtype)
    else:
        lse = every.logsumexp(-1, keepdim=True)
        p = torch.exp(s - lse)
    return p, torch.where(alive, lse, -torch.inf).squeeze(-1), seen


def _scores(q: Tensor, k: Tensor, tensors: Tensors, options: Options, added: list[Tensor], seen: Tensor) -> Tensor:
    """s of the pairs that are there; of the others it means nothing."""
    if options["similarity"] != "dot":  # a row that meets nobody has no gradient, which its own numbers would spoil
        q, k = torch.where(seen.any(-1)[..., None], q, 0), torch.where(seen.any(-2)[..., None], k, 0)
        q, k = _EMBEDDINGS[options["similarity"]](q, k)
    s = _factor(tensors, options) * scores(q, k, seen)
    if options["softcap"] is not None:
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    return sum(added, s)


def _cosine(*x: Tensor) -> list[Tensor]:
    """x / max(|x|, EPS), with a derivative of 1 / EPS where |x| is below EPS."""
    squared = (y.square().sum(-1, keepdim=True) for y in x)
    return [y * torch.where(n > EPS**2, n, EPS**2).rsqrt() for y, n in zip(x, squared)]


def _gaussian(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(q, -|q|^2 / 2, 1), (k, 1, -|k|^2 / 2): their product is -|q - k|^2 / 2."""
    q_norm, k_norm = (x.square().sum(-1, keepdim=True) / -2 for x in (q, k))
    return torch.cat((q, q_norm, torch.ones_like(q_norm)), -1), torch.cat((k, torch.ones_like(k_norm), k_norm), -1)


_EMBEDDINGS = {"cosine": _cosine, "gaussian": _gaussian}  # to rows whose dot product is the similarity


def _factor(tensors: Tensors, options: Options) -> Tensor | float:
    if tensors.get("scales") is not None:
        return _of_heads(tensors["scales"])
    if options["scale"] is not None:
        return options["scale"]
    head_dim = tensors["q"].shape[3]
    return 1 / math.sqrt(head_dim) if options["similarity"] == "dot" and head_dim else 1.0


def biases(tensors: Tensors, options: Options, indices: Tensor, k_length: int) -> list[Tensor]:
    """What is added to the scores, each broadcastable to [B, Hq, n, Sk]."""
    q_starts, slopes, table = (tensors.get(name) for name in ("q_starts", "slopes", "table"))
    position = indices[None, None, :, None] + (
        options["q_start"] if q_starts is None else q_starts[:, None, None, None]
    )
    distance = torch.arange(k_length, device=indices.device) - position
    terms = [] if tensors.get("bias") is None else [tensors["bias"]]
    if slopes is not None:
        terms.append(-_of_heads(slopes) * distance.abs())
    if table is not None:
        reach = len(tensors["buckets"]) // 2
        bucket = tensors["buckets"][distance.clamp(-reach, reach) + reach]
        by_head = (table if table.dim() == 3 else table[None]).mT[:, :, None]  # [B or 1, Hq, 1, buckets]
        batch = bucket.shape[0] if by_head.shape[0] == 1 else by_head.shape[0]
        lead = batch, by_head.shape[1], bucket.shape[2]
        # Not take_along_dim, which torch 2.10 cannot differentiate twice at dynamic shapes.
        terms.append(by_head.expand(*lead, -1).gather(3, bucket.expand(*lead, -1)))
    return terms


def _of_heads(x: Tensor) -> Tensor:
    """[Hq] or [B, Hq] -> broadcastable to [B, Hq, n, Sk]."""
    return x[..., None, None]


def _per_head(x: Tensor, heads: int) -> Tensor:
    """[B, Hk, S, D] -> [B, heads, S, D]."""
    return x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] else x


# ---- of whole calls, and their parts


def whole(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) as the operator gives them, but in the precision that is computed in; packed sequences too."""
    tensors = widened(tensors)
    if tensors.get("q_offsets") is None:
        return attention(tensors, options)
    results = [attention(part, options, sequence=b) for b, part in enumerate(sequences(tensors))]
    outs, lses = zip(*results) if results else ((), ())
    return joined(tensors, outs, 0.0, tensors["v"].shape[3]), joined(tensors, lses, -torch.inf)


def widened(tensors: Tensors) -> dict[str, Tensor | None]:
    """In the precision that is computed in: q's, and at least float32."""
    work = torch.promote_types(tensors["q"].dtype, torch.float32)
    return {n: x if x is None or not x.is_floating_point() else x.to(work) for n, x in tensors.items()}


def rows(tensors: Tensors, start: int, stop: int) -> dict[str, Tensor | None]:
    """The tensors with the queries start .. stop alone."""
    return {n: x.narrow(2, start, stop - start) if by_row(n, x) else x for n, x in tensors.items()}


def by_row(name: str, x: Tensor | None) -> bool:
    """Whether :func:`rows` takes its part of this tensor. (A mask stays whole, as what else tells pairs apart.)"""
    return name == "q" or (name == "bias" and x is not None and x.shape[2] > 1)


def sequences(tensors: Tensors) -> list[dict[str, Tensor | None]]:
    """The sequences of a packed call, each as a call that is not packed, with a batch of 1."""
    sizes = {n: split_sizes(tensors[f"{n}_offsets"], tensors[n].shape[2]) for n in ("q", "k")}
    (_, *q_lengths, _), (_, *k_lengths, _) = sizes["q"], sizes["k"]
    parts = {}
    for name, x in tensors.items():
        if x is None or name in ("q_offsets", "k_offsets"):
            continue
        if name in ("q", "k", "v"):
            parts[name] = x.split(sizes["q" if name == "q" else "k"], 2)[1:-1]
        elif x.dim() > _SHARED.get(name, 0) and x.shape[0] > 1:
            parts[name] = x.split(1)
        else:
            parts[name] = [x] * len(q_lengths)
        if name in ("bias", "mask"):
            parts[name] = [_crop(_crop(y, 2, m), 3, n) for y, m, n in zip(parts[name], q_lengths, k_lengths)]
    return [dict(zip(parts, values)) for values in zip(*parts.values())]


# With so many dimensions a tensor is the same for all sequences; with more, its first one tells them apart.
_SHARED = {"scales": 1, "sinks": 1, "slopes": 1, "table": 2, "buckets": 1, "bits": 2}


def split_sizes(offsets: Tensor, length: int) -> list[int]:
    """How many rows lie before the first sequence, in each sequence, and after the last one."""
    return [stop - start for start, stop in pairwise((0, *offsets.tolist(), length))]


def joined(tensors: Tensors, parts: Sequence[Tensor], gap: float, *width: int) -> Tensor:
    """[1, Hq, T, *width] of the sequences' [1, Hq, length, *width], with ``gap`` outside of every sequence."""
    q = tensors["q"]
    before, *_, after = split_sizes(tensors["q_offsets"], q.shape[2])
    before, after = (q.new_full((*q.shape[:2], n, *width), gap) for n in (before, after))
    return torch.cat((before, *parts, after), 2)


def _crop(x: Tensor, dim: int, length: int) -> Tensor:
    return x.narrow(dim, 0, length) if x.shape[dim] > 1 else x
