"""The operators, and all that torch wants of them from Python: shapes, gradients, tangents, autocast.

``libheedful.so`` defines ``heedful::attention_forward`` and ``heedful::attention_backward`` and computes them on the
CPU, ``libheedful_cuda.so`` on GPUs, where there is one; what their arguments mean stands in definition.py. Each has a
plain twin of few arguments, for calls so small that to look up the others would take longer than to compute.
:func:`forward` and :func:`backward` call them by the first way that fits:

- torch.compile, torch.export: as operators, with a registered gradient;
- forward mode, torch.func: in an autograd.Function with setup_context, jvp and vmap, because a registered gradient is
  not enough: torch.func.grad refuses it, and torch.func.jvp takes it and gives zeros;
- a gradient is wanted: in an autograd.Function as plain as can be, at a fraction of a registered gradient's overhead;
- else the kernel at once, past autograd.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from . import composite, flops, pairs, vmap
from .definition import DIFFERENTIABLE, OPTIONS, TENSORS
from .vmap import BACKWARD_TENSORS, PARAMETERS

LIBRARY = Path(__file__).with_name("libheedful.so")
try:
    torch.ops.load_library(LIBRARY)
except OSError as error:
    raise ImportError(
        f"heedful: its library of operators cannot be loaded: {error}. "
        f"It is built by `pip install .` (or `pip install -e .`) in heedful's source tree, for torch 2.10 or newer; "
        f"this is torch {torch.__version__}."
    ) from error

CUDA_LIBRARY = LIBRARY.with_name("libheedful_cuda.so")


def _load_cuda() -> str:
    """Loads the kernels for GPUs; returns why not, or nothing where it has.

    Whether there is a GPU is not asked: that would start CUDA, after which no child process of a fork may use it.
    """
    if not CUDA_LIBRARY.exists():
        return "this build has no CUDA kernels: it was built without nvcc, or with HEEDFUL_CUDA=off"
    if torch.version.cuda is None:
        return "not loaded: this torch is one without CUDA"
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        return f"not loaded: {error}"
    return ""


NO_CUDA = _load_cuda()  # why kernels for GPUs are not loaded


def no_gpu() -> str:
    """Why kernels for GPUs do not run here; nothing where they do."""
    if NO_CUDA:
        return NO_CUDA
    if not torch.cuda.is_available():
        return "torch finds no GPU (torch.cuda.is_available() is False)"
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(CUDA_LIBRARY)).heedful_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime))
    if driver.value // 1000 < runtime.value // 1000:  # in thousands and tens: 13000 is 13.0
        needs, has = (f"{x // 1000}.{x % 1000 // 10}" for x in (runtime.value, driver.value))
        return f"built by CUDA {needs}, which needs a driver of that major version; this one is of CUDA {has}"
    return ""


_forward_op = torch.ops.heedful.attention_forward.default
_backward_op = torch.ops.heedful.attention_backward.default
_below_autograd = torch._C._AutoDispatchBelowAutograd

# The same operators with these arguments alone, which torch calls in two thirds of the time. They are called where none
# but the kernel sees the call.
_plain_forward_op = torch.ops.heedful.plain_forward.default
_plain_backward_op = torch.ops.heedful.plain_backward.default
_PLAIN = frozenset(("q_start", "left", "right", "scale"))

OTHERS = TENSORS[3:]  # than q, k, v
_NO_PARAMETERS = (None,) * len(PARAMETERS)

Tensors = tuple[Tensor | None, ...]
Options = dict[str, Any]


def forward(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Sq, Dv], lse [B, Hq, Sq]) of q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv].

    arguments: any others of the operator, by name.
    """
    if not (q.is_cpu or q.is_meta or (q.is_cuda and not NO_CUDA)):
        raise NotImplementedError(
            f"heedful.attention: q: expected a tensor on the CPU, got one on {q.device}"
            f"{f', and kernels for GPUs are not there ({NO_CUDA})' if q.is_cuda else ''}. "
            "heedful.reference.attention runs on any device; heedful.explain says more"
        )
    if not q.is_cpu and allows_tf32(q):
        arguments["allow_tf32"] = True
    if torch.compiler.is_compiling():
        return _forward_op(q, k, v, **arguments)
    plain = arguments.keys() <= _PLAIN  # none is a tensor then, and to ask takes time
    transformed = _transformed()
    given = () if plain else arguments.values()
    if transformed or (torch.is_grad_enabled() and torch._C._any_requires_grad(q, k, v, *given)):
        if not plain:
            arguments = {name: x for name, x in arguments.items() if x is not None}
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu" if q.is_cpu else "cuda"):
            q, k, v, arguments = _cast(q, k, v, arguments)
        if not transformed:
            tensors = () if plain else [x for x in arguments.values() if isinstance(x, Tensor)]
            return _Recorded.apply(arguments, q, k, v, *tensors)
        others = [arguments.pop(name, None) for name in OTHERS]
        return _Forward.apply(q, k, v, *others, arguments)
    return _forward_below(q, k, v, arguments)


def _forward_below(q: Tensor, k: Tensor, v: Tensor, arguments: Options) -> tuple[Tensor, Tensor]:
    """The kernel at once, past autograd."""
    with _below_autograd():
        if arguments.keys() <= _PLAIN and _unseen(q, k, v):
            return _plain_forward_op(q, k, v, **arguments)
        return _forward_op(q, k, v, **arguments)


def _unseen(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether no dispatch mode and no subclass of tensors sees which operator is called: they know the full ones."""
    return type(q) is type(k) is type(v) is Tensor and torch._C._len_torch_dispatch_stack() == 0


def allows_tf32(q: Tensor) -> bool:
    """Whether attention of these queries may compute in TensorFloat-32: float32 on a GPU, where torch's own switch for
    matrix products says so. (Its fp32_precision follows every way to set it; to read allow_tf32 may raise.) What
    torch.export makes keeps the switch as it was."""
    return q.is_cuda and q.dtype is torch.float32 and _torch_allows_tf32()


def _torch_allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# A compiled graph is guarded by the switch. torch.compiler.assume_constant_result does no more, but imports the
# compiler, which takes as long as torch.
_torch_allows_tf32._dynamo_marked_constant = True


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *others: Tensor | None,
    **options: Any,
) -> Tensors:
    """(dq, dk, dv, dbias, dscales, dsinks, dslopes, dtable) of the tensors of BACKWARD_TENSORS.

    Of the last five, those that no option asks for are None.
    """
    tensors = dout, dlse, q, k, v, out, lse, *others
    if torch.compiler.is_compiling():
        return _backward_op(*tensors, **options)
    if _transformed() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)):
        return _Backward.apply(*_all_of(BACKWARD_TENSORS, tensors), options)
    with _below_autograd():
        if dlse is None and not others and options.keys() <= _PLAIN and _unseen(q, k, v):
            return *_plain_backward_op(dout, q, k, v, out, lse, **options), *_NO_PARAMETERS
        return _backward_op(*tensors, **options)


def _transformed() -> bool:
    """Whether forward mode or a torch.func transform is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


# ---- shapes: what each operator returns, without computing it


def _expect(argument: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise RuntimeError(f"heedful.attention: {argument}: expected {expected}, got {got}")


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
        raise RuntimeError(
            f"heedful.attention: q: expected a number of heads that is a multiple of k's {kv_heads}, got {heads}"
        )


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
    given = dict(zip(BACKWARD_TENSORS, tensors))
    q, k, v = given.pop("q"), given.pop("k"), given.pop("v")
    _check(q, k, v, given.items())
    parameters = [
        torch.empty_like(given[name], memory_format=torch.contiguous_format) if options.get(f"{name}_grad") else None
        for name in PARAMETERS
    ]
    return _follow(q.shape, q), _follow(k.shape, k), _follow(v.shape, v), *parameters


def _all_of(names: Sequence[str], tensors: Tensors) -> Tensors:
    """The tensors of a call, those that were left out because they have their default included."""
    return *tensors, *(None for _ in range(len(names) - len(tensors)))


# ---- gradients and tangents


def _save(ctx: FunctionCtx, inputs: Tensors, keyword_only_inputs: Options, output: Tensors) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.save_for_forward(*inputs, *output)
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)


def _forward_backward(ctx: FunctionCtx, dout: Tensor | None, dlse: Tensor | None) -> Tensors:
    """Gradients of the tensors of TENSORS."""
    *tensors, out, lse = ctx.saved_tensors
    wanted = [n for n, x, w in zip(PARAMETERS, tensors[3:], ctx.needs_input_grad[3:]) if x is not None and w]
    grads = _gradients(dout, dlse, tensors, out, lse, ctx.options, wanted)
    return *grads, *(None for _ in range(len(TENSORS) - len(DIFFERENTIABLE)))


def _gradients(
    dout: Tensor | None,
    dlse: Tensor | None,
    tensors: Sequence[Tensor | None],
    out: Tensor,
    lse: Tensor,
    options: Options,
    wanted: Iterable[str],
) -> Tensors:
    """Gradients of DIFFERENTIABLE; of its parameters, those that are wanted."""
    q, k, v, *others = tensors
    if dout is None:
        dout = out.new_zeros(()).expand_as(out)
    return backward(dout, dlse, q, k, v, out, lse, *others, **options, **{f"{name}_grad": True for name in wanted})


def _backward_backward(ctx: FunctionCtx, *ggrads: Tensor | None) -> Tensors:
    """Gradients of the tensors of BACKWARD_TENSORS; those of out and lse are part of those of q, k, v and so on."""
    tensors, options, dout, dlse = _call_of_backward(ctx.saved_tensors, ctx.options)
    ggrads = _materialize(dict(zip(DIFFERENTIABLE, ggrads)), tensors)
    gdout, gdlse, gq, gk, gv, *others = composite.backward_backward(tensors, options, dout, dlse, ggrads)
    if ctx.saved_tensors[1] is None:
        gdlse = None
    return gdout, gdlse, gq, gk, gv, None, None, *others, *(None for _ in range(len(TENSORS) - len(DIFFERENTIABLE)))


def _call_of_backward(saved: Tensors, options: Options) -> tuple[dict[str, Tensor | None], Options, Tensor, Tensor]:
    """What the composites want: tensors by name, options with their defaults, dout and dlse."""
    given = dict(zip(BACKWARD_TENSORS, saved))
    grads = _materialize(
        {"dout": given.pop("dout"), "dlse": given.pop("dlse")}, {"dout": given.pop("out"), "dlse": given.pop("lse")}
    )
    return given, _with_defaults(options), grads["dout"], grads["dlse"]


def _with_defaults(options: Options) -> Options:
    return {name: options.get(name, default) for name, default in OPTIONS.items()}


def _materialize(grads: dict[str, Tensor | None], like: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Zeros for the gradients or tangents that are None, except of tensors that are None."""
    return {
        name: g if g is not None or like[name] is None else torch.zeros_like(like[name]) for name, g in grads.items()
    }


class _Recorded(torch.autograd.Function):
    """attention_forward when a gradient is wanted. Inputs: the arguments given, by name; q, k, v; the tensors among the
    arguments again, for autograd to see. Small calls take longer in here than in the kernel: no step without need."""

    @staticmethod
    def forward(ctx: FunctionCtx, arguments: Options, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensors:
        out, lse = _forward_below(q, k, v, arguments)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.options, ctx.names = arguments, ()
        if tensors:
            ctx.names = [name for name, x in arguments.items() if isinstance(x, Tensor)]
            ctx.options = {name: x for name, x in arguments.items() if not isinstance(x, Tensor)}
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: FunctionCtx, dout: Tensor | None, dlse: Tensor | None) -> Tensors:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if not tensors:
            return None, *_gradients(dout, dlse, (q, k, v), out, lse, ctx.options, ())[:3]
        given, needed = dict(zip(ctx.names, tensors)), dict(zip(ctx.names, ctx.needs_input_grad[4:]))
        wanted = [name for name in PARAMETERS if needed.get(name)]
        others = [given.get(name) for name in OTHERS]
        dq, dk, dv, *grads = _gradients(dout, dlse, (q, k, v, *others), out, lse, ctx.options, wanted)
        grads = dict(zip(PARAMETERS, grads))
        return None, dq, dk, dv, *(grads.get(name) for name in ctx.names)


class _Forward(torch.autograd.Function):
    """attention_forward in forward mode and torch.func, with all that they ask for. Inputs: the tensors of TENSORS,
    then the options in one dict."""

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
        tensors = dict(zip(TENSORS, saved))
        tangents = _materialize(dict(zip(DIFFERENTIABLE, tangents)), tensors)
        return composite.forward_jvp(tensors, _with_defaults(ctx.options), tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return vmap.forward(forward_by_position, info.batch_size, in_dims[:-1], inputs[:-1], inputs[-1])


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
        tensors, options, dout, dlse = _call_of_backward(saved, ctx.options)
        given = dict(zip(BACKWARD_TENSORS, tangents))
        wanted = {name: given[name] for name in ("dout", "dlse", *DIFFERENTIABLE)}
        tangents = _materialize(wanted, {**tensors, "dout": dout, "dlse": dlse})
        results = composite.backward_jvp(tensors, options, dout, dlse, tangents)
        return *results[:3], *(x if ctx.options.get(f"{n}_grad") else None for n, x in zip(PARAMETERS, results[3:]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return vmap.backward(backward, info.batch_size, in_dims[:-1], inputs[:-1], inputs[-1])


def forward_by_position(*tensors: Tensor | None, **options: Any) -> Tensors:
    """:func:`forward` of the tensors of TENSORS."""
    return forward(*tensors[:3], **{name: x for name, x in zip(OTHERS, tensors[3:]) if x is not None}, **options)


# ---- autocast: q, k, v in the dtype that the user chose; a float32 bias or parameter stays as it is


def _cast(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """The arguments as autocast wants them."""
    dtype = torch.get_autocast_dtype("cpu" if q.is_cpu else "cuda")
    parameters = {
        name: _eligible(arguments[name], dtype)
        for name in PARAMETERS
        if arguments.get(name) is not None and arguments[name].dtype is not torch.float32
    }
    return _eligible(q, dtype), _eligible(k, dtype), _eligible(v, dtype), arguments | parameters


def _eligible(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype is not torch.float64 else x


def _autocast_on(device_type: str) -> Callable[..., Tensors]:
    def forward_in_autocast(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None, **options: Any) -> Tensors:
        q, k, v, arguments = _cast(q, k, v, {**dict(zip(OTHERS, others)), **options})
        with torch.autocast(device_type, enabled=False):
            return _forward_op(q, k, v, **arguments)

    return forward_in_autocast


# ---- registration


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensors:
    return _forward_op(q, k, v, **options)


def _plain_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **options: Any) -> Tensors:
    return _backward_op(dout, None, q, k, v, out, lse, **options)[:3]


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
        ("heedful::attention_forward", _forward_op, TENSORS, _forward_fake, _forward_backward, vmap.forward),
        (
            "heedful::attention_backward",
            _backward_op,
            BACKWARD_TENSORS,
            _backward_fake,
            _backward_backward,
            vmap.backward,
        ),
    )
    for name, op, names, fake, gradient, fold in rules:

        def by_vmap(info: Any, dims: tuple, *tensors: Any, op=op, names=names, fold=fold, **options: Any) -> tuple:
            return fold(op, info.batch_size, _all_of(names, dims), _all_of(names, tensors), options)

        torch.library.register_fake(name, fake, lib=library)
        torch.library.register_autograd(name, gradient, setup_context=_save, lib=reverse)
        torch.library.register_vmap(name, by_vmap, lib=library)
    for key, device_type in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        library.impl("attention_forward", _autocast_on(device_type), key)
        library.impl("plain_forward", _plain_forward, key)
    # Whoever calls a plain operator otherwise than forward and backward do gets the full one.
    for key in ("Autograd", "FuncTorchBatched", "Meta"):
        library.impl("plain_forward", _plain_forward, key)
        library.impl("plain_backward", _plain_backward, key)
    return library, reverse


_registrations = _register()
flops.register()
