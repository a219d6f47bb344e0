"""heedful.scaled_dot_product_attention is torch's: values, gradients, shapes, dtypes, errors; and its dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import heedful
from functions import BOOL, FLOATS, assert_close, holes, normal

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


@pytest.mark.parametrize("p", (-0.1, 1.5, float("nan"), "0.5"))
def test_sdpa_refuses_a_dropout_that_torch_refuses(p: Any) -> None:
    q = normal(2, 2, 3, 8).requires_grad_()
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        F.scaled_dot_product_attention(q, q, q, dropout_p=p)
    with pytest.raises(theirs.type, match="dropout_p: expected a number from 0 to 1, got "):
        heedful.scaled_dot_product_attention(q, q, q, dropout_p=p)


@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"attn_mask": holes(5)}, {"scale": 2.0}), ids=str)
def test_sdpa_has_dropout(options: dict[str, Any]) -> None:
    q, k = (normal(2, 4, n, 8, dtype=torch.float64).requires_grad_() for n in (3, 5))
    torch.manual_seed(1)
    out = heedful.scaled_dot_product_attention(q, k, k, dropout_p=0.5, **options)
    torch.manual_seed(1)
    seed = int(torch.randint(2**63 - 1, (1,)))
    mask = heedful.Causal() if options.get("is_causal") else options.get("attn_mask")
    same = {"scale": options.get("scale"), "align": "top-left", "dropout_p": 0.5, "seed": seed}
    expected = heedful.reference.attention(q, k, k, mask=mask, **same)
    torch.testing.assert_close(out, expected)
    assert not torch.equal(out, heedful.scaled_dot_product_attention(q, k, k, **options))
    for got, want in zip(*(torch.autograd.grad(x.square().sum(), (q, k)) for x in (out, expected))):
        torch.testing.assert_close(got, want)


def test_sdpa_drops_everything_as_torch_does() -> None:
    q = normal(2, 2, 3, 8)
    assert torch.equal(heedful.scaled_dot_product_attention(q, q, q, dropout_p=1.0), torch.zeros_like(q))
    assert torch.equal(F.scaled_dot_product_attention(q, q, q, dropout_p=1.0), torch.zeros_like(q))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sdpa_positional_arguments_are_torchs(dtype: torch.dtype) -> None:
    q, k = normal(2, 4, 3, 8, dtype=dtype), normal(2, 2, 5, 8, dtype=dtype)
    arguments = (q, k, k, None, 0.0, True)
    options = {"scale": 0.5, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(*arguments, **options)
    assert_close(heedful.scaled_dot_product_attention(*arguments, **options), expected)
