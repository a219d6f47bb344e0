"""torch.export of functions and modules that attend with heedful: a node for each call, any lengths, equal results."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

import heedful
from heedful import ALiBi, Causal, Documents, Gaussian, KeyLengths, RelativeBias, SlidingWindow

FORWARD = torch.ops.heedful.attention_forward.default
BATCH, ROWS = Dim("batch", max=64), Dim("rows", max=5000)
LONG, LONGER = Dim("long", min=65, max=5000), Dim("longer", min=65, max=5000)  # masks built inside need two tiles
Function = Callable[..., Tensor]
# Masks built inside an export divide lengths into tiles.
BUILT_INSIDE = pytest.mark.xfail(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="torch 2.10 does not simplify its own guards"
)


class Module(torch.nn.Module):
    """A function of tensors, and the parameters that features of heedful have."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        torch.manual_seed(0)
        self.slopes, self.sinks, self.bandwidth = (torch.nn.Parameter(torch.rand(4) + 0.5) for _ in range(3))
        self.table = torch.nn.Parameter(torch.randn(16, 4))

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(self, *tensors)


def exported(module: torch.nn.Module, example: tuple, dynamic_shapes: tuple, strict: bool) -> ExportedProgram:
    """The program in torch's own operators, written to a file and read again."""
    program = torch.export.export(module, example, dynamic_shapes=dynamic_shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program.run_decompositions(), file)
    file.seek(0)
    return torch.export.load(file)


def calls(program: ExportedProgram) -> list:
    return [node.target for node in program.graph.nodes if "heedful" in str(node.target)]


def qkv(batch: int, q_length: int, k_length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(q_length)
    shapes = (batch, 4, q_length, 8), (batch, 2, k_length, 8), (batch, 2, k_length, 6)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


FUNCTIONS: dict[str, Function] = {
    "lengths": lambda m, q, k, v, n: heedful.attention(q, k, v, mask=Causal() & KeyLengths(n)),
    "parameters": lambda m, q, k, v, n: heedful.attention(
        *(q, k, v), bias=ALiBi(m.slopes) + RelativeBias(m.table), sinks=m.sinks, softcap=5.0, align=n - 1
    ),
    "similarity": lambda m, q, k, v, n: heedful.attention(q, k, v, similarity=Gaussian(m.bandwidth), normalizer="hard"),
    "dropout": lambda m, q, k, v, n: heedful.attention(q, k, v, dropout_p=0.5, seed=3),
    "mask of tensors": lambda m, q, k, v, n: heedful.attention(q, k, v, mask=q[..., :1] > k[:, :1, :, 0][:, :, None]),
    "union": lambda m, q, k, v, n: heedful.attention(q, k, v, mask=SlidingWindow(30, 5) | KeyLengths(n)),
}


@pytest.mark.parametrize("strict", (False, True), ids=("traced", "strict"))
@pytest.mark.parametrize("name", [pytest.param(n, marks=BUILT_INSIDE if n == "union" else ()) for n in FUNCTIONS])
def test_attention(name: str, strict: bool) -> None:
    module = Module(FUNCTIONS[name])
    shapes = ({0: BATCH, 2: LONG}, {0: BATCH, 2: LONGER}, {0: BATCH, 2: LONGER}, {0: BATCH})
    program = exported(module, (*qkv(3, 70, 90), torch.tensor([5, 90, 33])), (shapes,), strict)
    assert calls(program) == [FORWARD]
    for lengths, q_length, k_length in (([65, 130], 129, 130), ([64] * 5, 66, 200)):
        inputs = (*qkv(len(lengths), q_length, k_length), torch.tensor(lengths))
        assert torch.equal(program.module()(*inputs), module(*inputs))


@pytest.mark.parametrize("strict", (False, True), ids=("traced", "strict"))
def test_packed_sequences(strict: bool) -> None:
    module = Module(lambda m, x, n: heedful.varlen_attention(x, x, x, n, mask=Causal(), bias=ALiBi(m.slopes)))
    shapes = ({0: ROWS}, {0: Dim("offsets", min=3, max=100)})
    program = exported(module, (torch.randn(50, 4, 8), torch.tensor([0, 20, 50])), (shapes,), strict)
    assert calls(program) == [FORWARD]
    for offsets in ([0, 7, 30, 30, 160], [2, 9, 13]):
        inputs = torch.randn(offsets[-1], 4, 8), torch.tensor(offsets)
        assert torch.equal(program.module()(*inputs), module(*inputs))


@BUILT_INSIDE
@pytest.mark.parametrize("strict", (False, True), ids=("traced", "strict"))
def test_documents(strict: bool) -> None:
    module = Module(lambda m, q, k, v, *ids: heedful.attention(q, k, v, mask=Causal() & Documents(*ids)))
    shapes = ({0: BATCH, 2: LONG}, *[{0: BATCH, 2: LONGER}] * 2, {0: LONG}, {0: LONGER})
    example = (*qkv(3, 130, 140), torch.arange(130) // 40, torch.arange(140) // 40)
    program = exported(module, example, (shapes,), strict)
    assert calls(program) == [FORWARD]
    for q_length, k_length in ((130, 130), (66, 200), (192, 65)):
        inputs = (*qkv(2, q_length, k_length), torch.arange(q_length) // 50, torch.arange(k_length) // 60)
        assert torch.equal(program.module()(*inputs), module(*inputs))


@pytest.mark.parametrize("strict", (False, True), ids=("traced", "strict"))
def test_a_swapped_encoder(strict: bool) -> None:
    model = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    heedful.swap(model)
    program = exported(model, (torch.randn(3, 9, 16),), ({0: BATCH, 1: ROWS},), strict)
    assert calls(program) == [FORWARD] * 2
    for batch, length in ((2, 5), (7, 100)):
        x = torch.randn(batch, length, 16)
        torch.testing.assert_close(program.module()(x), model(x))


def test_gradients_of_an_exported_program() -> None:
    module = Module(FUNCTIONS["parameters"])
    inputs = (*qkv(2, 9, 11), torch.tensor([5, 11]))
    got, want = torch.export.export(module, inputs).module(), module
    for m in (got, want):
        m(*inputs).square().sum().backward()
    gradients = [{name: x.grad for name, x in m.named_parameters() if x.grad is not None} for m in (got, want)]
    assert set(gradients[1]) == {"slopes", "sinks", "table"}
    torch.testing.assert_close(*gradients)
