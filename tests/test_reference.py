"""The definition's parts: dropout's hash, packed sequences, and the derivatives that composite.py makes of it.

That the definition is right is tested against tests/oracle.py, in test_forward.py and test_backward.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vjp

import heedful
from functions import holes, normal
from heedful import composite, definition
from heedful.definition import DIFFERENTIABLE, OPTIONS, TENSORS
from heedful.dropout import keep_factors, philox

B, HQ, HK, SQ, SK, D, DV = 2, 4, 2, 5, 6, 3, 2
F64 = torch.float64


def double(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, dtype=F64, seed=seed)


# ---- dropout


@pytest.mark.parametrize(
    ("counter", "key", "words"),  # known answers of Random123
    (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ),
    ids=("zeros", "ones", "pi"),
)
def test_philox(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert tuple(map(int, philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key))))) == words


def factors(p: float, seed: int, rows: range = range(40), k_length: int = 50, heads: int = 3, batch: int = 2) -> Tensor:
    return keep_factors(torch.tensor([seed]), p, torch.tensor(rows), k_length, heads, torch.arange(batch))


@pytest.mark.parametrize("seed", (0, 1, -1, 2**63 - 1, -(2**63)))
def test_the_bits_of_dropout(seed: int) -> None:
    """16 bits for each of 8 keys in turn, low half first. The seed is the key, the counters are (j / 8, i, h, b)."""
    z, key = factors(0.3, seed), (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF))
    kept = round(0.7 * 65536)
    for b, h, i, j in ((0, 0, 0, 0), (0, 0, 0, 7), (1, 2, 39, 49), (1, 0, 3, 8), (0, 1, 17, 30), (1, 1, 2, 13)):
        words = philox(tuple(map(torch.tensor, (j // 8, i, h, b))), key)
        half = int(words[j % 8 // 2]) >> 16 * (j % 2) & 0xFFFF
        assert z[b, h, i, j] == (65536 / kept if half < kept else 0)


def test_how_much_dropout_keeps() -> None:
    for p in (0.1, 0.5, 0.9):
        kept = factors(p, 7, k_length=500) != 0
        assert abs(kept.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
        assert abs((kept[..., 1:] & kept[..., :-1]).double().mean() - (1 - p) ** 2) < 5 / math.sqrt(kept.numel())
    assert (factors(0.0, 7) == 1).all() and (factors(1.0, 7) == 0).all()
    assert set(factors(0.5, 7).unique().tolist()) == {0.0, 2.0}


def test_dropout_depends_on_indices_alone() -> None:
    whole = factors(0.5, 3)
    assert torch.equal(factors(0.5, 3, rows=range(10, 30), k_length=33, heads=2, batch=1), whole[:1, :2, 10:30, :33])
    each = keep_factors(torch.tensor([4, 3]), 0.5, torch.arange(40), 50, 3, torch.arange(2))
    assert torch.equal(each[1], whole[1]) and not torch.equal(each[0], whole[0])


# ---- the definition's derivatives, a block of queries at a time

BASE = {"q": double(B, HQ, SQ, D), "k": double(B, HK, SK, D), "v": double(B, HK, SK, DV)}
EVERY = BASE | {
    "bias": double(1, HQ, SQ, SK),
    "scales": double(B, HQ).abs() + 0.3,
    "sinks": double(HQ),
    "slopes": double(B, HQ, seed=1).abs(),
    "table": double(B, 3, HQ),
    "buckets": torch.tensor([2, 1, 0, 1, 0]),
    "mask": holes(B, 1, SQ, SK),
    "q_lengths": torch.tensor([5, 4]),
    "k_lengths": torch.tensor([6, 5]),
    "q_starts": torch.tensor([1, 0]),
    "seed": torch.tensor([7]),
}
PACKED = EVERY | {
    "q": double(1, HQ, 9, D),
    "k": double(1, HK, 13, D),
    "v": double(1, HK, 13, DV),
    "q_offsets": torch.tensor([1, 6, 8]),
    "k_offsets": torch.tensor([1, 7, 12]),
    "q_lengths": torch.tensor([5, 1]),
    "k_lengths": None,
}
SHARED = {
    "scales": None,
    "sinks": double(HQ),
    "slopes": double(HQ),
    "table": double(3, HQ),
    "bias": double(1, 1, 1, SK),
}
CALLS: dict[str, tuple[dict[str, Tensor | None], dict[str, Any]]] = {
    "plain": (BASE, {}),
    "everything": (EVERY, {"left": 3, "right": 1, "softcap": 2.0, "similarity": "cosine", "dropout_p": 0.3}),
    "shared": (EVERY | SHARED, {"right": 0, "scale": -0.7}),
    "gaussian": (EVERY, {"right": 0, "similarity": "gaussian"}),
    "dead rows": (BASE, {"right": 0, "q_start": -2}),
    "hard": (EVERY, {"right": 1, "normalizer": "hard"}),
    "packed": (PACKED, {"right": 1, "softcap": 3.0, "similarity": "gaussian", "dropout_p": 0.2}),
    "packed, shared": (PACKED | SHARED, {"right": 1}),
    "packed, no sequences": (
        {n: PACKED[n] for n in "qkv"} | {"q_offsets": torch.tensor([2]), "k_offsets": torch.tensor([0])},
        {},
    ),
}


class Call:
    """A call with directions to differentiate it in; `f` is the definition in one piece, of what is differentiable."""

    def __init__(self, name: str) -> None:
        self.tensors, self.options = CALLS[name]
        self.x = {n: x for n in DIFFERENTIABLE if (x := self.tensors.get(n)) is not None}
        self.tx = {n: double(*x.shape, seed=3) for n, x in self.x.items()}
        out, lse = self.f(*self.x.values())
        self.dead = lse == -math.inf
        self.c = {"dout": double(*out.shape, seed=4), "dlse": double(*lse.shape, seed=5)}
        self.tc = {"dout": double(*out.shape, seed=6), "dlse": double(*lse.shape, seed=7)}

    def f(self, *x: Tensor) -> tuple[Tensor, Tensor]:
        return definition.whole(self.tensors | dict(zip(self.x, x)), self.options)

    def backward(self, dout: Tensor, dlse: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        return vjp(self.f, *x)[1]((dout, dlse))

    def composites(self, **c: Tensor) -> list[Tensor | None]:
        """All that composite.py gives: tangents of out, lse; of the gradients; and the gradients of those."""
        c = self.c | c
        return [
            *composite.forward_jvp(self.tensors, self.options, self.tx),
            *composite.backward_jvp(self.tensors, self.options, **c, tangents=self.tx | self.tc),
            *composite.backward_backward(self.tensors, self.options, **c, ggrads=self.tx),
        ]


@pytest.fixture(autouse=True)
def blocks_of_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the few queries of a test take more than one block, the last one not full."""
    monkeypatch.setattr(composite, "BLOCK", 2)


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(list(got), list(want))


@pytest.mark.parametrize("name", CALLS)
def test_composites_are_the_derivatives_of_the_definition(name: str) -> None:
    call = Call(name)
    x, c, tx = tuple(call.x.values()), tuple(call.c.values()), tuple(call.tx.values())
    first = jvp(call.f, x, tx)[1]
    tangents = jvp(call.backward, (*c, *x), (*call.tc.values(), *tx))[1]
    second = vjp(call.backward, *c, *x)[1](tx)
    assert_same((y for y in call.composites() if y is not None), (*first, *tangents, *second))
    given = [n in call.x for n in DIFFERENTIABLE]
    assert [y is not None for y in call.composites()] == [True, True, *given, True, True, *given]
    if name == "plain":  # that not all of it is zero
        assert min(y.abs().max() for y in (*first, *tangents, *second)) > 1e-2


@pytest.mark.parametrize("name", ("plain", "everything", "packed"))
def test_none_is_zero(name: str) -> None:
    call, some = Call(name), {}
    for n in call.x:
        some[n] = call.tx[n] = call.tx[n] if n in ("k", "bias") else torch.zeros_like(call.tx[n])
    call.tc["dout"].zero_()
    call.c["dlse"].zero_()
    want = call.composites()
    call.tx = {n: y for n, y in some.items() if n in ("k", "bias")}
    del call.tc["dout"]
    assert_same(*([y for y in ys if y is not None] for ys in (call.composites(dlse=None), want)))


@pytest.mark.parametrize("name", ("everything", "dead rows", "packed"))
def test_what_arrives_at_rows_with_nothing_is_ignored(name: str) -> None:
    call = Call(name)
    assert call.dead.any() and not call.dead.all()
    clean = call.composites()
    dirty = call.composites(
        dout=call.c["dout"].masked_fill(call.dead[..., None], math.nan),
        dlse=call.c["dlse"].masked_fill(call.dead, math.nan),
    )
    for got, want in zip(dirty, clean):
        assert (got is want is None) or torch.equal(got, want)


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("similarity", ("dot", "cosine", "gaussian"))
def test_what_nobody_sees_reaches_no_derivative(similarity: str, value: float) -> None:
    """A key past the lengths, a key that a bias of -inf hides, a query past the lengths."""
    clean = BASE | {
        "bias": torch.where(torch.arange(SK) == 1, -math.inf, double(SK))[None, None, None],
        "q_lengths": torch.tensor([4, 4]),
        "k_lengths": torch.tensor([5, 4]),
    }
    dirty = dict(clean)
    for n, index in (("k", 1), ("k", 5), ("v", 1), ("v", 5), ("q", 4)):
        dirty[n] = dirty[n].index_fill(2, torch.tensor(index), value)
    results = []
    for tensors in (clean, dirty):
        CALLS["hidden"] = tensors, {"similarity": similarity, "softcap": 2.0}
        call = Call("hidden")
        out = call.f(*call.x.values())
        grads = call.backward(*call.c.values(), *call.x.values())
        results.append([*out, *grads, *(y for y in call.composites() if y is not None)])
    del CALLS["hidden"]
    for got, want in zip(*results):
        assert torch.equal(got, want) and not want.isnan().any()


def test_a_non_finite_key_reaches_those_who_see_it() -> None:
    q, k, v = (BASE[n].clone() for n in "qkv")
    k[:, :, 3] = math.nan
    for similarity in ("dot", "cosine", heedful.Gaussian(1.5)):
        out = heedful.reference.attention(q, k, v, mask=heedful.Causal(), align="top-left", similarity=similarity)
        assert out[:, :, :3].isfinite().all() and out[:, :, 3:].isnan().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """Sums over blocks are not rounded either."""
    call = Call("everything")
    halves = {n: x.to(dtype) if x is not None and x.is_floating_point() else x for n, x in call.tensors.items()}
    call.tensors = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in halves.items()}
    call.x = {n: call.tensors[n] for n in call.x}
    call.tx, call.c, call.tc = ({n: y.to(dtype).double() for n, y in ys.items()} for ys in (call.tx, call.c, call.tc))
    want = call.composites()
    call.tensors = halves
    for ys in (call.tx, call.c, call.tc):
        ys |= {n: y.to(torch.float32 if n == "dlse" else dtype) for n, y in ys.items()}
    for n, (got, wanted) in enumerate(zip(call.composites(), want)):
        assert got.dtype is (torch.float32 if n in (1, 11) else dtype)
        torch.testing.assert_close(got.double(), wanted, rtol=torch.finfo(dtype).eps, atol=3e-5)


# ---- packed sequences


@pytest.mark.parametrize("dropout_p", (0.0, 0.4))
def test_packed_sequences_are_each_a_call(dropout_p: float) -> None:
    """Padded to one length, they give the same; rows outside of every sequence give nothing."""
    lengths, k_lengths = [3, 0, 4, 1], [5, 2, 3, 0]
    q_offsets, k_offsets = [3, 6, 6, 10, 11], [0, 5, 7, 10, 10]
    q, k, v = double(12, HQ, D), double(11, HK, D), double(11, HK, DV)
    options = {
        "mask": heedful.Causal() & holes(4, 1, 4, 5),
        "bias": heedful.ALiBi(double(HQ).abs()) + double(4, HQ, 4, 5),
        "align": torch.tensor([2, 1, 0, 0]),
        "sinks": double(4, HQ),
        "scale": double(4, HQ, seed=1),
        "softcap": 2.0,
    }
    if dropout_p:
        options |= {"dropout_p": dropout_p, "seed": torch.tensor([1, 2, 3, 4])}
    out, lse = heedful.reference.varlen_attention(q, k, v, q_offsets, k_offsets, **options, return_lse=True)
    assert out.shape == (12, HQ, DV) and lse.shape == (12, HQ)

    def padded(x: Tensor, offsets: list[int], longest: int) -> Tensor:
        parts = [x[start:stop] for start, stop in zip(offsets, offsets[1:])]
        return torch.stack([torch.cat((y, y.new_zeros(longest - len(y), *y.shape[1:]))) for y in parts]).transpose(1, 2)

    options["mask"] = options["mask"] & heedful.KeyLengths(k_lengths) & heedful.QueryLengths(lengths)
    tensors = padded(q, q_offsets, 4), padded(k, k_offsets, 5), padded(v, k_offsets, 5)
    want = heedful.reference.attention(*tensors, **options, return_lse=True)
    for b, (start, stop) in enumerate(zip(q_offsets, q_offsets[1:])):
        for got, wanted in zip((out, lse), want):
            torch.testing.assert_close(got[start:stop], wanted[b, :, : stop - start].transpose(0, 1))
    outside = torch.tensor([0, 1, 2, 11])
    assert (out[outside] == 0).all() and (lse[outside] == -math.inf).all()


def test_packed_without_sequences() -> None:
    q = double(3, HQ, D)
    out, lse = heedful.reference.varlen_attention(q, q, q, [1], return_lse=True)
    assert (out == 0).all() and out.shape == q.shape and (lse == -math.inf).all() and lse.shape == q.shape[:2]


# ---- names


def test_the_operators_take_what_the_definition_names() -> None:
    """The one list of arguments: the schemas in C++ follow it."""
    forward = torch.ops.heedful.attention_forward.default._schema.arguments
    assert tuple(a.name for a in forward) == (*TENSORS, *OPTIONS)
    assert {a.name: a.default_value for a in forward[len(TENSORS) :]} == OPTIONS
    backward = torch.ops.heedful.attention_backward.default._schema.arguments
    tensors = tuple(a.name for a in backward if not a.kwarg_only)
    assert tensors == ("dout", "dlse", "q", "k", "v", "out", "lse", *TENSORS[3:])
