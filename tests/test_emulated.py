"""The operators of the CUDA kernels, on the emulator: what they check, and that what the emulator finds is an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import heedful
import table
from backends import EMULATED, Backend, emulated_operators
from cases import Case, build, causal, check, packed
from functions import normal
from heedful import ops


@pytest.fixture(autouse=True)
def emulator() -> None:
    if reason := Backend.named(EMULATED).missing():
        pytest.skip(f"{EMULATED}: {reason}")


@pytest.fixture
def emulated(emulator: None) -> Iterator[None]:
    with emulated_operators():
        yield


def test_heedful_uses_them_until_the_end() -> None:
    """Two sets of kernels, whose bits differ: heedful's operators are those of one, then of the other, then of one."""
    q = normal(1, 2, 70, 64, dtype=torch.bfloat16)
    results = [heedful.attention(q, q, q)]
    with emulated_operators():
        results += [heedful.attention(q, q, q), torch.ops.heedful_emulated.attention_forward(q, q, q)[0]]
    results.append(heedful.attention(q, q, q))
    assert torch.equal(results[0], results[3]) and torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])


def test_gradients_by_autograd(emulated: None) -> None:
    q, k, v = (normal(1, 2, 9, 8, seed=n).requires_grad_() for n in range(3))
    heedful.attention(q, k, v, mask=heedful.Causal()).sum().backward()
    want = torch.autograd.grad(heedful.reference.attention(q, k, v, mask=heedful.Causal()).sum(), (q, k, v))
    for x, grad in zip((q, k, v), want, strict=True):
        torch.testing.assert_close(x.grad, grad)


@pytest.mark.parametrize("dtype", cases.FULL_DTYPES, ids=cases.short)
@pytest.mark.parametrize("width", table.WIDTHS)
def test_widths(width: int, dtype: torch.dtype, emulated: None) -> None:
    for d, dv in ((width, 7), (7, width), (width, width)):
        check(build(causal((1, 2, 1, 3, 17, d, dv)), dtype))


@pytest.mark.parametrize("rows", [5, 70], ids=["decoding", "forward"])
@pytest.mark.parametrize("dim", [64, 100])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["plain", "general"])
def test_tf32_is_allowed(rows: int, dim: int, options: dict, emulated: None) -> None:
    """Products then round what they take, in forward and backward; else float32 is exact."""
    leaves = [normal(1, 2, n, dim, seed=seed).requires_grad_() for seed, n in enumerate((rows, 71, 71))]
    dout = normal(1, 2, rows, dim, seed=9)

    def results(allow_tf32: bool) -> list[Tensor]:
        out, _ = ops.forward(*leaves, **options, allow_tf32=allow_tf32)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    wide = [x.detach().double().requires_grad_() for x in leaves]
    out = heedful.reference.attention(*wide, **options)
    exact = [out, *torch.autograd.grad(out, wide, dout.double())]
    for x, float32, tf32 in zip(exact, results(False), results(True), strict=True):
        size = x.abs().max()
        assert (float32 - x).abs().max() < 1e-5 * size
        assert 1e-5 * size < (tf32 - x).abs().max() < 5e-3 * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=cases.short)
def test_tf32_is_of_float32_alone(dtype: torch.dtype, emulated: None) -> None:
    q = normal(1, 2, 20, 8, dtype=dtype)
    assert torch.equal(ops.forward(q, q, q)[0], ops.forward(q, q, q, allow_tf32=True)[0])


def gradients(leaves: list[Tensor], dout: Tensor, out: Tensor, lse: Tensor, **options: Any) -> list[Tensor]:
    """dq, dk, dv by the operator itself."""
    return list(ops.backward(dout, None, *(x.detach() for x in (*leaves, out, lse)), **options)[:3])


def test_backward_computes_as_its_forward_did(emulated: None) -> None:
    leaves = [normal(1, 2, 70, 16, seed=seed).requires_grad_() for seed in range(3)]
    dout = normal(1, 2, 70, 16, seed=9)
    out, lse = ops.forward(*leaves, allow_tf32=True)
    got = torch.autograd.grad(out, leaves, dout)
    for x, tf32, exact in zip(
        got, gradients(leaves, dout, out, lse, allow_tf32=True), gradients(leaves, dout, out, lse), strict=True
    ):
        assert torch.equal(x, tf32) and not torch.equal(x, exact)


@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_tf32_in_gradients_row_by_row(mean: float, emulated: None) -> None:
    """The weights are those of the forward's scores, so that rows of the bias' gradient add up to 0."""
    q, k = (normal(1, 1, 48, 64, seed=seed) + mean for seed in range(2))
    v, dout, bias = normal(1, 1, 48, 64, seed=2), normal(1, 1, 48, 64, seed=3), normal(1, 1, 48, 48, seed=4)
    out, _ = ops.forward(q, k, v, bias=bias.requires_grad_(), allow_tf32=True)
    (dbias,) = torch.autograd.grad(out, bias, dout)
    assert dbias.sum(-1).abs().max() < 2e-3 * dbias.abs().max()


@pytest.mark.parametrize("similarity", ["dot", "cosine", "gaussian"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.4028e38])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tf32_of_huge_numbers(name: str, value: float, similarity: str, emulated: None) -> None:
    """What is finite, and what is NaN, is what is so in exact float32; pairs that do not meet share nothing."""
    leaves = {x: normal(1, 1, 70, 8, seed=seed) for seed, x in enumerate("qkv")}
    leaves[name][0, 0, 40, 3] = value
    options = {"right": 0, "similarity": similarity}

    def results(**option: bool) -> list[Tensor]:
        tensors = [x.clone().requires_grad_() for x in leaves.values()]
        out, lse = ops.forward(*tensors, **options, **option)
        return [out, lse, *torch.autograd.grad(out, tensors, torch.ones_like(out))]

    for exact, tf32 in zip(results(), results(allow_tf32=True), strict=True):
        assert torch.equal(exact.isnan(), tf32.isnan()) and torch.equal(exact.isfinite(), tf32.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
@pytest.mark.parametrize("name", [*table.FEATURES, "together"])
def test_same_bits_at_any_timing(name: str, dtype: torch.dtype, emulated: None) -> None:
    """Each launch has another order of threads and copies."""
    options = table.TOGETHER if name == "together" else table.FEATURES[name]
    problem = build(Case(table.SMALL, **options, right=3), dtype)
    first = problem.results()
    for _ in range(2):
        again = problem.results()
        assert [x for x in first if not torch.equal(first[x], again[x])] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": normal(1, 3, 5, 8)}, "q: expected a number of heads that is a multiple of k's 3, got 2"),
        ({"v": normal(1, 2, 5, 8).half()}, "v: expected float32, as q, got float16"),
        ({"mask": torch.ones(1, 2, 4, 6, dtype=torch.bool)}, r"mask: expected a shape that .*\[1, 2, 4, 5\]"),
        ({"k_lengths": torch.ones(3, dtype=torch.int64)}, r"k_lengths: expected \[B\] = \[1\], got \[3\]"),
        ({"softcap": -1.0}, "softcap: expected a normal number"),
        ({"dropout_p": 0.5}, "seed: expected a tensor where dropout_p is above 0, got None"),
        ({"similarity": "sine"}, 'similarity: expected "dot", "cosine" or "gaussian", got "sine"'),
        ({"q_offsets": torch.tensor([0, 4])}, "k_offsets: expected a tensor: both or neither are packed, got None"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_raise(arguments: dict, message: str, emulated: None) -> None:
    q, k, v = normal(1, 2, 4, 8), normal(1, 2, 5, 8), normal(1, 2, 5, 8)
    if "k" in arguments:
        arguments = {"v": normal(1, 3, 5, 8)} | arguments
    with pytest.raises(RuntimeError, match=f"heedful.attention: {message}"):
        torch.ops.heedful.attention_forward(**({"q": q, "k": k, "v": v} | arguments))


def test_biases_of_packed_sequences_have_one_length(emulated: None) -> None:
    """Offsets are not read: masks and biases say how long sequences are at most, and have to agree."""
    problem = build(packed((2, 1), (8, 8), (5, 9), (7, 3), bias="qk", mask="hqk"), torch.float32)
    check(problem)
    problem.options["mask"] = problem.options["mask"][:, :, :6]
    with pytest.raises(RuntimeError, match="bias: expected a shape that broadcasts to"):
        problem.results()


WRONG = {
    "offsets past the end": {"q_offsets": [0, 1000], "k_offsets": [0, 2**62]},
    "offsets before the first row": {"q_offsets": [-3, 4], "k_offsets": [-(2**62), 4]},
    "offsets that decrease": {"q_offsets": [4, 1], "k_offsets": [9, -9]},
    "offsets past a mask's end": {
        "q_offsets": [0, 4],
        "k_offsets": [0, 4],
        "mask": torch.ones(1, 1, 2, 3, dtype=torch.bool),
    },
    "buckets": {"buckets": [-(10**12), 3, 10**12], "table": torch.ones(3, 2)},
    "tiles": {"tiles": torch.tensor([[[[2**31 - 1]]], [[[-(2**31)]]]], dtype=torch.int32), "bits": [[5] * 64]},
    "tiles without bits": {"tiles": torch.tensor([[[[2]]], [[[2**31 - 1]]]], dtype=torch.int32)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=cases.short)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers_stay_inside(name: str, dtype: torch.dtype, emulated: None) -> None:
    """What no one reads before a launch may be wrong. The emulator would say where a kernel left q, k or v; the rest is
    so wrong that reading there would crash."""
    batch = 2 if name.startswith("tiles") else 1
    q = normal(batch, 2, 4, 8, dtype=dtype)
    wrong = {key: x if isinstance(x, Tensor) else torch.tensor(x) for key, x in WRONG[name].items()}
    out, lse = torch.ops.heedful.attention_forward(q, q, q, **wrong)
    torch.ops.heedful.attention_backward(out, lse, q, q, q, out, lse, **wrong, table_grad="table" in wrong)


def test_faults_are_errors(emulated: None) -> None:
    """Sequences on top of each other: two blocks write the same rows, and the emulator says where."""
    q = normal(1, 2, 4, 8, dtype=torch.float16)
    twice = torch.tensor([0, 4, 0, 4])
    with pytest.raises(RuntimeError, match=r"emulated: sm80/.*written twice.*\.cuh:\d+"):
        torch.ops.heedful.attention_forward(q, q, q, q_offsets=twice, k_offsets=twice)
