"""The same inputs give the same bits: from run to run, for any number of threads, and whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import table
from backends import Backend
from cases import Case, Problem, build, causal, packed

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
    Case((2, 4, 2, 200, 700, 16, 16), **table.TOGETHER, right=400),
    Case((1, 4, 2, 130, 1100, 8, 8), **table.TOGETHER, similarity="gaussian", wide=True),
    causal((2, 2, 1, 300, 300, 16, 16), similarity="cosine", sinks="h", scales="h", slopes="h", table="h", reach=200),
    Case((2, 4, 1, 300, 300, 16, 16), normalizer="hard", dropout_p=0.3, sinks="bh"),
    packed((4, 2), (16, 8), (300, 700), (1, 5), (0, 64), (130, 130), **table.TOGETHER, right=9),
)


WITHOUT_DROPOUT = {name: options for name, options in table.FEATURES.items() if name != "dropout"}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of the tensors whose bits differ."""
    return [name for name in a if not torch.equal(a[name], b[name])]


def check_threads(problem: Problem, first: int, *others: int) -> None:
    """The bits are those of `first` threads for any of the other numbers."""
    torch.set_num_threads(first)
    expected = problem.results()
    for count in others:
        torch.set_num_threads(count)
        assert torch.get_num_threads() == count
        assert not differing(expected, problem.results()), f"{count} threads"


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads(case: Case, dtype: torch.dtype, backend: Backend, threads: None) -> None:
    check_threads(build(case, dtype, backend.device), 1, 1, 2, 3)


@DTYPES
@pytest.mark.parametrize("heads", [8, 9, 12])
def test_many_heads_on_any_number_of_threads(heads: int, dtype: torch.dtype, backend: Backend, threads: None) -> None:
    """So many that a task of backward takes a whole head on two threads, and on three or five a part of one."""
    check_threads(build(causal((1, heads, heads, 70, 400, 16, 16), scales="h"), dtype, backend.device), 2, 1, 3, 5)


@DTYPES
@pytest.mark.parametrize(
    "case",
    [
        causal((1, 8, 2, 300, 300, 16, 24), scales="h", sinks="h", table="h", reach=50),
        Case((2, 8, 1, 200, 333, 24, 16), similarity="gaussian", left=100),
        Case((2, 6, 2, 130, 250, 16, 16), bias="hqk", wide_bias=True, mask="bqk"),
        Case((2, 6, 2, 130, 250, 16, 16), bias="qk"),
        Case((4, 4, 1, 257, 500, 16, 16), k_lengths=(500, 1, 0, 190), q_lengths=(257, 60, 7, 200)),
        packed((4, 1), (16, 8), (300, 500), (1, 5), (0, 64), (64, 130), (130, 130), **table.TOGETHER, right=9),
    ],
    ids=str,
)
def test_heads_of_a_group_on_any_number_of_threads(
    case: Case, dtype: torch.dtype, backend: Backend, threads: None
) -> None:
    """A task of backward takes the heads of a group on one thread, and a single one where groups are too few."""
    check_threads(build(case, dtype, backend.device), 1, 2, 5)


@DTYPES
@pytest.mark.parametrize(("heads", "queries"), [(8, 8), (7, 6), (5, 8), (3, 16), (2, 8)])
def test_few_queries_on_any_number_of_threads(
    heads: int, queries: int, dtype: torch.dtype, backend: Backend, threads: None
) -> None:
    """Decoding: a task takes all heads of the only group, and half of them where a thread would be idle."""
    check_threads(build(causal((1, heads, 1, queries, 300, 16, 24)), dtype, backend.device), 1, 2, 3)


@DTYPES
@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1, 1, 200, 256, 24, 16), dropout_p=0.2),
        causal((1, 4, 2, 256, 200, 64, 64), scales="h", sinks="h"),
        Case((2, 1, 1, 130, 129, 16, 16), mask="qk", left=60, right=5),
        Case((2, 1, 1, 257, 500, 16, 16), k_lengths=(250, 90), q_lengths=(257, 60)),
        packed((1, 1), (16, 8), (300, 300), (0, 200), (0, 64), (200, 300), (64, 264)),
        causal((1, 1, 1, 128, 128, 16, 16), tiles="h"),
    ],
    ids=str,
)
def test_pair_of_key_blocks_on_any_number_of_threads(
    case: Case, dtype: torch.dtype, backend: Backend, threads: None
) -> None:
    """A task of backward takes both blocks of keys, and a single one where threads would be idle."""
    check_threads(build(case, dtype, backend.device), 1, 2, 3, 5)


@DTYPES
def test_pair_of_key_blocks_beside_more(dtype: torch.dtype, backend: Backend, threads: None) -> None:
    """So many heads that no sequence has groups of key blocks, and more threads."""
    check_threads(build(Case((2, 16, 16, 130, 384, 16, 16), k_lengths=(384, 200)), dtype, backend.device), 1, 40)


def chosen(problem: Problem, order: list[int]) -> Problem:
    """The problem whose batch holds the sequences `order` of this one, in that order."""
    batch = problem.case.sizes[0]

    def pick(name: str, x: Any) -> Any:
        shared = not isinstance(x, Tensor) or name in ("bits", "buckets") or x.shape[0] != batch
        return x if shared else x[order]

    tensors = {name: pick(name, getattr(problem, name)) for name in ("q", "k", "v", "dout", "dlse")}
    return replace(problem, **tensors, options={name: pick(name, x) for name, x in problem.options.items()})


PER_SEQUENCE = ("out", "lse", "dq", "dk", "dv")


@DTYPES
@pytest.mark.parametrize(
    "case",
    [
        Case((5, 2, 1, 70, 150, 16, 24)),
        causal((5, 2, 2, 197, 300, 16, 16)),
        causal((5, 1, 1, 1, 700, 32, 32)),
        causal((5, 1, 1, 600, 600, 8, 8), bias="hqk"),
        Case((5, 1, 1, 70, 512, 8, 8), bias="bhqk"),
        Case((5, 2, 1, 70, 150, 16, 24), bias="bk", mask="bhqk"),
        Case((5, 2, 1, 70, 150, 16, 24), q_starts=(0, 80, -30, 500, 7), left=60, right=0),
        Case((5, 2, 2, 129, 300, 16, 16), k_lengths=(300, 0, 1, 200, 129), q_lengths=(1, 129, 70, 64, 65)),
        Case((5, 4, 1, 257, 500, 16, 16), k_lengths=(500, 0, 129, 330, 500), q_lengths=(257, 257, 70, 200, 64)),
        Case((5, 6, 1, 48, 2500, 16, 16), k_lengths=(2500, 0, 2049, 200, 30), q_lengths=(1, 12, 48, 20, 5), right=0),
    ],
    ids=str,
)
def test_any_company_in_the_batch(case: Case, dtype: torch.dtype, backend: Backend, threads: None) -> None:
    """A sequence alone, first, last, twice, and among others gives the same bits, on any number of threads."""
    check_company(case, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
@pytest.mark.parametrize(
    "case",
    [
        *(Case((5, 2, 1, 70, 150, 16, 24), **options, right=80) for options in WITHOUT_DROPOUT.values()),
        Case((5, 2, 1, 129, 300, 8, 8), **table.TOGETHER | {"dropout_p": 0.0}, q_starts=(0, 80, -30, 500, 7)),
    ],
    ids=str,
)
def test_any_company_beside_features(case: Case, dtype: torch.dtype, backend: Backend, threads: None) -> None:
    check_company(case, dtype, backend)


def check_company(case: Case, dtype: torch.dtype, backend: Backend) -> None:
    problem = build(case, dtype, backend.device)
    whole = problem.results()
    for count, order in ((1, [0]), (2, [3]), (3, [4, 2]), (2, [1, 1, 0, 4, 3, 2, 2]), (3, list(range(5)) * 4)):
        torch.set_num_threads(count)
        some = chosen(problem, order).results()
        wrong = [name for name in PER_SEQUENCE if not torch.equal(some[name], whole[name][order])]
        assert not wrong, f"batch of {order}, {count} threads"


@DTYPES
def test_any_company_under_dropout(dtype: torch.dtype, backend: Backend) -> None:
    """Where a sequence stands decides which pairs it loses, and who else is there does not."""
    problem = build(Case((5, 2, 1, 70, 150, 16, 24), dropout_p=0.3, seeds=True), dtype, backend.device)
    whole = problem.results()
    for order in ([0], [0, 1, 2], [3, 1, 4]):
        some, same = chosen(problem, order).results(), [n for n, b in enumerate(order) if n == b]
        assert not [name for name in PER_SEQUENCE if not torch.equal(some[name][same], whole[name][same])]


@DTYPES
@pytest.mark.parametrize("name", ["", *WITHOUT_DROPOUT])
def test_any_place_among_packed_sequences(name: str, dtype: torch.dtype, backend: Backend, threads: None) -> None:
    """Packed in another order and beside others, on another number of threads, a sequence has the same bits."""
    options = table.FEATURES[name] if name else {}
    if "tiles" in options:  # the same for all: a sequence's own would have to move with it
        options = {"tiles": "h"}
    lengths = ((70, 130), (33, 290), (1, 64))
    problem = build(packed((2, 1), (16, 8), *lengths, **options, right=20), dtype, backend.device)
    first = split(problem.results(), lengths)
    for count, order in ((2, [2, 0, 1]), (3, [1, 2, 1, 0, 0])):
        torch.set_num_threads(count)
        again = repacked(problem, lengths, order)
        some = split(again.results(), [lengths[b] for b in order])
        assert not [(n, b) for n, b in enumerate(order) if differing(first[b], some[n])]


@DTYPES
@pytest.mark.parametrize("queries", (3, 20, 200))
def test_short_sequences_on_any_number_of_threads(
    queries: int, dtype: torch.dtype, backend: Backend, threads: None
) -> None:
    """Packed sequences so short that kernels keep less of them than of longer ones: once, or only while it is used."""
    lengths = ((queries, 150), (1, 130), (5, 3), (2, 70), (4, 9))
    problem = build(packed((3, 1), (16, 8), *lengths, right=100), dtype, backend.device)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(problem.results())
    assert not differing(results[0], results[1]) and not differing(results[0], results[2])
    each = split(results[0], lengths)
    for b in range(len(lengths)):
        assert not differing(each[b], split(repacked(problem, lengths, [b]).results(), [lengths[b]])[0])


def split(results: dict[str, Tensor], lengths: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """The results of each packed sequence."""
    parts = {name: results[name].split([n[name in ("dk", "dv")] for n in lengths], dim=2) for name in PER_SEQUENCE}
    return [{name: part[b] for name, part in parts.items()} for b in range(len(lengths))]


def repacked(problem: Problem, lengths: Sequence[tuple[int, int]], order: list[int]) -> Problem:
    """The problem that holds the packed sequences `order` of this one."""
    options = dict(problem.options)
    tensors = {}
    for n, (side, names) in enumerate({"q_offsets": ("q", "dout", "dlse"), "k_offsets": ("k", "v")}.items()):
        sizes = [length[n] for length in lengths]
        for name in names:
            parts = getattr(problem, name).split(sizes, dim=2)
            tensors[name] = torch.cat([parts[b] for b in order], 2)
        options[side] = torch.tensor([0, *(sizes[b] for b in order)], device=problem.q.device).cumsum(0)
    return replace(problem, **tensors, options=options)


FULL = {"full": {}, "causal": {"right": 0}, "window": {"left": 40, "right": 3}}
OF_LENGTHS = {name: options for name, options in WITHOUT_DROPOUT.items() if name != "tiles"}


@DTYPES
@pytest.mark.parametrize("lengths", [(70, 150), (1, 64), (64, 65), (100, 300), (5, 5), (130, 1), (20, 700)], ids=str)
@pytest.mark.parametrize("band", FULL)
def test_any_padding(band: str, lengths: tuple[int, int], dtype: torch.dtype, backend: Backend) -> None:
    """A sequence of given lengths has the same bits whatever it is padded to and however long its neighbours are."""
    check_padding(FULL[band], lengths, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
@pytest.mark.parametrize("lengths", [(70, 150), (5, 65)], ids=str)
@pytest.mark.parametrize("name", OF_LENGTHS)
def test_any_padding_beside_features(name: str, lengths: tuple, dtype: torch.dtype, backend: Backend) -> None:
    check_padding(OF_LENGTHS[name] | {"right": 20}, lengths, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
@pytest.mark.parametrize("lengths", [(1, 150), (3, 700), (11, 2100), (40, 65)], ids=str)
@pytest.mark.parametrize("heads", [13, 16])
def test_any_padding_of_many_heads(heads: int, lengths: tuple[int, int], dtype: torch.dtype, backend: Backend) -> None:
    """Decoding, the heads that share keys go by as many at a time as a sequence's own queries say, and how they lie."""
    check_padding({"right": 20}, lengths, dtype, backend, heads=(heads, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
def test_any_padding_of_groups_of_heads(dtype: torch.dtype, backend: Backend) -> None:
    """Backward, a sequence's own queries and keys say whether groups of keys follow its query heads."""
    check_padding({"right": 20}, (190, 500), dtype, backend, heads=(16, 1))


def check_padding(
    options: dict[str, Any],
    lengths: tuple[int, int],
    dtype: torch.dtype,
    backend: Backend,
    heads: tuple[int, int] = (2, 1),
) -> None:
    (queries, keys), (most_queries, most_keys) = lengths, (200, 400 + 2 * lengths[1])
    others = ((most_queries, most_keys), (0, 0), (31, 7))
    longest = Case(
        (4, *heads, most_queries, most_keys, 16, 8), **options,
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
