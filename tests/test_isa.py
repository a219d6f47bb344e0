"""Instruction sets: forced by HEEDFUL_CPU_ISA they agree within rounding, and none has leaked into another's code."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import cases
import heedful
import heedful._info
from backends import INSTRUCTION_SETS, OF_BF16, available_backends
from cases import Case, build, causal

AVAILABLE = [backend.isa for backend in available_backends() if backend.isa]
SAMPLE = (
    Case((1, 2, 1, 70, 150, 16, 24)),
    causal((2, 4, 2, 129, 197, 33, 40), bias="hqk", wide_bias=True),
    Case((2, 2, 2, 64, 128, 64, 64), mask="bqk", k_lengths=(128, 65)),
)


@pytest.mark.parametrize("dtype", cases.FULL_DTYPES, ids=cases.short)
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_instruction_sets_agree(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each differs from the baseline by no more than twice what rounding may do to either."""
    problem = build(case, dtype)
    truth, results = problem.truth(), {}
    for isa in AVAILABLE:
        monkeypatch.setenv("HEEDFUL_CPU_ISA", isa)
        results[isa] = problem.results()
    for isa in AVAILABLE[1:]:
        for name, x in results[isa].items():
            base = results["baseline"][name].double()
            error = (x.double() - base).abs().where(base.isfinite(), 0)
            assert torch.equal(x.isfinite(), base.isfinite())
            assert (error <= 2 * truth.bound(name, dtype)).all(), f"{isa} {name}"


@pytest.mark.skipif(len(AVAILABLE) < 2, reason="this machine runs the baseline alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
def test_forcing_takes_effect(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused multiply-add rounds differently: the bits of a long sum tell the baseline from the others."""
    problem = build(Case((1, 1, 1, 64, 300, 64, 64)), dtype)
    bits = {}
    for isa in (*AVAILABLE, *AVAILABLE):
        monkeypatch.setenv("HEEDFUL_CPU_ISA", isa)
        runs = "avx512" if isa in OF_BF16 and dtype is torch.float32 else isa
        assert heedful.explain(problem.q, problem.k, problem.v).isa == runs
        _, lse = problem.forward()
        assert torch.equal(bits.setdefault(isa, lse), lse)
    assert all(not torch.equal(bits["baseline"], bits[isa]) for isa in AVAILABLE[1:])


def test_best_instruction_set_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEEDFUL_CPU_ISA", raising=False)
    problem = build(SAMPLE[0], torch.bfloat16)
    assert heedful.explain(problem.q, problem.k, problem.v).isa == AVAILABLE[-1] == heedful._info.cpu_capability()
    default = problem.results()
    monkeypatch.setenv("HEEDFUL_CPU_ISA", AVAILABLE[-1])
    assert all(torch.equal(x, default[name]) for name, x in problem.results().items())


@pytest.mark.parametrize("name", ["sse9", "AVX2", "cuda", *(isa for isa in INSTRUCTION_SETS if isa not in AVAILABLE)])
def test_instruction_set_that_cannot_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is unknown, or an instruction set that this machine lacks, is an error that says so."""
    problem = build(SAMPLE[0], torch.float32)
    out, lse = problem.forward()
    monkeypatch.setenv("HEEDFUL_CPU_ISA", name)
    with pytest.raises(RuntimeError, match=rf"HEEDFUL_CPU_ISA.*{name}"):
        problem.forward()
    with pytest.raises(RuntimeError, match=rf"HEEDFUL_CPU_ISA.*{name}"):
        torch.ops.heedful.attention_backward(problem.dout, None, problem.q, problem.k, problem.v, out, lse)


# ---- what the compiler made of it: x86 tells its encodings apart by their first byte

PREFIXES = {"26", "2e", "36", "3e", "64", "65", "66", "67", "f0", "f2", "f3"}
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")


def encoding(code: list[str]) -> str:
    """'avx512' (EVEX), 'avx' (VEX), 'ssse3' (0f 38 and 0f 3a, which x86-64's baseline lacks) or 'plain'."""
    start = next((n for n, byte in enumerate(code) if byte not in PREFIXES), len(code))
    code = code[start:]
    if code and code[0] == "62":
        return "avx512"
    if code and code[0] in ("c4", "c5"):
        return "avx"
    if code and code[0][0] == "4":  # REX
        code = code[1:]
    return "ssse3" if code[:2] in (["0f", "38"], ["0f", "3a"]) else "plain"


def instructions(listing: str) -> Iterator[tuple[str, str, str]]:
    """(function, encoding, text) of every instruction in what `objdump -d -C` printed."""
    function = ""
    for line in listing.splitlines():
        if found := FUNCTION.match(line):
            function = found[1]
        elif line.count("\t") >= 2:
            _, code, text = line.split("\t", 2)
            kind = encoding(code.split())
            if kind == "avx" and (text.startswith("k") or re.search(r"%k[0-7]", text)):
                kind = "avx512"
            if "%tmm" in text:
                kind = "amx"
            yield function, kind, text


disassembles = pytest.mark.xdist_group("disassembly")  # once, by one process


@cache
def kinds_by_function() -> dict[str, dict[str, str]]:
    """For each function of the library, an example of each encoding in it."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{platform.machine()} has one instruction set")
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed")
    library = Path(heedful.__file__).with_name("libheedful.so")
    command = ["objdump", "-d", "-C", "--insn-width=16", str(library)]
    environment = os.environ | {"LC_ALL": "C"}
    listing = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    kinds: dict[str, dict[str, str]] = {}
    for function, kind, text in instructions(listing):
        kinds.setdefault(function, {}).setdefault(kind, text)
    return kinds


def isa_of(function: str) -> str | None:
    """The instruction set whose namespace the function is in, or has in its arguments."""
    for isa in reversed(INSTRUCTION_SETS):
        if f"heedful::cpu::{isa}::" in function:
            return isa
    return None


def offenders(isas: tuple[str | None, ...], forbidden: tuple[str, ...]) -> list[str]:
    found = {f: kinds for f, kinds in kinds_by_function().items() if isa_of(f) in isas}
    assert found, f"no function of {isas} in the library: is it stripped?"
    return [f"{f[:200]}: {kinds[kind]}" for f, kinds in found.items() for kind in forbidden if kind in kinds]


@disassembles
def test_baseline_code_runs_anywhere() -> None:
    """Neither the baseline kernels nor anything that all share holds an instruction that an old machine lacks."""
    assert not offenders(("baseline",), ("amx", "avx512", "avx", "ssse3"))
    assert not offenders((None,), ("amx", "avx512", "avx", "ssse3"))


@disassembles
@pytest.mark.skipif("avx2" not in heedful._info.build_info()["isas"], reason="the library has no AVX2 kernels")
def test_avx2_code_has_no_avx512() -> None:
    assert not offenders(("avx2",), ("amx", "avx512"))


@disassembles
@pytest.mark.skipif("avx512" not in heedful._info.build_info()["isas"], reason="the library has no AVX-512 kernels")
def test_avx512_code_has_no_tile_registers() -> None:
    assert not offenders(("avx512",), ("amx",))
    assert not offenders(("avx512_bf16",), ("amx",))


@disassembles
def test_each_instruction_set_is_used() -> None:
    """What is compiled for an instruction set uses it, so that the tests above look at what they mean."""
    built = heedful._info.build_info()["isas"]
    for isa, kind in (("avx2", "avx"), ("avx512", "avx512"), ("avx512_bf16", "avx512"), ("amx_bf16", "amx")):
        if isa in built:
            used = [f for f, kinds in kinds_by_function().items() if isa_of(f) == isa and kind in kinds]
            assert len(used) >= 4, isa
    if "avx512" in built:
        assert any("%zmm" in text for kinds in kinds_by_function().values() for text in kinds.values())


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("62 f1 7c 48 58 c1", "avx512"),  # vaddps %zmm1,%zmm0,%zmm0
        ("c5 fc 58 c1", "avx"),  # vaddps %ymm1,%ymm0,%ymm0
        ("64 c5 f8 10 00", "avx"),  # vmovups %fs:(%rax),%xmm0
        ("66 0f 38 40 c1", "ssse3"),  # pmulld %xmm1,%xmm0
        ("66 41 0f 3a 0f c1 04", "ssse3"),  # palignr $4,%xmm9,%xmm0
        ("0f 58 c1", "plain"),  # addps %xmm1,%xmm0
        ("f3 0f 1e fa", "plain"),  # endbr64
    ],
)
def test_encodings(code: str, kind: str) -> None:
    assert encoding(code.split()) == kind
