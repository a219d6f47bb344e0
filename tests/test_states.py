"""merge_states, and the weights of attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import heedful
from functions import holes, normal
from heedful import Causal, KeyLengths, QueryLengths, composite
from heedful.states import attention_weights, merge_states

B, HQ, HK, SQ, SK, D = 2, 4, 2, 5, 9, 3
F64 = torch.float64
HALVES = (torch.bfloat16, torch.float16)


def double(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, dtype=F64, seed=seed)


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return double(B, HQ, SQ, D), double(B, HK, SK, D), double(B, HK, SK, 2)


# ---- merge_states


@pytest.mark.parametrize("stacked", (False, True))
def test_parts_of_the_keys_merge_to_the_whole(stacked: bool) -> None:
    """With a sink in one part alone, holes, and rows that see nothing of one part or of any; gradients too."""
    tensors = [x.requires_grad_() for x in qkv()]
    sinks = torch.where(torch.arange(HQ) % 2 == 0, double(HQ), -math.inf).requires_grad_()
    mask = KeyLengths([9, 3]) & holes(B, HQ, SQ, SK) & (torch.arange(SQ) != 2)[:, None]
    dense = mask.to_dense(SQ, SK, batch=B, heads=HQ)

    def whole(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return heedful.reference.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)

    def merged(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            keys, values, seen = (x.narrow(d, start, stop - start) for x, d in ((k, 2), (v, 2), (dense, 3)))
            options = {"sinks": sinks} if start == 4 else {}
            parts.append(heedful.reference.attention(q, keys, values, mask=seen, **options, return_lse=True))
        outs, lses = zip(*parts)
        return merge_states(torch.stack(outs), torch.stack(lses)) if stacked else merge_states(outs, lses)

    results = []
    for f in (whole, merged):
        out, lse = f(*tensors, sinks)
        grads = torch.autograd.grad(
            (out, lse), (*tensors, sinks), (double(*out.shape, seed=1), double(*lse.shape, seed=2))
        )
        results.append((out, lse, *grads))
    assert (results[0][1] == -math.inf).any()
    for got, want in zip(*reversed(results)):
        torch.testing.assert_close(got, want)


def test_merging_is_differentiable_twice() -> None:
    outs, lses, there = double(3, 2, 2, 4).requires_grad_(), double(3, 2, 2), torch.ones(3, 2, 2, dtype=torch.bool)
    there[:, 0, 1] = there[0, 1, 0] = False

    def f(outs: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = merge_states(outs, torch.where(there, x, -math.inf))
        return out, torch.where(lse == -math.inf, 0, lse)

    tensors = outs, lses.requires_grad_()
    assert torch.autograd.gradcheck(f, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, tensors, check_fwd_over_rev=True)
    assert vmap(merge_states)(outs[None], lses[None])[0].shape == (1, 2, 2, 4)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_part_with_nothing_takes_no_part(value: float) -> None:
    outs, lses = double(3, 4, 2), double(3, 4)
    lses[0, :2] = lses[:, 1] = -math.inf
    want = merge_states(outs[1:, :1], lses[1:, :1])
    outs[lses == -math.inf] = value
    outs, lses = outs.requires_grad_(), lses.requires_grad_()
    out, lse = merge_states(outs, lses)
    torch.testing.assert_close((out[:1], lse[:1]), want)
    assert (out[1] == 0).all() and lse[1] == -math.inf
    dout, dlse = double(4, 2, seed=1), double(4, seed=1)
    dout[1] = dlse[1] = math.nan  # at what is nothing altogether, an incoming gradient is ignored
    douts, dlses = torch.autograd.grad((out, lse), (outs, lses), (dout, dlse))
    there = (lses != -math.inf).detach()
    assert (douts[~there] == 0).all() and (dlses[~there] == 0).all()
    assert (douts[there] != 0).all() and douts.isfinite().all() and dlses.isfinite().all()
    douts, dlses = torch.autograd.grad(merge_states(outs, lses), (outs, lses), (dout * math.nan, dlse * math.nan))
    assert (douts[~there] == 0).all() and (dlses[~there] == 0).all() and dlses[there].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_merging_half_precision_rounds_once(dtype: torch.dtype) -> None:
    outs, lses = normal(5, 100, 8, dtype=dtype), 10 * normal(5, 100)
    out, lse = merge_states(outs, lses)
    want = merge_states(outs.double(), lses.double())
    assert out.dtype is dtype and lse.dtype is torch.float32
    torch.testing.assert_close(out.double(), want[0], rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-6)
    torch.testing.assert_close(lse.double(), want[1])


def test_merging_far_apart() -> None:
    out, lse = merge_states(torch.tensor([[1.0], [2.0]]), torch.tensor([1e4, -1e4]))
    assert out == 1 and lse == 1e4


@pytest.mark.parametrize(
    ("outs", "lses", "error", "text"),
    (
        ([], [], TypeError, r"outs: expected .*, got list"),
        (torch.ones(2, 3).long(), torch.ones(2), TypeError, r"outs: expected .*, got \['torch.int64'\]"),
        (torch.ones(2, 3), [torch.ones(1), 1.0], TypeError, r"lses: expected .*'float'"),
        (torch.ones(2, 3), 1.0, TypeError, r"lses: expected .*, got float"),
        ([torch.ones(3), torch.ones(4)], torch.ones(2), ValueError, r"outs: expected tensors of one shape, got "),
        (torch.ones(2, 3), torch.ones(2, 3), ValueError, r"lses: expected \[2\], .*, got \[2, 3\]"),
        (torch.ones(3), torch.ones(()), ValueError, r"lses: expected "),
    ),
)
def test_what_does_not_merge(outs: Any, lses: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=rf"^heedful\.merge_states: {text}"):
        merge_states(outs, lses)


# ---- attention_weights

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dead rows": {"mask": Causal() & QueryLengths([5, 3]), "align": -1},
    "sinks, holes": {"mask": holes(B, HQ, SQ, SK), "sinks": double(HQ), "softcap": 2.0, "scale": 1.3},
    "biases": {"bias": heedful.ALiBi(double(HQ).abs()) + double(HQ, SQ, SK), "similarity": heedful.Gaussian(0.8)},
    "hard": {"normalizer": "hard", "mask": Causal()},
    "hard-st": {"normalizer": "hard-st", "mask": Causal(), "sinks": double(HQ)},
}


@pytest.fixture(autouse=True)
def blocks_of_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composite, "BLOCK", 2)


@pytest.mark.parametrize("name", OPTIONS)
def test_weights_are_those_of_attention(name: str) -> None:
    """What comes out where v is the identity: then out = p."""
    q, k, _ = (x.requires_grad_() for x in qkv())
    identity = torch.eye(SK, dtype=F64).expand(B, HK, SK, SK)
    p, out = attention_weights(q, k, **OPTIONS[name]), heedful.reference.attention(q, k, identity, **OPTIONS[name])
    assert p.shape == (B, HQ, SQ, SK)
    torch.testing.assert_close(p, out)
    if name != "hard":
        upstream = double(B, HQ, SQ, SK, seed=1)
        got, want = (torch.autograd.grad(x, (q, k), upstream) for x in (p, out))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("top_k", (1, 4, SK, SK + 2))
@pytest.mark.parametrize("name", OPTIONS)
def test_the_largest_weights(name: str, top_k: int) -> None:
    q, k, _ = (x.requires_grad_() for x in qkv())
    p = attention_weights(q, k, **OPTIONS[name])
    values, indices = attention_weights(q, k, **OPTIONS[name], top_k=top_k)
    assert values.shape == indices.shape == (B, HQ, SQ, top_k) and indices.dtype is torch.int64
    padded = torch.nn.functional.pad(p.sort(-1, descending=True).values, (0, max(top_k - SK, 0)))
    torch.testing.assert_close(values, padded[..., :top_k])
    there = indices >= 0
    assert torch.equal(there.sum(-1), (p > 0).sum(-1).clamp(max=top_k)) and (indices[~there] == -1).all()
    picked = p.gather(-1, indices.clamp(min=0)) * there
    torch.testing.assert_close(values, picked)
    if name != "hard":
        upstream = double(B, HQ, SQ, top_k, seed=1)
        got, want = (torch.autograd.grad(x, (q, k), upstream) for x in (values, picked))
        torch.testing.assert_close(got, want)


def test_weights_are_differentiable_in_every_way() -> None:
    q, k, _ = qkv()
    f = lambda q: attention_weights(q, k, mask=Causal(), top_k=2)[0].square().sum()  # noqa: E731
    g = lambda q: attention_weights(q, k, mask=Causal()).topk(2).values.square().sum()  # noqa: E731
    want = jacrev(grad(g))(q)
    torch.testing.assert_close(jacfwd(jacrev(f))(q), want)
    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    torch.testing.assert_close(second, want.sum((0, 1, 2, 3)))


def test_weights_of_half_precision() -> None:
    q, k, _ = (x.bfloat16() for x in qkv())
    want = attention_weights(q.double(), k.double())
    for p in (attention_weights(q, k), attention_weights(q, k, top_k=SK)[0].flip(-1)):
        assert p.dtype is torch.bfloat16
        torch.testing.assert_close(p.double().sort(-1).values, want.sort(-1).values, rtol=2**-8, atol=0)


def test_a_key_that_is_not_there_is_never_among_the_largest() -> None:
    """Not even beside weights that are 0 or NaN."""
    q, k, _ = qkv()
    far = k.clone()
    far[:, :, 0] = 1e5 * q[:, ::2, 0]
    far[:, :, 6:] = math.nan
    values, indices = attention_weights(q, far, mask=KeyLengths(4), top_k=5)
    assert (indices[..., 4] == -1).all() and (indices[..., :4] >= 0).all() and (indices < 4).all()
    assert (values == 0).any(-1).all() and values.isfinite().all()


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return result


def test_the_largest_weights_take_a_block_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is kept for the gradient is not Sq x Sk in all."""
    monkeypatch.setattr(composite, "BLOCK", 16)
    s, kept = 256, {}
    q = normal(1, 1, s, 4).requires_grad_()
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(id(x), x), lambda x: x),
    ):
        values, _ = attention_weights(q, q, mask=Causal(), top_k=3)
        values.sum().backward()
    assert 16 * s <= largest.numel < 20 * s
    assert sum(x.numel() for x in kept.values()) < s * s / 2


@pytest.mark.parametrize(
    ("options", "error", "text"),
    (
        ({"top_k": 0}, ValueError, r"top_k: expected an int of 1 or more, or None, got 0"),
        ({"top_k": True}, ValueError, r"top_k: expected an int of 1 or more, or None, got True"),
        ({"dropout_p": 0.5}, TypeError, r"dropout_p: expected none"),
        ({"seed": 1}, TypeError, r"seed: expected none"),
    ),
)
def test_what_weights_do_not_take(options: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=rf"^heedful\.attention_weights: {text}"):
        attention_weights(*qkv()[:2], **options)
