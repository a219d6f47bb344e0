"""The operators, and all that torch wants of them from Python: shapes, gradients, tangents, vmap, autocast.

``libheedful.so`` defines and computes ``heedful::attention_forward`` and ``heedful::attention_backward``. Here
:func:`forward` and :func:`backward` call them by the first of these ways that fits:

- torch.compile, torch.export: as operators, with a registered gradient;
- forward mode, torch.func: in an autograd.Function with setup_context, jvp and vmap, because a registered gradient is
  not enough: torch.func.grad refuses it, and torch.func.jvp takes it and gives zeros;
- a gradient is wanted: in an autograd.Function as plain as can be, at a fraction of a registered gradient's overhead;
- else the kernel at once, past autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from . import composite, pairs

LIBRARY = Path(__file__).with_name("libheedful.so")
try:
    torch.ops.load_library(LIBRARY)
except OSError as error:
    raise ImportError(
        f"heedful: its library of operators cannot be loaded: {error}. "
        f"It is built by `pip install .` (or `pip install -e .`) in heedful's source tree, for torch 2.10 or newer; "
        f"this is torch {torch.__version__}."
    ) from error

_forward_op = torch.ops.heedful.attention_forward.default
_backward_op = torch.ops.heedful.attention_backward.default
_below_autograd = torch._C._AutoDispatchBelowAutograd

Tensors = tuple[Tensor | None, ...]
Options = dict[str, Any]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    q_starts: Tensor | None = None,
    q_start: int = 0,
    left: int | None = None,
    right: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Sq, Dv], lse [B, Hq, Sq]) of q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]."""
    if not (q.is_cpu or q.is_meta):
        raise NotImplementedError(
            f"heedful.attention: q: expected a tensor on the CPU, got one on {q.device}: this build of heedful has "
            "kernels for the CPU alone. heedful.reference.attention runs on any device; heedful.explain says more"
        )
    tensors = (q, k, v, mask, bias, q_lengths, k_lengths, q_starts)
    options = {"q_start": q_start, "left": left, "right": right, "scale": scale}
    if torch.compiler.is_compiling():
        return _forward_op(*tensors, **options)
    if _transformed():
        q, k, v, bias = _cast(q, k, v, bias)
        return _Forward.apply(q, k, v, mask, bias, q_lengths, k_lengths, q_starts, options)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(q, k, v, bias):
        q, k, v, bias = _cast(q, k, v, bias)
        return _Recorded.apply(q, k, v, mask, bias, q_lengths, k_lengths, q_starts, options)
    with _below_autograd():
        return _forward_op(*tensors, **options)


def backward(*tensors: Tensor | None, **options: Any) -> Tensors:
    """(dq, dk, dv, dbias or None) of dout, dlse, q, k, v, out, lse, mask, bias, q_lengths, k_lengths, q_starts."""
    if torch.compiler.is_compiling():
        return _backward_op(*tensors, **options)
    if _transformed() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)):
        return _Backward.apply(*tensors, options)
    with _below_autograd():
        return _backward_op(*tensors, **options)


def _transformed() -> bool:
    """Whether forward mode or a torch.func transform is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


# ---- shapes: what each operator returns, without computing it


def _expect(argument: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise RuntimeError(f"heedful.attention: {argument}: expected {expected}, got {got}")


OTHERS = ("mask", "bias", "q_lengths", "k_lengths", "q_starts")


def _check(q: Tensor, k: Tensor, v: Tensor, others: Iterable[tuple[str, Tensor | None]]) -> None:
    """One device, and what the shapes of the results stand on; the rest is checked where the results are computed."""
    for name, x in others:
        if x is not None:
            _expect(name, q.device, x.device)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _expect(name, "4 dimensions", f"{x.dim()} dimensions")
        _expect(name, q.device, x.device)
        _expect(name, q.dtype, x.dtype)
    (batch, heads, _, dim), (_, kv_heads, length, _) = q.shape, k.shape
    _expect("k", [batch, kv_heads, length, dim], list(k.shape))
    _expect("v", [batch, kv_heads, length], list(v.shape[:3]))
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        _expect("q", f"a number of heads that is a multiple of k's {kv_heads}", heads)


def _follow(shape: Sequence[int], like: Tensor) -> Tensor:
    """An empty [B, H, S, D], laid out as [B, S, H, D] where ``like`` is, else contiguous."""
    b, h, s, d = shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(b, s, h, d).transpose(1, 2)
    return like.new_empty(b, h, s, d)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    _check(q, k, v, zip(OTHERS, others))
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return _follow((*q.shape[:3], v.shape[3]), q), lse


def _backward_fake(*tensors: Tensor | None, **options: Any) -> Tensors:
    dout, dlse, q, k, v, out, lse, *others = _all_of(12, tensors)
    bias = others[1]
    _check(q, k, v, (("dout", dout), ("dlse", dlse), ("out", out), ("lse", lse), *zip(OTHERS, others)))
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if options.get("bias_grad") else None
    return _follow(q.shape, q), _follow(k.shape, k), _follow(v.shape, v), dbias


def _all_of(count: int, tensors: Tensors) -> Tensors:
    """The tensors of a call, those that the dispatcher leaves out because they have their default included."""
    return *tensors, *(None for _ in range(count - len(tensors)))


# ---- gradients and tangents


def _save(ctx: FunctionCtx, inputs: Tensors, keyword_only_inputs: Options, output: Tensors) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.save_for_forward(*inputs, *output)
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)


def _forward_backward(ctx: FunctionCtx, dout: Tensor | None, dlse: Tensor | None) -> Tensors:
    """Gradients of q, k, v, mask, bias, q_lengths, k_lengths, q_starts."""
    q, k, v, mask, bias, q_lengths, k_lengths, q_starts, out, lse = ctx.saved_tensors
    if dout is None:
        dout = out.new_zeros(()).expand_as(out)
    tensors = (dout, dlse, q, k, v, out, lse, mask, bias, q_lengths, k_lengths, q_starts)
    dq, dk, dv, dbias = backward(*tensors, **ctx.options, bias_grad=bias is not None and ctx.needs_input_grad[4])
    return dq, dk, dv, None, dbias, None, None, None


def _backward_backward(ctx: FunctionCtx, *ggrads: Tensor | None) -> Tensors:
    """Gradients of dout, dlse, q, k, v, out, lse, mask, bias, q_lengths, k_lengths, q_starts."""
    saved, grads = _saved_by_backward(ctx.saved_tensors)
    ggrads = _materialize(ggrads, (*saved[:3], saved[4]))
    dout, dlse, *gradients, dbias = composite.backward_backward(saved, ctx.options, grads, ggrads)
    return dout, None if ctx.saved_tensors[1] is None else dlse, *gradients, None, dbias, None, None, None


def _saved_by_backward(saved: Tensors) -> tuple[Tensors, Tensors]:
    """What the composites want: the forward operator's tensors and results, and (dout, dlse)."""
    dout, dlse, q, k, v, out, lse, mask, bias, q_lengths, k_lengths, q_starts, *_ = saved
    grads = _materialize((dout, dlse), (out, lse))
    return (q, k, v, mask, bias, q_lengths, k_lengths, q_starts, out, lse), grads


def _materialize(grads: Sequence[Tensor | None], like: Sequence[Tensor | None]) -> Tensors:
    """Zeros for the gradients or tangents that are None, except of tensors that are None."""
    return tuple(g if g is not None or x is None else torch.zeros_like(x) for g, x in zip(grads, like))


class _Recorded(torch.autograd.Function):
    """attention_forward when a gradient is wanted. Inputs: its tensors, then its options in one dict."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Any) -> Tensors:
        with _below_autograd():
            output = _forward_op(*inputs[:-1], **inputs[-1])
        ctx.save_for_backward(*inputs[:-1], *output)
        ctx.options = inputs[-1]
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> Tensors:
        return *_forward_backward(ctx, *grads), None


class _Forward(torch.autograd.Function):
    """attention_forward in forward mode and torch.func: likewise, with all that they ask for."""

    @staticmethod
    def forward(*inputs: Any) -> Tensors:
        return _forward_op(*inputs[:-1], **inputs[-1])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensors) -> None:
        _save(ctx, inputs[:-1], inputs[-1], output)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> Tensors:
        return *_forward_backward(ctx, *grads), None

    @staticmethod
    @pairs.tangents
    def jvp(ctx: FunctionCtx, saved: Tensors, *tangents: Any) -> Tensors:
        q, k, v, _, bias = saved[:5]
        tangents = _materialize((*tangents[:3], tangents[4]), (q, k, v, bias))
        return composite.forward_jvp(saved, ctx.options, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return _forward_vmap(forward, info.batch_size, in_dims[:-1], inputs[:-1], inputs[-1])


class _Backward(torch.autograd.Function):
    """attention_backward in forward mode and torch.func, and wherever it is differentiated itself."""

    @staticmethod
    def forward(*inputs: Any) -> Tensors:
        return _backward_op(*inputs[:-1], **inputs[-1])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensors) -> None:
        _save(ctx, inputs[:-1], inputs[-1], ())

    @staticmethod
    def backward(ctx: FunctionCtx, *ggrads: Tensor | None) -> Tensors:
        return *_backward_backward(ctx, *ggrads), None

    @staticmethod
    @pairs.tangents
    def jvp(ctx: FunctionCtx, saved: Tensors, *tangents: Any) -> Tensors:
        saved, grads = _saved_by_backward(saved)
        q, k, v, _, bias, *_, out, lse = saved
        tdout, tdlse, tq, tk, tv, tout, tlse, _, tbias, *_ = tangents
        tangents = _materialize((tq, tk, tv, tbias, tdout, tdlse, tout, tlse), (q, k, v, bias, *grads, out, lse))
        tangents = composite.backward_jvp(saved, ctx.options, grads, tangents)
        return tangents if ctx.options.get("bias_grad") else (*tangents[:3], None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return _backward_vmap(backward, info.batch_size, in_dims[:-1], inputs[:-1], inputs[-1])


# ---- vmap: one call, the mapped dimension folded into the batch


def _fold(x: Tensor | None, dim: int | None, size: int, batch: int, broadcasts: bool) -> Tensor | None:
    """x [B, ...], mapped along ``dim`` or not at all -> [size * B, ...]. What ``broadcasts`` may stay [1, ...]."""
    if x is None or (broadcasts and dim is None and x.shape[0] == 1):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(size, batch, *x.shape[2:]).flatten(0, 1)


def _fold_all(size: int, dims: Sequence[int | None], tensors: Tensors, q: int, mask: int) -> tuple[int, list]:
    """The batch size without the mapped dimension, and the tensors folded. q, mask: their places; bias follows mask."""
    batch = tensors[q].shape[0 if dims[q] is None else int(dims[q] == 0)]
    return batch, [_fold(x, d, size, batch, i in (mask, mask + 1)) for i, (x, d) in enumerate(zip(tensors, dims))]


def _unfold(x: Tensor, size: int, batch: int) -> Tensor:
    return x.unflatten(0, (size, batch))


def _forward_vmap(call: Callable[..., Tensors], size: int, dims: tuple, tensors: Tensors, options: Options) -> tuple:
    batch, folded = _fold_all(size, dims, tensors, q=0, mask=3)
    return tuple(_unfold(x, size, batch) for x in call(*folded, **options)), (0, 0)


def _backward_vmap(call: Callable[..., Tensors], size: int, dims: tuple, tensors: Tensors, options: Options) -> tuple:
    batch, folded = _fold_all(size, dims, tensors, q=2, mask=7)
    bias = folded[8]
    if bias is not None and options.get("bias_grad"):
        folded[8] = bias.expand(size * batch, *bias.shape[1:])  # where all share one, each needs a gradient of its own
    *grads, dbias = call(*folded, **options)
    grads = [_unfold(x, size, batch) for x in grads]
    if dbias is None:
        return (*grads, None), (0, 0, 0, None)
    dbias = _unfold(dbias, size, batch)
    rows = tensors[8].shape[0 if dims[8] is None else int(dims[8] == 0)]
    return (*grads, dbias.sum(1, keepdim=True) if rows == 1 else dbias), (0, 0, 0, 0)


# ---- autocast: q, k, v in the dtype that the user chose; a float32 bias stays as it is, being read in place


def _cast(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensors:
    """q, k, v, bias as autocast wants them, where it is on."""
    device_type = "cpu" if q.is_cpu else "cuda"
    if not torch.is_autocast_enabled(device_type):
        return q, k, v, bias
    dtype = torch.get_autocast_dtype(device_type)
    if bias is not None and bias.dtype is not torch.float32:
        bias = _eligible(bias, dtype)
    return _eligible(q, dtype), _eligible(k, dtype), _eligible(v, dtype), bias


def _eligible(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype is not torch.float64 else x


def _autocast_on(device_type: str) -> Callable[..., Tensors]:
    def forward_in_autocast(*tensors: Tensor | None, **options: Any) -> Tensors:
        q, k, v, mask, bias, *lengths = _all_of(8, tensors)
        q, k, v, bias = _cast(q, k, v, bias)
        with torch.autocast(device_type, enabled=False):
            return _forward_op(q, k, v, mask, bias, *lengths, **options)

    return forward_in_autocast


# ---- registration


class _Reverse(torch.library.Library):
    """Registers gradients that refuse forward mode, where they would silently give tangents of zero."""

    def impl(self, op_name: str, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        def refuse_tangents(keyset: Any, *tensors: Tensor | None, **options: Any) -> Any:
            if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
                if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
                    raise NotImplementedError(
                        f"torch.ops.heedful.{op_name} has no forward mode when called directly: use heedful.attention"
                    )
            return fn(keyset, *tensors, **options)

        return super().impl(op_name, refuse_tangents, *args, **kwargs)


def _register() -> tuple[torch.library.Library, ...]:
    """Registers all of the above; it lasts as long as what is returned."""
    library, reverse = torch.library.Library("heedful", "IMPL"), _Reverse("heedful", "IMPL")
    rules = (
        ("heedful::attention_forward", _forward_op, 8, _forward_fake, _forward_backward, _forward_vmap),
        ("heedful::attention_backward", _backward_op, 12, _backward_fake, _backward_backward, _backward_vmap),
    )
    for name, op, count, fake, gradient, fold in rules:

        def vmap(info: Any, dims: tuple, *tensors: Any, op=op, count=count, fold=fold, **options: Any) -> tuple:
            return fold(op, info.batch_size, _all_of(count, dims), _all_of(count, tensors), options)

        torch.library.register_fake(name, fake, lib=library)
        torch.library.register_autograd(name, gradient, setup_context=_save, lib=reverse)
        torch.library.register_vmap(name, vmap, lib=library)
    for key, device_type in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        library.impl("attention_forward", _autocast_on(device_type), key)
    return library, reverse


_registrations = _register()
