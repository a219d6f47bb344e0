"""Bias objects: what they come down to, their sums, and that attention with them is attention with the dense tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from functions import normal
from heedful.biases import ALiBi, Bias, RelativeBias, as_bias

B, HQ, SQ, SK = 2, 4, 5, 7
F64 = torch.float64
ALIGN = {"top-left": 0, "bottom-right": SK - SQ, 3: 3, -2: -2}


def double(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, dtype=F64, seed=seed)


def distance(start: int | Tensor) -> Tensor:
    """How far key j lies after the position of query i, [.., 1, Sq, Sk]."""
    start = torch.as_tensor(start).reshape(-1, 1, 1, 1)
    return torch.arange(SK) - torch.arange(SQ)[:, None] - start


# ---- ALiBi


def test_default_slopes_of_alibi() -> None:
    """Those of the paper: for 8 heads 1/2, 1/4, ..., 1/256; for 16 the roots between them."""
    assert torch.equal(ALiBi.default_slopes(8), 2.0 ** -torch.arange(1.0, 9))
    torch.testing.assert_close(ALiBi.default_slopes(16), 2.0 ** -(torch.arange(1.0, 17) / 2))
    twelve = torch.cat((2.0 ** -torch.arange(1.0, 9), 2.0 ** -(torch.arange(1.0, 9, 2) / 2)))
    torch.testing.assert_close(ALiBi.default_slopes(12), twelve)
    assert ALiBi.default_slopes(1).tolist() == [2**-8] and len(ALiBi.default_slopes(71)) == 71
    with pytest.raises(ValueError, match=r"heedful.ALiBi.default_slopes: heads: expected 1 or more, got 0"):
        ALiBi.default_slopes(0)


@pytest.mark.parametrize("align", (*ALIGN, torch.tensor([1, -1])), ids=str)
def test_alibi(align: Any) -> None:
    start = align if isinstance(align, Tensor) else ALIGN[align]
    for slopes in (double(HQ), double(B, HQ)):
        got = ALiBi(slopes).to_dense(SQ, SK, align=align)
        want = -slopes.reshape(-1, HQ, 1, 1) * distance(start).abs()
        assert got.dtype is F64 and torch.equal(got, want)


# ---- relative biases


@pytest.mark.parametrize("max_distance", (20, 128, 300))
@pytest.mark.parametrize("count", (8, 32, 33))
@pytest.mark.parametrize("bidirectional", (False, True))
def test_buckets_are_those_of_t5(bidirectional: bool, count: int, max_distance: int) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    bias = RelativeBias(torch.zeros(count, HQ), bidirectional, max_distance)
    reach = len(bias.buckets) // 2
    far = torch.arange(-2000, 2001)
    want = t5.T5Attention._relative_position_bucket(far, bidirectional, count, max_distance)
    assert torch.equal(bias.buckets[far.clamp(-reach, reach) + reach], want)


def test_buckets_of_t5_written_out() -> None:
    """8 buckets to a distance of 16: 4 for each side, of which 2 hold one distance each (2 in log steps: 2-5, 6-)."""
    both = RelativeBias(torch.zeros(8, 1), max_distance=16).buckets
    assert both[16:].tolist() == [0, 5] + [6] * 4 + [7] * 11
    assert both[:16].flip(0).tolist() == [1] + [2] * 4 + [3] * 11
    back = RelativeBias(torch.zeros(8, 1), bidirectional=False, max_distance=16).buckets
    assert back[:17].flip(0).tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
    assert (back[16:] == 0).all()


@pytest.mark.parametrize("align", (*ALIGN, torch.tensor([1, -1])), ids=str)
def test_relative_bias(align: Any) -> None:
    start = align if isinstance(align, Tensor) else ALIGN[align]
    for table in (double(8, HQ), double(B, 8, HQ)):
        bias = RelativeBias(table, max_distance=6)
        bucket = bias.buckets[distance(start).clamp(-6, 6) + 6]
        tables = table.reshape(-1, 8, HQ)
        size = max(len(tables), len(bucket))
        want = torch.stack([tables[b % len(tables)][bucket[b % len(bucket), 0]] for b in range(size)]).permute(
            0, 3, 1, 2
        )
        assert torch.equal(bias.to_dense(SQ, SK, align=align), want)


def test_clipped_distances() -> None:
    table = double(5, HQ)
    dense = RelativeBias.clipped(table).to_dense(SQ, SK)
    want = table[distance(SK - SQ).clamp(-2, 2) + 2].permute(0, 1, 4, 2, 3)[0]
    assert torch.equal(dense, want)
    with pytest.raises(ValueError, match=r"heedful.RelativeBias.clipped: table: expected an odd number of rows, got 4"):
        RelativeBias.clipped(torch.zeros(4, HQ))


# ---- sums

TENSOR, SLOPES, BUCKETS = double(HQ, SQ, SK), double(HQ), double(8, HQ)
SUMS: dict[str, list[Bias | Tensor]] = {
    "alibi twice": [ALiBi(SLOPES), ALiBi(double(B, HQ))],
    "tables": [RelativeBias(BUCKETS, max_distance=9), RelativeBias(double(B, 8, HQ), max_distance=9)],
    "tensor first": [TENSOR, ALiBi(SLOPES)],
    "tensor last": [RelativeBias(BUCKETS), TENSOR],
    "all": [ALiBi(SLOPES), TENSOR, RelativeBias(BUCKETS), double(SK), ALiBi(SLOPES)],
}


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    first, *others = SUMS[name]
    total = first
    for x in others:
        total = total + x
    assert isinstance(total, Bias)
    want = sum(as_bias(x).to_dense(SQ, SK) for x in SUMS[name])
    torch.testing.assert_close(total.to_dense(SQ, SK), want.expand_as(total.to_dense(SQ, SK)))


def test_tables_of_different_buckets_do_not_add() -> None:
    for other in (RelativeBias(BUCKETS, max_distance=10), RelativeBias(BUCKETS, False, 9), RelativeBias(double(9, HQ))):
        with pytest.raises(ValueError, match=r"heedful.RelativeBias: table: expected the same buckets .*to_dense\(\)"):
            RelativeBias(BUCKETS, max_distance=9) + other


def test_what_adds_to_a_tensor_inside_compile() -> None:
    tensors = [normal(1, HQ, s, 8) for s in (SQ, SK, SK)]

    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, slopes: Tensor) -> Tensor:
        return heedful.attention(q, k, v, bias=x + ALiBi(slopes) + RelativeBias(x.new_ones(8, HQ)) + x)

    x, slopes = normal(SQ, SK), normal(HQ)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*tensors, x, slopes), f(*tensors, x, slopes))
    torch._dynamo.reset()


# ---- in attention


@pytest.mark.parametrize("function", (heedful.attention, heedful.reference.attention))
@pytest.mark.parametrize("name", (*SUMS, "clipped"))
def test_attention_with_a_bias_is_attention_with_its_tensor(name: str, function: Any) -> None:
    q, k, v = double(B, HQ, SQ, 3), double(B, 2, SK, 3), double(B, 2, SK, 3)
    parts = SUMS.get(name) or [RelativeBias.clipped(double(5, HQ))]
    total = parts[0]
    for x in parts[1:]:
        total = total + x
    leaves = {n: x.detach().requires_grad_() for n, x in vars(total).items() if x is not None and x.is_floating_point()}
    bias = Bias(**vars(total) | leaves)
    for options in ({}, {"align": torch.tensor([2, -1]), "mask": heedful.Causal()}):
        dense = bias.to_dense(SQ, SK, align=options.get("align", "bottom-right"))
        results = []
        for given in (bias, dense):
            out, lse = function(q, k, v, bias=given, **options, return_lse=True)
            upstream = double(*out.shape, seed=1)
            results.append((out, lse, *torch.autograd.grad(out, list(leaves.values()), upstream, retain_graph=True)))
        torch.testing.assert_close(*results)
        assert all(g.abs().max() > 0 for g in results[0][2:])


# ---- the objects


def test_lower_gives_only_what_there_is() -> None:
    assert Bias().lower() == {} and repr(Bias()) == "Bias()"
    assert set(ALiBi(SLOPES).lower()) == {"slopes"}
    assert set(RelativeBias(BUCKETS).lower()) == {"table", "buckets"}
    total = double(SQ, SK) + ALiBi(SLOPES)
    assert {n: tuple(x.shape) for n, x in total.lower().items()} == {"bias": (1, 1, SQ, SK), "slopes": (HQ,)}
    assert repr(total) == "TensorBias([5, 7]) + ALiBi([4])"


def test_to_dense_takes_sizes_and_passes_gradients() -> None:
    slopes = double(HQ).requires_grad_()
    dense = ALiBi(slopes).to_dense(SQ, SK, batch=3)
    assert dense.shape == (3, HQ, SQ, SK) and Bias(double(SK)).to_dense(SQ, SK, heads=2).shape == (1, 2, SQ, SK)
    (grad,) = torch.autograd.grad(dense[0].sum(), slopes)
    assert torch.equal(grad, torch.full((HQ,), -distance(SK - SQ).abs().sum().item(), dtype=F64))


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = ALiBi(double(B, HQ).requires_grad_()).plot(SQ, SK, batch=1, head=2)
    assert axes.get_title() == "ALiBi([2, 4])" and axes.images[0].get_array().shape == (SQ, SK)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    (
        (lambda: ALiBi([0.5]), TypeError, r"heedful.ALiBi: slopes: expected a floating-point tensor .*, got list"),
        (lambda: ALiBi(torch.arange(4)), TypeError, r"heedful.ALiBi: slopes: expected .*, got torch.int64"),
        (lambda: ALiBi(torch.ones(1, 1, 4)), ValueError, r"heedful.ALiBi: slopes: expected .*, got \[1, 1, 4\]"),
        (lambda: RelativeBias(torch.ones(4)), ValueError, r"heedful.RelativeBias: table: expected .*, got \[4\]"),
        (
            lambda: RelativeBias(torch.ones(3, 4)),
            ValueError,
            r"heedful.RelativeBias: table: expected 4 buckets or more",
        ),
        (lambda: RelativeBias(torch.ones(32, 4), True, 8), ValueError, r"max_distance: expected more than 8, got 8"),
        (lambda: as_bias(0.5), TypeError, r"heedful.attention: bias: expected a tensor or a heedful bias, got float"),
        (lambda: ALiBi(SLOPES) + 1, TypeError, r"unsupported operand"),
    ),
)
def test_what_is_no_bias(make: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_a_bias_of_minus_infinity_in_a_table_masks() -> None:
    """Whatever the other numbers of such a pair are."""
    q, k, v = double(1, 1, SQ, 3), double(1, 1, SK, 3), double(1, 1, SK, 3)
    k[:, :, -1] = math.nan
    table = torch.tensor([[0.0], [0.0], [-math.inf]], dtype=F64)
    out = heedful.reference.attention(q, k, v, bias=RelativeBias.clipped(table), align="top-left")
    want = heedful.reference.attention(q, k, v, mask=heedful.Causal(), align="top-left")
    torch.testing.assert_close(out, want)
