"""attention_forward against the float64 truth: empty rows, sizes around tiles' ends, every offset; the truth itself.

The table of cases runs in test_backward.py, which checks out and lse too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import cases
import heedful
import table
from backends import Backend
from cases import (
    Case,
    Problem,
    build,
    check,
    definition_results,
    function_results,
    reference_results,
)
from oracle_scores import seen_pairs

DTYPES = pytest.mark.parametrize("dtype", cases.FULL_DTYPES, ids=cases.short)


def check_forward(problem: Problem) -> None:
    check(problem, dict(zip(("out", "lse"), problem.forward(), strict=True)))


@pytest.mark.cuda_kernels
@DTYPES
@pytest.mark.parametrize("case", table.EMPTY, ids=str)
def test_nothing_to_attend_to(case: Case, dtype: torch.dtype, backend: Backend, dirty_memory: None) -> None:
    problem = build(case, dtype, backend.device)
    check_forward(problem)
    out, lse = problem.forward()
    dead = lse == -torch.inf
    assert dead.all() or 0 in case.sizes[5:], "the case is meant to be one of empty rows"
    assert (out[dead] == 0).all() and not out[dead].signbit().any()


@pytest.mark.parametrize("queries", table.LENGTHS)
@pytest.mark.parametrize("options", [{}, {"right": 0}, {"left": 33, "right": 20}], ids=["full", "causal", "window"])
def test_lengths(queries: int, options: dict, backend: Backend) -> None:
    """The pairs of lengths around the ends of tiles that test_backward.py leaves out; bottom-right under a band."""
    first = table.LENGTHS.index(queries) % 2
    for keys in table.LENGTHS[1 - first :: 2]:
        start = keys - queries if options else 0
        case = Case((1, 1, 1, queries, keys, 4, 4), q_start=start, **options)
        check_forward(build(case, torch.float32, backend.device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.short)  # others compute in float32
@pytest.mark.parametrize("queries", [1, 70], ids=["decoding", "blocks"])
def test_weights_of_far_scores(queries: int, dtype: torch.dtype, backend: Backend) -> None:
    """A key x below the best weighs exp(-x) until that nears the subnormal numbers, then nothing: never a subnormal."""
    lowest = torch.finfo(dtype).tiny
    x = torch.arange(0, -1.1 * torch.tensor(lowest, dtype=torch.float64).log(), 0.125, dtype=torch.float64)
    k = torch.stack([torch.zeros_like(x), -x], 1).to(dtype)[:, None, :, None]
    v = torch.tensor([0.0, 1.0], dtype=dtype).expand(len(x), 1, 2)[..., None]
    q = torch.ones(len(x), 1, queries, 1, dtype=dtype)
    out = heedful.attention(*(t.to(backend.device) for t in (q, k, v)), scale=1.0).cpu()
    weight = (-x).exp() / (1 + (-x).exp())
    near = weight > 4096 * lowest
    for i in range(queries):
        off = (out[:, 0, i, 0].double() / weight - 1).abs()[near]
        assert (off <= (4 + x[near]) * torch.finfo(dtype).eps).all()
        rest = out[:, 0, i, 0][~near]
        assert ((rest == 0) | (rest >= lowest)).all() and (rest <= 8192 * lowest).all() and rest[-1] == 0


@pytest.mark.cuda_kernels
def test_far_positions(backend: Backend) -> None:
    """Positions and windows near the ends of 64-bit integers must not wrap around."""
    far = 2**62
    for option in (
        {"q_start": far, "right": 0},
        {"q_start": -far, "right": 0},
        {"q_start": far, "left": far},
        {"q_start": -far, "right": far},
        {"left": 2**63 - 1, "right": 2**63 - 1, "q_start": 5},
        {"left": 2**63 - 1, "right": 0, "q_start": -5},
        {"q_starts": (far, -far, 3), "left": 9},
        {"q_starts": (far, -far, 3), "right": 9},
    ):
        check_forward(build(Case((3, 1, 1, 5, 70, 4, 4), **option), torch.float32, backend.device))


@pytest.mark.parametrize("layout", [*cases.LAYOUTS, *cases.EXPANDED])
def test_layouts_are_what_they_say(layout: str) -> None:
    """The tensors of a case lie in memory as asked, for each dtype, the mask and the bias included."""
    x = cases.filled((2, 2, 3, 4), layout, torch.Generator())
    for dtype in cases.FULL_DTYPES:
        problem = build(Case((2, 2, 2, 3, 4, 4, 4), mask="bhqk", bias="bhqk", layouts=(layout,), gain=2.0), dtype)
        tensors = [problem.q, problem.options["bias"]]
        tensors += [problem.options["mask"]] if layout != "negated" else []
        for tensor in tensors:
            assert tensor.stride() == x.stride() and tensor.storage_offset() == x.storage_offset()
            assert tensor.is_neg() == x.is_neg()
        assert problem.options["bias"].dtype is dtype and problem.options["mask"].dtype is torch.bool
    assert layout in (cases.PLAIN, "negated", "offset") or not x.is_contiguous()


@pytest.mark.parametrize("case", [*table.TABLE, *table.EMPTY], ids=str)
def test_results_lie_as_their_inputs(case: Case, backend: Backend) -> None:
    """out follows q, dq q, dk k and dv v: [B, S, H, D] in memory where the input's heads are nearer than its rows."""
    problem = build(case, torch.float32, backend.device)
    results = problem.results()
    for name, like in (("out", "q"), ("dq", "q"), ("dk", "k"), ("dv", "v")):
        x, source = results[name], getattr(problem, like)
        nearer = source.stride(1) < source.stride(2)
        assert (x.transpose(1, 2) if nearer else x).is_contiguous(), f"{name} has strides {x.stride()}"
    assert results["lse"].is_contiguous()
    assert all(results[f"d{name}"].is_contiguous() for name in problem.parameters)


EXPRESSIBLE = [case for case in (*table.TABLE, *table.EMPTY) if cases.expressible(case)]


@pytest.mark.parametrize("case", [*table.TABLE, *table.EMPTY], ids=str)
def test_truth_is_the_definition(case: Case) -> None:
    """Two independent statements of the semantics agree: tests/oracle.py and heedful's own, in float64."""
    problem = build(case, torch.float64)
    check(problem, definition_results(problem))


@pytest.mark.parametrize("case", EXPRESSIBLE, ids=str)
def test_truth_is_the_reference(case: Case) -> None:
    """The same with arguments as users type them."""
    problem = build(case, torch.float64)
    check(problem, reference_results(problem))


@pytest.mark.parametrize("case", [case for case in EXPRESSIBLE if case.tiles is None], ids=str)
def test_python_front_is_the_op(case: Case, backend: Backend) -> None:
    """What users type passes every option on: the same bits as the op called directly, gradients included."""
    problem = build(case, torch.float32, backend.device)
    results = function_results(problem, heedful)
    expected = problem.results()
    assert results.keys() == expected.keys()
    assert [name for name, want in expected.items() if not torch.equal(results[name], want)] == []


TORCH_HAS = [c for c in table.TABLE if c not in table.WITH_FEATURES and c.scale is None and c.layouts == (cases.PLAIN,)]


@pytest.mark.parametrize("case", TORCH_HAS, ids=str)
def test_truth_is_torch(case: Case) -> None:
    """The truth against torch's own attention with a dense mask, in float64, in the rows that attend to something."""
    problem = build(case, torch.float64)
    batch, heads, _, queries, keys, _, _ = case.sizes
    options = {name: x for name, x in problem.options.items() if name != "bias"}
    mask = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    mask.masked_fill_(~seen_pairs((batch, heads, queries, keys), **options), -torch.inf)
    mask += problem.options.get("bias", 0)
    want = F.scaled_dot_product_attention(problem.q, problem.k, problem.v, mask, enable_gqa=True)
    truth = problem.truth()
    alive = truth.values["lse"] != -torch.inf
    torch.testing.assert_close(truth.values["out"][alive], want[alive], rtol=1e-11, atol=1e-13)
