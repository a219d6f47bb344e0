"""torch.compile of every feature: one graph, forward and backward, with eager mode's results; few compilations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import heedful
from heedful import (
    ALiBi,
    Bias,
    BlockMask,
    Causal,
    Dilated,
    Documents,
    Gaussian,
    Global,
    KeyLengths,
    PrefixLM,
    QueryLengths,
    RelativeBias,
    SlidingWindow,
    Strided,
)

B, HQ, HK, SQ, SK, D, DV = 2, 4, 2, 70, 130, 8, 6
Inputs = dict[str, Tensor]
Options = dict[str, Any]


def inputs(q_length: int = SQ, k_length: int = SK, batch: int = B, dtype: torch.dtype = torch.float32) -> Inputs:
    """Everything that a case may read: q, k, v and parameters, which want gradients, and tensors of ints and bools."""
    generator = torch.Generator().manual_seed(q_length + k_length)
    shapes = {
        "q": (batch, HQ, q_length, D),
        "k": (batch, HK, k_length, D),
        "v": (batch, HK, k_length, DV),
        "bias": (HQ, q_length, k_length),
        "scales": (batch, HQ),
        "sinks": (HQ,),
        "slopes": (HQ,),
        "table": (8, HQ),
    }
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    drawn["bandwidth"] = drawn["slopes"].exp()
    return {name: x.requires_grad_() for name, x in drawn.items()} | {
        "holes": torch.rand(batch, 1, q_length, k_length, generator=generator) > 0.3,
        "lengths": torch.randint(1, k_length + 1, (batch,), generator=generator),
        "q_ids": torch.arange(q_length) // 20,
        "k_ids": torch.arange(k_length) // 30,
        "seed": torch.tensor([7]),
    }


BLOCKS = BlockMask.from_function(lambda b, h, i, j: (i * j + h) % 3 != 0, SQ, SK, heads=HQ)
UNION = Global(3) | SlidingWindow(20, 4)
CASES: dict[str, Callable[[Inputs], Options]] = {
    "softcap": lambda x: {"softcap": 2.0},
    "sinks": lambda x: {"sinks": x["sinks"], "mask": KeyLengths(x["lengths"] - 1)},
    "scales": lambda x: {"scale": x["scales"]},
    "ALiBi": lambda x: {"bias": ALiBi(x["slopes"]), "mask": Causal()},
    "RelativeBias": lambda x: {"bias": RelativeBias(x["table"], max_distance=40)},
    "biases": lambda x: {"bias": ALiBi(x["slopes"]) + x["bias"] + RelativeBias(x["table"], bidirectional=False)},
    "tensor + bias": lambda x: {"bias": x["bias"] + ALiBi(x["slopes"])},
    "a bias made outside": lambda x: {"bias": FIXED_BIAS},
    "cosine": lambda x: {"similarity": "cosine", "scale": 5.0},
    "Gaussian": lambda x: {"similarity": Gaussian(2.0)},
    "Gaussian of a tensor": lambda x: {"similarity": Gaussian(x["bandwidth"]), "scale": x["scales"]},
    "dropout of a seed": lambda x: {"dropout_p": 0.3, "seed": 5},
    "dropout of a tensor": lambda x: {"dropout_p": 0.3, "seed": x["seed"]},
    "dropout of a drawn seed": lambda x: {"dropout_p": 0.3},
    "hard": lambda x: {"normalizer": "hard"},
    "hard-st": lambda x: {"normalizer": "hard-st", "mask": Causal()},
    "lengths": lambda x: {"mask": Causal() & KeyLengths(x["lengths"]) & QueryLengths(x["lengths"].clamp(max=9))},
    "tensor": lambda x: {"mask": x["holes"] & Causal() & (x["q_ids"][:, None] < 3)},
    "blocks made outside": lambda x: {"mask": BLOCKS & KeyLengths(x["lengths"])},
    "union made outside": lambda x: {"mask": UNION},
    "union": lambda x: {"mask": (Global(3) | SlidingWindow(20, 4)) & KeyLengths(x["lengths"])},
    "union with a tensor": lambda x: {"mask": x["holes"] | SlidingWindow(5, 5)},
    "PrefixLM": lambda x: {"mask": PrefixLM(x["lengths"]), "align": 3},
    "Documents": lambda x: {"mask": Causal() & Documents(x["q_ids"], x["k_ids"])},
    "strides": lambda x: {"mask": Dilated(9, 2, 3) | Strided(7), "align": x["lengths"] - 1},
    "everything": lambda x: {
        "mask": Causal() & Documents(x["q_ids"], x["k_ids"]) & x["holes"] & KeyLengths(x["lengths"]),
        "bias": ALiBi(x["slopes"]) + x["bias"] + RelativeBias(x["table"]),
        "similarity": Gaussian(x["bandwidth"]),
        "softcap": 2.0,
        "sinks": x["sinks"],
        "dropout_p": 0.3,
        "seed": 5,
        "align": x["lengths"] - 1,
    },
}
FIXED_BIAS: Bias = RelativeBias(torch.linspace(-1, 1, 8 * HQ).view(8, HQ)) + ALiBi(ALiBi.default_slopes(HQ))


def attention(case: Callable[[Inputs], Options]) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    return lambda x: heedful.attention(x["q"], x["k"], x["v"], **case(x), return_lse=True)


def varlen(case: Callable[[Inputs], Options], *offsets: Any) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """Of sequences packed in one, which is the batch's first."""

    def f(x: Inputs) -> tuple[Tensor, Tensor]:
        rows = [x[name][0].transpose(0, 1) for name in "qkv"]
        return heedful.varlen_attention(*rows, *offsets, **case(x), return_lse=True)

    return f


def results(f: Callable[[Inputs], tuple[Tensor, Tensor]], x: Inputs) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of what f reads."""
    torch.manual_seed(0)
    out, lse = f(x)
    wanted = [t for t in x.values() if t.requires_grad]
    finite = torch.where(lse.isfinite(), lse, 0)
    grads = torch.autograd.grad(out.square().sum() + finite.sin().sum(), wanted, allow_unused=True)
    return out, lse, *grads


def assert_same(compiled: Callable, eager: Callable, x: Inputs) -> None:
    (out, lse, *grads), (want, want_lse, *want_grads) = results(compiled, x), results(eager, x)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert out.stride() == want.stride()
    assert [g is None for g in grads] == [g is None for g in want_grads]
    for got, expected in zip(grads, want_grads):
        torch.testing.assert_close(got, expected)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_features(name: str) -> None:
    f, x = attention(CASES[name]), inputs()
    assert_same(torch.compile(f, backend="aot_eager", fullgraph=True), f, x)


def test_no_gradients() -> None:
    f, x = attention(CASES["everything"]), {name: t.detach() for name, t in inputs().items()}
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert all(map(torch.equal, compiled(x), f(x)))


OFFSETS = [0, 20, 20, 66], [3, 30, 90, 130]
VARLEN = {
    "plain": lambda x: {},
    "positions": lambda x: {"mask": Causal(), "bias": ALiBi(x["slopes"]), "align": "top-left"},
    "features": lambda x: {"sinks": x["sinks"], "softcap": 2.0, "dropout_p": 0.3, "similarity": "cosine"},
}


@pytest.mark.parametrize("name", VARLEN)
def test_packed_sequences(name: str) -> None:
    f, x = varlen(VARLEN[name], *map(torch.tensor, OFFSETS)), inputs()
    assert_same(torch.compile(f, backend="aot_eager", fullgraph=True), f, x)


def test_packed_sequences_with_offsets_in_lists() -> None:
    f, x = varlen(VARLEN["positions"], *OFFSETS), inputs()
    assert_same(torch.compile(f, backend="aot_eager", fullgraph=True), f, x)


def test_each_call_draws_its_own_seed() -> None:
    f, x = attention(CASES["dropout of a drawn seed"]), inputs()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])


def test_inductor() -> None:
    """What the operators take and give is also fused with; dropout's seed is a given one, as inductor draws its own."""

    def f(x: Inputs) -> tuple[Tensor, Tensor]:
        doubled = x | {"q": 2 * x["q"], "sinks": x["sinks"].sin()}
        out, lse = attention(CASES["everything"])(doubled)
        return out.cos(), lse

    (out, lse, *grads), want = results(torch.compile(f, fullgraph=True), x := inputs()), results(f, x)
    for got, expected in zip((out, lse, *grads), want):
        torch.testing.assert_close(got, expected)


# ---- lengths that change


def compilations(name: str, dynamic: bool | None, *sizes: tuple[int, int, int]) -> int:
    """How often a case is compiled for sizes of (queries, keys, batch); results are those of eager mode.

    The first batch shall be a number of its own: torch takes sizes that are equal in the first call to stay equal.
    """
    counter, f = CompileCounterWithBackend("aot_eager"), attention(CASES[name])
    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=dynamic)
    for size in sizes:
        assert_same(compiled, f, inputs(*size))
    return counter.frame_count


NATIVE = ("softcap", "sinks", "biases", "Gaussian of a tensor", "dropout of a drawn seed", "lengths", "tensor")


@pytest.mark.parametrize("dynamic", (True, None), ids=("dynamic", "automatic"))
@pytest.mark.parametrize("name", NATIVE)
def test_other_lengths_are_not_compiled_again(name: str, dynamic: bool | None) -> None:
    """But once, where torch finds out by itself what is dynamic."""
    sizes = (70, 130, 5), (33, 90, 3), (128, 64, 2), (190, 257, 4), (7, 9, 8), (129, 63, 2)
    assert compilations(name, dynamic, *sizes) <= 2


@pytest.mark.parametrize("name", ("union", "Documents"))
def test_nor_are_masks_built_inside_beyond_one_tile(name: str) -> None:
    """To torch.compile one tile is not one of many."""
    sizes = (70, 130, 5), (128, 65, 3), (190, 257, 2), (66, 192, 4), (129, 90, 8)
    assert compilations(name, True, *sizes) <= 2
