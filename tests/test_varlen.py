"""Sequences of different lengths in one call: packed, and in torch's nested tensors; each attends as it does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import heedful
from functions import FLOATS, holes, normal
from heedful import (
    ALiBi,
    Bias,
    Causal,
    Documents,
    Gaussian,
    Global,
    KeyLengths,
    PrefixLM,
    QueryLengths,
    RelativeBias,
    SlidingWindow,
)

HQ, HK, D, DV = 4, 2, 8, 5
Q_LENGTHS, K_LENGTHS = (3, 0, 70, 1, 2), (5, 2, 66, 0, 2)
N, SQ, SK = len(Q_LENGTHS), max(Q_LENGTHS), max(K_LENGTHS)
BEFORE, AFTER = 2, 3  # rows of q that lie outside of every sequence


def offsets(lengths: tuple[int, ...], first: int = 0) -> list[int]:
    return [first + sum(lengths[:n]) for n in range(len(lengths) + 1)]


Q_OFFSETS, K_OFFSETS = offsets(Q_LENGTHS, BEFORE), offsets(K_LENGTHS)


def packed(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rows = Q_OFFSETS[-1] + AFTER, K_OFFSETS[-1], K_OFFSETS[-1]
    shapes = zip(rows, (HQ, HK, HK), (D, D, DV))
    return [normal(*shape, dtype=dtype, seed=n).requires_grad_() for n, shape in enumerate(shapes)]


def parameter(*shape: int) -> Tensor:
    return normal(*shape, dtype=torch.float64, seed=3).requires_grad_()


# name -> the options, and those of one sequence b by itself where they differ
OPTIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, lambda b: {}),
    "causal": ({"mask": Causal()}, lambda b: {}),
    "causal, top-left": ({"mask": Causal(), "align": "top-left"}, lambda b: {}),
    "causal, from 1": ({"mask": Causal(), "align": 1}, lambda b: {}),
    "causal, by sequence": ({"mask": Causal(), "align": torch.arange(N)}, lambda b: {"align": b}),
    "window": ({"mask": SlidingWindow(3, 1)}, lambda b: {}),
    "lengths": (
        {"mask": KeyLengths([3, 2, 60, 0, 1]) & QueryLengths(40) & Causal()},
        lambda b: {"mask": KeyLengths([3, 2, 60, 0, 1][b]) & QueryLengths(40) & Causal()},
    ),
    "prefix": ({"mask": PrefixLM([1, 2, 30, 1, 2])}, lambda b: {"mask": PrefixLM([1, 2, 30, 1, 2][b])}),
    "global or near": ({"mask": Global(2) | SlidingWindow(5, 5)}, lambda b: {}),
    "documents": (
        {"mask": Documents(torch.arange(SQ) // 9, torch.arange(SK) // 9)},
        lambda b: {"mask": Documents(torch.arange(Q_LENGTHS[b]) // 9, torch.arange(K_LENGTHS[b]) // 9)},
    ),
    "tensor": (
        {"mask": holes(N, 1, SQ, SK)},
        lambda b: {"mask": holes(N, 1, SQ, SK)[b, None, :, : Q_LENGTHS[b], : K_LENGTHS[b]]},
    ),
    "alibi": ({"bias": ALiBi(parameter(HQ))}, lambda b: {}),
    "relative": ({"bias": RelativeBias(parameter(8, HQ), max_distance=20), "mask": Causal()}, lambda b: {}),
    "sinks": ({"sinks": parameter(HQ)}, lambda b: {}),
    "sinks by sequence": (
        {"sinks": (sinks := parameter(N, HQ)), "scale": sinks},
        lambda b: {"sinks": sinks[b : b + 1], "scale": sinks[b : b + 1]},
    ),
    "softcap": ({"softcap": 1.5, "scale": parameter(HQ)}, lambda b: {}),
    "gaussian": ({"similarity": Gaussian(2.0)}, lambda b: {}),
    "cosine": ({"similarity": "cosine", "scale": 5.0}, lambda b: {}),
    "hard": ({"normalizer": "hard"}, lambda b: {}),
    "hard-st": ({"normalizer": "hard-st", "mask": Causal()}, lambda b: {}),
}


def alone(tensors: list[Tensor], b: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sequence b by itself: out [length, Hq, Dv], lse [length, Hq]."""
    rows = slice(*Q_OFFSETS[b : b + 2]), *[slice(*K_OFFSETS[b : b + 2])] * 2
    q, k, v = (x[r].transpose(0, 1)[None] for x, r in zip(tensors, rows))
    return tuple(x[0].transpose(0, 1) for x in heedful.attention(q, k, v, **options, return_lse=True))


def gradients(out: Tensor, lse: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    seeds = normal(*out.shape, dtype=out.dtype, seed=8), normal(*lse.shape, dtype=lse.dtype, seed=9)
    given = [(x, g) for x, g in zip((out, lse), seeds) if x.requires_grad]
    found = torch.autograd.grad([x for x, _ in given], wanted, [g for _, g in given], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found)]


def parameters(options: dict[str, Any]) -> list[Tensor]:
    bias = options.get("bias")
    tensors = [*options.values(), *([bias.slopes, bias.table] if isinstance(bias, Bias) else [])]
    return [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]


@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_attends_as_it_does_alone(name: str) -> None:
    options, by_sequence = OPTIONS[name]
    tensors = packed()
    out, lse = heedful.varlen_attention(*tensors, Q_OFFSETS, K_OFFSETS, **options, return_lse=True)
    outs, lses = zip(*(alone(tensors, b, options | by_sequence(b)) for b in range(N)))
    out_alone = F.pad(torch.cat(outs), (0, 0, 0, 0, BEFORE, AFTER))
    lse_alone = F.pad(torch.cat(lses), (0, 0, BEFORE, AFTER), value=-torch.inf)
    wanted = tensors + parameters(options)
    for got, expected in zip(
        (out, lse, *gradients(out, lse, wanted)), (out_alone, lse_alone, *gradients(out_alone, lse_alone, wanted))
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", [*OPTIONS, "bias", "dropout", "dropout by sequence"])
def test_it_is_as_in_the_reference(name: str) -> None:
    more = {
        "bias": {"bias": parameter(N, 1, SQ, SK)},
        "dropout": {"dropout_p": 0.4, "seed": 9, "mask": Causal()},
        "dropout by sequence": {"dropout_p": 0.4, "seed": torch.arange(N)},
    }
    options = more[name] if name in more else OPTIONS[name][0]
    tensors, results = packed(), []
    for function in (heedful.varlen_attention, heedful.reference.varlen_attention):
        out, lse = function(*tensors, Q_OFFSETS, K_OFFSETS, **options, return_lse=True)
        results.append((out, lse, *gradients(out, lse, tensors + parameters(options))))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_and_shapes(dtype: torch.dtype) -> None:
    q, k, v = packed(dtype)
    out, lse = heedful.varlen_attention(q, k, v, Q_OFFSETS, K_OFFSETS, return_lse=True)
    assert out.shape == (len(q), HQ, DV) and out.dtype is dtype
    assert lse.shape == (len(q), HQ) and lse.dtype is torch.promote_types(dtype, torch.float32)
    assert torch.equal(heedful.varlen_attention(q, k, v, Q_OFFSETS, K_OFFSETS), out)
    assert (out[:BEFORE] == 0).all() and (out[-AFTER:] == 0).all() and (lse[-AFTER:] == -torch.inf).all()


def test_offsets_are_int32_or_int64_or_a_list_and_those_of_k_may_be_left_out() -> None:
    q = normal(Q_OFFSETS[-1], HK, D)
    want = heedful.varlen_attention(q, q, q, Q_OFFSETS, Q_OFFSETS, mask=Causal())
    for given in (tuple(Q_OFFSETS), torch.tensor(Q_OFFSETS), torch.tensor(Q_OFFSETS, dtype=torch.int32)):
        assert torch.equal(heedful.varlen_attention(q, q, q, given, mask=Causal()), want)
        assert torch.equal(heedful.varlen_attention(q, q, q, given, given, mask=Causal()), want)


def test_no_sequence_and_no_rows() -> None:
    q = normal(3, 2, D).requires_grad_()
    for given in ([0], [3], [1, 1, 1]):
        out, lse = heedful.varlen_attention(q, q, q, given, mask=PrefixLM(1), return_lse=True)
        assert (out == 0).all() and (lse == -torch.inf).all()
        assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()
    assert heedful.varlen_attention(q[:0], q[:0], q[:0], [0, 0]).shape == (0, 2, D)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
    "rank": ({"k": normal(1, 5, 2, D)}, RuntimeError, "k: expected 3 dimensions, got 4"),
    "offsets kind": ({"q_offsets": 3}, TypeError, "q_offsets: expected an int32 or int64 tensor .*, got int"),
    "offsets word": ({"q_offsets": "03"}, TypeError, "q_offsets: expected an int32 or int64 tensor .*, got str"),
    "offsets dtype": ({"q_offsets": torch.zeros(2)}, TypeError, "q_offsets: .*, got a tensor of torch.float32"),
    "offsets rank": ({"k_offsets": torch.zeros(1, 2).int()}, TypeError, r"k_offsets: .*, got .*int32 \[1, 2\]"),
    "no offsets": ({"k_offsets": []}, TypeError, r"k_offsets: .*, got a tensor of torch.int64 \[0\]"),
    "offsets number": ({"k_offsets": [0, 2, 5]}, RuntimeError, r"k_offsets: expected \[2\], as q_offsets, got \[3\]"),
    "offsets fall": ({"q_offsets": [0, 3, 1], "k_offsets": [0, 0, 0]}, RuntimeError, "q_offsets: expected .*, got"),
    "offsets below": ({"q_offsets": [-1, 3]}, RuntimeError, "q_offsets: expected .*, got"),
    "offsets beyond": ({"k_offsets": [0, 6]}, RuntimeError, "k_offsets: expected .*, got"),
    "mask": ({"mask": holes(4, 5)}, RuntimeError, r"mask: expected .*, got"),
    "bias": ({"bias": normal(2, 1, 3, 5)}, RuntimeError, r"bias: expected .*, got"),
    "sinks": ({"sinks": torch.ones(2, 4)}, RuntimeError, r"sinks: expected a tensor \[4\] or \[1, 4\], got \[2, 4\]"),
    "seed": ({"dropout_p": 0.5, "seed": torch.zeros(2).long()}, TypeError, r"seed: expected .* \[1\] or \[1\], got"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    change, kind, text = WRONG[name]
    right = {"q": normal(3, 4, D), "k": normal(5, 2, D), "v": normal(5, 2, D), "q_offsets": [0, 3], "k_offsets": [0, 5]}
    heedful.varlen_attention(**right)
    with pytest.raises(kind, match=rf"heedful\.(varlen_)?attention: {text}"):
        heedful.varlen_attention(**right | change)


# ---- nested tensors


def jagged(lengths: tuple[int, ...], heads: int, dim: int = D, like: Tensor | None = None) -> Tensor:
    """[N, j, heads, dim], a leaf; of the lengths of ``like``, where it is given."""
    values = normal(sum(lengths), heads, dim, dtype=torch.float64)
    start = torch.tensor(offsets(lengths)) if like is None else like.offsets()
    return torch.nested.nested_tensor_from_jagged(values, start).detach().requires_grad_()


def transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    k = jagged(K_LENGTHS, HK)
    return jagged(Q_LENGTHS, HQ), k, jagged(K_LENGTHS, HK, DV, like=k)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "documents"])
def test_nested_tensors_attend_as_packed_ones(name: str) -> None:
    options, tensors = OPTIONS[name][0], qkv()
    values = [x.detach().values().clone().requires_grad_() for x in tensors]
    want = heedful.varlen_attention(*values, offsets(Q_LENGTHS), offsets(K_LENGTHS), **options, return_lse=True)
    out, lse = heedful.attention(*transposed(*tensors), **options, return_lse=True)
    q = tensors[0]
    assert out.is_nested and out.shape == (N, HQ, q.shape[1], DV) and lse.shape == (N, HQ, q.shape[1])
    got = [x.transpose(1, 2).values() for x in (out, lse)]
    parts = gradients(*got, [*tensors, *parameters(options)])
    found = [x.values() if x.is_nested else x for x in parts]
    for x, expected in zip((*got, *found), (*want, *gradients(*want, values + parameters(options)))):
        torch.testing.assert_close(x, expected)


def test_a_nested_result_goes_on() -> None:
    """As torch's does: transposed, with its heads joined, through a layer, and backward."""
    tensors, layer = qkv(), torch.nn.Linear(HQ * DV, 3, dtype=torch.float64)
    out = heedful.attention(*transposed(*tensors), mask=Causal()).transpose(1, 2).flatten(2)
    result = layer(out)
    assert result.shape[:2] == tensors[0].shape[:2]
    result.values().sum().backward()
    assert tensors[0].grad.shape == tensors[0].shape and tensors[0].grad.values().any()


@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"scale": 0.5}), ids=str)
def test_scaled_dot_product_attention_of_nested_tensors(options: dict[str, Any]) -> None:
    q = jagged(Q_LENGTHS, HQ)
    k = jagged(Q_LENGTHS, HQ, like=q)
    out = heedful.scaled_dot_product_attention(*transposed(q, k, k), **options)
    with heedful.patched():
        assert torch.equal(F.scaled_dot_product_attention(*transposed(q, k, k), **options).values(), out.values())
    for n, got in enumerate(out.transpose(1, 2).unbind()):
        parts = (x.unbind()[n].transpose(0, 1) for x in (q, k, k))
        torch.testing.assert_close(got, F.scaled_dot_product_attention(*parts, **options).transpose(0, 1))


def test_scaled_dot_product_attention_of_nested_grouped_queries_with_dropout() -> None:
    q, k, v = transposed(*qkv())
    torch.manual_seed(2)
    out = heedful.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)
    torch.manual_seed(2)
    assert torch.equal(out.values(), heedful.attention(q, k, v, dropout_p=0.5).values())
    with pytest.raises(RuntimeError, match="key, value: expected the heads of query, 4, without enable_gqa, got 2"):
        heedful.scaled_dot_product_attention(q, k, v)
    with pytest.raises(RuntimeError, match="attn_mask: expected None beside nested tensors .*, got a mask"):
        heedful.scaled_dot_product_attention(q, k, v, holes(SQ, SK), enable_gqa=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_other_nested_tensors_are_refused() -> None:
    q, k, v = transposed(*qkv())
    dense = normal(N, HQ, 5, D)
    strided = torch.nested.nested_tensor([normal(HQ, 3, D), normal(HQ, 5, D)])
    lengths = torch.tensor([3, 4])
    holed = torch.nested.narrow(normal(2, 6, HQ, D), 1, torch.tensor([0, 1]), lengths, layout=torch.jagged)
    cases = {
        "a tensor that is not nested": (q, dense, dense),
        "a nested tensor of layout torch.strided": (strided, strided, strided),
        r"a nested tensor \[": (q.transpose(1, 2), k, v),
        "a nested tensor with holes": transposed(holed, holed, holed),
    }
    for function in (heedful.attention, heedful.scaled_dot_product_attention):
        for got, tensors in cases.items():
            with pytest.raises(NotImplementedError, match=f"expected a jagged tensor .*, got {got}.*to_padded_tensor"):
                function(*tensors)
        with pytest.raises(RuntimeError, match=r"v.*: expected the offsets of k.*, got its own"):
            function(q, k, jagged(K_LENGTHS, HK, DV).transpose(1, 2))
    with pytest.raises(TypeError, match=r"varlen_attention: q, k, v: expected packed tensors, got nested"):
        heedful.varlen_attention(q, k, v, Q_OFFSETS)
    with pytest.raises(RuntimeError, match="heedful.explain: q: expected 4 dimensions, got a nested tensor"):
        heedful.explain(q, k, v)


# ---- torch.compile


def test_compiled_packed() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor, start: Tensor, k_start: Tensor) -> Tensor:
        return heedful.varlen_attention(q, k, v, start, k_start, **options)

    options = {"mask": Causal(), "bias": ALiBi(torch.ones(HQ, dtype=torch.float64)), "softcap": 3.0}
    tensors, both = packed(), (torch.tensor(Q_OFFSETS), torch.tensor(K_OFFSETS))
    out, want = compiled(*tensors, *both), heedful.varlen_attention(*tensors, *both, **options)
    assert torch.equal(out, want)
    for got, expected in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (out, want))):
        torch.testing.assert_close(got, expected)


def test_compiled_nested() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return heedful.attention(*transposed(q, k, v), mask=Causal()).transpose(1, 2)

    tensors = qkv()
    results = []
    for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        out = f(*tensors)
        grads = torch.autograd.grad(out.values().square().sum(), tensors)
        results.append([out.values(), *(g.values() for g in grads)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


def test_compiled_packed_with_blocks_of_the_longest_sequences() -> None:
    """Their number is not known to a graph: an error with fullgraph, and else that part runs uncompiled."""

    def function(q: Tensor, k: Tensor, v: Tensor, start: Tensor, k_start: Tensor) -> Tensor:
        return heedful.varlen_attention(q, k, v, start, k_start, mask=PrefixLM(1))

    arguments = *packed(), torch.tensor(Q_OFFSETS), torch.tensor(K_OFFSETS)
    with pytest.raises(Exception, match="mask: expected Causal, SlidingWindow, lengths or a tensor .*PrefixLM"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(torch.compile(function, backend="aot_eager")(*arguments), function(*arguments))
