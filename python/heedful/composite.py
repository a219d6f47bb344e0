"""Derivatives that no kernel computes: of definition.py, a block of queries at a time.

Forward mode needs the tangents of both operators, double backward the gradients of the second. They are rarely asked
for, so they trade speed for brevity: all is computed anew from the operators' arguments, with memory for
[B, Hq, BLOCK, Sk] pairs at once, half precision in float32.

Below, f is the forward operator of x, its differentiable arguments, and c = (dout, dlse) are gradients of its results.
A tangent t goes through a function as the gradient of its gradient, which is linear in what it is given: that takes
reverse mode alone, which may happen inside of every transform (torch has only one forward level outside torch.func).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import tree_map

from . import definition
from .definition import DIFFERENTIABLE, Options, Tensors

BLOCK = 128  # queries

# (f, x, c, t) -> a result with a row for each query, like c, and one like x; either may be empty.
Rule = Callable[[Callable, tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Sequence, Sequence]]
Results = tuple[list[Tensor], dict[str, Tensor]]


def forward_jvp(tensors: Tensors, options: Options, tangents: Tensors) -> tuple[Tensor, Tensor]:
    """Tangents of (out, lse), given those of DIFFERENTIABLE. Here and below, a tangent of None is zero."""
    (tout, tlse), _ = _whole(lambda f, x, c, t: (_jvp(f, x, t), ()), tensors, options, (), tangents)
    return tout.to(tensors["q"].dtype), tlse


def backward_jvp(
    tensors: Tensors, options: Options, dout: Tensor, dlse: Tensor | None, tangents: Tensors
) -> tuple[Tensor | None, ...]:
    """Tangents of the gradients of DIFFERENTIABLE, given those of DIFFERENTIABLE, dout and dlse."""
    c = (dout, dlse, tangents.get("dout"), tangents.get("dlse"))
    _, grads = _whole(
        lambda f, x, c, t: ((), _jvp(_backward(f), (c[:2], *x), (c[2:], *t))), tensors, options, c, tangents
    )
    return grads


def backward_backward(
    tensors: Tensors, options: Options, dout: Tensor, dlse: Tensor | None, ggrads: Tensors
) -> tuple[Tensor | None, ...]:
    """Gradients of dout, dlse and DIFFERENTIABLE, given those of the gradients of DIFFERENTIABLE."""

    def rule(f: Callable, x: tuple[Tensor, ...], c: tuple[Tensor, ...], t: tuple[Tensor, ...]) -> tuple:
        gc, *gx = vjp(_backward(f), c, *x)[1](t)
        return gc, gx

    (gdout, gdlse), grads = _whole(rule, tensors, options, (dout, dlse), ggrads)
    return gdout.to(dout.dtype), gdlse, *grads


def _backward(f: Callable) -> Callable:
    """The backward operator: (c, *x) -> the gradients of x."""
    return lambda c, *x: vjp(f, *x)[1](c)


def _jvp(f: Callable, x: tuple, t: tuple) -> Any:
    """The tangent of f(*x)."""
    out, pull = vjp(f, *x)
    return vjp(pull, tree_map(torch.zeros_like, out))[1](t)[0]


# ---- what a rule gives for all queries


def _whole(
    rule: Rule, tensors: Tensors, options: Options, c: Sequence[Tensor | None], t: Tensors
) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """For a whole call. What is like x comes for each of DIFFERENTIABLE and in its dtype."""
    given = {n: x for n, x in tensors.items() if x is not None}
    wide = definition.widened(given)
    q, v = wide["q"], wide["v"]
    t = {n: _filled(t.get(n), wide[n]) for n in DIFFERENTIABLE if n in wide}
    out = q.new_zeros(()).expand(*q.shape[:3], v.shape[3])
    c = [_filled(y, (out, out[..., 0])[n % 2]) for n, y in enumerate(c)]
    if "q_offsets" not in wide:
        by_query, by_name = _by_block(rule, wide, c, t, options)
    elif len(wide["q_offsets"]) > 1:
        by_query, by_name = _by_sequence(rule, wide, c, t, options)
    else:  # packed, but no sequences
        by_query, by_name = [out, out[..., 0]], {n: torch.zeros_like(x) for n, x in t.items()}
    return by_query, tuple(by_name[n].to(given[n].dtype) if n in by_name else None for n in DIFFERENTIABLE)


def _filled(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x.to(like.dtype)


def _by_sequence(rule: Rule, tensors: Tensors, c: list[Tensor], t: dict[str, Tensor], options: Options) -> Results:
    """For packed sequences, one after the other."""

    def split(*x: Tensor) -> list[dict[str, Tensor]]:
        return [{n: part[n] for n in t} for part in definition.sequences(tensors | dict(zip(t, x)))]

    _, join = vjp(split, *(tensors[n] for n in t))
    parts, sizes = definition.sequences(tensors), definition.split_sizes(tensors["q_offsets"], tensors["q"].shape[2])
    c_parts = zip(*(y.split(sizes, 2)[1:-1] for y in c)) if c else [()] * len(parts)
    each = enumerate(zip(parts, c_parts, split(*t.values())))
    results = [_by_block(rule, *part, options, b) for b, part in each]
    by_query = [definition.joined(tensors, ys, 0.0, *ys[0].shape[3:]) for ys in zip(*(y for y, _ in results))]
    by_name = [g for _, g in results]
    return by_query, dict(zip(t, join(by_name))) if all(by_name) else {}


def _by_block(
    rule: Rule, tensors: Tensors, c: Sequence[Tensor], t: Mapping[str, Tensor], options: Options, sequence: int = 0
) -> Results:
    """For a call that is not packed, a block of queries after the other."""
    length, by_query, by_name = tensors["q"].shape[2], [], {}
    for start in range(0, max(length, 1), BLOCK):
        stop = min(start + BLOCK, length)
        block = definition.rows(tensors, start, stop)

        def f(*x: Tensor, block: Tensors = block, start: int = start) -> tuple[Tensor, Tensor]:
            return definition.attention({**block, **dict(zip(t, x))}, options, start, sequence)

        x, tx = tuple(block[n] for n in t), tuple(definition.rows(t, start, stop).values())
        rows, grads = rule(f, x, tuple(y.narrow(2, start, stop - start) for y in c), tx)
        by_query.append(rows)
        for n, g in zip(t, grads):
            if definition.by_row(n, tensors[n]):
                by_name.setdefault(n, []).append(g)
            else:
                by_name[n] = by_name[n] + g if n in by_name else g
    by_name = {n: torch.cat(g, 2) if isinstance(g, list) else g for n, g in by_name.items()}
    return [torch.cat(ys, 2) for ys in zip(*by_query)], by_name
