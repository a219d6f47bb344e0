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


def good_backward(arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    arguments = good() | (arguments or {})
    out, lse = FORWARD(**arguments)
    return {"dout": torch.randn_like(out), "dlse": torch.randn_like(lse), **arguments, "out": out, "lse": lse}


def expect(message: str, function: Callable[..., Any], arguments: dict[str, Any], kind: type = RuntimeError) -> None:
    """`function(**arguments)` raises `message`, a regular expression that the whole first line matches."""
    with pytest.raises(kind) as raised:
        function(**arguments)
    first = str(raised.value).splitlines()[0]
    assert re.fullmatch(message, first), first


ENDS = torch.tensor([0, 2, 5])
ONE = {name: x[:1] for name, x in good().items()}
# What is right, for some of it to be changed.
PACKED = ONE | {"q_offsets": ENDS, "k_offsets": torch.tensor([0, 4, 7])}
TABLE = {"table": torch.ones(3, 4), "buckets": torch.tensor([2, 0, 1, 0, 2])}
BLOCKS = {"tiles": torch.full((1, 1, 1, 1), 2, dtype=torch.int32), "bits": torch.full((1, 64), -1)}
SEED = {"seed": torch.tensor([7]), "dropout_p": 0.5}
EVERYTHING = {
    **TABLE, **BLOCKS, **SEED,
    "mask": torch.ones(1, 1, 5, 7, dtype=torch.bool), "bias": torch.zeros(1, 1, 5, 7),
    "scales": torch.ones(4), "sinks": torch.ones(2, 4), "slopes": torch.ones(4),
    "q_lengths": torch.tensor([5, 3]), "k_lengths": torch.tensor([7, 3]), "q_starts": torch.tensor([2, 0]),
    "softcap": 3.0, "similarity": "cosine",
}  # fmt: skip
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
    "scale twice": ({"scale": 1.0, "scales": torch.ones(4)}, r"scale: expected None where scales is given, got 1\.0+"),
    **{
        f"{name} {what}": ({name: x}, rf"{name}: expected .*\[4\].*\[2, 4\].*, got {got}")
        for name in ("scales", "sinks", "slopes")
        for what, x, got in (
            ("heads", torch.ones(3), r"\[3\]"),
            ("of key heads", torch.ones(2), r"\[2\]"),
            ("scalar", torch.ones(()), r"\[\]"),
            ("batch", torch.ones(3, 4), r"\[3, 4\]"),
            ("batch of one", torch.ones(1, 4), r"\[1, 4\]"),
            ("rank", torch.ones(2, 4, 1), r"\[2, 4, 1\]"),
        )
    },
    **{
        f"{name} {short}": ({name: torch.ones(4).to(dtype)}, rf"{name}: expected float32, as q.*, got {short}")
        for name in ("scales", "sinks", "slopes")
        for short, dtype in (("float64", torch.float64), ("float16", torch.float16), ("int64", torch.int64))
    },
    "table rank": (TABLE | {"table": torch.ones(4)}, r"table: expected 2 dimensions .* or 3 .*, got \[4\]"),
    "table heads": (TABLE | {"table": torch.ones(3, 2)}, r"table: expected .*\[3, 4\].*, got \[3, 2\]"),
    "table batch": (TABLE | {"table": torch.ones(1, 3, 4)}, r"table: expected .*\[2, 3, 4\], got \[1, 3, 4\]"),
    "table dtype": (TABLE | {"table": torch.ones(3, 4).double()}, r"table: expected float32, as q.*, got float64"),
    "table alone": ({"table": torch.ones(3, 4)}, r"buckets: expected .*beside table, got None"),
    "buckets alone": ({"buckets": torch.zeros(5).long()}, r"table: expected .*beside buckets, got None"),
    "buckets rank": (TABLE | {"buckets": torch.zeros(1, 5).long()}, r"buckets: expected .*, got \[1, 5\]"),
    "buckets even": (TABLE | {"buckets": torch.zeros(4).long()}, r"buckets: expected .*, got \[4\]"),
    "buckets empty": (TABLE | {"buckets": torch.zeros(0).long()}, r"buckets: expected .*, got \[0\]"),
    "buckets dtype": (TABLE | {"buckets": torch.zeros(5).int()}, r"buckets: expected int64, got int32"),
    "buckets below": (TABLE | {"buckets": torch.tensor([0, 1, -1])}, r"buckets: expected values from 0 to .*3, got -1"),
    "buckets above": (TABLE | {"buckets": torch.tensor([0, 3, 1])}, r"buckets: expected values from 0 to .*3, got 3"),
    "tiles rank": ({"tiles": torch.ones(1, 1).int()}, r"tiles: expected .*\[2, 4, 1, 1\], got \[1, 1\]"),
    "tiles shape": ({"tiles": torch.ones(2, 2, 1, 1).int()}, r"tiles: expected .*\[2, 4, 1, 1\], got \[2, 2, 1, 1\]"),
    "tiles many": ({"tiles": torch.ones(1, 1, 1, 2).int()}, r"tiles: expected .*, got \[1, 1, 1, 2\]"),
    "tiles dtype": ({"tiles": torch.ones(1, 1, 1, 1).long()}, r"tiles: expected int32, got int64"),
    "tiles below": ({"tiles": torch.full((1, 1, 1, 1), -1).int()}, r"tiles: expected values from 0 to .*, got -1"),
    "tiles above": ({"tiles": torch.full((1, 1, 1, 1), 2).int()}, r"tiles: expected values from 0 to .*, got 2"),
    "tiles past bits": (
        {"tiles": torch.full((1, 1, 1, 1), 4).int(), "bits": torch.zeros(2, 64).long()},
        r"tiles: expected values from 0 to .*4, got 4",
    ),
    "bits alone": ({"bits": torch.zeros(1, 64).long()}, r"tiles: expected .*beside bits, got None"),
    "bits shape": (BLOCKS | {"bits": torch.zeros(1, 63).long()}, r"bits: expected \[.*, 64\], got \[1, 63\]"),
    "bits rank": (BLOCKS | {"bits": torch.zeros(64).long()}, r"bits: expected \[.*, 64\], got \[64\]"),
    "bits dtype": (BLOCKS | {"bits": torch.zeros(1, 64).int()}, r"bits: expected int64, got int32"),
    "softcap zero": ({"softcap": 0.0}, r"softcap: expected .*above 0, got 0\.0*"),
    "softcap negative": ({"softcap": -2.0}, r"softcap: expected .*above 0, got -2\.0*"),
    "softcap nan": ({"softcap": float("nan")}, r"softcap: expected .*above 0, got -?nan"),
    "softcap inf": ({"softcap": float("inf")}, r"softcap: expected .*above 0, got inf"),
    "similarity": ({"similarity": "euclid"}, r'similarity: expected "dot", "cosine" or "gaussian", got "euclid"'),
    "normalizer": ({"normalizer": "hard-st"}, r'normalizer: expected "softmax" or "hard", got "hard-st"'),
    "dropout_p negative": (SEED | {"dropout_p": -0.1}, r"dropout_p: expected a probability.*, got -0\.1\d*"),
    "dropout_p large": (SEED | {"dropout_p": 1.5}, r"dropout_p: expected a probability.*, got 1\.5\d*"),
    "dropout_p nan": (SEED | {"dropout_p": float("nan")}, r"dropout_p: expected a probability.*, got -?nan"),
    "seed missing": ({"dropout_p": 0.5}, r"seed: expected a tensor where dropout_p is above 0, got None"),
    "seed shape": (SEED | {"seed": torch.ones(3).long()}, r"seed: expected .*\[B\], got \[3\]"),
    "seed rank": (SEED | {"seed": torch.ones(2, 1).long()}, r"seed: expected .*\[B\], got \[2, 1\]"),
    "seed dtype": (SEED | {"seed": torch.ones(1)}, r"seed: expected int64, got float32"),
    "offsets of queries alone": (PACKED | {"k_offsets": None}, r"k_offsets: expected .*, got None"),
    "offsets of keys alone": (PACKED | {"q_offsets": None}, r"q_offsets: expected .*, got None"),
    "offsets batch": ({"q_offsets": ENDS, "k_offsets": ENDS}, r"q: expected a batch of 1 .*, got 2"),
    "q_offsets rank": (PACKED | {"q_offsets": ENDS[None]}, r"q_offsets: expected .*, got \[1, 3\]"),
    "q_offsets empty": (PACKED | {"q_offsets": ENDS[:0]}, r"q_offsets: expected .*, got \[0\]"),
    "q_offsets dtype": (PACKED | {"q_offsets": ENDS.int()}, r"q_offsets: expected int64, got int32"),
    "q_offsets decreasing": (PACKED | {"q_offsets": torch.tensor([0, 4, 3])}, r"q_offsets: expected .*, got 3"),
    "q_offsets negative": (PACKED | {"q_offsets": torch.tensor([-1, 2, 3])}, r"q_offsets: expected .*, got -1"),
    "q_offsets past the end": (PACKED | {"q_offsets": torch.tensor([0, 2, 6])}, r"q_offsets: expected .*5, got 6"),
    "k_offsets past the end": (PACKED | {"k_offsets": torch.tensor([0, 2, 8])}, r"k_offsets: expected .*7, got 8"),
    "k_offsets number": (PACKED | {"k_offsets": torch.tensor([0, 2])}, r"k_offsets: expected .*2, got 1"),
    "offsets and q_lengths": (
        PACKED | {"q_lengths": torch.ones(1).long()},
        r"q_lengths: expected \[B\] = \[2\], got \[1\]",
    ),
    "offsets and mask": (
        PACKED | {"mask": torch.ones(1, 1, 5, 7).bool()},
        r"mask: expected .*\[2, 4, 3, 4\].*, got \[1, 1, 5, 7\]",
    ),
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
    **{
        f"{name}_grad": ({f"{name}_grad": True}, rf"{name}_grad: expected False where there is .*, got True")
        for name in cases.PARAMETERS
    },
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


ON_DEVICES = good() | EVERYTHING


@pytest.mark.parametrize("name", [name for name, x in ON_DEVICES.items() if isinstance(x, Tensor)])
def test_forward_on_two_devices(name: str) -> None:
    """One tensor on another device (here: meta) is an error that names a tensor and both devices."""
    arguments = ON_DEVICES | {name: ON_DEVICES[name].to("meta")}
    expect(r"heedful.attention: \w+: expected .*(cpu|meta).*, got .*(cpu|meta).*", FORWARD, arguments)


@pytest.mark.parametrize("name", ["q_offsets", "k_offsets"])
def test_packed_on_two_devices(name: str) -> None:
    arguments = PACKED | {name: PACKED[name].to("meta")}
    expect(r"heedful.attention: \w+: expected .*(cpu|meta).*, got .*(cpu|meta).*", FORWARD, arguments)


@pytest.mark.parametrize("name", ["dout", "dlse", "q", "k", "v", "out", "lse"])
def test_backward_on_two_devices(name: str) -> None:
    arguments = good_backward()
    arguments[name] = arguments[name].to("meta")
    expect(r"heedful.attention: \w+: expected .*(cpu|meta).*, got .*(cpu|meta).*", BACKWARD, arguments)


def test_unknown_and_missing_arguments() -> None:
    for unknown in ({"dropout": 0.1}, {"soft_cap": 1.0}, {"is_causal": True}):
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
    "scale tensor": ({"scale": torch.ones(3)}, r"scale: expected a tensor \[4\] or \[2, 4\], got \[3\]", RuntimeError),
    "softcap": ({"softcap": -1.0}, r"softcap: expected .*above 0.*, got -1\.0", ValueError),
    "softcap kind": ({"softcap": "2"}, r"softcap: expected .*above 0.*, got '2'", TypeError),
    "sinks": ({"sinks": torch.ones(3)}, r"sinks: expected a tensor \[4\] or \[2, 4\], got \[3\]", RuntimeError),
    "dropout_p": ({"dropout_p": 2.0}, r"dropout_p: expected a number from 0 to 1, got 2\.0", ValueError),
    "seed": ({"dropout_p": 0.5, "seed": 1.5}, r"seed: expected .*int.*, got 1\.5", TypeError),
    "similarity": ({"similarity": "cosin"}, r"similarity: expected 'dot', 'cosine' or .*, got 'cosin'", ValueError),
    "normalizer": (
        {"normalizer": "argmax"},
        r"normalizer: expected 'softmax' or 'hard' or 'hard-st', got 'argmax'",
        ValueError,
    ),
}


@pytest.mark.parametrize("name", WRONG_IN_PYTHON)
def test_attention(name: str) -> None:
    change, message, kind = WRONG_IN_PYTHON[name]
    expect(f"heedful.attention: {message}|heedful: {message}", heedful.attention, good() | change, kind)


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
    with pytest.raises((RuntimeError, ValueError), match="dropout_p: expected .*, got 1.1"):
        heedful.scaled_dot_product_attention(q, q, q, dropout_p=1.1)


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
        {"scales": torch.ones(1), "sinks": torch.ones(2)},
        {"tiles": torch.ones(1, 1, 2, 2).int()},
        {"seed": torch.ones(1).long(), "dropout_p": 1.01},
        {"softcap": -1.0},
        {"normalizer": "soft"},
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
    for arguments in ({}, EVERYTHING, PACKED, PACKED | TABLE | SEED):
        assert all(x is None or x.isfinite().all() for x in BACKWARD(**good_backward(arguments)))
    for dtype in cases.FULL_DTYPES:
        out, lse = FORWARD(**{name: x.to(dtype) for name, x in good().items()})
        assert out.dtype is dtype and lse.dtype is torch.promote_types(dtype, torch.float32)
    mask = heedful.Causal() & torch.ones(5, 7).bool()
    assert heedful.attention(**good(), mask=mask, bias=torch.zeros(5, 7), align="top-left").shape == (2, 4, 5, 6)
