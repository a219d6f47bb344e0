"""What users call: agreement with torch's own function, shapes, errors; and the reference against its definition."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import heedful
from functions import BOOL, FLOATS, assert_close, holes, normal
from heedful import (
    ALiBi,
    Causal,
    Gaussian,
    Global,
    KeyLengths,
    PrefixLM,
    QueryLengths,
    RelativeBias,
    SlidingWindow,
    ops,
)

# ---- attention and its reference


def definition(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor, scale: float, dout: Tensor, dlse: Tensor
) -> list[Tensor]:
    """out, lse, dq, dk, dv, dbias [B, Hq, Sq, Sk], one pair at a time."""
    (batch, heads, queries, _), (kv_heads, keys) = q.shape, k.shape[1:3]
    out, lse = torch.zeros_like(dout), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    dq, dk, dv, dbias = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(bias)
    for b in range(batch):
        for h in range(heads):
            g = h * kv_heads // heads
            for i in range(queries):
                present = [j for j in range(keys) if seen[b, h, i, j] and bias[b, h, i, j] != -math.inf]
                s = {j: scale * q[b, h, i].dot(k[b, g, j]) + bias[b, h, i, j] for j in present}
                s = {j: x for j, x in s.items() if x != -math.inf}
                if not s:
                    continue
                lse[b, h, i] = torch.stack(list(s.values())).logsumexp(0)
                p = {j: (x - lse[b, h, i]).exp() for j, x in s.items()}
                for j in s:
                    out[b, h, i] += p[j] * v[b, g, j]
                delta = out[b, h, i].dot(dout[b, h, i]) - dlse[b, h, i]
                for j in s:
                    ds = p[j] * (dout[b, h, i].dot(v[b, g, j]) - delta)
                    dbias[b, h, i, j] = ds
                    dq[b, h, i] += scale * ds * k[b, g, j]
                    dk[b, g, j] += scale * ds * q[b, h, i]
                    dv[b, g, j] += p[j] * dout[b, h, i]
    return [out, lse, dq, dk, dv, dbias]


B, HQ, HK, SQ, SK = 2, 4, 2, 4, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": Causal()},
    "causal top-left": {"mask": Causal(), "align": "top-left"},
    "causal, dead rows": {"mask": Causal(), "align": -2},
    "window by sequence": {"mask": SlidingWindow(1, 2), "align": torch.tensor([2, -1])},
    "lengths": {"mask": KeyLengths([3, 0]) & QueryLengths([4, 2]) & Causal()},
    "tensor": {"mask": holes(B, 1, SQ, SK)},
    "bias": {"bias": normal(HQ, SQ, SK, dtype=torch.float64)},
    "bias of -inf": {"bias": torch.where(holes(B, 1, SQ, SK, seed=1), normal(SQ, SK), -math.inf).double()},
    "bias of -inf, dead rows": {"bias": torch.where(holes(HQ, SQ, 1, seed=3), 0.5, -math.inf).double()},
    "all": {
        "mask": Causal() & holes(SQ, SK) & KeyLengths(5),
        "bias": normal(B, HQ, 1, SK, dtype=torch.float64),
        "scale": -0.7,
    },
}


@pytest.mark.parametrize("poison", ("none", "q", "k", "v", "dout", "dlse"))
@pytest.mark.parametrize("name", OPTIONS)
def test_reference_is_the_definition(name: str, poison: str) -> None:
    options = dict(OPTIONS[name])
    q, k, v = normal(B, HQ, SQ, 3), normal(B, HK, SK, 3), normal(B, HK, SK, 2)
    dout, dlse = normal(B, HQ, SQ, 2, seed=1), normal(B, HQ, SQ, seed=2)
    tensors = {n: x.double() for n, x in zip(("q", "k", "v", "dout", "dlse"), (q, k, v, dout, dlse))}
    if poison in ("q", "k", "v", "dout"):
        tensors[poison][0, 0, 2, 0] = math.nan
        tensors[poison][1, 1, 1, 1] = math.inf
    bias = options["bias"].detach().requires_grad_() if "bias" in options else None
    options["bias"] = bias
    q, k, v = (tensors[n].requires_grad_() for n in "qkv")
    out, lse = heedful.reference.attention(q, k, v, **options, return_lse=True)
    if poison == "dlse":  # what reaches a row with nothing to attend to is ignored
        tensors["dlse"][lse == -math.inf] = math.nan

    mask = heedful.Mask() & options.get("mask", torch.ones(1, 1, dtype=BOOL))
    seen = mask.to_dense(SQ, SK, batch=B, heads=HQ, align=options.get("align", "bottom-right"))
    dense_bias = (
        torch.zeros(B, HQ, SQ, SK, dtype=torch.float64) if bias is None else bias.detach().expand(B, HQ, SQ, SK)
    )
    scale = options.get("scale", 1 / math.sqrt(3))
    with torch.no_grad():
        truth = definition(q, k, v, seen, dense_bias, scale, tensors["dout"], tensors["dlse"])
    wanted = [q, k, v] if bias is None else [q, k, v, bias]
    grads = torch.autograd.grad((out, lse), wanted, (tensors["dout"], tensors["dlse"]))
    if bias is not None:
        truth[5] = truth[5].sum_to_size(bias.shape)
    for got, want in zip((out, lse, *grads), truth):
        if poison == "dout":  # which of its ways to be non-finite a gradient takes depends on the order of the sums
            got, want = (torch.where(x.isfinite(), x, math.nan) for x in (got, want))
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_is_its_reference(name: str, dtype: torch.dtype) -> None:
    options = dict(OPTIONS[name])
    q, k, v = (normal(B, h, s, d, dtype=dtype, seed=d) for h, s, d in ((HQ, SQ, 8), (HK, SK, 8), (HK, SK, 5)))
    if "bias" in options:
        options["bias"] = options["bias"].to(dtype).detach().requires_grad_()
    tensors = [x.requires_grad_() for x in (q, k, v)] + [options[n] for n in ("bias",) if n in options]
    results = []
    for function in (heedful.attention, heedful.reference.attention):
        out, lse = function(q, k, v, **options, return_lse=True)
        assert torch.equal(function(q, k, v, **options), out)
        assert lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        grads = torch.autograd.grad((out, lse), tensors, (torch.ones_like(out), lse.isfinite().to(lse.dtype)))
        results.append((out, lse, *grads))
    for got, want in zip(*results):
        assert_close(got, want)


@pytest.mark.parametrize("function", (heedful.attention, heedful.reference.attention))
def test_a_float32_bias_beside_half_precision(function: Any) -> None:
    q, bias = normal(1, 2, 3, 8, dtype=torch.bfloat16), normal(3, 3).requires_grad_()
    out = function(q, q, q, bias=bias)
    assert out.dtype is torch.bfloat16
    (dbias,) = torch.autograd.grad(out.sum(), bias)
    assert dbias.dtype is torch.float32 and dbias.shape == (3, 3)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q, bias), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("wanted", ("out", "lse"))
def test_gradient_through_one_result_alone(wanted: str) -> None:
    tensors = [normal(1, 2, 3, 4, dtype=torch.float64, seed=n).requires_grad_() for n in range(3)]
    grads = []
    for function in (heedful.attention, heedful.reference.attention):
        result = dict(zip(("out", "lse"), function(*tensors, return_lse=True)))[wanted]
        grads.append(torch.autograd.grad(result.square().sum(), tensors, allow_unused=True))
    for got, want in zip(*grads):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)


def test_gradients_are_asked_for_one_by_one() -> None:
    data = [normal(1, 2, 3, 4, dtype=torch.float64, seed=n) for n in range(3)] + [normal(3, 3, dtype=torch.float64)]
    for n in range(4):
        tensors = [x.detach().requires_grad_(i == n) for i, x in enumerate(data)]
        results = [f(*tensors[:3], bias=tensors[3]) for f in (heedful.attention, heedful.reference.attention)]
        got, want = (torch.autograd.grad(x.square().sum(), tensors[n])[0] for x in results)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": normal(2, 3, 8)}, "q: expected 4 dimensions"),
        ({"v": normal(2, 2, 6, 8)}, "v: expected"),
        ({"k": normal(2, 3, 5, 8), "v": normal(2, 3, 5, 8)}, "q: expected a number of heads"),
        ({"bias": normal(1, 1, 1, 3, 5)}, "bias: expected at most 4 dimensions"),
        ({"bias": normal(4, 5)}, "bias: expected a shape that broadcasts"),
        ({"bias": normal(3, 5).half()}, "bias: expected float32"),
        ({"scale": math.inf}, "scale: expected a finite number"),
        ({"q": normal(2, 3, 8), "mask": Causal()}, "q: expected 4 dimensions"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], text: str) -> None:
    arguments = {"q": normal(2, 4, 3, 8), "k": normal(2, 2, 5, 8), "v": normal(2, 2, 5, 8)} | change
    with pytest.raises(RuntimeError) as error:
        heedful.attention(**arguments)
    assert text in str(error.value)


# ---- every option: against the reference, and against what it says


def heads(*shape: int, positive: bool = False) -> Tensor:
    """A parameter that needs a gradient."""
    x = normal(*shape, dtype=torch.float64, seed=5)
    return (x.abs() + 0.5 if positive else x).requires_grad_()


FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": heads(HQ), "mask": KeyLengths([3, 0])},
    "sinks by sequence": {"sinks": heads(B, HQ), "mask": Causal()},
    "scales": {"scale": heads(HQ)},
    "scales by sequence": {"scale": heads(B, HQ), "softcap": 2.0},
    "cosine": {"similarity": "cosine", "scale": 4.0},
    "cosine, scales": {"similarity": "cosine", "scale": heads(HQ)},
    "gaussian": {"similarity": Gaussian(1.5)},
    "gaussian, scale": {"similarity": Gaussian(1.5), "scale": 2.0, "mask": Causal()},
    "gaussian, scales": {"similarity": Gaussian(1.5), "scale": heads(B, HQ)},
    "gaussian by head": {"similarity": Gaussian(heads(HQ, positive=True))},
    "gaussian by sequence, scales": {"similarity": Gaussian(heads(B, HQ, positive=True)), "scale": heads(HQ)},
    "alibi": {"bias": ALiBi(heads(HQ)), "mask": Causal()},
    "alibi, top-left": {"bias": ALiBi(heads(B, HQ)), "align": "top-left"},
    "relative": {"bias": RelativeBias(heads(8, HQ), max_distance=5)},
    "relative by sequence": {"bias": RelativeBias(heads(B, 8, HQ), bidirectional=False), "align": torch.tensor([3, 0])},
    "all biases": {"bias": ALiBi(heads(HQ)) + RelativeBias(heads(8, HQ)) + heads(SQ, SK), "align": 1},
    "prefix": {"mask": PrefixLM([2, 5])},
    "global or near": {"mask": Global(1) | SlidingWindow(1, 0) | holes(SQ, SK)},
    "dropout": {"dropout_p": 0.4, "seed": 7, "mask": Causal()},
    "dropout by sequence": {"dropout_p": 0.4, "seed": torch.tensor([7, -3]), "sinks": heads(HQ)},
    "hard": {"normalizer": "hard", "sinks": heads(HQ)},
    "hard, dropout": {"normalizer": "hard", "dropout_p": 0.5, "seed": 1, "mask": KeyLengths([4, 0])},
    "hard-st": {"normalizer": "hard-st", "sinks": heads(HQ), "bias": heads(SQ, SK), "mask": Causal()},
    "hard-st, dead rows": {"normalizer": "hard-st", "mask": KeyLengths([4, 0]), "dropout_p": 0.5, "seed": 1},
    "all": {
        "mask": Causal() & KeyLengths(5),
        "bias": ALiBi(heads(HQ)) + heads(HQ, 1, SK),
        "softcap": 2.0,
        "sinks": heads(HQ),
        "scale": heads(B, HQ),
        "similarity": "cosine",
        "dropout_p": 0.3,
        "seed": 2**63 - 1,
    },
}


def leaves(*values: Any) -> list[Tensor]:
    """Every tensor among the options that needs a gradient."""
    found = []
    for x in values:
        parts = [x] if isinstance(x, Tensor) else vars(x).values() if hasattr(x, "__dict__") else []
        found += [y for y in parts if isinstance(y, Tensor) and y.requires_grad]
    return found


def qkv(queries: int = SQ, keys: int = SK) -> list[Tensor]:
    shapes = ((B, HQ, queries, 8), (B, HK, keys, 8), (B, HK, keys, 5))
    return [normal(*shape, dtype=torch.float64, seed=n).requires_grad_() for n, shape in enumerate(shapes)]


def results(function: Any, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """out, lse, and the gradients of both in q, k, v and the options."""
    out, lse = function(*tensors, **options, return_lse=True)
    grads = (normal(*out.shape, dtype=out.dtype, seed=8), normal(*lse.shape, dtype=lse.dtype, seed=9))
    wanted = tensors + leaves(*options.values())
    given = [(x, g) for x, g in zip((out, lse), grads) if x.requires_grad]  # the lse of "hard" need not
    found = torch.autograd.grad([x for x, _ in given], wanted, [g for _, g in given], allow_unused=True)
    return [out, lse, *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found))]


@pytest.mark.parametrize("name", FEATURES)
def test_every_option_is_as_in_the_reference(name: str) -> None:
    tensors, options = qkv(), FEATURES[name]
    assert len(results(heedful.attention, tensors, options)) == 5 + len(leaves(*options.values()))
    for got, want in zip(*(results(f, tensors, options) for f in (heedful.attention, heedful.reference.attention))):
        assert got.isfinite().all() or torch.equal(got.isfinite(), want.isfinite())
        torch.testing.assert_close(got, want)


def plainly(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v.repeat_interleave(HQ // HK, 1)


def test_options_mean_what_they_say() -> None:
    q, k, v = (x.detach() for x in qkv())
    keys = k.repeat_interleave(HQ // HK, 1)
    dot, scale, by_head = q @ keys.mT, heads(HQ).detach(), heads(B, HQ, positive=True).detach()
    distances = (q[:, :, :, None] - keys[:, :, None]).square().sum(-1)
    position = torch.arange(SQ)[:, None] + SK - SQ
    cases = {
        "softcap": ({"softcap": 0.7}, 0.7 * (dot / math.sqrt(8) / 0.7).tanh()),
        "scale": ({"scale": scale}, scale[:, None, None] * dot),
        "cosine": ({"similarity": "cosine"}, F.cosine_similarity(q[:, :, :, None], keys[:, :, None], dim=-1)),
        "gaussian": ({"similarity": Gaussian(1.5)}, -distances / 4.5),
        "scale, gaussian": (
            {"similarity": Gaussian(by_head), "scale": scale},
            -(scale[:, None, None] * distances) / (2 * by_head.square())[..., None, None],
        ),
        "alibi": (
            {"bias": ALiBi(scale), "scale": 1.0},
            dot - scale[:, None, None] * (torch.arange(SK) - position).abs(),
        ),
    }
    for options, scores in cases.values():
        torch.testing.assert_close(heedful.attention(q, k, v, **options), plainly(scores, v))


def test_a_sink_is_a_key_of_no_value() -> None:
    q, k, v = (x.detach() for x in qkv())
    sinks = heads(HQ).detach()
    scores = q @ k.repeat_interleave(2, 1).mT
    with_sink = torch.cat((scores, sinks[:, None, None].expand(B, HQ, SQ, 1)), -1)
    out, lse = heedful.attention(q, k, v, sinks=sinks, scale=1.0, return_lse=True)
    torch.testing.assert_close(lse, with_sink.logsumexp(-1))
    torch.testing.assert_close(out, with_sink.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_half_precision_bandwidth_is_squared_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in qkv())
    bandwidth = torch.full((HQ,), 1 / 3, dtype=dtype).requires_grad_()
    lse = heedful.attention(q, k, v, similarity=Gaussian(bandwidth), return_lse=True)[1]
    want = heedful.attention(q, k, v, similarity=Gaussian(bandwidth[0].item()), return_lse=True)[1]
    torch.testing.assert_close(lse, want)
    assert torch.autograd.grad(lse.sum(), bandwidth)[0].dtype is dtype


# ---- dropout


def test_dropout_follows_torch_manual_seed() -> None:
    q, k, v = (x.detach() for x in qkv(40, 50))
    torch.manual_seed(3)
    first, second = (heedful.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(heedful.attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    before = torch.get_rng_state()
    heedful.attention(q, k, v, mask=Causal())
    heedful.attention(q, k, v, dropout_p=0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_keeps_the_expected_share_and_value() -> None:
    q = torch.zeros(1, 4, 256, 8)
    eye = torch.eye(256).expand(1, 4, 256, 256)  # so that the result is the weights
    weights = heedful.attention(q, q, eye, dropout_p=0.25, seed=11) * 256
    kept = weights != 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 4 / 3))
    assert abs(kept.double().mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / kept.numel())
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert not torch.equal(kept, heedful.attention(q, q, eye, dropout_p=0.25, seed=12) != 0)


def test_dropout_of_everything_and_of_nothing() -> None:
    q, k, v = qkv()
    out, lse = heedful.attention(q, k, v, dropout_p=1.0, return_lse=True)
    assert (out == 0).all() and torch.equal(lse, heedful.attention(q, k, v, return_lse=True)[1])
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    assert torch.equal(heedful.attention(q, k, v, dropout_p=0, seed=1), heedful.attention(q, k, v))


@pytest.mark.parametrize("seed", (torch.tensor(-5), torch.tensor([-5]), torch.tensor([-5, -5])), ids=str)
def test_a_seed_may_be_a_tensor(seed: Tensor) -> None:
    q, k, v = qkv()
    want = heedful.attention(q, k, v, dropout_p=0.5, seed=-5)
    assert torch.equal(heedful.attention(q, k, v, dropout_p=0.5, seed=seed), want)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiled_dropout_follows_torch_manual_seed(dynamic: bool) -> None:
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return heedful.attention(q, k, v, dropout_p=0.5, softcap=2.0, mask=Causal())

    q, k, v = qkv()
    torch.manual_seed(3)
    first, second = compiled(q, k, v), compiled(q, k, v)
    torch.manual_seed(3)
    assert torch.equal(compiled(q, k, v), first) and not torch.equal(first, second)


# ---- hard-st


def test_hard_st_has_the_values_of_hard_and_the_gradients_of_softmax() -> None:
    tensors, options = qkv(), {"bias": heads(SQ, SK), "sinks": heads(HQ), "mask": Causal() & KeyLengths([5, 1])}
    both = {n: results(heedful.attention, tensors, options | {"normalizer": n}) for n in ("hard", "softmax", "hard-st")}
    names = ("out", "lse", "q", "k", "v", "bias", "sinks")
    for name, hard, soft, got in zip(names, *both.values()):
        assert torch.equal(got, hard if name in ("out", "lse", "v") else soft), name
        assert not torch.equal(hard, soft), name


def test_hard_st_with_numbers_that_are_not_finite() -> None:
    q, k, v = qkv()
    with torch.no_grad():
        k[:, :, 0] = math.nan
        v[:, :, 1] = math.inf
    mask = torch.ones(SQ, SK, dtype=BOOL)
    mask[1:, :2] = mask[3] = False  # the first query alone sees them, the last one sees nothing
    found = {n: results(heedful.attention, [q, k, v], {"mask": mask, "normalizer": n}) for n in ("hard", "hard-st")}
    for hard, got in zip(found["hard"][:2], found["hard-st"][:2]):
        torch.testing.assert_close(got, hard, rtol=0, atol=0, equal_nan=True)
    dq = found["hard-st"][2]
    assert dq[:, :, 1:].isfinite().all() and (dq[:, :, 3] == 0).all() and (dq[:, :, 1] != 0).all()


def test_hard_st_computes_softmax_only_for_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], ops.forward
    monkeypatch.setattr(ops, "forward", lambda *x, **options: calls.append(options) or forward(*x, **options))
    q, k, v = qkv()
    heedful.attention(q.detach(), k.detach(), v, normalizer="hard-st")
    with torch.no_grad():
        heedful.attention(q, k, v, normalizer="hard-st")
    assert [c["normalizer"] for c in calls] == ["hard", "hard"]
    heedful.attention(q, k, v, normalizer="hard-st")
    assert [c["normalizer"] for c in calls[2:]] == ["hard", "softmax"]


def test_hard_st_in_every_mode() -> None:
    q, k, v = (x.detach() for x in qkv())

    def total(normalizer: str) -> Any:
        return lambda q: heedful.attention(q, k, v, normalizer=normalizer, mask=Causal()).sum()

    want = torch.func.grad(total("softmax"))(q)
    torch.testing.assert_close(torch.func.grad(total("hard-st"))(q), want)
    torch.testing.assert_close(torch.func.jvp(total("hard-st"), (q,), (q,))[1], (want * q).sum())
    compiled = torch.compile(total("hard-st"), fullgraph=True, backend="aot_eager")
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], want)
    torch.testing.assert_close(compiled(leaf), total("hard")(q))


# ---- errors of options

WRONG_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap: expected a finite number above 0 or None, got 0.0"),
    "softcap nan": ({"softcap": math.nan}, ValueError, "softcap: expected a finite number above 0 or None, got nan"),
    "softcap bool": ({"softcap": True}, TypeError, "softcap: expected a number above 0 or None, got True"),
    "sinks number": ({"sinks": 1.0}, TypeError, "sinks: expected a tensor [4] or [2, 4], got float"),
    "sinks dtype": ({"sinks": torch.ones(4).int()}, TypeError, "sinks: expected a tensor [4] or [2, 4] of floating"),
    "sinks shape": ({"sinks": torch.ones(2)}, RuntimeError, "sinks: expected a tensor [4] or [2, 4], got [2]"),
    "scale word": ({"scale": "1"}, TypeError, "scale: expected a number or a tensor [Hq] or [B, Hq], got '1'"),
    "scale shape": ({"scale": torch.ones(())}, RuntimeError, "scale: expected a tensor [4] or [2, 4], got []"),
    "scale inf": ({"scale": math.inf}, RuntimeError, "scale: expected a finite number"),
    "dropout nan": ({"dropout_p": math.nan}, ValueError, "dropout_p: expected a number from 0 to 1, got nan"),
    "dropout word": ({"dropout_p": "0"}, TypeError, "dropout_p: expected a number from 0 to 1, got '0'"),
    "dropout bool": ({"dropout_p": True}, TypeError, "dropout_p: expected a number from 0 to 1, got True"),
    "seed float": ({"dropout_p": 0.1, "seed": 1.0}, TypeError, "seed: expected an int or an int64 tensor [1] or [B]"),
    "seed large": ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed: expected an int of 64 bits, got 9223372036"),
    "seed dtype": (
        {"dropout_p": 0.1, "seed": torch.zeros(1).int()},
        TypeError,
        "seed: expected an int or a torch.int64 tensor [1] or [2], got a tensor of torch.int32 [1]",
    ),
    "seed shape": (
        {"dropout_p": 0.1, "seed": torch.zeros(4).long()},
        TypeError,
        "seed: expected an int or a torch.int64 tensor [1] or [2], got a tensor of torch.int64 [4]",
    ),
    "similarity": ({"similarity": "gaussian"}, ValueError, "similarity: expected 'dot', 'cosine' or heedful.Gaussian("),
    "bandwidth": ({"similarity": Gaussian(torch.ones(3))}, RuntimeError, "bandwidth: expected a tensor [4] or [2, 4]"),
    "normalizer": ({"normalizer": None}, ValueError, "normalizer: expected 'softmax' or 'hard' or 'hard-st', got None"),
    "bias": ({"bias": 1.0}, TypeError, "bias: expected a tensor or a heedful bias, got float"),
    "mask": ({"mask": "causal"}, TypeError, "mask: expected a bool tensor or a heedful mask, got str"),
    "align": ({"align": "left"}, ValueError, 'align: expected "top-left", "bottom-right", an int or an int tensor'),
    "align, mask": ({"align": True, "mask": Causal()}, TypeError, 'align: expected "top-left", "bottom-right", an int'),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_wrong_options(name: str) -> None:
    options, kind, text = WRONG_OPTIONS[name]
    q, k, v = qkv()
    functions = [heedful.attention, heedful.reference.attention, heedful.explain]
    for function in functions if name != "scale inf" else functions[:1]:
        with pytest.raises(kind) as error:
            function(q, k, v, **options)
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("bandwidth", "kind", "text"),
    [
        (0.0, ValueError, "expected a finite number above 0, got 0.0"),
        (math.inf, ValueError, "expected a finite number above 0, got inf"),
        (math.nan, ValueError, "expected a finite number above 0, got nan"),
        ("1", TypeError, "expected a number or a tensor [Hq], got str"),
        (True, TypeError, "expected a number or a tensor [Hq], got bool"),
    ],
)
def test_wrong_bandwidths(bandwidth: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        Gaussian(bandwidth)
    assert f"heedful.Gaussian: bandwidth: {text}" in str(error.value)


def test_unknown_options_are_not_taken() -> None:
    q = normal(1, 1, 2, 4)
    for function in (heedful.attention, heedful.reference.attention, heedful.explain):
        with pytest.raises(TypeError, match="unexpected keyword argument 'is_causal'"):
            function(q, q, q, is_causal=True)


# ---- explain, and the package


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = normal(2, 4, 3, 8), normal(2, 2, 5, 8)
    monkeypatch.delenv("HEEDFUL_CPU_ISA", raising=False)
    found = heedful.explain(q, k, k, mask=Causal(), bias=normal(3, 5))
    assert found.kernel == f"cpu/{found.isa}" and found.tiles
    text = repr(found)
    for part in (
        "q [2, 4, 3, 8]",
        "float32 on cpu",
        "mask Causal()",
        "bias [3, 5]",
        f"runs cpu/{found.isa}",
        *found.tiles,
    ):
        assert part in text
    monkeypatch.setenv("HEEDFUL_CPU_ISA", "baseline")
    found = heedful.explain(q, k, k)
    assert found.kernel == "cpu/baseline"


def test_explain_takes_the_options_of_attention() -> None:
    q, k, v = (x.detach() for x in qkv())
    for name, options in FEATURES.items():
        assert heedful.explain(q, k, v, **options, return_lse=True).kernel, name
    options = {"bias": ALiBi(torch.ones(HQ)), "sinks": torch.ones(HQ), "similarity": Gaussian(2.0), "softcap": 3.0}
    text = repr(heedful.explain(q, k, v, **options, scale=None))
    for part in ("bias ALiBi([4])", "sinks [4]", "similarity Gaussian(2.0)", "softcap 3.0"):
        assert part in text
    assert "scale" not in text


def test_explain_says_why_not() -> None:
    q = normal(2, 4, 3, 8)
    for found in (heedful.explain(*[q.to("meta")] * 3), heedful.explain(*[q.int()] * 3)):
        assert found.kernel is None and found.isa is None and found.reasons
        assert "cannot run; heedful.reference.attention runs on any device" in repr(found)
        assert all(reason in repr(found) for reason in found.reasons)
    assert "int32" in found.reasons[0]
    with pytest.raises(RuntimeError, match="heedful.explain: k: expected 4 dimensions, got 3"):
        heedful.explain(q, q[0], q)


def test_a_missing_library_is_explained(tmp_path: Path) -> None:
    package = Path(heedful.__file__).parent
    shutil.copytree(
        package, tmp_path / "heedful", ignore=shutil.ignore_patterns("libheedful.so", "__pycache__", "demo")
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", "import heedful"]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: heedful: its library of operators cannot be loaded" in run.stderr
    assert "pip install" in run.stderr


def test_public_names() -> None:
    assert all(hasattr(heedful, name) for name in heedful.__all__)
    assert heedful.__all__ == sorted(heedful.__all__)
    functions = {"attention", "varlen_attention", "scaled_dot_product_attention", "merge_states", "attention_weights"}
    objects = {"Gaussian", "ALiBi", "RelativeBias", "Bias", "Mask", "BlockMask", "Documents", "PrefixLM", "Strided"}
    assert set(heedful.__all__) >= functions | objects | {"explain", "nn", "patched", "reference", "swap"}
