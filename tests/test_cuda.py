"""The operators for GPUs, as far as they show without one: when they are loaded, what they need, what explain says."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import heedful
from heedful import Causal, _info, ops

BUILT = pytest.mark.skipif(not ops.CUDA_LIBRARY.exists(), reason="not built: no nvcc, or HEEDFUL_CUDA=off")

SWITCH = "torch.backends.cuda.matmul.fp32_precision"


def on_gpu(dtype: torch.dtype = torch.bfloat16, dim: int = 8) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(1, 2, 3, dim, dtype=dtype, device="cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As if kernels were loaded, for a GPU of the capability that the test asks for."""
    monkeypatch.setattr(ops, "no_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: getattr(request, "param", (9, 0)))


def test_a_device_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "NO_CUDA", "not loaded: one reason")
    q = on_gpu()
    for function in (heedful.attention, heedful.scaled_dot_product_attention):
        with pytest.raises(
            NotImplementedError, match="got one on cuda:0.*one reason.*heedful.reference.attention .*heedful.explain"
        ):
            function(q, q, q)


def test_explain_says_why_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "NO_CUDA", "not loaded: one reason")
    found = heedful.explain(*[on_gpu()] * 3)
    assert found.kernel is None and found.isa is None
    assert {"cuda/sm80: not loaded: one reason", "cuda/rows: not loaded: one reason"} < set(found.reasons)
    assert "cpu/baseline: runs on the device cpu only" in found.reasons


@pytest.mark.parametrize(
    ("dtype", "dim", "kernel", "reason"),
    [
        (torch.bfloat16, 64, "cuda/sm80", "cuda/rows: cuda/sm80 runs"),
        (torch.float16, 256, "cuda/sm80", "cuda/rows: cuda/sm80 runs"),
        (torch.float16, 257, "cuda/rows", "cuda/sm80: takes head dims of up to 256, got 257"),
        (
            torch.float32,
            64,
            "cuda/rows",
            f"cuda/sm80: takes float32 as TensorFloat-32 only, which {SWITCH} does not allow",
        ),
        (torch.float32, 129, "cuda/rows", "cuda/sm80: takes head dims of up to 128 in float32, got 129"),
        (torch.float64, 64, "cuda/rows", "cuda/sm80: takes no float64"),
    ],
    ids=str,
)
def test_explain_names_the_kernel(dtype: torch.dtype, dim: int, kernel: str, reason: str, gpu: None) -> None:
    found = heedful.explain(*[on_gpu(dtype, dim)] * 3, mask=Causal(), softcap=3.0)
    assert found.kernel == kernel and found.isa is None and reason in found.reasons
    assert f"runs {kernel}, forward and backward" in repr(found)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Torch's switch for matrix products allows TensorFloat-32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("dtype", "dim", "kernel", "reason"),
    [
        (torch.float32, 128, "cuda/sm80", f"cuda/rows: cuda/sm80 runs, as {SWITCH} allows TensorFloat-32"),
        (torch.float32, 129, "cuda/rows", "cuda/sm80: takes head dims of up to 128 in float32, got 129"),
        (torch.bfloat16, 128, "cuda/sm80", "cuda/rows: cuda/sm80 runs"),
        (torch.float64, 64, "cuda/rows", "cuda/sm80: takes no float64"),
    ],
    ids=str,
)
def test_explain_asks_torch_for_tf32(
    dtype: torch.dtype, dim: int, kernel: str, reason: str, gpu: None, tf32: None
) -> None:
    found = heedful.explain(*[on_gpu(dtype, dim)] * 3, mask=Causal(), softcap=3.0)
    assert found.kernel == found.backward == kernel and reason in found.reasons


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_hard_attention_of_float32_stays_exact(precision: str, gpu: None, tf32: None) -> None:
    """Of rounded scores another key may be the best."""
    torch.backends.cuda.matmul.fp32_precision = precision
    found = heedful.explain(*[on_gpu(torch.float32)] * 3, normalizer="hard")
    assert found.kernel == found.backward == "cuda/rows"
    assert "cuda/sm80: leaves hard attention of float32 to cuda/rows" in found.reasons


SWITCHES = (
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
)


def test_calls_ask_torch_for_tf32() -> None:
    """However it is switched on: without a warning or an error, for float32 on a GPU alone. Each in a process of its
    own, as no call undoes all of them; forks of one that has imported all."""
    code = f"""
import os
import warnings
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import heedful
from heedful import ops

given = []
def forward_op(q, k, v, **arguments):
    given.append(arguments.get("allow_tf32", False))
    return q, q
ops.NO_CUDA, ops._forward_op = "", forward_op
def call():
    gpu = [("cuda", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    for device, dtype in (*gpu, ("cpu", torch.float32)):
        with FakeTensorMode():
            q = torch.empty(1, 2, 3, 8, dtype=dtype, device=device)
        heedful.attention(q, q, q)
call()
for switch in {SWITCHES}:
    if os.fork():
        _, status = os.wait()
        assert status == 0, switch
        continue
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a way is deprecated
        exec(switch)
    warnings.simplefilter("error")
    call()
    assert given == [False] * 4 + [True] + [False] * 3, given
    break
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_cpus_compute_exactly() -> None:
    leaves = [torch.randn(1, 2, 30, 16, requires_grad=True) for _ in range(3)]

    def results(**options: bool) -> list[torch.Tensor]:
        out, _ = ops.forward(*leaves, **options)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    assert all(map(torch.equal, results(), results(allow_tf32=True)))


@pytest.mark.parametrize("gpu", [(7, 5)], indirect=True)
def test_explain_refuses_an_old_gpu(gpu: None) -> None:
    found = heedful.explain(*[on_gpu()] * 3)
    assert found.kernel is None
    assert "cuda/sm80: needs a GPU of compute capability 8.0, this one has 7.5" in found.reasons


def test_explain_refuses_sequences_too_long(gpu: None) -> None:
    q = on_gpu()
    k = q[:, :, :1].expand(1, 2, 2**30 + 1, 8)
    found = heedful.explain(q, k, k)
    assert found.kernel is None and "cuda/rows: takes sequences of up to 2^30 rows" in found.reasons


def test_every_reason_not_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CUDA_LIBRARY", tmp_path / "libheedful_cuda.so")
    assert "this build has no CUDA kernels" in ops._load_cuda()
    ops.CUDA_LIBRARY.write_text("no library")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is one without CUDA" in ops._load_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert str(ops.CUDA_LIBRARY) in ops._load_cuda()


def test_every_reason_not_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "NO_CUDA", "not loaded: one reason")
    assert ops.no_gpu() == "not loaded: one reason"
    monkeypatch.setattr(ops, "NO_CUDA", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU" in ops.no_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for driver, expected in ((13000, ""), (14010, ""), (12080, "built by CUDA 13.1, which .*this one is of CUDA 12.8")):

        def versions(to_driver: ctypes._Pointer, to_runtime: ctypes._Pointer, driver: int = driver) -> None:
            to_driver._obj.value, to_runtime._obj.value = driver, 13010

        library = SimpleNamespace(heedful_cuda_versions=versions)
        monkeypatch.setattr(ops.ctypes, "CDLL", lambda path, library=library: library)
        assert re.fullmatch(expected, ops.no_gpu())


@BUILT
def test_library_tells_its_versions() -> None:
    driver, runtime = ctypes.c_int(-1), ctypes.c_int()
    ctypes.CDLL(str(ops.CUDA_LIBRARY)).heedful_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime))
    assert runtime.value >= 12000 and driver.value >= 0


def test_import_starts_neither_cuda_nor_the_compiler() -> None:
    """After the one a forked process could not use it; the other takes as long to import as torch."""
    code = (
        "import sys, torch; torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = None;"
        "import heedful; assert not torch.cuda.is_initialized() and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_hard_attention_goes_back_row_by_row(gpu: None) -> None:
    found = heedful.explain(*[on_gpu()] * 3, normalizer="hard")
    assert (found.kernel, found.backward) == ("cuda/sm80", "cuda/rows")
    assert "runs cuda/sm80; backward cuda/rows" in repr(found)
    assert "cuda/sm80: leaves hard attention's backward to cuda/rows" in found.reasons


@BUILT
def test_build_info_knows() -> None:
    assert _info.build_info()["cuda"]


@BUILT
def test_library_loads_without_a_gpu() -> None:
    """And registers both operators; it has all that it needs in any torch."""
    code = (
        "import torch, heedful; from heedful import ops; torch.ops.load_library(ops.CUDA_LIBRARY);"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "assert all(has(f'heedful::attention_{name}', 'CUDA') for name in ('forward', 'backward'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@BUILT
def test_library_needs_the_stable_abi_alone() -> None:
    for tool in ("readelf", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} (binutils) is not installed")
    dynamic = subprocess.run(["readelf", "-dW", ops.CUDA_LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\) .*\[(.*)\]", dynamic))
    assert {"libheedful.so", "libtorch_cpu.so"} < needed
    assert not [name for name in needed if "cuda" in name]
    assert re.findall(r"\(RUNPATH\) .*\[(.*)\]", dynamic) == ["$ORIGIN"]
    symbols = ["nm", "-D", "-C", "--undefined-only", ops.CUDA_LIBRARY]
    undefined = subprocess.run(symbols, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_" in undefined and "heedful::select" in undefined
    of_torch = [line for line in undefined.splitlines() if re.search(r"\b(?:at|c10|torch)::", line)]
    assert [line for line in of_torch if "heedful::" not in line] == []
