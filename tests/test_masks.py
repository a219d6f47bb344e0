"""Masks: what they mean, how they join, what the operators are given."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import heedful
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
from heedful.masks import allowed

B, H, SQ, SK = 2, 3, 5, 7
TABLE = torch.rand(B, H, SQ, SK, generator=torch.Generator().manual_seed(0)) > 0.3
Q_IDS, K_IDS = torch.tensor([[0, 0, 1, 2, 2], [3, 1, 1, 0, 0]]), torch.tensor([0, 0, 1, 1, 2, 2, 2])

# Each mask with its definition: may query i, at position p, of sequence b and head h attend to key j?
MASKS: dict[str, tuple[Callable[[], Mask], Callable[..., bool]]] = {
    "causal": (Causal, lambda b, h, i, j, p: j <= p),
    "window": (lambda: SlidingWindow(2, 1), lambda b, h, i, j, p: p - 2 <= j <= p + 1),
    "window left": (lambda: SlidingWindow(1, None), lambda b, h, i, j, p: j >= p - 1),
    "window right": (lambda: SlidingWindow(None, 2), lambda b, h, i, j, p: j <= p + 2),
    "keys": (lambda: KeyLengths([4, 0]), lambda b, h, i, j, p: j < (4, 0)[b]),
    "keys, one for all": (lambda: KeyLengths(3), lambda b, h, i, j, p: j < 3),
    "queries": (lambda: QueryLengths(torch.tensor([9, 2])), lambda b, h, i, j, p: i < (9, 2)[b]),
    "tensor": (lambda: Mask() & TABLE, lambda b, h, i, j, p: bool(TABLE[b, h, i, j])),
    "tensor [Sq, Sk]": (lambda: Mask() & TABLE[0, 0], lambda b, h, i, j, p: bool(TABLE[0, 0, i, j])),
    "tensor, keys alone": (lambda: TABLE[:, :1, :1] & Mask(), lambda b, h, i, j, p: bool(TABLE[b, 0, 0, j])),
    "prefix": (lambda: PrefixLM([3, 0]), lambda b, h, i, j, p: j <= p or j < (3, 0)[b]),
    "prefix, one for all": (lambda: PrefixLM(4), lambda b, h, i, j, p: j <= p or j < 4),
    "global": (lambda: Global(torch.tensor([1, 4])), lambda b, h, i, j, p: p < (1, 4)[b] or j < (1, 4)[b]),
    "global, one for all": (lambda: Global(2), lambda b, h, i, j, p: p < 2 or j < 2),
    "documents": (lambda: Documents(Q_IDS, K_IDS), lambda b, h, i, j, p: bool(Q_IDS[b, i] == K_IDS[j])),
    "dilated": (
        lambda: Dilated(2, 1, 2),
        lambda b, h, i, j, p: any(j == p + 2 * m for m in range(-2, 2)),
    ),
    "dilated, unbounded": (
        lambda: Dilated(None, 1, 3),
        lambda b, h, i, j, p: any(j == p + 3 * m for m in range(-9, 2)),
    ),
    "strided": (lambda: Strided(3), lambda b, h, i, j, p: (p - j) % 3 == 0),
    "blocks": (
        lambda: BlockMask.from_function(lambda b, h, i, j: (i + j + h) % (b + 2) == 0, SQ, SK, B, H),
        lambda b, h, i, j, p: (i + j + h) % (b + 2) == 0,
    ),
    "all": (
        lambda: Causal() & TABLE & SlidingWindow(3, None) & KeyLengths([7, 5]) & QueryLengths(4),
        lambda b, h, i, j, p: p - 3 <= j <= p and j < (7, 5)[b] and i < 4 and bool(TABLE[b, h, i, j]),
    ),
    "any": (
        lambda: KeyLengths([1, 2]) | TABLE | Strided(4) | QueryLengths(1),
        lambda b, h, i, j, p: j < (1, 2)[b] or bool(TABLE[b, h, i, j]) or (p - j) % 4 == 0 or i < 1,
    ),
    "all of any": (
        lambda: (Global(1) | SlidingWindow(1, 1)) & KeyLengths([6, 3]) & (TABLE | Causal()),
        lambda b, h, i, j, p: (
            (p < 1 or j < 1 or abs(p - j) < 2) and j < (6, 3)[b] and (bool(TABLE[b, h, i, j]) or j <= p)
        ),
    ),
}
ALIGNS = {
    "top-left": lambda b: 0,
    "bottom-right": lambda b: SK - SQ,
    -1: lambda b: -1,
    torch.tensor([3, 0]): lambda b: (3, 0)[b],
}

# The lengths of sequences, of queries and keys: those that a mask gives by itself or joined by & alone.
LENGTHS = {
    "keys": (None, (4, 0)),
    "keys, one for all": (None, (3, 3)),
    "queries": ((9, 2), None),
    "all": ((4, 4), (7, 5)),
    "all of any": (None, (6, 3)),
}


def defined(allowed: Callable[..., bool], start: Callable[[int], int]) -> Tensor:
    pairs = [(b, h, i, j, i + start(b)) for b in range(B) for h in range(H) for i in range(SQ) for j in range(SK)]
    return torch.tensor([allowed(*pair) for pair in pairs]).view(B, H, SQ, SK)


@pytest.mark.parametrize("align", ALIGNS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_to_dense_is_the_definition(name: str, align: str | int | Tensor) -> None:
    make, allowed = MASKS[name]
    mask, start = make(), ALIGNS[align]
    if align == "bottom-right":  # by each sequence's own lengths
        q_lengths, k_lengths = LENGTHS.get(name, (None, None))
        start = lambda b: length(k_lengths, b, SK) - length(q_lengths, b, SQ)  # noqa: E731
    assert torch.equal(mask.to_dense(SQ, SK, batch=B, heads=H, align=align), defined(allowed, start))


def length(n: tuple[int, int] | None, b: int, most: int) -> int:
    return most if n is None else min(most, n[b])


@pytest.mark.parametrize("first", MASKS)
@pytest.mark.parametrize("second", MASKS)
def test_and_intersects_and_or_unites(first: str, second: str) -> None:
    a, b = MASKS[first][0](), MASKS[second][0]()
    size = {"batch": B, "heads": H, "align": 1}
    both = a.to_dense(SQ, SK, **size) & b.to_dense(SQ, SK, **size)
    assert torch.equal((a & b).to_dense(SQ, SK, **size), both)
    assert torch.equal((b & a).to_dense(SQ, SK, **size), both)
    either = a.to_dense(SQ, SK, **size) | b.to_dense(SQ, SK, **size)
    assert torch.equal((a | b).to_dense(SQ, SK, **size), either)
    assert torch.equal((b | a).to_dense(SQ, SK, **size), either)


def test_tensors_join_from_both_sides() -> None:
    for mask in (Causal() & TABLE, TABLE & Causal()):
        assert isinstance(mask, Mask)
        assert torch.equal(mask.to_dense(SQ, SK, align=0), TABLE & Causal().to_dense(SQ, SK, align=0))
    for mask in (Causal() | TABLE, TABLE | Causal()):
        assert isinstance(mask, Mask)
        assert torch.equal(mask.to_dense(SQ, SK, align=0), TABLE | Causal().to_dense(SQ, SK, align=0))


@pytest.mark.parametrize("align", ALIGNS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_attention_sees_what_to_dense_shows(name: str, align: str | int | Tensor) -> None:
    mask = MASKS[name][0]()
    q, k, v = (torch.randn(B, H, s, 4, dtype=torch.float64) for s in (SQ, SK, SK))
    dense = mask.to_dense(SQ, SK, batch=B, heads=H, align=align)
    for function in (heedful.attention, heedful.reference.attention):
        torch.testing.assert_close(function(q, k, v, mask=mask, align=align), function(q, k, v, mask=dense))


def test_to_dense_takes_its_sizes_from_the_mask() -> None:
    assert Causal().to_dense(3, 4).shape == (1, 1, 3, 4)
    assert KeyLengths([1, 2, 3]).to_dense(3, 4).shape == (3, 1, 3, 4)
    assert (Causal() & TABLE).to_dense(SQ, SK).shape == (B, H, SQ, SK)
    assert Causal().to_dense(2, 2, align=torch.tensor([0, 1, 2, 3])).shape == (4, 1, 2, 2)
    assert Causal().to_dense(0, 3).shape == (1, 1, 0, 3)
    assert Causal().to_dense(2, 2, device="meta").device.type == "meta"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("align", ALIGNS, ids=str)
def test_the_operators_arguments_mean_the_same(name: str, align: str | int | Tensor) -> None:
    mask = MASKS[name][0]()
    arguments = mask.lower(SQ, SK, B, H, torch.empty(0), align)
    dense = mask.to_dense(SQ, SK, batch=B, heads=H, align=align)
    assert torch.equal(meant(arguments, SQ, SK).expand_as(dense), dense)
    rows = torch.tensor([3, 1])
    assert torch.equal(allowed(rows, SK, **arguments).expand(B, H, 2, SK), dense[:, :, rows])


def meant(arguments: dict, q_length: int, k_length: int) -> Tensor:
    return allowed(torch.arange(q_length), k_length, **arguments)


def test_what_the_operators_take_as_it_is_stays_so() -> None:
    lengths = torch.tensor([3, 4])
    mask = SlidingWindow(4, 3) & TABLE & KeyLengths(lengths) & Causal() & QueryLengths(2)
    arguments = mask.lower(SQ, SK, B, H, lengths, "top-left")
    assert set(arguments) == {"mask", "left", "right", "q_lengths", "k_lengths", "q_start"}
    assert (arguments["left"], arguments["right"], arguments["q_start"]) == (4, 0, 0)
    assert arguments["k_lengths"].tolist() == [3, 4] and arguments["q_lengths"].tolist() == [2, 2]
    assert Mask().lower(SQ, SK, B, H, lengths, "bottom-right") == {"q_start": SK - SQ}
    union = (mask & Global(1)).lower(SQ, SK, B, H, lengths, 3)
    assert set(union) == {*arguments, "tiles", "bits"}


def test_packed_sequences_have_positions_by_their_own_lengths() -> None:
    lengths = torch.tensor([5, 2]), torch.tensor([7, 6])
    for mask, starts in ((Causal(), [2, 4]), (Causal() & KeyLengths([6, 9]), [1, 4]), (PrefixLM(1), [2, 4])):
        arguments = mask.lower(5, 7, 2, H, torch.empty(0), "bottom-right", lengths)
        assert arguments["q_starts"].tolist() == starts
        assert "q_lengths" not in arguments
        seen = meant(arguments, 5, 7)
        for b, (n, m) in enumerate(zip(*map(Tensor.tolist, lengths))):
            alone = mask.to_dense(n, m, align=starts[b], batch=2)[b, 0]
            assert torch.equal(seen.expand(2, 1, 5, 7)[b, 0, :n, :m], alone)


def test_repr() -> None:
    assert repr(Causal()) == "Causal()"
    assert repr(SlidingWindow(2, None)) == "SlidingWindow(left=2, right=None)"
    mask = KeyLengths([4, 5]) & (Causal() | Global(4)) & TABLE & QueryLengths(4)
    assert repr(mask) == "KeyLengths([4, 5]) & (Causal() | Global(4)) & TensorMask([2, 3, 5, 7]) & QueryLengths(4)"
    assert repr((Causal() & Strided(2)) | PrefixLM(3)) == "Causal() & Strided(2) | PrefixLM(3)"
    assert repr(Dilated(1, None, 2) & PrefixLM(3)) == "Dilated(left=1, right=None, dilation=2) & PrefixLM(3)"
    assert repr(Documents(Q_IDS, K_IDS.int())) == "Documents(int64 [2, 5], int32 [7])"
    assert repr(BlockMask.from_tensor(TABLE)) == "BlockMask([2, 3, 5, 7])"
    assert repr(KeyLengths(list(range(100)))) == "KeyLengths(int64 [100])"
    assert repr(Mask()) == "Mask()"


INT_TENSOR = "expected an int tensor [B, S] or [S], got"


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: SlidingWindow(-1, 0), ValueError, "heedful.SlidingWindow: left: expected 0 or more, or None"),
        (lambda: SlidingWindow(1, 2.0), TypeError, "heedful.SlidingWindow: right: expected an int or None, got 2.0"),
        (lambda: SlidingWindow(True, 0), TypeError, "left: expected an int or None, got True"),
        (lambda: KeyLengths(2.5), TypeError, "heedful.KeyLengths: n: expected an int, a list of ints or an int tensor"),
        (lambda: KeyLengths([1.5]), TypeError, "expected an int tensor [B], got a tensor of torch.float32 [1]"),
        (
            lambda: QueryLengths(torch.ones(2, 2, dtype=torch.int64)),
            TypeError,
            "heedful.QueryLengths: n: expected an int tensor [B], got a tensor of torch.int64 [2, 2]",
        ),
        (lambda: QueryLengths(None), TypeError, "heedful.QueryLengths: n: expected an int"),
        (lambda: PrefixLM("3"), TypeError, "heedful.PrefixLM: n: expected an int"),
        (lambda: Global(1.0), TypeError, "heedful.Global: n: expected an int"),
        (lambda: Dilated(-1, 0, 2), ValueError, "heedful.Dilated: left: expected 0 or more, or None"),
        (lambda: Dilated(1, 0.5, 2), TypeError, "heedful.Dilated: right: expected an int or None, got 0.5"),
        (lambda: Dilated(1, 1, 0), ValueError, "heedful.Dilated: dilation: expected 1 or more, got 0"),
        (lambda: Strided(None), TypeError, "heedful.Strided: stride: expected an int, got None"),
        (lambda: Strided(-2), ValueError, "heedful.Strided: stride: expected 1 or more, got -2"),
        (lambda: Documents([1, 2]), TypeError, f"heedful.Documents: q_ids: {INT_TENSOR} list"),
        (lambda: Documents(torch.ones(3)), TypeError, f"q_ids: {INT_TENSOR} a tensor of torch.float32"),
        (lambda: Documents(Q_IDS, Q_IDS[None]), ValueError, f"heedful.Documents: k_ids: {INT_TENSOR} [1, 2, 5]"),
        (
            lambda: Causal() & torch.zeros(2, 2),
            TypeError,
            "mask: expected a bool tensor or a heedful mask, got a tensor of",
        ),
        (lambda: torch.zeros(2, 2) | Causal(), TypeError, "got a tensor of torch.float32"),
        (lambda: Causal() & 3, TypeError, "unsupported operand"),
        (lambda: None | Causal(), TypeError, "unsupported operand"),
        (lambda: torch.ones(2, 2, dtype=torch.bool) ^ Causal(), TypeError, "unsupported operand"),
    ],
)
def test_wrong_masks(make: Callable[[], Mask], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        make()
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"mask": "causal"}, TypeError, "mask: expected a bool tensor or a heedful mask, got str"),
        ({"mask": torch.zeros(5, 7)}, TypeError, "what is added to the scores is given as bias"),
        (
            {"mask": torch.ones(1, 1, 1, 5, 7, dtype=torch.bool)},
            RuntimeError,
            "mask: expected at most 4 dimensions, got 5",
        ),
        ({"mask": torch.ones(5, 6, dtype=torch.bool)}, RuntimeError, "mask: expected"),
        ({"mask": KeyLengths([1, 2, 3])}, RuntimeError, "k_lengths: expected"),
        ({"mask": QueryLengths([1, 2, 3])}, RuntimeError, "q_lengths: expected"),
        ({"mask": TABLE[..., :6] | Causal()}, RuntimeError, "mask: expected a tensor broadcastable to [2, 3, 5, 7]"),
        ({"mask": PrefixLM([1, 2, 3])}, RuntimeError, "heedful.PrefixLM: n: expected an int tensor [2], got [3]"),
        ({"mask": Global([1, 2, 3])}, RuntimeError, "heedful.Global: n: expected an int tensor [2], got [3]"),
        ({"mask": Documents(Q_IDS)}, RuntimeError, "heedful.Documents: k_ids: expected [2, 7] or [7], got [2, 5]"),
        ({"mask": Documents(K_IDS)}, RuntimeError, "heedful.Documents: q_ids: expected [2, 5] or [5], got [7]"),
        (
            {"mask": BlockMask.from_tensor(TABLE[:, :2])},
            RuntimeError,
            "mask: expected a mask for [2, 3, 5, 7], got BlockMask([2, 2, 5, 7])",
        ),
        ({"mask": BlockMask.from_tensor(TABLE[..., 1:]) | Causal()}, RuntimeError, "got BlockMask([2, 3, 5, 6])"),
        ({"mask": PrefixLM(1), "align": torch.zeros(3, dtype=torch.int64)}, RuntimeError, "q_starts: expected"),
        ({"mask": Causal(), "align": "center"}, ValueError, "align: expected"),
        ({"align": "center"}, ValueError, "align: expected"),
        ({"align": 1.5}, TypeError, "align: expected"),
        ({"align": True}, TypeError, "align: expected"),
        ({"mask": Causal(), "align": torch.zeros(2)}, TypeError, "align: expected an int tensor"),
        ({"mask": Causal(), "align": torch.zeros(3, dtype=torch.int64)}, RuntimeError, "q_starts: expected"),
    ],
)
def test_wrong_masks_in_a_call(options: dict, kind: type[Exception], text: str) -> None:
    q, k, v = (torch.randn(B, H, s, 4) for s in (SQ, SK, SK))
    with pytest.raises(kind) as error:
        heedful.attention(q, k, v, **options)
    assert text in str(error.value)


def test_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = (Causal() & KeyLengths([3, 6])).plot(4, 6, batch=1)
    drawn = torch.as_tensor(axes.images[0].get_array().data).bool()
    assert torch.equal(drawn, (Causal() & KeyLengths([3, 6])).to_dense(4, 6)[1, 0])
    matplotlib.pyplot.close("all")

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="Mask.plot needs matplotlib: pip install matplotlib"):
        Causal().plot(4, 6)


def test_a_dense_mask_is_never_copied() -> None:
    mask = torch.ones(1, 1, SQ, SK, dtype=torch.bool)
    lowered = (Mask() & mask).lower(SQ, SK, B, H, mask, "bottom-right")["mask"]
    assert lowered.data_ptr() == mask.data_ptr()
