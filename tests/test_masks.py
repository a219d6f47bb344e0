"""Masks: what they mean, how they join, what the operators are given."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import heedful
from heedful import Causal, KeyLengths, Mask, QueryLengths, SlidingWindow

B, H, SQ, SK = 2, 3, 5, 7
TABLE = torch.rand(B, H, SQ, SK, generator=torch.Generator().manual_seed(0)) > 0.3

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
    "all": (
        lambda: Causal() & TABLE & SlidingWindow(3, None) & KeyLengths([7, 5]) & QueryLengths(4),
        lambda b, h, i, j, p: p - 3 <= j <= p and j < (7, 5)[b] and i < 4 and bool(TABLE[b, h, i, j]),
    ),
}
ALIGNS = {
    "top-left": lambda b: 0,
    "bottom-right": lambda b: SK - SQ,
    -1: lambda b: -1,
    torch.tensor([3, 0]): lambda b: (3, 0)[b],
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
        start = lambda b: length(mask.k_lengths, b, SK) - length(mask.q_lengths, b, SQ)  # noqa: E731
    assert torch.equal(mask.to_dense(SQ, SK, batch=B, heads=H, align=align), defined(allowed, start))


def length(n: int | Tensor | None, b: int, most: int) -> int:
    return most if n is None else min(most, n if isinstance(n, int) else int(n[b]))


@pytest.mark.parametrize("first", MASKS)
@pytest.mark.parametrize("second", MASKS)
def test_and_is_the_intersection(first: str, second: str) -> None:
    a, b = MASKS[first][0](), MASKS[second][0]()
    size = {"batch": B, "heads": H, "align": 1}
    both = a.to_dense(SQ, SK, **size) & b.to_dense(SQ, SK, **size)
    assert torch.equal((a & b).to_dense(SQ, SK, **size), both)
    assert torch.equal((b & a).to_dense(SQ, SK, **size), both)


def test_tensors_join_from_both_sides() -> None:
    for mask in (Causal() & TABLE, TABLE & Causal()):
        assert isinstance(mask, Mask)
        assert torch.equal(mask.to_dense(SQ, SK, align=0), TABLE & Causal().to_dense(SQ, SK, align=0))


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


def test_repr() -> None:
    assert repr(Causal()) == "Causal()"
    assert repr(SlidingWindow(2, None)) == "SlidingWindow(left=2, right=None)"
    mask = KeyLengths([4, 5]) & Causal() & TABLE & SlidingWindow(2, 3) & QueryLengths(4)
    assert (
        repr(mask) == "SlidingWindow(left=2, right=0) & QueryLengths(4) & KeyLengths([4, 5]) & TensorMask([2, 3, 5, 7])"
    )
    assert repr(KeyLengths(list(range(100)))) == "KeyLengths(int64 [100])"
    assert repr(Mask()) == "Mask()"


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: SlidingWindow(-1, 0), ValueError, "left: expected 0 or more, or None"),
        (lambda: SlidingWindow(1, 2.0), TypeError, "right: expected an int or None, got 2.0"),
        (lambda: SlidingWindow(True, 0), TypeError, "left: expected an int or None, got True"),
        (lambda: KeyLengths(2.5), TypeError, "KeyLengths: expected an int, a list of ints or an int tensor"),
        (
            lambda: KeyLengths([1.5]),
            TypeError,
            "KeyLengths: expected an int tensor [B], got a tensor of torch.float32 [1]",
        ),
        (
            lambda: QueryLengths(torch.ones(2, 2, dtype=torch.int64)),
            TypeError,
            "QueryLengths: expected an int tensor [B]",
        ),
        (lambda: QueryLengths(None), TypeError, "QueryLengths: expected an int"),
        (
            lambda: Causal() & torch.zeros(2, 2),
            TypeError,
            "mask: expected a bool tensor or a heedful mask, got a tensor of",
        ),
        (lambda: Causal() & 3, TypeError, "unsupported operand"),
        (lambda: Causal() | Causal(), TypeError, "unsupported operand"),
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
    lowered, *_ = (Mask() & mask).lower(SQ, SK, B, mask, "bottom-right")
    assert lowered.data_ptr() == mask.data_ptr()
