"""Products in which a pair that is not there takes no part, forward or backward, whatever its numbers are.

``matmul`` lets a NaN or an infinity of one pair into others, because 0 * NaN is NaN. These two do not. Each is the
other's derivative, so both can be differentiated any number of times, in forward mode and under vmap too.

``seen`` is bool, broadcastable to [..., M, N]: the pairs that are there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionCtx


def scores(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    """a [..., M, D], b [..., N, D] -> [..., M, N]: a_m . b_n for the pairs that are there, 0 for the others."""
    return _Scores.apply(a, b, seen)


def contract(w: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    """w [..., M, N], b [..., N, D] -> [..., M, D]: the sum of w_mn * b_n over the n that m sees."""
    return _Contract.apply(w, b, seen)


def tangents(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A jvp from ``rule(ctx, saved, *tangents)``, one that forward mode can differentiate in its turn.

    NOTE: torch runs a jvp with forward mode off: of two nested transforms the outer one would silently get zeros.
    """

    @functools.wraps(rule)
    def jvp(ctx: FunctionCtx, *tangents: Tensor | None) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = tuple(None if x is None else forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors)
            return rule(ctx, saved, *tangents)

    return jvp


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """In the precision of the arguments, whatever autocast is set to."""
    device_type = x.device.type
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


def _mapped(product: Callable[..., Tensor], in_dims: tuple, tensors: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """vmap: the mapped dimension in front of the others."""
    rank = max(x.dim() - (dim is not None) for x, dim in zip(tensors, in_dims, strict=True))

    def in_front(x: Tensor, dim: int | None) -> Tensor:
        return x if dim is None else x.movedim(dim, 0)[(slice(None), *(None,) * (rank + 1 - x.dim()))]

    return product(*map(in_front, tensors, in_dims)), 0


class _Scores(Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
        with _no_autocast(a):
            return torch.where(seen, a @ b.mT, 0)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        a, b, seen = ctx.saved_tensors
        return contract(grad, b, seen), contract(grad.mT, a, seen.mT), None

    @staticmethod
    @tangents
    def jvp(ctx: FunctionCtx, saved: tuple, da: Tensor, db: Tensor, _: None) -> Tensor:
        a, b, seen = saved
        return scores(da, b, seen) + scores(a, db, seen)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *tensors: Tensor) -> tuple[Tensor, int]:
        return _mapped(scores, in_dims, tensors)


class _Contract(Function):
    @staticmethod
    def forward(w: Tensor, b: Tensor, seen: Tensor) -> Tensor:
        with _no_autocast(w):
            w = torch.where(seen, w, 0)
            finite = b.isfinite()
            out = w @ torch.where(finite, b, 0)
            # What the non-finite entries add: an infinity where every one that is seen pulls the same way, else NaN.
            hits = seen.to(b.dtype) @ (~finite).to(b.dtype)
            pull = w.sign() @ torch.where(b.isinf(), b.sign(), 0)
            return out + torch.where(hits == 0, 0, torch.where(pull.abs() == hits, pull * torch.inf, torch.nan))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        w, b, seen = ctx.saved_tensors
        return scores(grad, b, seen), contract(w.mT, grad, seen.mT), None

    @staticmethod
    @tangents
    def jvp(ctx: FunctionCtx, saved: tuple, dw: Tensor, db: Tensor, _: None) -> Tensor:
        w, b, seen = saved
        return contract(dw, b, seen) + contract(w, db, seen)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *tensors: Tensor) -> tuple[Tensor, int]:
        return _mapped(contract, in_dims, tensors)
