"""attention_backward: against the float64 truth across tiles, and by gradcheck through out and lse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import cases
import heedful
import table
from backends import Backend
from cases import Case, build, causal, check, packed
from table import WINDOWS, together

DTYPES = pytest.mark.parametrize("dtype", cases.FULL_DTYPES, ids=cases.short)


@pytest.mark.cuda_kernels
@DTYPES
@pytest.mark.parametrize("case", [*table.TABLE, *table.EMPTY], ids=str)
def test_table(case: Case, dtype: torch.dtype, backend: Backend, dirty_memory: None) -> None:
    check(build(case, dtype, backend.device))


@pytest.mark.parametrize("queries", table.LENGTHS)
@pytest.mark.parametrize("options", [{}, {"right": 0}, {"left": 33, "right": 20}], ids=["full", "causal", "window"])
def test_lengths(queries: int, options: dict, backend: Backend) -> None:
    """Every second pair of lengths around the ends of tiles; bottom-right where there is a band."""
    first = table.LENGTHS.index(queries) % 2
    for keys in table.LENGTHS[first::2]:
        start = keys - queries if options else 0
        case = Case((1, 1, 1, queries, keys, 4, 4), q_start=start, bias="hqk" if keys % 3 else None, **options)
        check(build(case, torch.float32, backend.device))


@DTYPES
@pytest.mark.parametrize("width", table.WIDTHS)
def test_widths(width: int, dtype: torch.dtype, backend: Backend) -> None:
    for v_width in {width, 7, 64}:
        check(build(causal((1, 2, 1, 17, 70, width, v_width)), dtype, backend.device))
        check(build(Case((1, 2, 1, 66, 19, v_width, width), layouts=("bshd",)), dtype, backend.device))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 12, 32])
def test_groups_of_query_heads(group: int, backend: Backend) -> None:
    for queries in (1, 3, 20):
        for kv_heads in (1, 2):
            case = causal((2, kv_heads * group, kv_heads, queries, 70, 16, 16))
            check(build(case, torch.float32, backend.device))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (5, 7), (18, 20), (9, 3)], ids=str)
def test_every_small_offset(sizes: tuple[int, int], window: tuple[int | None, int | None], backend: Backend) -> None:
    (queries, keys), (left, right) = sizes, window
    for start in range(-max(queries, keys) - 3, max(queries, keys) + 4):
        case = Case((1, 1, 1, queries, keys, 3, 3), left=left, right=right, q_start=start)
        check(build(case, torch.float32, backend.device))


@pytest.mark.parametrize("window", [(None, 0), (40, 10), (64, None), (0, 63)], ids=str)
def test_every_offset_across_tiles(window: tuple[int | None, int | None], backend: Backend) -> None:
    """All offsets at once: each sequence of the batch has its own."""
    queries, keys = 70, 140
    starts = tuple(range(-queries - 3, keys + 4))
    left, right = window
    sizes = (len(starts), 1, 1, queries, keys, 3, 3)
    check(build(Case(sizes, left=left, right=right, q_starts=starts), torch.float32, backend.device))


@pytest.mark.parametrize("shape", table.BROADCASTS, ids=lambda shape: shape or "one")
def test_bias_gradient_of_every_broadcast_shape(shape: str, backend: Backend) -> None:
    """Summed over its broadcast dimensions across tiles, heads and sequences, in the bias's own dtype."""
    for dtype in cases.FULL_DTYPES:
        for wide in (False, True):
            case = Case((2, 4, 2, 70, 150, 8, 8), bias=shape, wide_bias=wide, holes=0.1, k_lengths=(150, 65), right=9)
            check(build(case, dtype, backend.device))


@pytest.mark.cuda_kernels
def test_float32_bias_beside_float64(backend: Backend) -> None:
    """A float32 bias serves every dtype; its gradient is float32 too, and as good as that allows."""
    problem = build(causal((2, 4, 2, 35, 70, 24, 17), bias="hqk", holes=0.1), torch.float64, backend.device)
    problem.options["bias"] = problem.options["bias"].float()
    results = problem.results()
    dbias = results.pop("dbias")
    assert dbias.dtype is torch.float32
    truth = problem.truth()
    check(problem, results, truth)
    torch.testing.assert_close(dbias.double().cpu(), truth.values["dbias"], rtol=2e-7, atol=1e-7)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("layout", ["scalar", "expand_s", "expand_d", "bhds", "strided", "bshd", "negated"])
def test_gradients_arrive_in_any_layout(layout: str, backend: Backend) -> None:
    """dout and dlse as autograd hands them over: expanded from one number, transposed, sliced."""
    problem = build(
        causal((2, 4, 2, 35, 70, 24, 17), layouts=("contiguous",) * 3 + (layout,)), torch.float32, backend.device
    )
    generator = torch.Generator().manual_seed(1)
    dlse = cases.filled((*problem.dlse.shape, 1), layout, generator).squeeze(-1)
    problem.dlse = cases.cast(dlse, torch.float32, backend.device)
    check(problem)


@pytest.mark.cuda_kernels
def test_saved_results_in_any_layout(backend: Backend) -> None:
    """The op called directly takes out and lse as they come, strided and not contiguous."""
    problem = build(causal((2, 4, 2, 35, 70, 24, 17)), torch.float32, backend.device)
    out, lse = problem.forward()
    out, lse = (torch.stack((x, x.neg()), -1)[..., 0] for x in (out, lse))
    assert not (out.is_contiguous() or lse.is_contiguous())
    inputs = (problem.dout, problem.dlse, problem.q, problem.k, problem.v, out, lse)
    gradients = torch.ops.heedful.attention_backward(*inputs, **problem.options)
    check(problem, dict(zip(("dq", "dk", "dv"), gradients[:3], strict=True)))


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
def test_rows_far_apart(dtype: torch.dtype, backend: Backend, tmp_path: Path) -> None:
    """The last row begins past 2^32 elements: a file says so, of which a few pages exist."""
    if backend.device != "cpu":
        pytest.skip(f"{backend.name}: a file lies in the CPU's memory")
    problem = build(causal((1, 2, 2, 3, 5, 8, 16), bias="hqk"), dtype)
    tensors = {name: getattr(problem, name) for name in ("q", "k", "v", "dout")} | {"bias": problem.options["bias"]}
    for name, x in tensors.items():
        heads, rows, width = x.shape[1:]
        step = 2**32 // (rows - 1) + heads * width
        size = rows * step
        memory = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)
        far = memory.as_strided(x.shape, (size, width, step, 1)).copy_(x)
        assert (rows - 1) * far.stride(2) > 2**32
        if name == "bias":
            problem.options[name] = far
        else:
            setattr(problem, name, far)
    try:
        check(problem)
    finally:
        for name in tensors:
            (tmp_path / name).unlink()


@pytest.mark.cuda_kernels
def test_without_a_gradient_of_lse(backend: Backend) -> None:
    """dlse=None is a gradient of zero."""
    problem = build(causal((2, 4, 2, 35, 70, 24, 17), bias="hqk", sinks="h"), torch.float32, backend.device)
    tensors = (problem.q, problem.k, problem.v, *problem.forward())
    backward, wanted = torch.ops.heedful.attention_backward, {"bias_grad": True, "sinks_grad": True}
    some = backward(problem.dout, None, *tensors, **problem.options, **wanted)
    same = backward(problem.dout, torch.zeros_like(tensors[-1]), *tensors, **problem.options, **wanted)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(some, same, strict=True))
    problem.dlse = torch.zeros_like(problem.dlse)
    check(problem)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("wanted", [(), *((name,) for name in cases.PARAMETERS), ("sinks", "table")], ids="+".join)
@pytest.mark.parametrize("sizes", [(2, 2, 1, 19, 23, 8, 8), (1, 2, 2, 70, 150, 8, 8)], ids=str)
def test_parameters_that_want_a_gradient(sizes: tuple, wanted: tuple[str, ...], backend: Backend) -> None:
    """Those alone get one, and it is right whoever else gets one."""
    problem = build(Case(sizes, **table.TOGETHER), torch.float32, backend.device)
    tensors = (problem.q, problem.k, problem.v, *problem.forward())
    flags = {f"{name}_grad": True for name in wanted}
    gradients = torch.ops.heedful.attention_backward(problem.dout, problem.dlse, *tensors, **problem.options, **flags)
    results = dict(zip(cases.NAMES[2:], gradients, strict=True))
    assert [name for name in cases.PARAMETERS if results[f"d{name}"] is not None] == [
        name for name in cases.PARAMETERS if name in wanted
    ]
    check(problem, {name: x for name, x in results.items() if x is not None})


@pytest.mark.parametrize("name", cases.PARAMETERS[1:])
@pytest.mark.parametrize("shape", ["h", "bh"])
def test_gradient_of_every_parameter_shape(shape: str, name: str, backend: Backend) -> None:
    """Summed over queries, keys and what it broadcasts over, across tiles, in the parameter's own dtype."""
    for dtype in cases.FULL_DTYPES:
        for wide in (False, True):
            case = Case((3, 4, 2, 70, 150, 8, 8), **{name: shape}, wide=wide, k_lengths=(150, 65, 0), right=9)
            check(build(case, dtype, backend.device))


def gradcheck_case(case: Case, device: str, wanted: tuple[str, ...] | None = None, **how: Any) -> None:
    """gradcheck in float64 of out and of lse where it is finite, for the inputs in `wanted`, by default for all."""
    problem = build(case, torch.float64, device)
    if case.normalizer == "hard":  # no ties, which a small step would break
        problem.q += torch.linspace(0, 0.1, problem.q.numel(), dtype=torch.float64).view(problem.q.shape)
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v} | problem.parameters
    leaves = [x.clone().requires_grad_(wanted is None or name in wanted) for name, x in inputs.items()]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = problem.options | dict(zip(inputs, tensors, strict=True))
        out, lse = torch.ops.heedful.attention_forward(**arguments)
        if case.normalizer == "hard":
            return (out,)  # lse, the largest score, has no gradient here
        return out, lse.where(lse != -torch.inf, 0)  # finite differences of -inf are NaN

    assert gradcheck(call, tuple(leaves), **how)


TINY = (2, 2, 1, 4, 6, 3, 2)
GRADCHECKED = (
    Case((2, 2, 2, 3, 5, 3, 3)),
    Case((1, 4, 2, 3, 5, 3, 2)),
    Case((1, 6, 1, 2, 3, 1, 4)),
    causal((1, 2, 1, 5, 7, 3, 2)),
    Case((1, 2, 1, 5, 7, 3, 2), right=0),
    Case((1, 2, 1, 5, 7, 3, 2), right=0, q_start=-2),
    Case((2, 2, 1, 5, 7, 3, 2), right=0, q_starts=(-2, 3)),
    Case((1, 2, 1, 5, 7, 3, 2), left=2, right=1, q_start=1),
    Case((2, 2, 1, 5, 7, 3, 2), left=1, q_starts=(0, 9)),
    Case((3, 2, 1, 4, 6, 3, 2), k_lengths=(6, 0, 3)),
    Case((3, 2, 1, 4, 6, 3, 2), q_lengths=(4, 0, 3), k_lengths=(1, 5, 6), right=0, q_starts=(2, 1, 0)),
    Case((2, 2, 1, 4, 6, 3, 2), mask="bhqk"),
    Case((2, 2, 1, 4, 6, 3, 2), mask="k", scale=0.7),
    Case((2, 2, 2, 4, 6, 3, 2), bias="hqk", mask="bk", right=0, q_start=2),
    Case((2, 2, 2, 4, 6, 3, 2), bias="bqk", holes=0.4),
    Case((1, 2, 1, 3, 4, 0, 2), bias="qk"),
    Case((1, 2, 1, 3, 4, 2, 0)),
    Case((2, 2, 1, 3, 4, 3, 2), layouts=("bshd", "bhds", "strided")),
    *(Case(TINY, **options, seed=n) for n, options in enumerate(table.FEATURES.values())),
    *(Case(TINY, **{name: "bh"}, seed=n) for n, name in enumerate(cases.PARAMETERS[1:])),
)


@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
def test_gradcheck(case: Case, backend: Backend) -> None:
    gradcheck_case(case, backend.device)


# gradcheck's fast mode compares one number for each input and output, in random directions.
FAST = (
    *(Case((2, 2, 1, 4, 6, 2, 3), bias=shape, seed=n) for n, shape in enumerate(table.BROADCASTS)),
    *(Case(TINY, **options, bias="qk", q_starts=(2, -1), right=1) for options in table.FEATURES.values()),
    *(packed((2, 1), (3, 2), (4, 6), (0, 2), (3, 1), **options, outside=1) for options in table.FEATURES.values()),
    *(Case(TINY, **together(*pair), left=3) for pair in table.PAIRS),
    Case(TINY, scales="h", similarity="cosine"),
    Case(TINY, scales="bh", similarity="gaussian"),
    Case(TINY, scale=-0.5, similarity="gaussian"),
    Case(TINY, softcap=0.5),
    Case(TINY, sinks="bh", right=0, q_start=-2, q_lengths=(4, 2)),
    Case((2, 2, 1, 4, 0, 3, 2), sinks="h"),
    Case(TINY, table="h", reach=2, slopes="h", q_start=3),
    Case(TINY, dropout_p=0.7, seeds=True),
    *(Case(TINY, **table.TOGETHER, similarity=kind, right=4) for kind in ("dot", "cosine", "gaussian")),
    packed((4, 2), (3, 2), (4, 6), (0, 2), (3, 1), **table.TOGETHER, seeds=True),
)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("case", FAST, ids=str)
def test_gradcheck_fast(case: Case, backend: Backend) -> None:
    gradcheck_case(case, backend.device, fast_mode=True)


@pytest.mark.parametrize(
    "wanted",
    [*((name,) for name in ("q", "k", "v", *cases.PARAMETERS)), ("q", "k"), ("v", "bias"), ("k", "sinks", "table")],
    ids="+".join,
)
def test_gradcheck_of_some_inputs(wanted: tuple[str, ...], backend: Backend) -> None:
    """The inputs that need no gradient change nothing for those that do."""
    gradcheck_case(Case((2, 4, 2, 3, 5, 3, 2), **table.TOGETHER, right=1), backend.device, wanted)


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 2, 1, 70, 130, 17, 9), bias="qk"),
        causal((1, 2, 2, 129, 129, 33, 40)),
        Case((2, 2, 1, 66, 150, 8, 8), left=40, right=3, q_starts=(0, 84), k_lengths=(150, 101), bias="bk"),
        *(Case((2, 2, 1, 66, 150, 8, 8), **table.TOGETHER, similarity=kind) for kind in ("dot", "cosine", "gaussian")),
        packed((2, 1), (8, 8), (66, 150), (9, 65), **table.TOGETHER, right=20),
    ],
    ids=str,
)
def test_gradcheck_across_tiles(case: Case, backend: Backend) -> None:
    """In random directions, which is what gradcheck's fast mode does: one number for each input and output."""
    gradcheck_case(case, backend.device, fast_mode=True)


def test_nothing_of_a_great_length() -> None:
    """An empty batch has no task, whatever its other sizes would make of one."""
    q, k = torch.empty(0, 1, 2**57, 1, requires_grad=True), torch.empty(0, 1, 1, 1, requires_grad=True)
    heedful.attention(q, k, k).sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape
