"""torch.utils.flop_counter's figures for heedful's operators are those that it has for torch's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import heedful
from heedful import ALiBi, Causal, Documents, Gaussian, KeyLengths

OPS = torch.ops.heedful
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
SIZES = ((2, 3, 3, 5, 7, 4, 4), (1, 4, 2, 9, 9, 8, 8), (2, 4, 1, 1, 33, 16, 16), (2, 2, 2, 4, 6, 8, 3))


def tensors(b: int, hq: int, hk: int, sq: int, sk: int, d: int, dv: int) -> list[Tensor]:
    return [torch.randn(*s, requires_grad=True) for s in ((b, hq, sq, d), (b, hk, sk, d), (b, hk, sk, dv))]


def count(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> tuple[int, int]:
    """The figures of a forward and of a backward pass."""
    with FlopCounterMode(display=False) as of_forward:
        out = function(*inputs, **options)
    with FlopCounterMode(display=False) as of_backward:
        torch.autograd.grad(out, [x for x in inputs if x.requires_grad], torch.ones_like(out))
    return of_forward.get_total_flops(), of_backward.get_total_flops()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_as_torchs(sizes: tuple[int, ...]) -> None:
    q, k, v = tensors(*sizes)
    of_all_heads = [x.detach().repeat_interleave(sizes[1] // sizes[2], 1).requires_grad_() for x in (k, v)]
    shapes = [x.shape for x in (q, *of_all_heads)]
    dout = (*q.shape[:3], sizes[-1])
    want = sdpa_flop_count(*shapes), sdpa_backward_flop_count(dout, *shapes)
    assert count(heedful.attention, q, k, v) == want
    assert count(heedful.scaled_dot_product_attention, q, k, v, enable_gqa=True) == want
    with sdpa_kernel(SDPBackend.MATH):  # two products, whose scores backward need not compute again
        assert count(scaled_dot_product_attention, q, *of_all_heads)[0] == want[0]
    if FUSED in flop_registry and sizes[-1] == sizes[-2]:  # what torch 2.10 does not count, and what is not fused
        assert count(scaled_dot_product_attention, q, *of_all_heads) == want


def test_options_make_no_difference() -> None:
    q, k, v = tensors(2, 4, 2, 9, 9, 8, 8)
    want = count(heedful.attention, q, k, v)
    assert min(want) > 0
    ids = torch.tensor([0] * 4 + [1] * 5)
    for options in (
        {"mask": Causal() & KeyLengths([3, 9])},
        {"mask": Causal() & Documents(ids), "bias": ALiBi(torch.ones(4)), "softcap": 2.0},
        {"bias": torch.randn(9, 9), "sinks": torch.zeros(4), "dropout_p": 0.5},
        {"similarity": Gaussian(2.0), "scale": torch.ones(4)},
        {"normalizer": "hard"},
    ):
        assert count(heedful.attention, q, k, v, **options) == want


def test_by_operator_and_module() -> None:
    """A swapped model's table is that of the model before; attention is in the rows of its module."""
    model = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(3, 7, 16, requires_grad=True)
    before = count(model, x)
    heedful.swap(model)
    if FUSED in flop_registry:
        assert count(model, x) == before
    with FlopCounterMode(display=False) as mode:
        model(x).sum().backward()
    counts = mode.get_flop_counts()["TransformerEncoderLayer.self_attn"]
    pairs = 3 * 2 * 7 * 7
    assert counts[OPS.attention_forward] == 2 * pairs * (8 + 8)
    assert counts[OPS.attention_backward] == 2 * pairs * (3 * 8 + 2 * 8)


def packed(q_lengths: list[int], k_lengths: list[int], d: int, dv: int, outside: int = 0) -> tuple[list[Tensor], ...]:
    """Packed tensors of 4 query heads and 2 key heads, and their offsets; some rows are in no sequence."""
    offsets = [torch.tensor([outside, *n]).cumsum(0) for n in (q_lengths, k_lengths)]
    rows, columns = (int(x[-1]) + outside for x in offsets)
    shapes = (rows, 4, d), (columns, 2, d), (columns, 2, dv)
    return [torch.randn(*shape, requires_grad=True) for shape in shapes], offsets


@pytest.mark.parametrize("outside", (0, 3))
def test_packed_sequences_count_by_their_lengths(outside: int) -> None:
    q_lengths, k_lengths = [5, 0, 1, 30], [9, 4, 0, 31]
    inputs, offsets = packed(q_lengths, k_lengths, 8, 6, outside)
    each = [count(heedful.attention, *tensors(1, 4, 2, *n, 8, 6)) for n in zip(q_lengths, k_lengths)]
    want = tuple(map(sum, zip(*each)))
    assert want[0] > 0
    assert count(heedful.varlen_attention, *inputs, *offsets) == want
    assert count(heedful.varlen_attention, *inputs, *offsets, mask=Causal(), align="top-left") == want


def test_nested_tensors() -> None:
    (q, k, v), (q_offsets, k_offsets) = packed([5, 1, 12], [9, 3, 2], 8, 8)
    want = count(heedful.varlen_attention, q, k, v, q_offsets, k_offsets)
    offsets = q_offsets, k_offsets, k_offsets

    def attention(*rows: Tensor) -> Tensor:
        jagged = [torch.nested.nested_tensor_from_jagged(x, n).transpose(1, 2) for x, n in zip(rows, offsets)]
        return heedful.attention(*jagged).values()

    assert count(attention, q, k, v) == want


def test_offsets_without_numbers_count_the_most_there_can_be() -> None:
    with FakeTensorMode():
        inputs, offsets = [torch.empty(n, 2, 8) for n in (20, 30, 30)], [torch.empty(4, dtype=torch.int64)] * 2
        with FlopCounterMode(display=False) as mode:
            heedful.varlen_attention(*inputs, *offsets)
    assert mode.get_total_flops() == 2 * 2 * 20 * 30 * (8 + 8)


@pytest.mark.parametrize("first", ("heedful", "torch.utils.flop_counter"))
def test_imported_in_any_order_and_only_if_needed(first: str) -> None:
    """The counter imports Triton where there is one: whoever does not count shall not wait for that."""
    program = f"""
import sys, torch
import {first}
if {first!r} == "heedful":
    assert "torch.utils.flop_counter" not in sys.modules, "importing heedful imports the counter"
from torch.utils.flop_counter import FlopCounterMode
import heedful
with FlopCounterMode(display=False) as mode:
    heedful.attention(*[torch.zeros(1, 1, 2, 4)] * 3)
print(mode.get_total_flops())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(2 * 2 * 2 * (4 + 4))]
