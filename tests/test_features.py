"""What is special about each feature of the scores: its extremes, its ties, its own arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import cases
import oracle_scores
import table
from backends import Backend
from cases import Case, build, check, packed

DTYPES = pytest.mark.parametrize("dtype", cases.FULL_DTYPES, ids=cases.short)
SIMILARITIES = pytest.mark.parametrize("similarity", ["dot", "cosine", "gaussian"])

# ---- dropout


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    """Random123's kat_vectors for philox4x32-10; what the kernels are compared with stands on these."""
    assert tuple(int(x) for x in oracle_scores.philox(counter, key)) == words


def kept(
    device: str, sizes: tuple[int, int, int, int], seed: Tensor, dropout_p: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """z of every pair, [B, H, Sq, Sk], read out of the op: equal scores, and values that are the identity matrix."""
    batch, heads, queries, keys = sizes
    q, k = (torch.zeros(batch, heads, n, 1, dtype=dtype, device=device) for n in (queries, keys))
    v = torch.eye(keys, dtype=dtype, device=device).expand(batch, heads, keys, keys)
    out, lse = torch.ops.heedful.attention_forward(q, k, v, seed=seed.to(device), dropout_p=dropout_p)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(keys)))  # which dropout does not touch
    return out * keys


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)])
def test_dropout_known_answers(seed: int, backend: Backend) -> None:
    """Pair (i, j) reads the 16 bits of its own half of its own word, of counter (j / 8, i, h, b) and key seed."""
    z = kept(backend.device, (2, 3, 5, 64), torch.tensor([seed]), 0.5)
    key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for b, h, i, j in (
        (0, 0, 0, 0),
        (0, 0, 0, 1),
        (0, 0, 0, 7),
        (0, 0, 1, 8),
        (0, 2, 4, 13),
        (1, 0, 3, 62),
        (1, 2, 4, 63),
    ):
        words = oracle_scores.philox((j // 8, i, h, b), key)
        bits = int(words[j % 8 // 2]) >> (16 if j % 2 else 0) & 0xFFFF
        assert round(float(z[b, h, i, j]), 4) == (2.0 if bits < 32768 else 0.0), (b, h, i, j)


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 2, 3, 5), (2, 3, 70, 130), (1, 1, 1, 300), (3, 1, 130, 9)], ids=str)
def test_dropout_keeps_what_the_hash_says(sizes: tuple, dtype: torch.dtype, backend: Backend) -> None:
    for seed in (torch.tensor([3]), torch.arange(sizes[0]) + 2**40):
        z = kept(backend.device, sizes, seed, 0.25, dtype)
        want = oracle_scores.dropout_factors(sizes, seed, 0.25)
        torch.testing.assert_close(z.double().cpu(), want, rtol=0.03, atol=0)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_rate(dropout_p: float, backend: Backend) -> None:
    """Within five standard deviations over 400 000 pairs, in every head and at every place of eight neighbours."""
    z = kept(backend.device, (4, 2, 250, 200), torch.tensor([1234]), dropout_p)
    keep = z != 0
    assert torch.allclose(z[keep], torch.tensor(65536 / round(65536 * (1 - dropout_p))), rtol=1e-5)

    def check_rate(which: Tensor) -> None:
        deviation = math.sqrt(dropout_p * (1 - dropout_p) / which.numel())
        assert abs(which.double().mean().item() - (1 - dropout_p)) < 5 * deviation

    check_rate(keep)
    for part in (*keep.flatten(0, 1), *keep.unflatten(-1, (25, 8)).unbind(-1)):
        check_rate(part)
    pairs = keep[..., 1:] & keep[..., :-1]  # neighbours know nothing of each other
    assert abs(pairs.double().mean().item() - (1 - dropout_p) ** 2) < 5 / math.sqrt(pairs.numel())


def test_dropout_of_all_and_of_none(backend: Backend) -> None:
    seed = torch.tensor([5])
    assert (kept(backend.device, (1, 2, 20, 70), seed, 1.0) == 0).all()
    ones = kept(backend.device, (1, 2, 20, 70), seed, 0.0)
    assert torch.equal(kept(backend.device, (1, 2, 20, 70), seed, 1e-9), ones)
    smallest = kept(backend.device, (1, 1, 300, 300), seed, 2**-16)  # one pair of 65536
    assert 0 < int((smallest == 0).sum()) < 15


def test_dropout_seeds_differ(backend: Backend) -> None:
    """Between seeds, sequences and heads; a seed for each sequence counts the sequence as well."""
    one, other = (kept(backend.device, (2, 2, 20, 70), torch.tensor([n]), 0.5) for n in (1, 2))
    tables = [*one.flatten(0, 1), *other.flatten(0, 1)]
    assert all(not torch.equal(a, b) for n, a in enumerate(tables) for b in tables[:n])
    both = kept(backend.device, (2, 2, 20, 70), torch.tensor([1, 2]), 0.5)
    assert torch.equal(both[0], one[0]) and torch.equal(both[1], other[1])


# ---- hard attention


@DTYPES
def test_hard_ties_go_to_the_lowest_key(dtype: torch.dtype, backend: Backend) -> None:
    """Rows of equal scores, and rows with their largest score twice, across lanes, panels and blocks of keys."""
    queries, keys = 66, 300
    q = torch.ones(1, 1, queries, 1, dtype=dtype, device=backend.device)
    k = torch.zeros(1, 1, keys, 1, dtype=dtype, device=backend.device)
    v = torch.arange(keys, device=backend.device).to(dtype)[None, None, :, None]  # exact up to 256 in every dtype
    call = torch.ops.heedful.attention_forward
    assert (call(q, k, v, normalizer="hard")[0] == 0).all()
    for first, second in ((0, 299), (1, 2), (63, 64), (7, 8), (127, 128), (100, 256), (255, 299)):
        k[:, :, [first, second]] = 2.0
        out, lse = call(q, k, v, normalizer="hard", scale=1.0)
        assert (out == first).all() and (lse == 2).all(), (first, second)
        out, _ = call(q, k, v, normalizer="hard", scale=1.0, left=0, q_start=first + 1)  # later queries miss the first
        assert (out[0, 0, : second - first] == second).all(), (first, second)
        k.zero_()


@DTYPES
def test_hard_gradient_is_of_values_alone(dtype: torch.dtype, backend: Backend) -> None:
    problem = build(Case((2, 4, 2, 70, 150, 8, 8), **table.TOGETHER, normalizer="hard"), dtype, backend.device)
    problem.dlse.fill_(math.nan)
    results = problem.results()
    assert all((x == 0).all() for name, x in results.items() if name[0] == "d" and name != "dv")
    check(problem, results)


def test_hard_attention_gathers(backend: Backend) -> None:
    """Bit by bit: out is a row of v, dv is the sum of the rows of dout that chose it."""
    problem = build(Case((2, 2, 2, 70, 150, 8, 8), normalizer="hard", right=5), torch.float32, backend.device)
    results = problem.results()
    scores = (problem.q @ problem.k.mT).masked_fill(~oracle_scores.seen_pairs((2, 2, 70, 150), right=5), -math.inf)
    top = scores.amax(-1, keepdim=True)
    best = (torch.where(scores == top, torch.arange(150), 150)).amin(-1)
    assert torch.equal(results["out"], problem.v.take_along_dim(best[..., None], 2))
    choice = torch.nn.functional.one_hot(best, 150).float()
    torch.testing.assert_close(results["dv"], choice.mT @ problem.dout, rtol=1e-5, atol=1e-5)


@DTYPES
def test_hard_sinks(dtype: torch.dtype, backend: Backend) -> None:
    """A sink wins where it is larger than every score, not where it is as large."""
    call = torch.ops.heedful.attention_forward
    q = torch.ones(1, 3, 5, 1, dtype=dtype, device=backend.device)
    k = torch.full((1, 3, 70, 1), 2.0, dtype=dtype, device=backend.device)
    v = torch.ones_like(k)
    out, lse = call(q, k, v, sinks=torch.tensor([1.5, 2.0, 2.5]).to(q), normalizer="hard", scale=1.0)
    assert (out == torch.tensor([1.0, 1.0, 0.0])[:, None, None].to(out)).all()
    assert (lse == torch.tensor([2.0, 2.0, 2.5])[:, None].to(lse)).all()


# ---- sinks


@DTYPES
@pytest.mark.parametrize("normalizer", ["softmax", "hard"])
def test_sink_of_minus_infinity_is_none(normalizer: str, dtype: torch.dtype, backend: Backend) -> None:
    """The same results as without, and no gradient, also where nothing else is seen."""
    case = Case((2, 4, 2, 70, 150, 8, 8), right=0, q_start=-9, sinks="h", normalizer=normalizer)
    problem = build(case, dtype, backend.device)
    problem.options["sinks"].fill_(-math.inf)
    without = {name: x for name, x in problem.options.items() if name != "sinks"}
    results, bare = problem.results(), replace(problem, options=without)
    check(problem, results)
    assert (results.pop("dsinks") == 0).all()
    check(bare, results)
    assert (results["lse"] == -math.inf).sum() == 2 * 4 * 9


@DTYPES
@pytest.mark.parametrize("normalizer", ["softmax", "hard"])
def test_only_a_sink(normalizer: str, dtype: torch.dtype, backend: Backend) -> None:
    """Rows that see no key have out = 0 and lse = sink; rows that do not exist have lse = -inf all the same."""
    case = Case((2, 2, 1, 70, 90, 8, 8), right=0, q_start=-100, sinks="bh", q_lengths=(70, 65), normalizer=normalizer)
    problem = build(case, dtype, backend.device)
    results = problem.results()
    sinks = problem.options["sinks"].to(results["lse"].dtype)
    assert (results["out"] == 0).all()
    assert (results["lse"][0] == sinks[0, :, None]).all() and (results["lse"][1, :, :65] == sinks[1, :, None]).all()
    assert (results["lse"][1, :, 65:] == -math.inf).all()
    assert all((results[name] == 0).all() for name in ("dq", "dk", "dv"))
    check(problem, results)


@DTYPES
@pytest.mark.parametrize("sink", [-1e4, -100.0, 100.0, 1e4], ids=str)
def test_sinks_far_from_the_scores(sink: float, dtype: torch.dtype, backend: Backend) -> None:
    problem = build(Case((2, 2, 1, 70, 150, 8, 8), sinks="h", right=0, q_start=40), dtype, backend.device)
    problem.options["sinks"][0] = sink
    results = problem.results()
    check(problem, results)
    assert (results["out"][:, 0].float().abs().max() < 1e-30) == (sink > 0)


# ---- softcap


@DTYPES
def test_softcap_far_above_the_scores_changes_nothing(dtype: torch.dtype, backend: Backend) -> None:
    capped = build(Case((2, 2, 1, 70, 150, 8, 8), softcap=1e9), dtype, backend.device)
    results = capped.results()
    check(capped, results)
    bounds, plain = capped.truth(), replace(capped, options={})
    check(plain, results, replace(bounds, values=plain.truth().values))


@DTYPES
@pytest.mark.parametrize("softcap", [1e-3, 0.1, 1.0, 50.0, 1e4], ids=str)
@pytest.mark.parametrize("gain", [1e-3, 1.0, 300.0], ids=str)
def test_softcap_of_every_size(gain: float, softcap: float, dtype: torch.dtype, backend: Backend) -> None:
    """Scores far below and far above the cap; none comes out above it, and no gradient overflows."""
    problem = build(Case((1, 2, 1, 35, 70, 8, 8), softcap=softcap, gain=gain), dtype, backend.device)
    results = problem.results()
    check(problem, results)
    assert (results["lse"] <= softcap * (1 + 1e-6) + math.log(70) + 1e-5).all()


def test_softcap_of_infinite_products(backend: Backend) -> None:
    """Products beyond the largest number are capped like any other: nothing here is infinite."""
    problem = build(Case((1, 1, 1, 20, 70, 1, 3), softcap=5.0, scale=1.0), torch.float32, backend.device)
    problem.q.copy_(torch.where(problem.q < 0, -1e25, 1e25))
    problem.k.copy_(torch.where(problem.k < 0, -1e25, 1e25))
    out, lse = problem.forward()
    same = (problem.q > 0) == (problem.k.mT > 0)
    want = torch.where(same, 5.0, -5.0).softmax(-1) @ problem.v
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert (lse <= 5 + math.log(70)).all()


# ---- similarities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.short)
@pytest.mark.parametrize("offset", [10.0, 300.0], ids=str)
def test_gaussian_far_from_the_origin(offset: float, dtype: torch.dtype, backend: Backend) -> None:
    """|q - k| does not change where both move: what is lost is what |q|^2 has more digits than |q - k|^2."""
    case = Case((2, 2, 1, 35, 70, 4, 8), similarity="gaussian", scale=0.3)
    near, far = (build(case, dtype, backend.device) for _ in range(2))
    for name in ("q", "k"):
        moved = ((getattr(near, name) * 8).round() / 8).clone()  # so that moving does not round
        setattr(near, name, moved)
        setattr(far, name, moved + offset)
    check(near)
    check(far)
    close, distant = near.results(), far.results()
    loss = torch.finfo(dtype).eps * offset**2 * 4 * 64
    torch.testing.assert_close(distant["out"], close["out"], rtol=loss, atol=loss)
    torch.testing.assert_close(distant["lse"], close["lse"], rtol=loss, atol=loss)


@DTYPES
def test_gaussian_of_equal_rows(dtype: torch.dtype, backend: Backend) -> None:
    """A key that is the query has a score of 0, the largest there is."""
    problem = build(Case((1, 2, 2, 70, 70, 4, 8), similarity="gaussian", scale=100.0), dtype, backend.device)
    problem.k.copy_(problem.q)
    results = problem.results()
    check(problem, results)
    assert (results["lse"].abs() < 0.05).float().mean() > 0.5


@DTYPES
def test_cosine_does_not_see_lengths(dtype: torch.dtype, backend: Backend) -> None:
    """Rows times powers of two have the same bits, and gradients divided by them."""
    problem = build(Case((2, 2, 1, 70, 150, 8, 8), similarity="cosine", scale=4.0), dtype, backend.device)
    scaled = replace(problem, q=problem.q * 16, k=problem.k * 8)
    results, other = problem.results(), scaled.results()
    check(scaled, other)
    assert torch.equal(results["out"], other["out"]) and torch.equal(results["lse"], other["lse"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.short)
def test_cosine_of_short_rows(dtype: torch.dtype, backend: Backend) -> None:
    """Rows of zeros, below and just above eps: finite, and the gradient is that of x / eps below it."""
    problem = build(Case((1, 2, 1, 70, 150, 4, 8), similarity="cosine", scale=3.0), dtype, backend.device)
    for x in (problem.q, problem.k):
        x[:, :, 3] = 0
        x[:, :, 5] *= 1e-12
        x[:, :, 9] *= 3e-8
        x[:, :, 65] *= 1e-30
    check(problem)


@SIMILARITIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
@pytest.mark.parametrize("size", [1e-6, 1e3, 1e6], ids=str)
def test_rows_of_every_size(size: float, dtype: torch.dtype, similarity: str, backend: Backend) -> None:
    case = Case((1, 2, 1, 35, 70, 8, 8), similarity=similarity, scale=1e-6 if size > 1 else 1.0)
    problem = build(case, dtype, backend.device)
    check(replace(problem, q=problem.q * size, k=problem.k * size))


@SIMILARITIES
def test_a_scale_for_each_head(similarity: str, backend: Backend) -> None:
    """A tensor of equal numbers is that number; zeros have a gradient like any other."""
    problem = build(Case((2, 4, 2, 70, 150, 8, 8), scales="bh", similarity=similarity), torch.float32, backend.device)
    problem.options["scales"][:, ::2] = 0.0
    check(problem)
    problem.options["scales"].fill_(0.25)
    results = problem.results()
    del results["dscales"]
    alike = {"scale": 0.25} | ({} if similarity == "dot" else {"similarity": similarity})
    check(replace(problem, options=alike), results)


# ---- distances


@pytest.mark.parametrize("start", [2**62, -(2**62), 2**40, -(2**40)], ids=str)
def test_tables_of_far_positions(start: int, backend: Backend) -> None:
    """Every distance is clamped, none wraps around."""
    check(build(Case((2, 2, 1, 70, 150, 8, 8), table="bh", q_start=start), torch.float32, backend.device))
    case = Case((2, 2, 1, 70, 150, 8, 8), table="h", q_starts=(start, 3))
    check(build(case, torch.float32, backend.device))


@DTYPES
@pytest.mark.parametrize("slope", [0.0, 2.0**-8, 0.5, -0.01, 30.0], ids=str)
def test_slopes_of_every_size(slope: float, dtype: torch.dtype, backend: Backend) -> None:
    for start in (0, 80, -500, 3000):
        problem = build(Case((1, 2, 1, 70, 150, 8, 8), slopes="h", q_start=start), dtype, backend.device)
        problem.options["slopes"].fill_(slope)
        check(problem)


@DTYPES
@pytest.mark.parametrize("value", [-3.38e38, -1e30, 1e30, 3.38e38])
def test_huge_biases_that_are_finite(value: float, dtype: torch.dtype, backend: Backend) -> None:
    """They swallow the products: what has one for all of its keys attends to all of them alike."""
    problem = build(Case((1, 2, 1, 70, 600, 8, 8), bias="qk", wide_bias=True), dtype, backend.device)
    bias = problem.options["bias"]
    with torch.no_grad():
        bias[..., ::3, :] = value
        bias[..., 1::3, :290] = value
    check(problem)
    out = problem.forward()[0].double()
    alike = problem.v.double()
    torch.testing.assert_close(out[..., ::3, :], alike.mean(2, True).expand_as(out[..., ::3, :]), rtol=0, atol=1e-2)
    if value > 0:
        alike = alike[:, :, :290].mean(2, True).expand_as(out[..., 1::3, :])
        torch.testing.assert_close(out[..., 1::3, :], alike, rtol=0, atol=1e-2)


@pytest.mark.parametrize("reach", [0, 1, 5, 30, 63, 64, 149, 219, 500])
@pytest.mark.parametrize("start", [0, 37, 80], ids=str)
def test_table_gradients_at_the_clamp(start: int, reach: int, backend: Backend) -> None:
    """Pairs further away than the table reaches add to its ends; with a bucket for each distance, one by one."""
    problem = build(
        Case((2, 2, 1, 70, 150, 8, 8), table="h", reach=reach, q_start=start), torch.float32, backend.device
    )
    rows = 2 * reach + 1
    generator = torch.Generator().manual_seed(reach)
    problem.options["table"] = torch.randn(rows, 2, generator=generator).to(backend.device)
    problem.options["buckets"] = torch.arange(rows, device=backend.device)
    results = problem.results()
    check(problem, results)
    distance = torch.arange(150) - torch.arange(start, start + 70)[:, None]
    met = torch.zeros(rows, dtype=torch.bool)
    met[(distance.clamp(-reach, reach) + reach).flatten()] = True
    assert torch.equal((results["dtable"] != 0).all(-1).cpu(), met)


def test_distances_are_the_dense_bias(backend: Backend) -> None:
    """ALiBi and a table against the same numbers given as a bias."""
    problem = build(
        Case((2, 2, 1, 70, 150, 8, 8), slopes="bh", table="bh", reach=40, q_starts=(80, -7)),
        torch.float32,
        backend.device,
    )
    options = problem.options
    _, _, ahead = oracle_scores.distances(2, 70, 150, options["q_starts"].cpu())
    ahead = ahead.to(backend.device)
    bucket = options["buckets"][ahead.clamp(-40, 40) + 40].squeeze(1)
    learned = options["table"][torch.arange(2)[:, None, None], bucket].permute(0, 3, 1, 2)
    bias = learned - options["slopes"][:, :, None, None] * ahead.abs()
    results = problem.results()
    dense = replace(problem, options={"bias": bias}).results()
    for name in ("out", "lse", "dq", "dk", "dv"):
        torch.testing.assert_close(results[name], dense[name], rtol=1e-4, atol=1e-5)
    slopes = -(dense["dbias"] * ahead.abs()).double().sum((2, 3)).float()
    torch.testing.assert_close(results["dslopes"], slopes, rtol=1e-4, atol=1e-3)


# ---- blocks


def dense_blocks(seen: Tensor) -> dict[str, Tensor]:
    """The tiles and bits of a mask bool [B, H, Sq, Sk], with every tile's own kind; pairs past the ends are set."""
    batch, heads, queries, keys = seen.shape
    rows, columns = -(-queries // 64), -(-keys // 64)
    whole = torch.ones(batch, heads, rows * 64, columns * 64, dtype=torch.bool)
    whole[:, :, :queries, :keys] = seen
    pairs = whole.unflatten(3, (columns, 64)).unflatten(2, (rows, 64)).transpose(3, 4)  # [B, H, rows, columns, 64, 64]
    inside = torch.zeros_like(whole)
    inside[:, :, :queries, :keys] = True
    inside = inside.unflatten(3, (columns, 64)).unflatten(2, (rows, 64)).transpose(3, 4)
    full, empty = pairs.flatten(4).all(-1), ~(pairs & inside).flatten(4).any(-1)
    partial = ~full & ~empty
    tiles = torch.where(partial, 1 + partial.flatten().cumsum(0).view(partial.shape), full.int())
    bits = (pairs[partial].long() << torch.arange(64)).sum(-1)
    return {"tiles": tiles.int(), "bits": bits}


@DTYPES
@pytest.mark.parametrize("sizes", [(70, 150), (64, 64), (65, 63), (1, 129), (128, 1)], ids=str)
def test_blocks_are_the_dense_mask(sizes: tuple[int, int], dtype: torch.dtype, backend: Backend) -> None:
    """Random pairs, whole tiles of nothing, whole tiles of everything, rows of nothing: as the mask pair by pair."""
    queries, keys = sizes
    problem = build(Case((2, 2, 1, queries, keys, 8, 8), mask="bhqk"), dtype, backend.device)
    seen = problem.options["mask"].cpu()
    seen[0, 0, :64, :64], seen[1, 0, -3:, 64:], seen[1, 1, 2::7] = False, True, False
    seen[0, 1] = torch.arange(keys) <= torch.arange(queries)[:, None]
    blocks = {name: x.to(backend.device) for name, x in dense_blocks(seen).items()}
    assert torch.equal(oracle_scores.of_tiles(*(x.cpu() for x in blocks.values()), queries, keys), seen)
    masked = replace(problem, options={"mask": seen.to(backend.device)})
    check(masked, replace(problem, options=blocks).results())


def test_blocks_of_one_kind(backend: Backend) -> None:
    """All tiles empty: nothing at all. All full: no mask."""
    problem = build(Case((2, 2, 1, 70, 150, 8, 8)), torch.float32, backend.device)
    tiles = torch.zeros(1, 1, 2, 3, dtype=torch.int32, device=backend.device)
    nothing = replace(problem, options={"tiles": tiles}).results()
    assert (nothing.pop("lse") == -math.inf).all() and all((x == 0).all() for x in nothing.values())
    check(problem, replace(problem, options={"tiles": tiles + 1}).results())


@pytest.mark.parametrize("single", [(0, 0), (63, 63), (64, 64), (0, 149), (69, 0), (69, 149), (63, 64)], ids=str)
def test_blocks_of_one_pair(single: tuple[int, int], backend: Backend) -> None:
    """Each bit is its own pair, the sign bit too: out is the one value that is seen."""
    i, j = single
    problem = build(Case((1, 1, 1, 70, 150, 8, 8)), torch.float32, backend.device)
    tiles = torch.zeros(1, 1, 2, 3, dtype=torch.int32)
    tiles[0, 0, i // 64, j // 64] = 2
    bits = torch.zeros(1, 64, dtype=torch.int64)
    bits[0, i % 64] = torch.tensor(1) << (j % 64)
    blocks = {"tiles": tiles.to(backend.device), "bits": bits.to(backend.device)}
    out, lse = replace(problem, options=blocks).forward()
    want = torch.zeros_like(out)
    want[:, :, i] = problem.v[:, :, j]
    torch.testing.assert_close(out, want)
    assert (lse != -math.inf).nonzero().tolist() == [[0, 0, i]]


# ---- packed sequences


@DTYPES
@pytest.mark.parametrize("name", ["", *table.FEATURES])
def test_packed_is_padded(name: str, dtype: torch.dtype, backend: Backend) -> None:
    """Each sequence has the bits that it has alone, though alone it is sequence 0 and packed it may be another."""
    options = table.FEATURES[name] if name else {}
    case = packed((4, 2), (16, 8), (70, 130), (1, 1), (33, 90), (9, 200), **options, right=9, outside=2)
    problem = build(case, dtype, backend.device)
    whole = problem.results()
    offsets = [problem.options.pop(n).tolist() for n in ("q_offsets", "k_offsets")]
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(*(zip(x[:-1], x[1:], strict=True) for x in offsets), strict=True)):
        if name == "dropout" and b:
            break  # whose bits depend on the sequence's index
        alone = replace(
            problem,
            **{n: getattr(problem, n)[:, :, q0:q1] for n in ("q", "dout", "dlse")},
            **{n: getattr(problem, n)[:, :, k0:k1] for n in ("k", "v")},
            options=problem.options | tiles_of(problem, b, q1 - q0, k1 - k0),
        ).results()
        ends = {"out": (q0, q1), "lse": (q0, q1), "dq": (q0, q1), "dk": (k0, k1), "dv": (k0, k1)}
        wrong = [n for n, (start, end) in ends.items() if not torch.equal(alone[n], whole[n][:, :, start:end])]
        assert not wrong, f"sequence {b}"


def tiles_of(problem: cases.Problem, b: int, queries: int, keys: int) -> dict[str, Tensor]:
    if "tiles" not in problem.options:
        return {}
    return {"tiles": problem.options["tiles"][b : b + 1, :, : -(-queries // 64), : -(-keys // 64)]}


def test_packed_dropout_counts_from_each_sequence(backend: Backend) -> None:
    """The index of the sequence is the counter's b, and i and j start anew: as the same sequences in a padded batch."""
    case = packed((2, 1), (8, 8), (70, 130), (5, 9), (33, 90), dropout_p=0.4, seeds=True)
    problem = build(case, torch.float32, backend.device)
    out, _ = problem.forward()
    offsets = [problem.options[n] for n in ("q_offsets", "k_offsets", "k_offsets")]

    def pad(x: Tensor, ends: Tensor) -> Tensor:
        sequences = x[0].transpose(0, 1).split(ends.diff().tolist())
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).transpose(1, 2)

    padded = [pad(x, ends) for x, ends in zip((problem.q, problem.k, problem.v), offsets, strict=True)]
    options = {"q_lengths": offsets[0].diff(), "k_lengths": offsets[1].diff(), "seed": problem.options["seed"]}
    batch, _ = torch.ops.heedful.attention_forward(*padded, **options, dropout_p=0.4)
    for b, sequence in enumerate(out[0].split(offsets[0].diff().tolist(), dim=1)):
        assert torch.equal(sequence, batch[b, :, : sequence.shape[1]])


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.short)
@pytest.mark.parametrize("similarity", ["cosine", "gaussian"])
@pytest.mark.parametrize("queries", [1, 8, 20, 70])
def test_forward_and_backward_see_the_same_scores(
    queries: int, similarity: str, dtype: torch.dtype, backend: Backend
) -> None:
    """However large q and k are: what backward recomputes, it divides by forward's sum. Weights show in dv."""
    problem = build(Case((1, 1, 1, queries, 8, 64, 8), similarity=similarity, scale=None), dtype, backend.device)
    problem.q, problem.k = (x + 30 for x in (problem.q, problem.k))
    problem.dout, problem.dlse = torch.ones_like(problem.dout), torch.zeros_like(problem.dlse)
    sums = problem.results()["dv"].sum(2)  # over keys, of the weights of all queries
    torch.testing.assert_close(sums, torch.full_like(sums, queries), rtol=64 * torch.finfo(dtype).eps, atol=0)
