"""Random problems drawn by hypothesis, every feature together, forward and every gradient against the float64 truth.

The seed is printed at the end of each run (--hypothesis-seed repeats it); HEEDFUL_HYPOTHESIS=long draws thousands.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cases
import table
from backends import Backend
from cases import Case, build, check

SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

small = st.integers(0, 20)
across_tiles = st.sampled_from(table.LENGTHS)
lengths = st.one_of(small, small, across_tiles)
widths = st.one_of(st.integers(0, 12), st.integers(0, 12), st.sampled_from(table.WIDTHS))
layouts = st.sampled_from((*cases.LAYOUTS, *cases.EXPANDED))
dimensions = st.one_of(st.none(), st.sampled_from(table.BROADCASTS))
parameters = st.sampled_from((None, None, None, "h", "bh"))
PAIRS_AT_MOST = 200_000


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, torch.dtype]:
    """Any case of at most a few hundred thousand pairs, and a dtype."""
    batch, kv_heads, group = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 4))
    queries, keys = draw(lengths), draw(lengths)
    if batch * kv_heads * group * queries * keys > PAIRS_AT_MOST:
        batch, kv_heads = min(batch, 1), min(kv_heads, 1)
    packed = None
    if batch and draw(st.sampled_from((False, False, True))):  # the first sequence is the longest one
        others = st.tuples(st.integers(0, queries), st.integers(0, keys))
        packed = ((queries, keys), *(draw(others) for _ in range(batch - 1)))
    around = st.integers(-queries - 3, keys + 3)
    side = st.one_of(st.none(), st.integers(-3, 5), st.integers(0, keys + 3))

    def per_sequence(values: st.SearchStrategy[int]) -> tuple[int, ...] | None:
        return draw(st.one_of(st.none(), st.tuples(*[values] * batch)))

    scales = draw(parameters)
    case = Case(
        sizes=(batch, kv_heads * group, kv_heads, queries, keys, draw(widths), draw(widths)),
        packed=packed,
        outside=draw(st.integers(0, 3)) if packed else 0,
        left=draw(side),
        right=draw(st.one_of(st.just(0), side)),
        q_start=draw(st.one_of(st.just(keys - queries), around)),
        q_starts=per_sequence(around),
        q_lengths=per_sequence(st.integers(-1, queries + 1)),
        k_lengths=per_sequence(st.integers(-1, keys + 1)),
        mask=draw(dimensions),
        tiles=draw(st.sampled_from((None, None, None, "", "b", "h", "bh"))),
        bias=draw(dimensions),
        wide_bias=draw(st.booleans()),
        holes=draw(st.sampled_from((0.0, 0.2, 0.9))),
        similarity=draw(st.sampled_from(("dot", "dot", "cosine", "gaussian"))),
        scale=None if scales else draw(st.sampled_from((None, None, 0.3, -1.0, 0.0))),
        scales=scales,
        softcap=draw(st.sampled_from((None, None, 0.7, 30.0))),
        sinks=draw(parameters),
        slopes=draw(parameters),
        table=draw(parameters),
        reach=draw(st.sampled_from((0, 5, 40, 400))),
        wide=draw(st.booleans()),
        normalizer=draw(st.sampled_from(("softmax", "softmax", "softmax", "hard"))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.1, 0.6, 1.0))),
        seeds=draw(st.booleans()),
        layouts=draw(st.tuples(*[layouts] * 6)),
        gain=draw(st.sampled_from((1.0, 1.0, 6.0))),
        seed=draw(st.integers(0, 2**16)),
    )
    return case, draw(st.sampled_from(cases.FULL_DTYPES))


@SETTINGS
@given(drawn=problems())
def test_random_problem(drawn: tuple[Case, torch.dtype], backend: Backend) -> None:
    case, dtype = drawn
    check(build(case, dtype, backend.device))


@SETTINGS
@given(drawn=problems(), count=st.integers(1, 4))
def test_random_problem_on_threads(
    drawn: tuple[Case, torch.dtype], count: int, backend: Backend, threads: None
) -> None:
    """Forward and backward give the same bits on one thread and on several."""
    case, dtype = drawn
    problem = build(case, dtype, backend.device)
    torch.set_num_threads(1)
    alone = problem.results()
    torch.set_num_threads(count)
    together = problem.results()
    assert all(torch.equal(x, together[name]) for name, x in alone.items())
