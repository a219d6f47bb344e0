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
from heedful import Causal, KeyLengths, QueryLengths, SlidingWindow

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BOOL = torch.bool


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def holes(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.3


def assert_close(got: Tensor, want: Tensor) -> None:
    """Equal up to rounding: for half precision, of the largest values."""
    if got.dtype in (torch.bfloat16, torch.float16) and got.numel():
        torch.testing.assert_close(got, want, rtol=0, atol=2 * torch.finfo(got.dtype).eps * want.abs().max().item())
    else:
        torch.testing.assert_close(got, want)


# ---- scaled_dot_product_attention: name -> shapes of query, key, value; options, a mask by its shape and dtype.

CALLS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "rank 1": ((4,), (4,), (4,), {}),
    "rank 2": ((3, 4), (5, 4), (5, 6), {}),
    "rank 2 causal": ((3, 4), (5, 4), (5, 6), {"is_causal": True}),
    "rank 3": ((2, 3, 4), (2, 5, 4), (2, 5, 6), {}),
    "rank 3 causal": ((2, 3, 4), (2, 5, 4), (2, 5, 6), {"is_causal": True}),
    "rank 4": ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), {}),
    "rank 4 causal, more keys": ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), {"is_causal": True}),
    "rank 4 causal, fewer keys": ((2, 2, 5, 4), (2, 2, 3, 4), (2, 2, 3, 4), {"is_causal": True}),
    "rank 5": ((2, 3, 2, 3, 4), (2, 3, 2, 5, 4), (2, 3, 2, 5, 6), {}),
    "rank 6": ((2, 1, 3, 2, 3, 4), (2, 1, 3, 2, 5, 4), (2, 1, 3, 2, 5, 6), {"is_causal": True}),
    "ranks 4 3 3": ((2, 2, 3, 4), (2, 5, 4), (2, 5, 6), {}),
    "ranks 3 4 4": ((2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), {}),
    "ranks 4 4 3": ((2, 2, 3, 4), (2, 2, 5, 4), (2, 5, 6), {}),
    "ranks 2 4 4": ((3, 4), (2, 2, 5, 4), (2, 2, 5, 6), {}),
    "ranks 2 2 5": ((3, 4), (5, 4), (2, 3, 2, 5, 6), {}),
    "batch 1 of query": ((1, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), {}),
    "batch 1 of key": ((2, 2, 3, 4), (1, 2, 5, 4), (2, 2, 5, 6), {}),
    "batch 1 of value": ((2, 2, 3, 4), (2, 2, 5, 4), (1, 2, 5, 6), {}),
    "batch 1 of query and key": ((1, 2, 3, 4), (1, 2, 5, 4), (2, 2, 5, 6), {}),
    "batch of 5 dimensions broadcast": ((2, 1, 2, 3, 4), (1, 3, 2, 5, 4), (2, 3, 1, 5, 6), {}),
    "one head of key and value": ((2, 4, 3, 4), (2, 1, 5, 4), (2, 1, 5, 6), {}),
    "one head of query": ((2, 1, 3, 4), (2, 4, 5, 4), (2, 4, 5, 6), {}),
    "one head of key": ((2, 4, 3, 4), (2, 1, 5, 4), (2, 4, 5, 6), {}),
    "one head of value": ((2, 4, 3, 4), (2, 4, 5, 4), (2, 1, 5, 6), {}),
    "heads differ": ((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), {}),
    "batches differ": ((2, 4, 3, 4), (3, 4, 5, 4), (3, 4, 5, 6), {}),
    "head dims differ": ((2, 4, 3, 4), (2, 4, 5, 3), (2, 4, 5, 6), {}),
    "key lengths differ": ((2, 4, 3, 4), (2, 4, 5, 4), (2, 4, 6, 6), {}),
    "value length 1": ((2, 4, 3, 4), (2, 4, 5, 4), (2, 4, 1, 6), {}),
    "gqa": ((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), {"enable_gqa": True}),
    "gqa causal": ((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), {"enable_gqa": True, "is_causal": True}),
    "gqa mask": ((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), {"enable_gqa": True, "mask": ((2, 4, 3, 5), BOOL)}),
    "gqa equal heads": ((2, 4, 3, 4), (2, 4, 5, 4), (2, 4, 5, 6), {"enable_gqa": True}),
    "gqa does not divide": ((2, 4, 3, 4), (2, 3, 5, 4), (2, 3, 5, 6), {"enable_gqa": True}),
    "gqa fewer heads of query": ((2, 2, 3, 4), (2, 4, 5, 4), (2, 4, 5, 6), {"enable_gqa": True}),
    "gqa one head of query": ((2, 1, 3, 4), (2, 4, 5, 4), (2, 4, 5, 6), {"enable_gqa": True}),
    "gqa heads 4 2 4": ((2, 4, 3, 4), (2, 2, 5, 4), (2, 4, 5, 6), {"enable_gqa": True}),
    "gqa heads 4 4 2": ((2, 4, 3, 4), (2, 4, 5, 4), (2, 2, 5, 6), {"enable_gqa": True}),
    "gqa heads 4 2 1": ((2, 4, 3, 4), (2, 2, 5, 4), (2, 1, 5, 6), {"enable_gqa": True}),
    "gqa rank 2": ((3, 4), (5, 4), (5, 6), {"enable_gqa": True}),
    "gqa rank 3": ((4, 3, 4), (2, 5, 4), (2, 5, 6), {"enable_gqa": True}),
    "gqa rank 5": ((2, 3, 4, 3, 4), (2, 3, 2, 5, 4), (2, 3, 2, 5, 6), {"enable_gqa": True}),
    "gqa ranks 4 3 3": ((2, 4, 3, 4), (2, 5, 4), (2, 5, 6), {"enable_gqa": True}),
    "gqa batch 1": ((2, 4, 3, 4), (1, 2, 5, 4), (1, 2, 5, 6), {"enable_gqa": True}),
    "scale": ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), {"scale": 0.3}),
    "scale 0": ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), {"scale": 0.0}),
    "scale negative": ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), {"scale": -1.0}),
    "scale int": ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), {"scale": 1}),
    "D 0": ((2, 2, 3, 0), (2, 2, 5, 0), (2, 2, 5, 4), {}),
    "Dv 0": ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 0), {}),
    "no keys": ((2, 2, 3, 4), (2, 2, 0, 4), (2, 2, 0, 4), {}),
    "no queries": ((2, 2, 0, 4), (2, 2, 5, 4), (2, 2, 5, 4), {}),
    "batch 0": ((0, 2, 3, 4), (0, 2, 5, 4), (0, 2, 5, 4), {}),
    "batch 0 and 1": ((0, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), {}),
    "batch 0 of 5 dimensions": ((0, 3, 2, 3, 4), (0, 3, 2, 5, 4), (0, 3, 2, 5, 4), {}),
    "mask for more batches": ((1, 4, 3, 4), (1, 4, 5, 4), (1, 4, 5, 4), {"mask": ((2, 1, 3, 5), BOOL)}),
    "mask for more heads": ((2, 1, 3, 4), (2, 1, 5, 4), (2, 1, 5, 4), {"mask": ((2, 4, 3, 5), BOOL)}),
    "mask for more queries": ((2, 4, 1, 4), (2, 4, 5, 4), (2, 4, 5, 4), {"mask": ((3, 5), BOOL)}),
    "mask for value's batch": ((1, 4, 3, 4), (1, 4, 5, 4), (2, 4, 5, 4), {"mask": ((2, 4, 3, 5), BOOL)}),
    "mask for key's batch": ((1, 4, 3, 4), (2, 4, 5, 4), (2, 4, 5, 4), {"mask": ((2, 4, 3, 5), BOOL)}),
    "mask of rank 4 for rank 3": ((2, 3, 4), (2, 5, 4), (2, 5, 4), {"mask": ((2, 4, 3, 5), BOOL)}),
    "mask of rank 3 for rank 3": ((2, 3, 4), (2, 5, 4), (2, 5, 4), {"mask": ((2, 3, 5), BOOL)}),
    "mask of rank 4 for rank 2": ((3, 4), (5, 4), (5, 4), {"mask": ((2, 1, 3, 5), BOOL)}),
    "mask of rank 4 and ones for rank 2": ((3, 4), (5, 4), (5, 4), {"mask": ((1, 1, 3, 5), BOOL)}),
    "mask of rank 5": ((2, 3, 2, 3, 4), (2, 3, 2, 5, 4), (2, 3, 2, 5, 6), {"mask": ((2, 1, 2, 3, 5), BOOL)}),
    "bias of rank 5": ((2, 3, 2, 3, 4), (2, 3, 2, 5, 4), (2, 3, 2, 5, 6), {"mask": ((3, 1, 3, 5), torch.float32)}),
} | {
    f"{'mask' if dtype is BOOL else 'bias'} {list(shape)}": (
        (2, 4, 3, 4), (2, 4, 5, 4), (2, 4, 5, 4), {"mask": (shape, dtype)},
    )
    for dtype in (BOOL, torch.float32)
    for shape in (
        (3, 5), (1, 5), (3, 1), (1, 1), (4, 3, 5), (1, 3, 5), (2, 4, 3, 5), (2, 1, 1, 5), (2, 1, 3, 5), (1, 1, 3, 1),
        (5, 3), (4, 5), (3, 3, 5), (2, 2, 3, 5), (7, 2, 4, 3, 5), (1, 2, 4, 3, 5),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_sdpa_is_torchs(name: str) -> None:
    *shapes, options = CALLS[name]
    options = dict(options)
    tensors = [normal(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]
    if "mask" in options:
        shape, dtype = options.pop("mask")
        mask = holes(*shape) if dtype is BOOL else normal(*shape, dtype=dtype).requires_grad_()
        options["attn_mask"] = mask
        tensors += [] if dtype is BOOL else [mask]
    try:
        expected = F.scaled_dot_product_attention(*tensors[:3], **options)
    except (RuntimeError, IndexError):
        with pytest.raises(RuntimeError, match=r"^heedful\.\w+: [\w, ]+: expected .*, got "):
            heedful.scaled_dot_product_attention(*tensors[:3], **options)
        return
    out = heedful.scaled_dot_product_attention(*tensors[:3], **options)
    torch.testing.assert_close(out, expected)
    dout = normal(*out.shape, seed=9)
    gradients = (torch.autograd.grad(x, tensors, dout, allow_unused=True) for x in (out, expected))
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)


@pytest.mark.parametrize("shape", ((), (1,), (5,)), ids=str)
@pytest.mark.parametrize("dtype", (BOOL, torch.float32), ids=str)
def test_sdpa_takes_a_mask_of_fewer_than_two_dimensions(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v = (normal(2, 2, n, 8, seed=n) for n in (3, 5, 5))
    mask = holes(*shape) if dtype is BOOL else normal(*shape)  # torch takes it, or not, by the kernel that it chooses
    expected = F.scaled_dot_product_attention(q, k, v, mask.expand(3, 5))
    assert_close(heedful.scaled_dot_product_attention(q, k, v, mask), expected)


@pytest.mark.parametrize("dtype", (*FLOATS, torch.int32, torch.int64, torch.uint8, torch.complex64), ids=str)
@pytest.mark.parametrize("of_query", FLOATS, ids=str)
def test_sdpa_takes_a_mask_of_the_dtypes_that_torch_takes(of_query: torch.dtype, dtype: torch.dtype) -> None:
    q, k, v = (normal(2, 2, n, 8, dtype=of_query, seed=n) for n in (3, 5, 5))
    mask = normal(3, 5).to(dtype)
    try:
        expected = F.scaled_dot_product_attention(q, k, v, mask)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="attn_mask: expected bool, torch.float32 or query's torch.* got torch"):
            heedful.scaled_dot_product_attention(q, k, v, mask)
        return
    assert_close(heedful.scaled_dot_product_attention(q, k, v, mask), expected)


@pytest.mark.parametrize("dtype", (torch.int32, torch.complex64, torch.float8_e4m3fn), ids=str)
def test_sdpa_refuses_the_dtypes_that_torch_refuses(dtype: torch.dtype) -> None:
    q = normal(2, 2, 3, 8).to(dtype)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, q, q)
    with pytest.raises(RuntimeError, match="q: expected float32, float64, bfloat16 or float16, got"):
        heedful.scaled_dot_product_attention(q, q, q)


def test_sdpa_refuses_mixed_dtypes_devices_and_types() -> None:
    q = normal(2, 2, 3, 8)
    with pytest.raises(RuntimeError, match="v: expected float32, as q, got float16"):
        heedful.scaled_dot_product_attention(q, q, q.half())
    with pytest.raises(TypeError, match="value: expected a tensor, got list"):
        heedful.scaled_dot_product_attention(q, q, [1.0])
    with pytest.raises(TypeError, match="attn_mask: expected a tensor or None, got bool"):
        heedful.scaled_dot_product_attention(q, q, q, True)
    for tensors in ((q, q, q.to("meta")), (q, q.to("meta"), q), (q.to("meta"), q, q)):
        with pytest.raises(RuntimeError, match="expected .*, got "):
            heedful.scaled_dot_product_attention(*tensors)


def test_sdpa_without_heads() -> None:
    q, k = (
        normal(2, 0, 3, 4).requires_grad_(),
        normal(2, 0, 5, 4),
    )  # torch 2.10 divides by the number of heads, and dies
    out = heedful.scaled_dot_product_attention(q, k, k, is_causal=True)
    assert out.shape == (2, 0, 3, 4)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    with pytest.raises(RuntimeError, match="key, value: expected heads that divide those of query, 4, got"):
        heedful.scaled_dot_product_attention(normal(2, 4, 3, 4), k, k, enable_gqa=True)


def test_sdpa_causal_with_a_mask_is_an_error() -> None:
    q, mask = normal(2, 2, 3, 8), holes(3, 3)  # torch 2.10 lets it pass on the CPU where its fused kernel runs
    with pytest.raises(RuntimeError, match="attn_mask: expected None where is_causal is set, got a tensor"):
        heedful.scaled_dot_product_attention(q, q, q, mask, is_causal=True)


@pytest.mark.parametrize("p", (0.5, 1.0, -0.1, 2.0))
def test_sdpa_has_no_dropout_yet(p: float) -> None:
    q = normal(2, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="dropout is not supported yet; torch.nn.functional"):
        heedful.scaled_dot_product_attention(q, q, q, dropout_p=p)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sdpa_positional_arguments_are_torchs(dtype: torch.dtype) -> None:
    q, k = normal(2, 4, 3, 8, dtype=dtype), normal(2, 2, 5, 8, dtype=dtype)
    arguments = (q, k, k, None, 0.0, True)
    options = {"scale": 0.5, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(*arguments, **options)
    assert_close(heedful.scaled_dot_product_attention(*arguments, **options), expected)


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


def test_options_that_are_not_there_yet_are_not_taken() -> None:
    q = normal(1, 1, 2, 4)
    for option in ("softcap", "sinks", "dropout_p", "seed", "similarity", "normalizer"):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            heedful.attention(q, q, q, **{option: 1})


@pytest.mark.parametrize("layout", (torch.jagged, torch.strided), ids=str)
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([normal(2, 4, 8), normal(3, 4, 8)], layout=layout).transpose(1, 2)
    for function in (heedful.attention, heedful.scaled_dot_product_attention):
        with pytest.raises(NotImplementedError, match="expected a dense tensor, got a nested one; pad it .*KeyLengths"):
            function(nested, nested, nested)


def test_a_device_without_kernels_is_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 2, 3, 8, device="cuda")
        for function in (heedful.attention, heedful.scaled_dot_product_attention):
            with pytest.raises(
                NotImplementedError, match="got one on cuda.*heedful.reference.attention .*heedful.explain"
            ):
                function(q, q, q)


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
    assert set(heedful.__all__) >= {"attention", "scaled_dot_product_attention", "reference", "explain", "nn", "swap"}
