"""Every wrong argument is one clear error: its name, what was expected, and what came, before anything is computed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import heedful

FORWARD, BACKWARD = torch.ops.heedful.attention_forward, torch.ops.heedful.attention_backward


def good() -> dict[str, Any]:
    """Arguments that are right: B 2, Hq 4, Hk 2, Sq 5, Sk 7, D 8, Dv 6."""
    return {"q": torch.randn(2, 4, 5, 8), "k": torch.randn(2, 2, 7, 8), "v": torch.randn(2, 2, 7, 6)}


def good_backward() -> dict[str, Any]:
    arguments = good()
    out, lse = FORWARD(**arguments)
    return {"dout": torch.randn_like(out), "dlse": torch.randn_like(lse), **arguments, "out": out, "lse": lse}


def expect(message: str, function: Callable[..., Any], arguments: dict[str, Any], kind: type = RuntimeError) -> None:
    """`function(**arguments)` raises `message`, a regular expression that the whole first line matches."""
    with pytest.raises(kind) as raised:
        function(**arguments)
    first = str(raised.value).splitlines()[0]
    assert re.fullmatch(message, first), first


# The argument that is wrong, how it is changed, and the message's end after "heedful.attention: ".
WRONG_FORWARD: dict[str, tuple[dict[str, Any], str]] = {
    "q rank": ({"q": torch.randn(4, 5, 8)}, r"q: expected 4 dimensions \[B, Hq, Sq, D\], got \[4, 5, 8\]"),
    "k rank": ({"k": torch.randn(1, 2, 2, 7, 8)}, r"k: expected 4 dimensions .*, got \[1, 2, 2, 7, 8\]"),
    "v rank": ({"v": torch.randn(())}, r"v: expected 4 dimensions .*, got \[\]"),
    "k batch": ({"k": torch.randn(3, 2, 7, 8)}, r"k: expected .*\[2, 2, 7, 8\].*, got \[3, 2, 7, 8\]"),
    "k width": ({"k": torch.randn(2, 2, 7, 9)}, r"k: expected .*\[2, 2, 7, 8\].*, got \[2, 2, 7, 9\]"),
    "k batch of one": ({"k": torch.randn(1, 2, 7, 8)}, r"k: expected .*, got \[1, 2, 7, 8\]"),
    "v batch": ({"v": torch.randn(1, 2, 7, 6)}, r"v: expected .*\[2, 2, 7, 6\].*, got \[1, 2, 7, 6\]"),
    "v heads": ({"v": torch.randn(2, 4, 7, 6)}, r"v: expected .*\[2, 2, 7, 6\].*, got \[2, 4, 7, 6\]"),
    "v rows": ({"v": torch.randn(2, 2, 8, 6)}, r"v: expected .*\[2, 2, 7, 6\].*, got \[2, 2, 8, 6\]"),
    "heads": ({"q": torch.randn(2, 3, 5, 8)}, r"q: expected .*multiple of k's 2, got 3"),
    "fewer heads": ({"q": torch.randn(2, 1, 5, 8)}, r"q: expected .*multiple of k's 2, got 1"),
    "no kv heads": (
        {"k": torch.randn(2, 0, 7, 8), "v": torch.randn(2, 0, 7, 6)},
        r"q: expected .*multiple of k's 0, got 4",
    ),
    "integers": (
        {name: torch.ones(x.shape, dtype=torch.int32) for name, x in good().items()},
        r"q: expected float32, float64, bfloat16 or float16, got int32",
    ),
    "complex": (
        {"q": torch.randn(2, 4, 5, 8, dtype=torch.complex64)},
        r"q: expected float32, .*, got \S*[cC]omplex\S*",
    ),
    "k dtype": ({"k": torch.randn(2, 2, 7, 8).double()}, r"k: expected float32, as q, got float64"),
    "v dtype": ({"v": torch.randn(2, 2, 7, 6).half()}, r"v: expected float32, as q, got float16"),
    "mask rank": ({"mask": torch.ones(5, 7, dtype=torch.bool)}, r"mask: expected .*\[2, 4, 5, 7\].*, got \[5, 7\]"),
    "mask shape": (
        {"mask": torch.ones(2, 2, 5, 7, dtype=torch.bool)},
        r"mask: expected .*\[2, 4, 5, 7\].*, got \[2, 2, 5, 7\]",
    ),
    "mask keys": ({"mask": torch.ones(1, 1, 5, 8, dtype=torch.bool)}, r"mask: expected .*, got \[1, 1, 5, 8\]"),
    "mask empty": ({"mask": torch.ones(1, 1, 5, 0, dtype=torch.bool)}, r"mask: expected .*, got \[1, 1, 5, 0\]"),
    "mask dtype": ({"mask": torch.ones(1, 1, 5, 7)}, r"mask: expected bool, got float32"),
    "mask uint8": ({"mask": torch.ones(1, 1, 5, 7, dtype=torch.uint8)}, r"mask: expected bool, got \S*(uint8|Byte)"),
    "bias rank": ({"bias": torch.randn(4, 5, 7)}, r"bias: expected .*\[2, 4, 5, 7\].*, got \[4, 5, 7\]"),
    "bias shape": ({"bias": torch.randn(2, 4, 7, 5)}, r"bias: expected .*\[2, 4, 5, 7\].*, got \[2, 4, 7, 5\]"),
    "bias float64": ({"bias": torch.randn(1, 1, 5, 7).double()}, r"bias: expected float32, as q.*, got float64"),
    "bias bfloat16": ({"bias": torch.randn(1, 1, 5, 7).bfloat16()}, r"bias: expected float32, as q.*, got bfloat16"),
    "bias bool": ({"bias": torch.ones(1, 1, 5, 7, dtype=torch.bool)}, r"bias: expected float32, as q.*, got bool"),
    "q_lengths shape": ({"q_lengths": torch.ones(3).long()}, r"q_lengths: expected \[B\] = \[2\], got \[3\]"),
    "k_lengths shape": ({"k_lengths": torch.ones(1).long()}, r"k_lengths: expected \[B\] = \[2\], got \[1\]"),
    "k_lengths rank": ({"k_lengths": torch.ones(2, 1).long()}, r"k_lengths: expected \[B\] = \[2\], got \[2, 1\]"),
    "q_starts scalar": ({"q_starts": torch.tensor(3)}, r"q_starts: expected \[B\] = \[2\], got \[\]"),
    "q_lengths dtype": ({"q_lengths": torch.ones(2).int()}, r"q_lengths: expected int64, got int32"),
    "k_lengths dtype": ({"k_lengths": torch.ones(2)}, r"k_lengths: expected int64, got float32"),
    "q_starts dtype": ({"q_starts": torch.ones(2, dtype=torch.bool)}, r"q_starts: expected int64, got bool"),
    "scale nan": ({"scale": float("nan")}, r"scale: expected a finite number, got -?nan"),
    "scale inf": ({"scale": float("inf")}, r"scale: expected a finite number, got inf"),
}
WRONG_BACKWARD: dict[str, tuple[dict[str, Any], str]] = {
    "dout shape": ({"dout": torch.randn(2, 4, 5, 8)}, r"dout: expected .*\[2, 4, 5, 6\], got \[2, 4, 5, 8\]"),
    "dout dtype": ({"dout": torch.randn(2, 4, 5, 6).double()}, r"dout: expected float32, as q, got float64"),
    "dlse shape": ({"dlse": torch.randn(2, 4, 5, 1)}, r"dlse: expected .*\[2, 4, 5\], got \[2, 4, 5, 1\]"),
    "dlse dtype": ({"dlse": torch.randn(2, 4, 5).bfloat16()}, r"dlse: expected float32.*, got bfloat16"),
    "out shape": ({"out": torch.randn(2, 4, 6, 6)}, r"out: expected .*\[2, 4, 5, 6\], got \[2, 4, 6, 6\]"),
    "out dtype": ({"out": torch.randn(2, 4, 5, 6).half()}, r"out: expected float32, as q, got float16"),
    "lse shape": ({"lse": torch.randn(2, 2, 5)}, r"lse: expected .*\[2, 4, 5\], got \[2, 2, 5\]"),
    "lse dtype": ({"lse": torch.randn(2, 4, 5).double()}, r"lse: expected float32.*, got float64"),
    "bias_grad": ({"bias_grad": True}, r"bias_grad: expected False where there is no bias, got True"),
}


@pytest.mark.parametrize("name", WRONG_FORWARD)
def test_forward_op(name: str) -> None:
    change, message = WRONG_FORWARD[name]
    expect(f"heedful.attention: {message}", FORWARD, good() | change)


@pytest.mark.parametrize("name", [name for name in WRONG_FORWARD if "rank" not in name or name[0] in "mbqk"])
def test_backward_op_meets_the_same_checks(name: str) -> None:
    change, message = WRONG_FORWARD[name]
    expect(f"heedful.attention: {message}", BACKWARD, good_backward() | change)


@pytest.mark.parametrize("name", WRONG_BACKWARD)
def test_backward_op(name: str) -> None:
    change, message = WRONG_BACKWARD[name]
    expect(f"heedful.attention: {message}", BACKWARD, good_backward() | change)


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "bias", "q_lengths", "k_lengths", "q_starts"])
def test_forward_on_two_devices(name: str) -> None:
    """One tensor on another device (here: meta) is an error that names a tensor and both devices."""
    arguments = good() | {
        "mask": torch.ones(1, 1, 5, 7, dtype=torch.bool), "bias": torch.zeros(1, 1, 5, 7),
        "q_lengths": torch.tensor([5, 3]), "k_lengths": torch.tensor([7, 3]), "q_starts": torch.tensor([2, 0]),
    }  # fmt: skip
    arguments[name] = arguments[name].to("meta")
    expect(r"heedful.attention: \w+: expected .*(cpu|meta).*, got .*(cpu|meta).*", FORWARD, arguments)


@pytest.mark.parametrize("name", ["dout", "dlse", "q", "k", "v", "out", "lse"])
def test_backward_on_two_devices(name: str) -> None:
    arguments = good_backward()
    arguments[name] = arguments[name].to("meta")
    expect(r"heedful.attention: \w+: expected .*(cpu|meta).*, got .*(cpu|meta).*", BACKWARD, arguments)


def test_unknown_and_missing_arguments() -> None:
    for unknown in ({"dropout": 0.1}, {"softcap": 1.0}, {"is_causal": True}):
        for function in (FORWARD, heedful.attention, heedful.reference.attention):
            with pytest.raises((RuntimeError, TypeError), match=next(iter(unknown))):
                function(**good(), **unknown)
    for function in (FORWARD, heedful.attention):
        with pytest.raises((RuntimeError, TypeError), match="'?v'?"):
            function(good()["q"], good()["k"])


# The same through Python: the argument's own name, TypeError and ValueError where Python's own rules say so.
WRONG_IN_PYTHON: dict[str, tuple[dict[str, Any], str, type]] = {
    "q rank": ({"q": torch.randn(4, 5, 8)}, r"q.*: expected 4 dimensions.*got .*", RuntimeError),
    "k width": ({"k": torch.randn(2, 2, 7, 9)}, r"k: expected .*, got \[2, 2, 7, 9\]", RuntimeError),
    "heads": ({"q": torch.randn(2, 3, 5, 8)}, r"q: expected .*multiple of .*2.*, got 3", RuntimeError),
    "dtype": ({"k": torch.randn(2, 2, 7, 8).half()}, r"k: expected float32, as q, got float16", RuntimeError),
    "mask dtype": ({"mask": torch.ones(5, 7)}, r"mask: expected .*bool.*, got .*float32.*", TypeError),
    "mask kind": ({"mask": "causal"}, r"mask: expected .*bool.*, got .*str.*", TypeError),
    "mask shape": ({"mask": torch.ones(5, 8).bool()}, r"mask: expected .*, got \[1, 1, 5, 8\]", RuntimeError),
    "mask rank": (
        {"mask": torch.ones(1, 1, 1, 5, 7).bool()},
        r"mask: expected at most 4 dimensions, got 5",
        RuntimeError,
    ),
    "bias dtype": ({"bias": torch.ones(5, 7).long()}, r"bias: expected float32, as q.*, got int64", RuntimeError),
    "bias shape": ({"bias": torch.ones(3, 5, 7)}, r"bias: expected .*, got \[1, 3, 5, 7\]", RuntimeError),
    "lengths": (
        {"mask": heedful.KeyLengths(torch.ones(3).long())},
        r"k_lengths: expected \[B\] = \[2\], got \[3\]",
        RuntimeError,
    ),
    "align word": ({"align": "middle", "mask": heedful.Causal()}, r"align: expected .*, got 'middle'", ValueError),
    "align word without a mask": ({"align": "middle"}, r"align: expected .*, got 'middle'", ValueError),
    "align float": ({"align": 1.5, "mask": heedful.Causal()}, r"align: expected .*, got 1\.5", TypeError),
    "align dtype": (
        {"align": torch.ones(2), "mask": heedful.Causal()},
        r"align: expected .*, got .*float32",
        TypeError,
    ),
    "align shape": (
        {"align": torch.ones(3).long(), "mask": heedful.Causal()},
        r"(align|q_starts): expected .*\[2\], got \[3\]",
        RuntimeError,
    ),
    "scale": ({"scale": float("nan")}, r"scale: expected a finite number, got -?nan", RuntimeError),
}


@pytest.mark.parametrize("name", WRONG_IN_PYTHON)
def test_attention(name: str) -> None:
    change, message, kind = WRONG_IN_PYTHON[name]
    expect(f"heedful.attention: {message}|heedful: {message}", heedful.attention, good() | change, kind)


def test_attention_of_nested_tensors() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="nested"):
        heedful.attention(nested, nested, nested)


def test_scaled_dot_product_attention_refuses_what_torch_refuses() -> None:
    q = torch.randn(2, 4, 5, 8)
    for arguments in (
        {"query": q, "key": q[:, :2], "value": q[:, :2]},
        {"query": q, "key": q[:, :3], "value": q[:, :3], "enable_gqa": True},
        {"query": q, "key": q.double(), "value": q},
        {"query": q, "key": q, "value": q, "attn_mask": torch.ones(5, 6).bool()},
        {"query": q, "key": q, "value": q, "attn_mask": torch.ones(5, 5).long()},
        {"query": q[0, 0, 0], "key": q[0, 0, 0], "value": q[0, 0, 0]},
    ):
        with pytest.raises(RuntimeError):
            torch.nn.functional.scaled_dot_product_attention(**arguments)
        with pytest.raises(RuntimeError, match="heedful.*expected .*got "):
            heedful.scaled_dot_product_attention(**arguments)
    # torch's CPU kernel takes the first (2.10), and reads past the end of value in the second.
    with pytest.raises(RuntimeError, match="attn_mask: expected None where is_causal is set"):
        heedful.scaled_dot_product_attention(q, q, q, torch.ones(5, 5, dtype=torch.bool), is_causal=True)
    with pytest.raises(RuntimeError, match="v: expected .*got "):
        heedful.scaled_dot_product_attention(q, torch.randn(2, 4, 6, 8), q)
    with pytest.raises(NotImplementedError, match="dropout_p: expected 0, got 0.1"):
        heedful.scaled_dot_product_attention(q, q, q, dropout_p=0.1)


def endless() -> dict[str, Tensor]:
    """A problem of 2^38 pairs that takes minutes to compute, in a few bytes: every stride is 0."""
    return {name: torch.zeros(1, 1, 1, 1).expand(4, 1, 2**18, 16) for name in ("q", "k", "v")}


@pytest.mark.parametrize(
    "change",
    [
        {"v": torch.zeros(1).expand(4, 1, 2**18 - 1, 16)},
        {"mask": torch.ones(1, 1, 1, 2).bool()},
        {"bias": torch.zeros(1, 1, 1, 1).double()},
        {"k_lengths": torch.ones(3).long()},
        {"q_starts": torch.ones(4).int()},
        {"scale": float("nan")},
        {"mask": torch.ones(1, 1, 1, 1).bool(), "bias": torch.zeros(4, 1, 5, 1)},
    ],
    ids=lambda change: "+".join(change),
)
def test_errors_come_before_any_work(change: dict[str, Any]) -> None:
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match=rf"heedful.attention: {list(change)[-1]}: expected"):
        FORWARD(**endless() | change)
    assert time.perf_counter() - started < 2


def test_backward_errors_come_before_any_work() -> None:
    inputs = endless()
    rows = torch.zeros(1, 1, 1).expand(4, 1, 2**18)
    started = time.perf_counter()
    for wrong in ({"lse": rows.double()}, {"dout": inputs["q"][:1]}, {"dlse": rows[:, :, 1:]}, {"bias_grad": True}):
        arguments = {"dout": inputs["q"], "dlse": rows, **inputs, "out": inputs["q"], "lse": rows} | wrong
        expect(rf"heedful.attention: {next(iter(wrong))}: expected .*", BACKWARD, arguments)
    assert time.perf_counter() - started < 2


def test_good_arguments_are_good() -> None:
    """What the tests above change is right before the change."""
    assert all(x is None or x.isfinite().all() for x in BACKWARD(**good_backward()))
    for dtype in cases.FULL_DTYPES:
        out, lse = FORWARD(**{name: x.to(dtype) for name, x in good().items()})
        assert out.dtype is dtype and lse.dtype is torch.promote_types(dtype, torch.float32)
    mask = heedful.Causal() & torch.ones(5, 7).bool()
    assert heedful.attention(**good(), mask=mask, bias=torch.zeros(5, 7), align="top-left").shape == (2, 4, 5, 6)
