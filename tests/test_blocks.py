"""The block form of masks: what is built, how much of it is looked at, what is kept, and where it comes from."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from heedful import (
    BlockMask,
    Causal,
    Dilated,
    Documents,
    Global,
    KeyLengths,
    Mask,
    PrefixLM,
    QueryLengths,
    SlidingWindow,
    Strided,
)
from heedful import blocks as form
from heedful.blocks import TILE
from heedful.masks import allowed

LIKE = torch.empty(0)


def meant(arguments: dict, q_length: int, k_length: int) -> Tensor:
    return allowed(torch.arange(q_length), k_length, **arguments)


def draw_bools(shape: tuple[int, ...], seed: int, density: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


# ---- any mask, of any size


@st.composite
def calls(draw: st.DrawFn) -> tuple[Mask, Callable[..., Tensor], dict, tuple[int, int, int, int]]:
    """A tree of masks, what it means by its leaves alone, the alignment, and the sizes."""
    length = st.one_of(st.integers(0, 5), st.sampled_from((63, 64, 65, 127, 128, 130)))
    batch, heads, q_length, k_length = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(length), draw(length)
    number = st.integers(-2, max(q_length, k_length) + 2)
    width = st.one_of(st.none(), st.integers(0, 70))
    seeds = st.integers(0, 99)
    counts = st.one_of(number, st.lists(number, min_size=batch, max_size=batch))

    def ids(length: int) -> Tensor:
        shape = draw(st.sampled_from(((length,), (1, length), (batch, length))))
        values = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(draw(seeds)))
        return values.sort(-1).values if draw(st.booleans()) else values

    def tensor() -> Tensor:
        shape = [n if draw(st.booleans()) else 1 for n in (batch, heads, q_length, k_length)]
        return draw_bools(tuple(shape), draw(seeds), draw(st.sampled_from((0.02, 0.5, 1.0))))

    leaves = (
        lambda: Causal(),
        lambda: SlidingWindow(draw(width), draw(width)),
        lambda: KeyLengths(draw(counts)),
        lambda: QueryLengths(draw(counts)),
        lambda: PrefixLM(draw(counts)),
        lambda: Global(draw(counts)),
        lambda: Documents(ids(q_length), ids(k_length)),
        lambda: Dilated(draw(width), draw(width), draw(st.integers(1, 80))),
        lambda: Strided(draw(st.integers(1, 80))),
        lambda: Mask() & tensor(),
        lambda: BlockMask.from_tensor(tensor().expand(-1, -1, q_length, k_length)),
        lambda: Mask(),
    )
    align = draw(st.sampled_from(("top-left", "bottom-right", "int", "tensor")))
    if align == "int":
        align = draw(number)
    elif align == "tensor":
        align = torch.tensor(draw(st.lists(number, min_size=batch, max_size=batch)))

    def tree(depth: int) -> tuple[Mask, Callable[..., Tensor]]:
        if depth == 0 or draw(st.booleans()):
            leaf = draw(st.sampled_from(leaves))()
            return leaf, lambda **size: leaf.to_dense(q_length, k_length, **size)
        combine = draw(st.sampled_from((operator.and_, operator.or_)))
        masks, dense = zip(*(tree(depth - 1) for _ in range(draw(st.integers(2, 3)))))
        return functools.reduce(combine, masks), lambda **size: functools.reduce(combine, (f(**size) for f in dense))

    mask, dense = tree(3)
    return mask, dense, align, (batch, heads, q_length, k_length)


@settings(max_examples=400)
@given(call=calls())
def test_a_tree_of_masks_means_what_its_leaves_mean(call: tuple) -> None:
    mask, dense, align, (batch, heads, q_length, k_length) = call
    arguments = mask.lower(q_length, k_length, batch, heads, LIKE, align)
    whole = mask.to_dense(q_length, k_length, batch=batch, heads=heads, align=align)
    assert torch.equal(meant(arguments, q_length, k_length).expand_as(whole), whole)
    if "tiles" in arguments:
        check_form(arguments["tiles"], arguments["bits"], q_length, k_length)
    starts = arguments.get("q_starts", arguments.get("q_start"))  # by the lengths of the whole, where it has any
    assert torch.equal(whole, dense(batch=batch, heads=heads, align=starts))


def check_form(tiles: Tensor, bits: Tensor, q_length: int, k_length: int) -> None:
    """Partial tiles are numbered one by one, each with pairs that are there and pairs that are not; none outside."""
    assert tiles.dtype is torch.int32 and bits.dtype is torch.int64
    assert tiles.shape[2:] == (-(-q_length // TILE), -(-k_length // TILE)) and bits.shape[1:] == (TILE,)
    assert torch.equal(tiles[tiles > 1].sort().values, 2 + torch.arange(len(bits), dtype=torch.int32))
    *_, rows, columns = (tiles > 1).nonzero().unbind(1)
    number = tiles[tiles > 1].long() - 2
    row, column = (TILE * x[:, None] + torch.arange(TILE) for x in (rows, columns))
    pairs = (bits[number][..., None] >> torch.arange(TILE)) & 1 != 0
    inside = (row < q_length)[..., None] & (column < k_length)[:, None]
    assert not (pairs & ~inside).any()
    assert pairs.flatten(1).any(1).all() and (inside & ~pairs).flatten(1).any(1).all()


# ---- how much is looked at


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tiles have their pairs evaluated, chunk by chunk."""
    tiles, evaluate = [], form._evaluate

    def counted(seen: Callable, pack: Callable, b: Tensor, *others: object) -> tuple:
        tiles.append(len(b))
        return evaluate(seen, pack, b, *others)

    monkeypatch.setattr(form, "_evaluate", counted)
    return tiles


IDS = torch.arange(2048)


@pytest.mark.parametrize(
    ("mask", "partial"),
    [
        (Documents(IDS // 512), 0),
        # Four tiles in a row hold the end of one document and the start of another. Three of them meet 14 tiles of
        # one document each, the last 7, all twice; four meet themselves and three the one before, twice.
        (Documents(IDS // 500), 2 * (3 * 14 + 7) + 4 + 2 * 3),
        (Causal() & Documents(IDS // 500), 3 * 14 + 7 + 4 + 3),  # nothing above the diagonal
        (KeyLengths([1024]) & QueryLengths([64]) & (Causal() | Causal()), 1),
        (Causal() | Causal(), 32),
        (Global(64) | SlidingWindow(64, 64), 2 * 30),  # next to the diagonal, but for the first row and column
        (PrefixLM(640), 32 - 10),
        (Strided(1), 0),
        (Strided(64), 32 * 32),
        (Dilated(1, 0, 100), 32 + 2 * 31 - 1),  # the diagonal, and 100 below it
        (BlockMask.from_tensor(draw_bools((1, 1, 2048, 2048), 0, 0.5)), 0),  # built before
    ],
    ids=repr,
)
def test_only_the_tiles_that_intervals_leave_open_are_evaluated(mask: Mask, partial: int, evaluated: list[int]) -> None:
    mask.lower(2048, 2048, 1, 1, LIKE, "top-left")
    assert sum(evaluated) == partial
    assert max(evaluated, default=0) <= form.CHUNK


def test_tiles_that_turn_out_empty_or_full_need_no_bits(evaluated: list[int]) -> None:
    ids = torch.tensor([0, 2] * 32 + [1] * 64 + [1] * 64)  # 1 lies between 0 and 2
    built = Documents(ids).lower(192, 192, 1, 1, LIKE, 0)
    assert built["tiles"][0, 0].tolist() == [[2, 0, 0], [0, 1, 1], [0, 1, 1]] and len(built["bits"]) == 1
    assert sum(evaluated) == 5
    even = Strided(2) | (Mask() & (torch.arange(128) % 2 == 0))
    assert even.lower(1, 128, 1, 1, LIKE, 0)["tiles"].tolist() == [[[[2, 3]]]]
    odd = torch.arange(128) % 2 == 1
    built = (Strided(2) | (Mask() & odd)).lower(1, 128, 1, 1, LIKE, 0)
    assert built["tiles"].tolist() == [[[[1, 1]]]] and len(built["bits"]) == 0


def test_blocks_are_shared_by_what_they_do_not_depend_on() -> None:
    mask = (Strided(3) | SlidingWindow(2, 2)) & KeyLengths([100, 70, 5])
    assert mask.lower(100, 100, 3, 4, LIKE, "top-left")["tiles"].shape == (1, 1, 2, 2)
    assert mask.lower(100, 100, 3, 4, LIKE, "bottom-right")["tiles"].shape == (3, 1, 2, 2)
    by_head = mask & (Causal() | draw_bools((4, 100, 100), 0, 0.5))
    assert by_head.lower(100, 100, 3, 4, LIKE, "top-left")["tiles"].shape == (1, 4, 2, 2)


# ---- what is kept


def test_blocks_are_built_once(evaluated: list[int]) -> None:
    ids, table = torch.zeros(2, 100, dtype=torch.int64), draw_bools((100, 100), 0, 0.5)
    mask = (Documents(ids) & (table | Causal())) & KeyLengths([100, 90])
    counts = torch.tensor([3, 5])

    def builds(**changes: object) -> bool:
        evaluated.clear()
        options = {"q_length": 100, "k_length": 100, "batch": 2, "heads": 2, "like": LIKE, "align": "top-left"}
        mask.lower(**options | changes)
        return bool(evaluated)

    assert builds() and not builds() and not builds(like=torch.empty(3))
    assert builds(align=0) and not builds(align=0) and builds()  # only the latest is kept
    assert builds(heads=4) and not builds(heads=4) and builds()
    assert builds(align=counts) and not builds(align=counts) and not builds(align=counts.clone())
    counts[0] = 4
    assert builds(align=counts)
    lengths = torch.tensor([100, 90]), torch.tensor([80, 100])
    options = {"align": "bottom-right", "lengths": lengths}
    assert builds(**options) and not builds(**options)
    assert not builds(align="bottom-right", lengths=tuple(n.clone() for n in lengths))
    assert builds(align="bottom-right")

    assert not builds(align="bottom-right")
    ids[1, 50:] = 1
    assert builds(align="bottom-right")
    table[0] = True
    assert builds(align="bottom-right")
    assert torch.equal(
        meant(mask.lower(100, 100, 2, 2, LIKE, "top-left"), 100, 100).expand(2, 2, 100, 100),
        mask.to_dense(100, 100, batch=2, heads=2, align="top-left"),
    )


@torch.inference_mode()
def test_blocks_built_in_inference_mode(evaluated: list[int]) -> None:
    """Its tensors have no version, so their values are compared; what is kept serves outside of it."""
    ids = torch.arange(2 * 100).view(2, 100) // 30
    mask = Documents(ids)
    first = mask.lower(100, 100, 2, 1, LIKE, 0)
    assert evaluated and not any(x.is_inference() for x in (first["tiles"], first["bits"]))
    evaluated.clear()
    assert mask.lower(100, 100, 2, 1, LIKE, 0)["bits"] is first["bits"] and not evaluated
    ids[0] = 7
    again = mask.lower(100, 100, 2, 1, LIKE, 0)
    assert torch.equal(meant(again, 100, 100), mask.to_dense(100, 100)) and evaluated
    assert not BlockMask.from_tensor(mask.to_dense(100, 100)).tiles.is_inference()


# ---- block masks


SHAPES = ((130, 70), (2, 1, 64, 200), (1, 3, 65, 63), (2, 2, 0, 5), (3, 4, 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_mask_from_tensor(shape: tuple[int, ...]) -> None:
    table = draw_bools(shape, 0, 0.5)
    mask = BlockMask.from_tensor(table)
    check_form(mask.tiles, mask.bits, *shape[-2:])
    assert torch.equal(mask.to_dense(*shape[-2:]), table[(None,) * (4 - len(shape))])
    arguments = mask.lower(*shape[-2:], *mask.lead(), LIKE, "top-left")
    assert arguments["tiles"] is mask.tiles and arguments["bits"] is mask.bits
    again = BlockMask(mask.tiles, mask.bits, *shape[-2:])
    assert torch.equal(again.to_dense(*shape[-2:]), mask.to_dense(*shape[-2:]))


def test_block_mask_from_function() -> None:
    shapes = set()

    def f(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shapes.add(torch.broadcast_shapes(*(x.shape for x in (b, h, i, j))))
        return (i - j) % (2 + b + h) == 0

    mask = BlockMask.from_function(f, 600, 500, 2, 3)
    b, h, i, j = (torch.arange(n) for n in (2, 3, 600, 500))
    want = (i[:, None] - j) % (2 + b[:, None, None, None] + h[:, None, None]) == 0
    assert torch.equal(mask.to_dense(600, 500), want)
    assert all(len(shape) == 3 and shape[0] <= form.CHUNK and shape[1:] == (TILE, TILE) for shape in shapes)
    rows = BlockMask.from_function(lambda b, h, i, j: i > 3, 100, 100)  # a result that only some of them broadcast to
    assert rows.lead() == (1, 1) and torch.equal(rows.to_dense(100, 100)[0, 0, :, 0], torch.arange(100) > 3)


def own_ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 4, (batch, length), generator=torch.Generator().manual_seed(0)).sort(-1).values


DOCUMENTS, BORDERS = own_ids(2, 200), torch.tensor([10, 50, 90])
MODS = {
    "causal": lambda b, h, i, j: i >= j,
    "by head": lambda b, h, i, j: (i >= j) & ((i - j) % (h + 2) != 0),
    "documents": lambda b, h, i, j: DOCUMENTS[b, i] == DOCUMENTS[b, j],
    "reduction": lambda b, h, i, j: (BORDERS <= i).sum() == (BORDERS <= j).sum(),  # right for one pair at a time alone
    "all": lambda b, h, i, j: b.new_ones((), dtype=torch.bool),
    "none": lambda b, h, i, j: b.new_zeros((), dtype=torch.bool),
}


@pytest.mark.parametrize("mod", MODS)
@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ((None, None, 130, 70), 128),
        ((2, 3, 200, 200), 128),
        ((2, None, 100, 200), (32, 64)),
        ((None, 3, 130, 140), (48, 80)),
        ((2, 1, 64, 64), 64),
        ((1, 1, 1, 200), 128),
    ],
    ids=str,
)
def test_block_mask_from_flex_attention(mod: str, sizes: tuple, block: int | tuple[int, int]) -> None:
    flex = create_block_mask(MODS[mod], *sizes, device="cpu", BLOCK_SIZE=block)
    mask = BlockMask.from_flex(flex)
    check_form(mask.tiles, mask.bits, *sizes[2:])
    assert torch.equal(mask.to_dense(*sizes[2:]), create_mask(MODS[mod], *sizes, device="cpu"))


def test_block_mask_from_flex_attention_asks_only_about_partial_blocks(evaluated: list[int]) -> None:
    flex = create_block_mask(MODS["causal"], None, None, 1024, 1024, device="cpu")
    assert len(BlockMask.from_flex(flex).bits) == 16 and sum(evaluated) == 8 * 4
    flex.full_kv_num_blocks[..., 3] = 0  # its lists rule, not its mask_mod
    assert not BlockMask.from_flex(flex).to_dense(1024, 1024)[0, 0, 3 * 128 : 4 * 128, : 3 * 128].any()
    flex = create_block_mask(lambda b, h, i, j: i // 128 == j // 128, None, None, 512, 512, device="cpu")
    sliced = BlockMask.from_flex(flex[:, :, :])  # without a mask_mod, but with no partial blocks either
    assert torch.equal(sliced.to_dense(512, 512), BlockMask.from_flex(flex).to_dense(512, 512))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: BlockMask.from_tensor(torch.ones(2, 2)), TypeError, "mask: expected a bool tensor"),
        (
            lambda: BlockMask.from_tensor(draw_bools((3,), 0, 1)),
            ValueError,
            "tensor: expected 2 to 4 dimensions, got 1",
        ),
        (lambda: BlockMask.from_function(3, 5, 5), TypeError, "f: expected a function of b, h, i, j, got 3"),
        (lambda: BlockMask.from_function(MODS["causal"], -1, 5), ValueError, "q_length: expected 0 or more, got -1"),
        (lambda: BlockMask.from_function(MODS["causal"], 5, 5.0), TypeError, "k_length: expected an int, got 5.0"),
        (lambda: BlockMask.from_function(lambda b, h, i, j: i - j, 5, 5), TypeError, "got torch.int64"),
        (lambda: BlockMask.from_function(lambda b, h, i, j: True, 5, 5), TypeError, "got bool"),
        (lambda: BlockMask.from_function(lambda b, h, i, j: (i > j)[..., :7], 5, 5), ValueError, "got [1, 64, 7]"),
        (lambda: BlockMask.from_flex(Causal()), TypeError, "flex_attention.BlockMask, got Causal"),
        (
            lambda: BlockMask.from_flex(create_block_mask(MODS["causal"], 2, 1, 256, 256, device="cpu")[1]),
            ValueError,
            "flex_block_mask.mask_mod: expected a function that says which pairs",
        ),
        (lambda: BlockMask([[1]], LIKE, 5, 5), TypeError, "tiles: expected torch.int32 [B, H, 1, 1], got list"),
        (
            lambda: BlockMask(torch.ones(1, 1, 1, 1), torch.ones(0, 64), 5, 5),
            TypeError,
            "tiles: expected torch.int32 [B, H, 1, 1], got torch.float32",
        ),
        (
            lambda: BlockMask(torch.ones(1, 1, 1, 2).int(), torch.ones(0, 64).long(), 65, 65),
            ValueError,
            "tiles: expected torch.int32 [B, H, 2, 2], got [1, 1, 1, 2]",
        ),
        (
            lambda: BlockMask(torch.ones(1, 1, 1, 1).int(), torch.ones(2, 8).long(), 5, 5),
            ValueError,
            "bits: expected torch.int64 [n, 64], got [2, 8]",
        ),
    ],
)
def test_wrong_block_masks(make: Callable[[], Mask], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        make()
    assert text in str(error.value)


# ---- compilers and transforms, which forbid shapes that depend on data


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


TRACED = {
    "tensor": lambda ids, table: table | Causal(),
    "documents": lambda ids, table: Causal() & Documents(ids),
    "many": lambda ids, table: (Global(2) | Strided(5) | SlidingWindow(3, 0)) & (PrefixLM([3, 70]) | table),
    "lengths": lambda ids, table: KeyLengths(ids[:, -1]) & (Causal() | table),
}


@pytest.mark.parametrize(
    ("name", "backend", "dynamic"),
    [*((name, "aot_eager", name == "many") for name in TRACED), ("documents", "inductor", False)],
)
@pytest.mark.usefixtures("_fresh_compiler")
def test_compile(name: str, backend: str, dynamic: bool) -> None:
    def f(ids: Tensor, table: Tensor) -> dict:
        return TRACED[name](ids, table).lower(*table.shape, 2, 3, ids, "bottom-right")

    compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=dynamic)
    for q_length, k_length in ((100, 100), (130, 130))[: 1 + dynamic]:
        ids, table = own_ids(2, q_length) + 60, draw_bools((q_length, k_length), 0, 0.5)
        got, want = compiled(ids, table), f(ids, table)
        assert torch.equal(meant(got, q_length, k_length), meant(want, q_length, k_length))
        assert torch.equal(got["tiles"].clamp(max=2), want["tiles"].clamp(max=2).expand_as(got["tiles"]))


def test_a_mask_made_outside_of_what_is_compiled() -> None:
    mask = Documents(own_ids(2, 100)) & (Causal() | Global(2))
    block = BlockMask.from_tensor(draw_bools((100, 100), 0, 0.5))

    @torch.compile(fullgraph=True, backend="eager")
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x + meant(m.lower(100, 100, 2, 1, x, 0), 100, 100) for m in (mask, block, mask & block))

    wants = (m.to_dense(100, 100, batch=2, align=0) for m in (mask, block, mask & block))
    for got, want in zip(f(torch.zeros(1)), wants):
        assert torch.equal(got.bool().expand_as(want), want)


def test_vmap() -> None:
    def f(ids: Tensor, table: Tensor) -> Tensor:
        return meant(((table | Causal()) & Documents(ids)).lower(100, 100, 2, 1, ids, 0), 100, 100)

    ids, tables = own_ids(2, 100), draw_bools((3, 2, 1, 100, 100), 0, 0.5)
    assert torch.equal(torch.vmap(f, (None, 0))(ids, tables), torch.stack([f(ids, table) for table in tables]))
    many = torch.stack([ids, ids.flip(0), 1 - ids])
    assert torch.equal(torch.vmap(f, (0, None))(many, tables[0]), torch.stack([f(x, tables[0]) for x in many]))


def test_nothing_is_kept_from_a_transform() -> None:
    mask = Documents(own_ids(2, 100))
    torch.func.grad(lambda x: x * mask.lower(100, 100, 2, 1, x, 0)["tiles"].sum())(torch.tensor(1.0))
    lowered = mask.lower(100, 100, 2, 1, LIKE, 0)
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in (lowered["tiles"], lowered["bits"]))
