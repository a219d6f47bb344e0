"""What torch makes of the operators: gradients of every order and mode, vmap, compile, export, autocast, fakes."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import heedful
from heedful import Causal, KeyLengths, Mask, QueryLengths, SlidingWindow, composite
from heedful.vmap import PARAMETERS

FORWARD = torch.ops.heedful.attention_forward.default
BACKWARD = torch.ops.heedful.attention_backward.default
PLAIN_FORWARD, PLAIN_BACKWARD = torch.ops.heedful.plain_forward.default, torch.ops.heedful.plain_backward.default
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
B, HQ, HK, SQ, SK, D, DV = 2, 4, 2, 4, 5, 3, 2


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def qkv(dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (B, HQ, SQ, D), (B, HK, SK, D), (B, HK, SK, DV)
    return tuple(normal(*shape, dtype=dtype, seed=n).requires_grad_(requires_grad) for n, shape in enumerate(shapes))


HOLES = normal(B, 1, SQ, SK) > -0.7
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": Causal()},
    "dead rows": {"mask": Causal() & KeyLengths([3, 0]) & QueryLengths([4, 2]), "align": -1, "scale": 0.7},
    "tensor, window": {"mask": SlidingWindow(1, 2) & HOLES, "align": torch.tensor([1, 0])},
    "bias [Hq, Sq, 1]": {"bias": normal(HQ, SQ, 1)},
    "bias, causal": {"bias": normal(B, 1, 1, SK), "mask": Causal()},
    "bias [B, Hq, Sq, Sk]": {"bias": normal(B, HQ, SQ, SK), "mask": HOLES},
    "softcap, scale": {"softcap": 1.5, "scale": normal(HQ), "mask": Causal()},
    "sinks": {"sinks": normal(B, HQ), "mask": Causal() & KeyLengths([3, 0])},
    "ALiBi": {"slopes": normal(HQ).abs(), "align": torch.tensor([1, 0])},
    "relative bias": {"table": normal(8, HQ), "mask": Causal() | heedful.Global(1)},
    "cosine": {"similarity": "cosine", "scale": normal(B, HQ) + 5},
    "Gaussian": {"bandwidth": normal(HQ).abs() + 1, "softcap": 3.0},
    "dropout": {"dropout_p": 0.3, "seed": 7, "bias": normal(HQ, 1, SK)},
    "hard": {"normalizer": "hard", "sinks": normal(HQ) - 1, "mask": Causal()},
    "everything": {
        **{"bias": normal(HQ, SQ, 1), "scale": normal(HQ), "sinks": normal(HQ), "slopes": normal(B, HQ)},
        **{"table": normal(8, HQ), "softcap": 2.0, "similarity": "cosine", "dropout_p": 0.2, "seed": 11},
        "mask": Causal() & QueryLengths([4, 2]) & (heedful.Global(1) | HOLES),
    },
}
FEW = ("plain", "dead rows")  # to check every number of; of the others a random direction
NAMED = ("bias", "scale", "sinks", "slopes", "table", "bandwidth")


def call(function: Callable, options: dict[str, Any]) -> tuple[Callable, list[Tensor]]:
    """The function of q, k, v and parameters, giving out and lse (0 where -inf, for finite differences); parameters."""
    names = [name for name in NAMED if isinstance(options.get(name), Tensor)] or ["bias"]
    rest = {name: x for name, x in options.items() if name not in names}

    def f(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, parameters))
        biases = [given.pop("bias")] if "bias" in given else []
        if "slopes" in given:
            biases.append(heedful.ALiBi(given.pop("slopes")))
        if "table" in given:
            biases.append(heedful.RelativeBias(given.pop("table"), max_distance=4))
        if biases:
            given["bias"] = functools.reduce(operator.add, biases[::-1])
        if "bandwidth" in given:
            given["similarity"] = heedful.Gaussian(given.pop("bandwidth"))
        out, lse = function(q, k, v, **given, **rest, return_lse=True)
        lse = torch.where(lse == -math.inf, 0, lse)
        return out, torch.zeros_like(lse) if rest.get("normalizer") == "hard" else lse  # no gradient goes to scores

    return f, [options[name] for name in names if name in options]


def squares(f: Callable) -> Callable:
    return lambda *tensors: sum(x.square().sum() for x in f(*tensors))


def assert_same(got: Any, want: Any, **tolerance: Any) -> None:
    torch.testing.assert_close(got, want, **tolerance)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Calls(TorchDispatchMode):
    """Counts the operators that run, and keeps the size of the largest tensor that one of them gives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "heedful":
            self.names.append(func._opname)
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, Tensor) and x.is_contiguous():  # not a broadcast view
                self.largest = max(self.largest, x.numel())
        return result


# ---- autograd


def blocks_of_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the few queries of a test take more than one block, the last one not full."""
    monkeypatch.setattr(composite, "BLOCK", 3)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_in_reverse_and_forward_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of_3(monkeypatch)
    f, bias = call(heedful.attention, OPTIONS[name])
    tensors = [x.detach().requires_grad_() for x in (*qkv(), *bias)]
    options = {"check_batched_grad": False, "check_batched_forward_grad": name in FEW, "fast_mode": name not in FEW}
    assert torch.autograd.gradcheck(f, tensors, check_forward_ad=True, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradgradcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of_3(monkeypatch)
    f, bias = call(heedful.attention, OPTIONS[name])
    tensors = [x.detach().requires_grad_() for x in (*qkv(), *bias)]
    options = {"check_batched_grad": False, "fast_mode": True}
    assert torch.autograd.gradgradcheck(f, tensors, check_fwd_over_rev=True, **options)
    if name == "bias, causal":
        assert torch.autograd.gradgradcheck(f, tensors, check_batched_grad=False)


def test_gradcheck_of_the_backward_operator_by_itself() -> None:
    """Its derivative holds for the out and lse that belong to its other inputs."""
    (q, k, v), bias = qkv(), normal(1, HQ, 1, SK)
    out, lse = FORWARD(q, k, v, bias, right=1)
    tensors = [x.detach().requires_grad_() for x in (normal(*out.shape), normal(*lse.shape), q, k, v, bias)]

    def f(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out, lse = (x.detach() for x in FORWARD(q, k, v, bias, right=1))
        return BACKWARD(dout, dlse, q, k, v, out, lse, bias, right=1, bias_grad=True)[:4]

    assert torch.autograd.gradcheck(f, tensors)


def test_third_order() -> None:
    f, _ = call(heedful.attention, {"mask": Causal()})
    r, _ = call(heedful.reference.attention, {"mask": Causal()})
    q, k, v = qkv(requires_grad=True)
    orders = []
    for function in (f, r):
        x = squares(function)(q, k, v)
        for _ in range(3):
            (g,) = torch.autograd.grad(x, k, create_graph=True)
            x = g.pow(3).sum()
        orders.append(g)
    assert_same(*orders)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_second_order_and_tangents_in_half_precision(dtype: torch.dtype) -> None:
    tensors = [x.to(dtype).detach().requires_grad_() for x in (*qkv(), normal(SQ, SK))]
    f, _ = call(heedful.attention, {"mask": Causal()})
    r, _ = call(heedful.reference.attention, {"mask": Causal()})
    seconds, tangents = [], []
    for function, inputs in ((f, tensors), (r, [x.detach().double().requires_grad_() for x in tensors])):
        firsts = torch.autograd.grad(
            function(*inputs)[0].sum(), inputs, torch.ones((), dtype=inputs[0].dtype), create_graph=True
        )
        seconds.append(torch.autograd.grad(sum(x.sum() for x in firsts[:3]), inputs))
        tangents.append(jvp(function, tuple(inputs), tuple(x.detach() for x in inputs))[1])
    for got, want in (*zip(*seconds), *zip(*tangents)):
        assert got.dtype in (dtype, torch.float32)
        error = (got.double() - want).square().mean().sqrt()
        assert error <= 4 * torch.finfo(dtype).eps * want.square().mean().sqrt().clamp(min=0.1)


def test_composites_hold_a_block_of_pairs_at_most() -> None:
    s = 4 * composite.BLOCK
    q = normal(1, 1, s, 2, dtype=torch.float32).requires_grad_()
    (first,) = torch.autograd.grad(heedful.attention(q, q, q, mask=Causal()).sum(), q, create_graph=True)
    with Calls() as calls:
        torch.autograd.grad(first.sum(), q)
    assert composite.BLOCK * s <= calls.largest < s * s
    with Calls() as calls:
        jvp(lambda q: heedful.attention(q, q, q, mask=Causal()), (q.detach(),), (q.detach(),))
    assert composite.BLOCK * s <= calls.largest < s * s


@pytest.mark.parametrize("by", ("mask", "bias"))
def test_what_is_masked_reaches_no_tangent_and_no_second_gradient(by: str) -> None:
    q, k, v = qkv()
    mask = Causal() & KeyLengths(3)
    dense = mask.to_dense(SQ, SK, batch=B)
    options = {"mask": mask} if by == "mask" else {"bias": torch.where(dense, 0.5, -math.inf).double()}
    for poisoned in (k, v):
        poisoned[:, :, 4] = math.nan
        poisoned[0, 0, 3] = math.inf
    results = []
    for function in (heedful.attention, heedful.reference.attention):
        f = lambda q, k, v, g=function: g(q, k, v, **options)  # noqa: E731
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        firsts = torch.autograd.grad(f(*tensors).square().sum(), tensors, create_graph=True)
        seconds = torch.autograd.grad(sum(x.square().sum() for x in firsts), tensors)
        tangent = jvp(f, (q, k, v), (k[:, :1, :SQ].expand_as(q).nan_to_num(1, 1), k, v))[1]
        results.append((tangent, *firsts, *seconds))
    for got, want in zip(*results):
        assert got.isfinite().all()
        assert_same(got, want)


def test_checkpointing() -> None:
    tensors = qkv(requires_grad=True)
    f = lambda *t: heedful.attention(*t, mask=Causal())  # noqa: E731
    want = torch.autograd.grad(f(*tensors).square().sum(), tensors)
    for reentrant in (False, True):
        inputs = [x.detach().requires_grad_() for x in tensors]
        checkpoint(f, *inputs, use_reentrant=reentrant).square().sum().backward()
        assert all(torch.equal(x.grad, w) for x, w in zip(inputs, want))


# ---- torch.func


@pytest.mark.parametrize("name", OPTIONS)
def test_func(name: str) -> None:
    f, bias = call(heedful.attention, OPTIONS[name])
    r, _ = call(heedful.reference.attention, OPTIONS[name])
    tensors = (*qkv(), *bias)
    every = tuple(range(len(tensors)))
    tangents = tuple(normal(*x.shape, seed=7) for x in tensors)
    assert_same(grad(squares(f), every)(*tensors), grad(squares(r), every)(*tensors))
    assert_same(jvp(f, tensors, tangents), jvp(r, tensors, tangents))
    assert_same(jacrev(f, every)(*tensors), jacrev(r, every)(*tensors))
    assert_same(jacfwd(f, every)(*tensors), jacrev(r, every)(*tensors))


@pytest.mark.parametrize("outer", (jacfwd, jacrev))
@pytest.mark.parametrize("inner", (jacfwd, jacrev))
def test_nested_transforms(outer: Callable, inner: Callable) -> None:
    """Forward over forward among them: there torch gives zeros unless the tangent rule takes care."""
    (q, k, v), bias = qkv(), normal(1, 1, SQ, 1)
    f, _ = call(heedful.attention, {"mask": Causal()})
    r, _ = call(heedful.reference.attention, {"mask": Causal()})
    want = hessian(squares(r), (0, 3))(q, k, v, bias)
    assert max(x.abs().max() for row in want for x in row) > 0.1
    assert_same(outer(inner(squares(f), (0, 3)), (0, 3))(q, k, v, bias), want)


MAPPED = ((0, 0, 0, 0), (0, None, None, None), (None, 0, 0, None), (None, None, None, 0), (0, 0, 0, None), (1, 2, 0, 3))


@pytest.mark.parametrize("dims", MAPPED, ids=str)
@pytest.mark.parametrize("shape", ((B, HQ, SQ, SK), (1, HQ, SQ, 1), (B, 1, 1, SK), (1, 1, 1, SK)), ids=str)
def test_vmap(dims: tuple[int | None, ...], shape: tuple[int, ...]) -> None:
    tensors = [x if dim is None else torch.stack([x, 2 * x, -x], dim) for x, dim in zip((*qkv(), normal(*shape)), dims)]
    for options in ({}, {"mask": Causal() & HOLES & KeyLengths([5, 3]), "align": torch.tensor([1, 0])}):
        f, _ = call(heedful.attention, options)
        r, _ = call(heedful.reference.attention, options)
        assert_same(vmap(f, dims)(*tensors), vmap(r, dims)(*tensors))
        every = (0, 1, 2, 3)
        assert_same(vmap(grad(squares(f), every), dims)(*tensors), vmap(grad(squares(r), every), dims)(*tensors))
        whole, truth = (squares(vmap(x, dims)) for x in (f, r))
        assert_same(grad(whole, every)(*tensors), grad(truth, every)(*tensors))


def test_vmap_of_masks_and_lengths() -> None:
    q, k, v = qkv()
    n = torch.tensor([[5, 3], [0, 2], [1, 4]])
    holes = normal(3, SQ, SK) > 0

    def with_function(function: Callable) -> Callable:
        return lambda holes, n: function(q, k, v, mask=Causal() & holes & KeyLengths(n), return_lse=True)

    got, want = (vmap(with_function(f))(holes, n) for f in (heedful.attention, heedful.reference.attention))
    assert_same(got, want)
    for i in range(3):
        assert_same(tuple(x[i] for x in got), with_function(heedful.attention)(holes[i], n[i]))


def test_vmap_is_one_call() -> None:
    tensors = [torch.stack([x] * 5) for x in qkv()]
    with Calls() as calls:
        vmap(vmap(heedful.attention))(*(x.unsqueeze(1) for x in tensors))
    assert calls.names == ["attention_forward"]
    with Calls() as calls:
        vmap(grad(lambda *t: heedful.attention(*t).sum()))(*tensors)
    assert calls.names == ["attention_forward", "attention_backward"]


def test_vmap_of_the_operators_themselves() -> None:
    tensors = [torch.stack([x, -x]) for x in qkv()]
    for bias, dim in ((normal(2, 1, HQ, SQ, 1), 0), (normal(1, HQ, SQ, 1), None), (normal(B, 1, 2, 1, SK), 2)):
        out, lse = vmap(FORWARD, (0, 0, 0, dim))(*tensors, bias)
        got = vmap(lambda *t: BACKWARD(t[0], None, *t[1:], bias_grad=True)[:4], (0, 0, 0, 0, 0, 0, dim))(
            out, *tensors, out, lse, bias
        )
        for n in range(2):
            one = [x[n] for x in tensors]
            one_bias = bias if dim is None else bias.select(dim, n)
            results = FORWARD(*one, one_bias)
            assert_same((out[n], lse[n]), results)
            grads = BACKWARD(results[0], None, *one, *results, one_bias, bias_grad=True)[:4]
            assert_same(tuple(x[n] for x in got), grads)


@pytest.mark.parametrize("requires_grad", (False, True))
def test_a_direct_call_refuses_forward_mode(requires_grad: bool) -> None:
    """A registered gradient would silently give tangents of zero."""
    q, k, v = qkv(requires_grad=requires_grad)
    out, lse = FORWARD(*qkv())
    for direct in (lambda q: FORWARD(q, k, v), lambda q: BACKWARD(out, lse, q, k, v, out, lse)):
        with forward_ad.dual_level():
            with pytest.raises(
                NotImplementedError, match="no forward mode when called directly: use heedful.attention"
            ):
                direct(forward_ad.make_dual(q, q.detach()))
            direct(q)  # without a tangent there is nothing to refuse
        with pytest.raises(NotImplementedError, match="no forward mode when called directly"):
            jvp(direct, (q,), (q,))


# ---- fake tensors


def samples(dtype: torch.dtype, requires_grad: bool) -> Iterator[tuple[Any, tuple, dict[str, Any]]]:
    """Calls of both operators with everything that they take, and with nothing."""
    (q, k, v), lengths = qkv(dtype, requires_grad), torch.tensor([3, 5])
    shapes = (1, HQ, 1, SK), (B, HQ), (HQ,), (HQ,), (3, HQ)
    parameters = [normal(*shape, dtype=dtype, seed=n).requires_grad_(requires_grad) for n, shape in enumerate(shapes)]
    buckets, tiles = torch.tensor([0, 2, 1]), torch.full((1, 1, 1, 1), 2, dtype=torch.int32)
    bits = torch.arange(-32, 32)[None]
    every = (*parameters, buckets, HOLES, tiles, bits, lengths, lengths, lengths, None, None, torch.tensor([5]))
    for tensors, options in (
        (every, {"q_start": 1, "left": 3, "right": 0, "softcap": 2.0, "similarity": "cosine", "dropout_p": 0.1}),
        ((), {}),
    ):
        yield FORWARD, (q, k, v, *tensors), options
        out, lse = (x.detach() for x in FORWARD(q, k, v, *tensors, **options))
        dout = normal(*out.shape, dtype=dtype).requires_grad_(requires_grad)
        dlse = normal(*lse.shape, dtype=lse.dtype) if tensors else None
        yield (
            BACKWARD,
            (dout, dlse, q, k, v, out, lse, *tensors),
            (options | {f"{name}_grad": True for name in PARAMETERS if tensors}),
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    for op, tensors, options in samples(dtype, requires_grad=False):
        opcheck(op, tensors, options)


def test_opcheck_with_gradients() -> None:
    for op, tensors, options in samples(torch.float32, requires_grad=True):
        opcheck(op, tensors, options)


# ---- the plain operators: the others' results, with few arguments, for calls that nothing else sees


class Seen(Tensor):
    """A tensor that sees what is called with it."""

    names: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: Tensor) -> Seen:
        x = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        x.inner = inner
        return x

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        cls.names.append(func.__name__)
        return func(*(x.inner if isinstance(x, Seen) else x for x in args), **kwargs or {})


@pytest.mark.parametrize(
    "options",
    [{}, {"right": 0}, {"q_start": 1, "right": -1, "scale": 0.3}, {"q_start": 2, "left": 1, "right": 0}],
    ids=str,
)
def test_plain_operators_are_the_others(options: dict[str, Any]) -> None:
    q, k, v = qkv(requires_grad=True)
    want = FORWARD(q, k, v, **options)
    dout = normal(*want[0].shape)
    grads = torch.autograd.grad(want[0], (q, k, v), dout)
    with torch.no_grad():
        got = PLAIN_FORWARD(q, k, v, **options)
        got_grads = PLAIN_BACKWARD(dout, q, k, v, *got, **options)
    assert_same((*got, *got_grads), (*(x.detach() for x in want), *grads), rtol=0, atol=0)
    out, _ = PLAIN_FORWARD(q, k, v, **options)
    assert_same(torch.autograd.grad(out, (q, k, v), dout, create_graph=True), grads, rtol=0, atol=0)
    for op, tensors in ((PLAIN_FORWARD, (q, k, v)), (PLAIN_BACKWARD, (dout, q, k, v, *(x.detach() for x in got)))):
        opcheck(op, tuple(x.detach() for x in tensors), options)
        opcheck(op, tuple(x.detach().requires_grad_() for x in tensors), options)
        mapped = vmap(lambda *t, op=op: op(*t, **options))(*(torch.stack([x, x]) for x in tensors))
        assert_same(tuple(x[1] for x in mapped), op(*tensors, **options))
        meta = op(*(x.to("meta") for x in tensors), **options)
        assert [x.shape for x in meta] == [x.shape for x in op(*tensors, **options)]


def test_who_sees_a_call_sees_the_full_operator() -> None:
    q, k, v = qkv(requires_grad=True)
    with Calls() as calls:
        heedful.attention(q, k, v).sum().backward()
    assert [n for n in calls.names if "ward" in n] == ["attention_forward", "attention_backward"]
    with torch.no_grad(), torch.profiler.profile() as trace:
        heedful.attention(q, k, v, mask=SlidingWindow(2, 0))
    calls = {x.key for x in trace.key_averages()}
    assert "heedful::plain_forward" in calls and "heedful::attention_forward" not in calls
    Seen.names.clear()
    heedful.attention(*(Seen(x.detach()) for x in (q, k, v)))
    assert Seen.names == ["attention_forward.default"]


def test_plain_operators_say_what_is_wrong() -> None:
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match=r"heedful.attention: k: expected .* got \[2, 2, 5, 2\]"):
        PLAIN_FORWARD(q, k[..., :2], v)
    with pytest.raises(RuntimeError, match="heedful.attention: scale: expected a finite number, got inf"):
        PLAIN_FORWARD(q, k, v, scale=math.inf)
    out, lse = PLAIN_FORWARD(q, k, v)
    with pytest.raises(RuntimeError, match="heedful.attention: dout: expected"):
        PLAIN_BACKWARD(out[..., :1], q, k, v, out, lse)


def layouts(b: int, h: int, s: int, d: int) -> dict[str, Tensor]:
    return {
        "bhsd": normal(b, h, s, d),
        "bshd": normal(b, s, h, d).transpose(1, 2),
        "sbhd": normal(s, b, h, d).permute(1, 2, 0, 3),
        "bhds": normal(b, h, d, s).mT,
        "packed": normal(b, s, 3, h, d)[:, :, 1].transpose(1, 2),
        "expanded heads": normal(b, 1, s, d).expand(b, h, s, d),
        "expanded": normal(1, 1, 1, 1).expand(b, h, s, d),
    }


@pytest.mark.parametrize(
    "sizes", ((2, 4, 5, 3), (1, 1, 5, 3), (2, 1, 1, 3), (1, 4, 1, 1), (0, 2, 3, 4), (2, 2, 0, 4)), ids=str
)
@pytest.mark.parametrize("layout", layouts(1, 1, 1, 1))
def test_fake_layouts_are_the_real_ones(layout: str, sizes: tuple[int, ...]) -> None:
    q = layouts(*sizes)[layout]
    for other in layouts(*sizes).values():
        for tensors in ((q, other, other), (other, q, other), (other, other, q)):
            bias = normal(1, sizes[1], 1, sizes[2])
            real = FORWARD(*tensors, bias)
            real_back = BACKWARD(real[0], real[1], *tensors, *real, bias, bias_grad=True)[:4]
            faked = [x.to("meta") if x.is_contiguous() else _meta(x) for x in (*tensors, bias, *real)]
            fake = FORWARD(*faked[:4])
            fake_back = BACKWARD(faked[4], faked[5], *faked[:3], *faked[4:], faked[3], bias_grad=True)[:4]
            for got, want in zip((*fake, *fake_back), (*real, *real_back)):
                assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def _meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def test_results_follow_the_layout_of_their_inputs() -> None:
    q = normal(2, 5, 4, 3).transpose(1, 2).requires_grad_()
    out = heedful.attention(q, q, q)
    assert out.transpose(1, 2).is_contiguous()
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.transpose(1, 2).is_contiguous()


def test_meta_device() -> None:
    q, k, v = (x.to("meta").requires_grad_() for x in qkv())
    out, lse = heedful.attention(q, k, v, mask=Causal() & KeyLengths([1, 2]), return_lse=True)
    assert out.is_meta and out.shape == (B, HQ, SQ, DV) and lse.shape == (B, HQ, SQ)
    assert [x.shape for x in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
    assert heedful.reference.attention(q, k, v, mask=Causal()).shape == out.shape
    assert heedful.scaled_dot_product_attention(q, q, q).is_meta
    for wrong in (
        (q, k[:, :, :4], v),
        (q, k, v[:1]),
        (q[:, :3], k, v),
        (q[..., :2], k, v),
        (q[0], k, v),
        (q, k, v.half()),
    ):
        with pytest.raises(RuntimeError, match=r"^heedful.attention: [qkv]: expected .*, got "):
            heedful.attention(*wrong)


# ---- torch.compile and torch.export


def causal(q: Tensor, k: Tensor, v: Tensor, holes: Tensor) -> Tensor:
    return heedful.attention(q, k, v, mask=Causal())


COMPILED: dict[str, Callable[..., Tensor]] = {
    "causal": causal,
    "masks": lambda q, k, v, holes: heedful.attention(q, k, v, mask=SlidingWindow(2, 0) & KeyLengths([5, 3]), align=1),
    "mask & tensor": lambda q, k, v, holes: heedful.attention(q, k, v, mask=Causal() & holes),
    "tensor & mask": lambda q, k, v, holes: heedful.attention(q, k, v, mask=holes & Causal()),
    "tensor": lambda q, k, v, holes: heedful.attention(q, k, v, mask=holes, scale=0.3),
    "bias": lambda q, k, v, holes: heedful.attention(q, k, v, bias=holes.to(q.dtype) + q[:1, :, :, :1]),
    "lse": lambda q, k, v, holes: torch.cat([x.flatten() for x in heedful.attention(q, k, v, return_lse=True)]),
    "sdpa": lambda q, k, v, holes: heedful.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "sdpa, mask": lambda q, k, v, holes: heedful.scaled_dot_product_attention(q[:, :2], k, v, holes),
    "sdpa, rank 3": lambda q, k, v, holes: heedful.scaled_dot_product_attention(q[0, :2], k[0], v[0], holes[0]),
    "sdpa, rank 5": lambda q, k, v, holes: heedful.scaled_dot_product_attention(
        q[None, :, :2], k[None], v, holes[None]
    ),
    "vmap": lambda q, k, v, holes: vmap(causal, (0, 0, 0, None))(q[:, None], k[:, None], v[:, None], None),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_without_graph_breaks(name: str) -> None:
    f, tensors = COMPILED[name], qkv(torch.float32)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    out, want = compiled(*tensors, HOLES), f(*tensors, HOLES)
    assert torch.equal(out, want) and out.stride() == want.stride()
    tensors = qkv(torch.float32, requires_grad=True)
    out, want = compiled(*tensors, HOLES), f(*tensors, HOLES)
    assert torch.equal(out, want) and out.stride() == want.stride()
    grads = (torch.autograd.grad(x.square().sum(), tensors) for x in (out, want))
    for got, expected in zip(*grads):
        assert_same(got, expected)


def test_compile_takes_a_mask_as_an_argument() -> None:
    f = lambda q, k, v, mask: heedful.attention(q, k, v, mask=mask)  # noqa: E731
    tensors, mask = qkv(), Causal() & HOLES & KeyLengths([4, 2])
    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(*tensors, mask), f(*tensors, mask))


def test_compile_for_real() -> None:
    tensors = qkv(torch.float32, requires_grad=True)
    f = lambda *t: heedful.attention(*(2 * x for x in t), mask=Causal() & KeyLengths([5, 3])).sin()  # noqa: E731
    out, want = torch.compile(f, fullgraph=True)(*tensors), f(*tensors)
    assert_same(out, want)
    assert_same(torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(want.sum(), tensors))


@pytest.mark.parametrize("bshd", (False, True), ids=("bhsd", "bshd"))
@pytest.mark.parametrize("function", ("attention", "scaled_dot_product_attention"))
def test_compile_with_dynamic_lengths_does_not_recompile(function: str, bshd: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    options = {"mask": Causal() & KeyLengths([3, 5])} if function == "attention" else {"is_causal": True}
    f = lambda *t: getattr(heedful, function)(*t, **options)  # noqa: E731
    compiled, first = torch.compile(f, backend=counter, fullgraph=True, dynamic=True), 0
    for q_length, k_length in ((6, 7), (9, 8), (17, 40), (128, 33)):
        lengths = (q_length, k_length, k_length)
        shapes = [(2, s, 3, 8) if bshd else (2, 3, s, 8) for s in lengths]
        tensors = [normal(*s).transpose(1, 2) if bshd else normal(*s) for s in shapes]
        tensors = [x.requires_grad_() for x in tensors]
        out, want = compiled(*tensors), f(*tensors)
        assert torch.equal(out, want) and out.stride() == want.stride()
        assert_same(torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(want.sum(), tensors))
        first = first or counter.frame_count
    assert counter.frame_count == first


@pytest.mark.parametrize("strict", (False, True))
def test_export(strict: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return heedful.attention(q, k, v, mask=Causal())

    length = torch.export.Dim("length", min=2, max=1000)
    example = tuple(normal(2, 3, 6, 8, seed=n) for n in range(3))
    program = torch.export.export(Module(), example, dynamic_shapes=[{2: length}] * 3, strict=strict)
    program = program.run_decompositions()
    assert [n.target for n in program.graph.nodes if "heedful" in str(n.target)] == [FORWARD]
    longer = tuple(normal(2, 3, 33, 8, seed=n) for n in range(3))
    assert torch.equal(program.module()(*longer), Module()(*longer))


# ---- autocast


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype: torch.dtype, compiled: bool) -> None:
    tensors = [x.requires_grad_() for x in (*qkv(torch.float32), normal(SQ, SK, dtype=torch.float32))]

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=dtype):
            return heedful.attention(q, k, v, mask=Causal(), bias=bias, return_lse=True)

    out, lse = (torch.compile(f, backend="aot_eager", fullgraph=True) if compiled else f)(*tensors)
    q, k, v, bias = (x.detach().requires_grad_() for x in tensors)
    halves = [x.to(dtype) for x in (q, k, v)]
    want = heedful.attention(*halves, mask=Causal(), bias=bias, return_lse=True)  # a float32 bias stays float32
    assert out.dtype is dtype and lse.dtype is torch.float32
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    got, expected = torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(want[0].sum(), (q, k, v, bias))
    for x, y in zip(got, expected):
        assert x.dtype is torch.float32 and torch.equal(x, y)


def test_autocast_casts_as_torchs_does() -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, mask = normal(1, 2, 3, 8), normal(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.float16, torch.float64):
            x = q.to(dtype)
            assert heedful.attention(x, x, x).dtype is sdpa(x, x, x).dtype
        mixed = q.float(), q.half(), q.bfloat16()
        assert heedful.attention(*mixed).dtype is sdpa(*mixed).dtype is torch.bfloat16
        half, full = (heedful.scaled_dot_product_attention(*mixed, m) for m in (mask.half(), mask.float()))
        assert_same(half, sdpa(*mixed, mask.half()), atol=2e-2, rtol=0)
        assert_same(full, sdpa(*mixed, mask.float()), atol=2e-2, rtol=0)
    with torch.autocast("cpu", enabled=False):
        assert heedful.attention(q, q, q).dtype is torch.float64


def test_autocast_with_transforms_and_second_order() -> None:
    """The same casts under torch.func; and what no kernel computes is not computed in bfloat16 products."""
    tensors = qkv(torch.float32, requires_grad=True)
    f = lambda *t: heedful.attention(*t, mask=Causal()).float().square().sum()  # noqa: E731

    def second(*t: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(torch.autograd.grad(f(*t), t, create_graph=True)[0].square().sum(), t)

    halved = lambda *t: f(*(x.bfloat16() for x in t))  # noqa: E731
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = grad(f, (0, 1, 2))(*tensors)
        tangent = jvp(f, tensors, tensors)[1]
        doubles = [x.detach().double().requires_grad_() for x in tensors]
        twice = second(*doubles)
        oracle = heedful.reference.attention(*tensors)
    assert_same(got, grad(halved, (0, 1, 2))(*tensors))
    assert_same(tangent, jvp(halved, tensors, tensors)[1])
    assert_same(twice, second(*doubles))
    assert_same(oracle, heedful.reference.attention(*tensors))


# ---- the way a call takes


def test_a_call_without_gradients_leaves_no_graph() -> None:
    q, k, v = qkv(requires_grad=True)
    with torch.no_grad():
        assert not heedful.attention(q, k, v).requires_grad
    with torch.inference_mode():
        assert heedful.attention(q, k, v).is_inference()
    out, lse = heedful.attention(q, k.detach(), v.detach(), return_lse=True)
    assert out.requires_grad and lse.requires_grad
    assert not heedful.attention(*(x.detach() for x in (q, k, v)), mask=Mask()).requires_grad
