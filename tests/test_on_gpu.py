"""What only a GPU shows: streams, graphs, compilation, several devices, dtypes beside the CPU's results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import heedful
from backends import CUDA, Backend
from functions import normal
from heedful import ALiBi, Causal

missing = Backend.named(CUDA).missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=f"{CUDA}: {missing}")


def slopes(q: Tensor) -> Tensor:
    return torch.linspace(0.1, 0.5, q.shape[1], dtype=q.dtype, device=q.device)


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda q, k, v: heedful.attention(q, k, v, mask=Causal()),
    "capped": lambda q, k, v: heedful.attention(q, k, v, mask=Causal(), softcap=5.0, bias=ALiBi(slopes(q))),
    "dropout": lambda q, k, v: heedful.attention(q, k, v, dropout_p=0.3, seed=7),
    "decoding": lambda q, k, v: heedful.attention(q[:, :, :1], k, v),
}
EVERY_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(dtype: torch.dtype = torch.bfloat16, device: str = "cuda", rows: int = 150) -> list[Tensor]:
    drawn = [normal(2, heads, rows, 64, seed=n) for n, heads in enumerate((4, 2, 2))]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def gradients(call: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@EVERY_CALL
@DTYPES
def test_as_on_the_cpu(call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Dropout too: the same pairs are left out."""
    wide = [x.detach().double().cpu().requires_grad_() for x in inputs(dtype)]
    for got, want in zip(gradients(call, inputs(dtype)), gradients(call, wide), strict=True):
        assert (got.cpu().double() - want).abs().max() <= ERROR[dtype] * want.abs().max()


@EVERY_CALL
def test_tf32_where_torch_allows_it(call: Callable[..., Tensor]) -> None:
    """Else float32 is exact, to the bit what it is before. Backward computes as its forward did."""
    switch = torch.backends.cuda.matmul
    before, results = switch.fp32_precision, []
    try:
        for precision in ("ieee", "tf32", "ieee"):
            switch.fp32_precision = precision
            leaves = inputs(torch.float32)
            out = call(*leaves)
            gradients = []
            for switch.fp32_precision in ("ieee", "tf32"):
                gradients.append(torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True))
            assert all(map(torch.equal, *gradients))
            results.append([out.detach(), *gradients[0]])
    finally:
        switch.fp32_precision = before
    exact, rounded, again = results
    for x, y, z in zip(exact, rounded, again, strict=True):
        assert torch.equal(x, z) and 1e-5 * x.abs().max() < (x - y).abs().max() < 1e-2 * x.abs().max()


@EVERY_CALL
def test_on_another_stream(call: Callable[..., Tensor]) -> None:
    """Work waits for what its stream has before it, and for nothing else."""
    leaves = inputs()
    want = gradients(call, leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    busy = torch.randn(4096, 4096, device="cuda")
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(x) for x in leaves]
        for _ in range(10):
            busy = busy @ busy / 64
        for x, y in zip(late, leaves, strict=True):
            x.copy_(y.detach())
        got = gradients(call, [x.requires_grad_() for x in late])
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@EVERY_CALL
def test_in_a_graph(call: Callable[..., Tensor]) -> None:
    """Captured once, replayed on other numbers."""
    leaves = inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(call, leaves)  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(call, leaves)
    with torch.no_grad():
        for x in leaves:
            x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(captured, gradients(call, leaves), strict=True))


@EVERY_CALL
def test_compiled(call: Callable[..., Tensor]) -> None:
    leaves = inputs()
    for x, y in zip(gradients(torch.compile(call, fullgraph=True), leaves), gradients(call, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(missing is not None or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu() -> None:
    """The tensors' GPU computes, whichever is the current one; tensors of two are refused."""
    first, second = (gradients(CALLS["capped"], inputs(device=f"cuda:{n}")) for n in range(2))
    assert all(y.device.index == 1 and torch.equal(x, y.to("cuda:0")) for x, y in zip(first, second, strict=True))
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match=r"heedful.attention: k: expected .*cuda:0.*got .*cuda:1"):
        heedful.attention(q, k.to("cuda:1"), v)


def test_masks_and_biases_on_the_cpu_are_refused() -> None:
    q, k, v = inputs()
    with pytest.raises((RuntimeError, ValueError), match="mask: expected .*cuda"):
        heedful.attention(q, k, v, mask=torch.ones(150, 150, dtype=torch.bool))


def test_nothing_waits_for_the_gpu() -> None:
    """torch can be told to refuse what would."""
    leaves = inputs()
    gradients(CALLS["capped"], leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(CALLS["capped"], leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_explain_names_what_runs() -> None:
    assert heedful.explain(*inputs(), mask=Causal()).kernel == "cuda/sm80"
    assert heedful.explain(*inputs(torch.float32), mask=Causal()).kernel == "cuda/rows"
