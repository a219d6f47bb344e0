"""The same inputs give the same bits: from run to run, for any number of threads, and whatever else is in the batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from backends import Backend
from cases import Case, Problem, build, causal

DTYPES = pytest.mark.parametrize("dtype", cases.FULL_DTYPES, ids=cases.short)

# Long enough for several tiles, tasks and groups of keys; one head with many keys, and many heads with few.
CASES = (
    Case((2, 4, 2, 300, 333, 24, 40)),
    causal((1, 1, 1, 1100, 1100, 16, 16)),
    Case((1, 1, 1, 40, 2500, 8, 8)),
    causal((3, 4, 1, 130, 200, 33, 17), bias="hqk", wide_bias=True),
    Case((3, 4, 4, 70, 90, 16, 16), bias="k", mask="bqk"),
    Case((3, 4, 2, 70, 90, 16, 16), bias="", left=30, right=5, q_start=20),
    Case((4, 2, 2, 257, 300, 16, 16), bias="qk", k_lengths=(300, 1, 0, 190), q_lengths=(257, 200, 7, 64)),
    Case((1, 2, 1, 900, 70, 16, 16), bias="bhqk"),
)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of the tensors whose bits differ."""
    return [name for name in a if not torch.equal(a[name], b[name])]


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads(case: Case, dtype: torch.dtype, backend: Backend, threads: None) -> None:
    problem = build(case, dtype, backend.device)
    torch.set_num_threads(1)
    first = problem.results()
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        assert torch.get_num_threads() == count
        assert not differing(first, problem.results()), f"{count} threads"


def chosen(problem: Problem, order: list[int]) -> Problem:
    """The problem whose batch holds the sequences `order` of this one, in that order."""
    batch = problem.case.sizes[0]

    def pick(x: Any) -> Any:
        return x[order] if isinstance(x, Tensor) and x.shape[0] == batch else x

    tensors = {name: pick(getattr(problem, name)) for name in ("q", "k", "v", "dout", "dlse")}
    return replace(problem, **tensors, options={name: pick(x) for name, x in problem.options.items()})


PER_SEQUENCE = ("out", "lse", "dq", "dk", "dv")


@DTYPES
@pytest.mark.parametrize(
    "case",
    [
        Case((5, 2, 1, 70, 150, 16, 24)),
        causal((5, 2, 2, 197, 300, 16, 16)),
        causal((5, 1, 1, 1, 700, 32, 32)),
        causal((5, 1, 1, 600, 600, 8, 8), bias="hqk"),
        Case((5, 2, 1, 70, 150, 16, 24), bias="bk", mask="bhqk"),
        Case((5, 2, 1, 70, 150, 16, 24), q_starts=(0, 80, -30, 500, 7), left=60, right=0),
        Case((5, 2, 2, 129, 300, 16, 16), k_lengths=(300, 0, 1, 200, 129), q_lengths=(1, 129, 70, 64, 65)),
    ],
    ids=str,
)
def test_any_company_in_the_batch(case: Case, dtype: torch.dtype, backend: Backend, threads: None) -> None:
    """A sequence alone, first, last, twice, and among others gives the same bits, on any number of threads."""
    problem = build(case, dtype, backend.device)
    whole = problem.results()
    for count, order in ((1, [0]), (2, [3]), (3, [4, 2]), (2, [1, 1, 0, 4, 3, 2, 2]), (3, list(range(5)) * 4)):
        torch.set_num_threads(count)
        some = chosen(problem, order).results()
        wrong = [name for name in PER_SEQUENCE if not torch.equal(some[name], whole[name][order])]
        assert not wrong, f"batch of {order}, {count} threads"


@DTYPES
@pytest.mark.parametrize("lengths", [(70, 150), (1, 64), (64, 65), (100, 300), (5, 5), (130, 1), (20, 700)], ids=str)
@pytest.mark.parametrize("band", [{}, {"right": 0}, {"left": 40, "right": 3}], ids=["full", "causal", "window"])
def test_any_padding(band: dict, lengths: tuple[int, int], dtype: torch.dtype, backend: Backend) -> None:
    """A sequence of given lengths has the same bits whatever it is padded to and however long its neighbours are."""
    (queries, keys), (most_queries, most_keys) = lengths, (200, 400 + 2 * lengths[1])
    others = ((most_queries, most_keys), (0, 0), (31, 7))
    longest = Case(
        (4, 2, 1, most_queries, most_keys, 16, 8), **band,
        q_lengths=(queries, *(q for q, _ in others)), k_lengths=(keys, *(k for _, k in others)),
        q_starts=(keys - queries, *(k - q for q, k in others)),
    )  # fmt: skip
    problem = build(longest, dtype, backend.device)
    whole = problem.results()
    cut = {"out": queries, "lse": queries, "dq": queries, "dk": keys, "dv": keys}
    for more_queries, more_keys in ((0, 0), (0, 37), (3, 0), (64, 64), (65, keys)):
        alone = chosen(problem, [0])
        q_end, k_end = queries + more_queries, keys + more_keys
        alone = replace(
            alone,
            **{name: getattr(alone, name)[:, :, :q_end].clone() for name in ("q", "dout", "dlse")},
            **{name: getattr(alone, name)[:, :, :k_end].clone() for name in ("k", "v")},
        )
        some = alone.results()
        wrong = [name for name, end in cut.items() if not torch.equal(some[name][:, :, :end], whole[name][:1, :, :end])]
        assert not wrong, f"padded to {q_end} queries and {k_end} keys"


def test_calls_from_several_threads_at_once(backend: Backend, threads: None) -> None:
    """Calls share nothing: four Python threads, each with its own problem, get the bits that each gets alone."""
    torch.set_num_threads(2)
    problems = [build(case, torch.float32, backend.device) for case in CASES]
    alone = [problem.results() for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = pool.map(Problem.results, problems)
            assert not any(differing(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_stay_as_they_were(case: Case, backend: Backend) -> None:
    """Neither op writes to an input, and what they return is new memory."""
    problem = build(case, torch.float32, backend.device)
    tensors = [problem.q, problem.k, problem.v, problem.dout, problem.dlse, *problem.options.values()]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    results = problem.results()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    owners = [x.untyped_storage().data_ptr() for x in (*tensors, *results.values())]
    assert len(set(owners)) == len(owners)
