"""Masked means absent, pair by pair: what is not finite reaches exactly those results that may see it.

Every sequence of a batch is the same problem with one number replaced, each at its own place; the truth says which
results change. NaN must arrive wherever it is seen, and nothing else may move by more than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import cases
import heedful
from backends import Backend
from cases import Case, Problem, build, check, definition_results, packed
from oracle_scores import combine, seen_pairs
from table import TOGETHER

DTYPES = pytest.mark.parametrize("dtype", cases.FULL_DTYPES, ids=cases.short)
FEW_DTYPES = (torch.float32, torch.bfloat16)
VALUES = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)

# Two query and three key tiles of 64, the last of each partial.
SIZES = (1, 2, 1, 70, 150, 5, 6)
MASKS = {
    "full": Case(SIZES),
    "causal": Case(SIZES, right=0, q_start=80),
    "causal top-left": Case(SIZES, right=0),
    "causal early": Case(SIZES, right=0, q_start=-40),
    "window": Case(SIZES, left=20, right=3, q_start=60),
    "lengths": Case(SIZES, k_lengths=(140,), q_lengths=(66,)),
    "short lengths": Case(SIZES, k_lengths=(65,), q_lengths=(9,)),
    "mask": Case(SIZES, mask="hqk"),
    "key mask": Case(SIZES, mask="k"),
    "query mask": Case(SIZES, mask="q"),
    "bias": Case(SIZES, bias="hqk", holes=0.4),
    "key bias": Case(SIZES, bias="k", holes=0.4),
    "all": Case(SIZES, bias="hqk", holes=0.2, mask="qk", k_lengths=(149,), left=70, right=9, q_start=50),
}
PER_SEQUENCE = TOGETHER | dict.fromkeys(("sinks", "slopes", "table"), "bh") | {"dropout_p": 0.0}
# The same with features of the scores, whose parameters each sequence has its own of.
FEATURED = {
    "scales": Case(SIZES, scales="bh", right=0, q_start=80),
    "sinks": Case(SIZES, sinks="bh", right=0, q_start=5, q_lengths=(66,)),
    "slopes": Case(SIZES, slopes="bh", left=20, right=3, q_start=60),
    "table": Case(SIZES, table="bh", reach=30, k_lengths=(140,)),
    "tiles": Case(SIZES, tiles="h"),
    "one query": Case((1, 4, 2, 1, 150, 5, 6), right=0, q_start=100),
    "one query mask": Case((1, 4, 2, 1, 150, 5, 6), mask="hk", bias="hqk", holes=0.2, k_lengths=(140,)),
    "tiles of bias": Case(SIZES, tiles="h", bias="hqk", holes=0.2, right=9, q_start=30),
}
# Here an infinity may well become a number, or the other way around: only NaN is planted.
NUMERIC = {
    "cosine": Case(SIZES, similarity="cosine", right=0, q_start=80),
    "cosine lengths": Case(SIZES, similarity="cosine", scales="bh", k_lengths=(140,), q_lengths=(66,)),
    "cosine tiles": Case(SIZES, similarity="cosine", tiles="h"),
    "gaussian": Case(SIZES, similarity="gaussian", left=20, right=3, q_start=60),
    "gaussian mask": Case(SIZES, similarity="gaussian", scales="bh", mask="hqk"),
    "gaussian bias": Case(SIZES, similarity="gaussian", bias="k", holes=0.4),
    "softcap": Case(SIZES, softcap=2.0, right=0, q_start=-40),
    "softcap mask": Case(SIZES, softcap=2.0, mask="k", bias="hqk", holes=0.2),
    "together": Case(SIZES, **PER_SEQUENCE | {"sinks": None}, right=9, q_start=50),
}
# A NaN that is seen may be passed by, where hard attention prefers another key or dropout drops its pair: what counts
# is that one that is not seen leaves everything alone.
CHOOSY = {
    "hard": Case(SIZES, normalizer="hard", right=0, q_start=80),
    "hard sinks": Case(SIZES, normalizer="hard", sinks="bh", mask="hqk"),
    "hard lengths": Case(SIZES, normalizer="hard", k_lengths=(140,), q_lengths=(66,)),
    "hard tiles": Case(SIZES, normalizer="hard", tiles="h", similarity="gaussian"),
    "dropout": Case(SIZES, dropout_p=0.3, right=0, q_start=80),
    "dropout mask": Case(SIZES, dropout_p=0.5, mask="hqk", sinks="bh"),
    "dropout tiles": Case(SIZES, dropout_p=0.5, tiles="h", softcap=2.0),
}
QUERIES, KEYS = (0, 31, 63, 64, 65, 69), (0, 1, 30, 63, 64, 127, 128, 139, 140, 149)


def places(problem: Problem, target: str, small: bool) -> list[tuple[int, ...]]:
    """Where to plant in the one sequence of `target`: [head, row, column], spread over tiles; everywhere if `small`."""
    tensor = problem.options[target] if target in problem.options else getattr(problem, target)
    heads, rows, *columns = tensor.shape[1:]
    if small:
        return [(heads - 1, row, *(row % size for size in columns)) for row in range(rows)]
    if target == "bias":
        return [(0, row % rows, column % columns[0]) for row in QUERIES for column in KEYS[::2]]
    wanted = KEYS if target in ("k", "v") else QUERIES
    return [(heads - 1, row, *(row % size for size in columns)) for row in wanted if row < rows]


def planted(problem: Problem, target: str, at: list[tuple[int, ...]], value: float) -> Problem:
    """The problem once for each place, in one batch, with `value` at that place of `target`."""
    count = len(at)

    def repeat(x: Tensor) -> Tensor:
        return x.repeat(count, *[1] * (x.dim() - 1))

    tensors = {name: repeat(getattr(problem, name)) for name in ("q", "k", "v", "dout", "dlse")}
    shared = ("buckets", "bits", "seed")
    options = {
        name: repeat(x) if isinstance(x, Tensor) and name not in shared else x for name, x in problem.options.items()
    }
    where = options[target] if target in options else tensors[target]
    for b, place in enumerate(at):
        where[(b, *place)] = value
    return replace(problem, **tensors, options=options)


def check_reach(problem: Problem, results: dict[str, Tensor] | None = None, arrives: bool = True) -> None:
    """The results are the truth's: finite where it is, equal there, and not finite elsewhere, where it `arrives`.

    A score of +inf makes its row NaN as a whole here, for the rest of such a row is not promised.
    """
    results = results or problem.results()
    exact = problem.truth()
    infinite = (exact.values["lse"] == math.inf).any()
    poisoned = problem.truth(infinite_is_nan=True) if infinite else exact
    for name, result in results.items():
        got = result.cpu().double()
        dirty = got.isfinite() & ~exact.values[name].isfinite()
        assert not (arrives and dirty.any()), (
            f"{name}: {int(dirty.sum())} values see what is not finite, and are finite"
        )
        # From here on, a result that may be anything is what it should be.
        loose = poisoned.values[name].isfinite() != exact.values[name].isfinite()
        loose |= ((name == "lse") | (not arrives)) & poisoned.values[name].isnan()
        results[name] = torch.where(loose.to(result.device), math.nan, result)
    check(problem, results, poisoned)


IN_EVERY_DTYPE = ("causal", "lengths", "mask", "all")


@pytest.mark.parametrize("target", ["q", "k", "v", "dout"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in MASKS for dtype in (cases.FULL_DTYPES if kind in IN_EVERY_DTYPE else FEW_DTYPES)],
    ids=lambda x: x if isinstance(x, str) else cases.short(x),
)
def test_planted(kind: str, target: str, dtype: torch.dtype, backend: Backend) -> None:
    problem = build(MASKS[kind], dtype, backend.device)
    at = places(problem, target, small=False)
    for value in (math.nan, math.inf, -math.inf) if dtype is torch.float32 else (math.nan,):
        check_reach(planted(problem, target, at, value))


@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=cases.short)
@pytest.mark.parametrize("target", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("kind", [*FEATURED, *NUMERIC, *CHOOSY])
def test_planted_beside_features(kind: str, target: str, dtype: torch.dtype, backend: Backend) -> None:
    problem = build((FEATURED | NUMERIC | CHOOSY)[kind], dtype, backend.device)
    at = places(problem, target, small=False)
    values = (math.nan, math.inf, -math.inf) if dtype is torch.float32 and kind in FEATURED else (math.nan,)
    for value in values:
        check_reach(planted(problem, target, at, value), arrives=kind not in CHOOSY)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("similarity", ["dot", "cosine", "gaussian"])
@pytest.mark.parametrize("name", ["scales", "sinks", "slopes", "table"])
def test_planted_in_parameters(name: str, similarity: str, backend: Backend) -> None:
    """A parameter that is not finite spoils its own head of its own sequence, in rows that see a key, and no other."""
    case = Case((3, 4, 2, 70, 150, 5, 6), **{name: "bh"}, similarity=similarity, right=0, q_start=-9)
    problem = build(case, torch.float32, backend.device)
    problem.options[name][1, ..., 2] = math.nan
    results = problem.results()
    for other in ("out", "lse", "dq"):
        clean = torch.ones(3, 4, dtype=torch.bool)
        clean[1, 2] = False
        assert results[other][clean].isfinite().logical_or(results[other][clean] == -math.inf).all(), other
    assert results["dk"][::2].isfinite().all() and results["dk"][1, 0].isfinite().all()
    assert results["out"][1, 2, 9:].isnan().all() and (name == "sinks" or (results["out"][1, 2, :9] == 0).all())


def test_planted_in_packed_sequences(backend: Backend) -> None:
    """NaN in a row of one sequence, or outside of all, reaches no other sequence."""
    case = packed((4, 2), (5, 6), (70, 130), (0, 5), (9, 9), (33, 65), **PER_SEQUENCE, outside=2, right=40)
    clean = build(case, torch.float32, backend.device)
    rows = {"q": (0, 1, 2, 71, 72, 81, 114, 115), "k": (0, 2, 131, 132, 136, 137, 145, 211), "v": (1, 50, 140)}
    for target, row in ((target, row) for target, some in rows.items() for row in some):
        dirty = replace(clean, **{target: getattr(clean, target).clone()})
        getattr(dirty, target)[0, :, row, 1] = math.nan
        check_reach(dirty)


@pytest.mark.cuda_kernels
def test_rows_outside_of_packed_sequences_may_hold_anything(backend: Backend) -> None:
    for similarity in ("dot", "cosine", "gaussian"):
        case = packed((4, 2), (5, 6), (70, 130), (0, 5), (9, 9), similarity=similarity, outside=3)
        clean = build(case, torch.float32, backend.device)
        queries, keys = ([*range(3), *range(n - 3, n)] for n in (clean.q.shape[2], clean.k.shape[2]))
        dirty = replace(
            clean,
            q=spoiled(clean.q, queries, math.nan), dout=spoiled(clean.dout, queries, math.nan),
            k=spoiled(clean.k, keys, math.nan), v=spoiled(clean.v, keys, math.nan),
            dlse=spoiled(clean.dlse[..., None], queries, math.nan).squeeze(-1),
        )  # fmt: skip
        results = dirty.results()
        check(dirty, results, clean.truth())
        assert (results["dq"][:, :, queries] == 0).all() and (results["dk"][:, :, keys] == 0).all()


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("similarity", ["cosine", "gaussian"])
@DTYPES
def test_a_masked_row_has_no_gradient_of_its_own(dtype: torch.dtype, similarity: str, backend: Backend) -> None:
    """Rows of NaN that nobody sees: their similarities' norms are NaN, their gradients 0, and nothing else notices."""
    case = Case((2, 4, 2, 70, 150, 5, 6), similarity=similarity, right=0, q_start=-9, mask="k", tiles="h", scales="bh")
    clean = build(case, dtype, backend.device)
    seen = clean_pairs(clean)
    idle_queries = ~seen.any(-1)
    idle_keys = ~seen.any(-2).unflatten(1, (2, 2)).any(2)
    dirty = replace(
        clean,
        q=clean.q.masked_fill(idle_queries[..., None].to(clean.q.device), math.nan),
        k=clean.k.masked_fill(idle_keys[..., None].to(clean.k.device), math.nan),
    )
    assert dirty.q.isnan().any() and dirty.k.isnan().any()
    results = dirty.results()
    check(dirty, results, clean.truth())
    assert (results["dq"][idle_queries] == 0).all() and (results["dk"][idle_keys] == 0).all()


def clean_pairs(problem: Problem) -> Tensor:
    batch, heads, _, queries, keys, _, _ = problem.case.sizes
    masks = ("mask", "tiles", "bits", "q_lengths", "k_lengths", "q_starts", "q_start", "left", "right")
    options = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in problem.options.items() if name in masks}
    return seen_pairs((batch, heads, queries, keys), **options)


def test_the_truth_is_pair_by_pair() -> None:
    """oracle_scores.combine against the sum written out term by term, with NaN and infinity in both factors."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        weights, rows = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        rows = rows.T.contiguous()
        present = torch.rand(4, 5, generator=generator) < 0.6
        weights[torch.rand(4, 5, generator=generator) < 0.1] = math.nan
        rows[torch.rand(5, 4, generator=generator) < 0.1] = math.inf
        want = torch.tensor([
            [sum(float(weights[i, j] * rows[j, d]) for j in range(5) if present[i, j]) for d in range(4)]
            for i in range(4)
        ], dtype=torch.float64)  # fmt: skip
        want[~want.isfinite()] = math.nan
        torch.testing.assert_close(combine(weights, rows, present), want, equal_nan=True)


@pytest.mark.cuda_kernels
@VALUES
@pytest.mark.parametrize("target", ["q", "k", "v", "dout", "dlse", "bias"])
@pytest.mark.parametrize("band", [(None, 0, 3), (3, 1, 2), (None, None, 0)], ids=str)
def test_planted_everywhere(band: tuple, target: str, value: float, backend: Backend) -> None:
    """Each row of a small problem in turn, under a band and under none, GQA, with a mask and a bias with holes."""
    left, right, start = band
    case = Case((1, 4, 2, 9, 13, 3, 2), left=left, right=right, q_start=start, bias="hqk", holes=0.2, mask="qk", seed=3)
    problem = build(case, torch.float32, backend.device)
    check_reach(planted(problem, target, places(problem, target, small=True), value))


@VALUES
@pytest.mark.parametrize("kind", ["bias", "key bias", "all"])
def test_planted_in_bias(kind: str, value: float, backend: Backend) -> None:
    """A bias of -inf takes its pair away; NaN and +inf spoil their rows alone, and the gradients that those feed."""
    problem = build(MASKS[kind], torch.float32, backend.device)
    check_reach(planted(problem, "bias", places(problem, "bias", small=False), value))


@DTYPES
@pytest.mark.parametrize("kind", MASKS)
def test_planted_in_gradient_of_lse(kind: str, dtype: torch.dtype, backend: Backend) -> None:
    """NaN in dlse reaches dq of its row and dk of the keys that row sees; at an lse of -inf it is ignored."""
    problem = build(MASKS[kind], dtype, backend.device)
    check_reach(planted(problem, "dlse", places(problem, "dlse", small=False), math.nan))


@pytest.mark.parametrize("target", ["q", "k", "v", "dout", "dlse", "bias"])
@pytest.mark.parametrize("kind", [*MASKS, *FEATURED, *NUMERIC])
def test_definition(kind: str, target: str) -> None:
    """heedful's own definition, which heedful.reference is, keeps the same promise."""
    problem = build((MASKS | FEATURED | NUMERIC)[kind], torch.float64)
    if target == "bias" and "bias" not in problem.options:
        pytest.skip("the case has no bias")
    at = places(problem, target, small=False)
    for value in (math.nan, math.inf, -math.inf) if kind in ("bias", "all", "scales") else (math.nan,):
        dirty = planted(problem, target, at[::2], value)
        check_reach(dirty, definition_results(dirty))


def spoiled(x: Tensor, rows: Iterable[int], value: float) -> Tensor:
    x = x.clone()
    x[:, :, list(rows)] = value
    return x


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38], ids=str)
@DTYPES
def test_padding_may_hold_anything(dtype: torch.dtype, value: float, backend: Backend) -> None:
    """Rows past the lengths are full of what overflows or is not finite; every result is that of clean padding."""
    case = Case((2, 2, 1, 70, 150, 16, 8), q_lengths=(66, 66), k_lengths=(130, 130), bias="bhqk", right=0, q_start=64)
    clean = build(case, dtype, backend.device)
    value = math.copysign(min(abs(value), torch.finfo(dtype).max), value) if math.isfinite(value) else value
    queries, keys = range(66, 70), range(130, 150)
    dirty = replace(
        clean,
        q=spoiled(clean.q, queries, value), dout=spoiled(clean.dout, queries, value),
        k=spoiled(clean.k, keys, value), v=spoiled(clean.v, keys, value),
        dlse=spoiled(clean.dlse[:, :, :, None], queries, value).squeeze(-1),
        options=clean.options | {"bias": spoiled(spoiled(clean.options["bias"].mT, keys, value).mT, queries, value)},
    )  # fmt: skip
    check(dirty, truth=clean.truth())


@pytest.mark.cuda_kernels
@DTYPES
@pytest.mark.parametrize("kind", [name for name, case in MASKS.items() if case.left is not None or case.right == 0])
def test_values_beside_the_band_may_overflow(kind: str, dtype: torch.dtype, backend: Backend) -> None:
    """The largest finite values at keys that no query sees: their scores overflow, and must not count."""
    clean = build(MASKS[kind], dtype, backend.device)
    options = {name: x for name, x in clean.options.items() if name not in ("bias", "mask")}
    seen = seen_pairs((1, 2, 70, 150), **options)[0, 0]
    blind, unseen = ((~seen.any(n)).nonzero().flatten().tolist() for n in (1, 0))
    assert blind or unseen or kind == "causal"
    top = torch.finfo(dtype).max
    dirty = replace(
        clean,
        q=spoiled(clean.q, blind, -top), dout=spoiled(clean.dout, blind, top),
        k=spoiled(clean.k, unseen, top), v=spoiled(clean.v, unseen, top),
    )  # fmt: skip
    check(dirty, truth=clean.truth())


@pytest.mark.parametrize("heads", [7, 8, 71], ids=lambda heads: f"{heads} heads")
def test_an_unseen_value_changes_no_bit_of_one_query(heads: int, backend: Backend) -> None:
    """Pairs that are left out one by one leave the rest's sum as it was, in tasks of few heads and of many."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator).to(backend.device, torch.bfloat16)
        for shape in ((48, heads, 1, 8), (48, 1, 300, 8), (48, 1, 300, 1024))
    )
    mask = heedful.SlidingWindow(100, 0)
    out = heedful.attention(q, k, v, mask=mask)
    v[:, :, 194] = math.nan
    assert torch.equal(heedful.attention(q, k, v, mask=mask), out)


@pytest.mark.cuda_kernels
def test_rows_with_nothing_ignore_every_gradient(backend: Backend) -> None:
    """All of dout and dlse is NaN at rows that attend to nothing: no gradient notices, nor is any but zero there."""
    case = Case((2, 2, 1, 70, 150, 8, 8), right=0, q_start=-5, k_lengths=(150, 60), bias="bhqk", mask="bhqk")
    clean = build(case, torch.float32, backend.device)
    dead = clean.truth().values["lse"] == -math.inf
    assert 10 <= int(dead.sum()) < dead.numel()
    dirty = replace(
        clean, dout=clean.dout.masked_fill(dead[..., None], math.nan), dlse=clean.dlse.masked_fill(dead, math.nan)
    )
    results = dirty.results()
    check(dirty, results, clean.truth())
    assert (results["dq"][dead] == 0).all() and (results["dbias"][dead] == 0).all()


@pytest.mark.cuda_kernels
def test_a_score_of_minus_infinity_is_absent(backend: Backend) -> None:
    """Whatever made it: here q . k itself. Its value, a NaN, reaches nobody."""
    problem = build(Case((1, 1, 1, 70, 150, 4, 4)), torch.float32, backend.device)
    problem.q[..., 0] = 1.0
    problem.k[:, :, 7::9, 0] = -math.inf
    problem.v[:, :, 7::9] = math.nan
    results = problem.results()
    assert results["out"].isfinite().all() and results["dq"].isfinite().all()
    check(problem, results)


@pytest.mark.cuda_kernels
def test_a_row_all_of_minus_infinity_is_empty(backend: Backend) -> None:
    problem = build(Case((1, 1, 1, 20, 70, 4, 4)), torch.float32, backend.device)
    problem.q[..., 0] = 1.0
    problem.k[..., 0] = -math.inf
    results = problem.results()
    assert (results["lse"] == -math.inf).all() and all((results[name] == 0).all() for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.short)
def test_scores_of_every_size(dtype: torch.dtype, backend: Backend) -> None:
    """Finite scores up to a thousandth of the largest number neither overflow nor underflow into NaN."""
    for size in (1e2, 1e4, 1e10, 1e30, float(torch.finfo(dtype).max) / 1000):
        problem = build(Case((1, 1, 1, 70, 150, 1, 3), scale=1.0), dtype, backend.device)
        problem.q[:] = torch.where(problem.q < 0, -1.0, 1.0)
        problem.k.clamp_(-1, 1).mul_(size)
        results = problem.results()
        assert all(x.isfinite().all() for x in results.values()), size
        best = problem.k.amax(2), problem.k.amin(2)
        want = torch.where(problem.q[..., 0] > 0, best[0], -best[1])
        torch.testing.assert_close(results["lse"], want, rtol=1e-5, atol=math.log(150))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=cases.short)
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.7], ids=str)
def test_far_scores_pick_one_key(scale: float, dtype: torch.dtype, backend: Backend) -> None:
    """Where one score is far above the others its weight is 1, however large they are: forward, and backward again."""
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for size in (1e2, 1e4, 1e6, 1e7, 1e8, 1e9, 1e12, 1e30):
        problem = build(Case((1, 1, 1, 70, 150, 1, 3), scale=scale), dtype, backend.device)
        problem.q[:] = torch.where(problem.q < 0, -1.0, 1.0)
        problem.k[:] = size * torch.linspace(-1, 1, 150, dtype=dtype)[:, None]
        results = problem.results()
        truth = problem.truth().values
        for name in ("out", "dv"):
            torch.testing.assert_close(
                results[name].double().cpu(), truth[name], rtol=tolerance, atol=tolerance, msg=f"{name} {size}"
            )
