"""Where queries sit among the keys, and how many of both each sequence has: what masks and biases by distance share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import spans

Lengths = int | Tensor  # int64 [B], or one for all
Align = str | int | Tensor

BOTTOM_RIGHT = "bottom-right"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def positions(
    align: Align,
    q_length: int,
    k_length: int,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    like: Tensor,
) -> tuple[int, Tensor | None]:
    """The position of the first query: (one for all, None), or (0, int64 [B])."""
    wrong = 'heedful.attention: align: expected "top-left", "bottom-right", an int or an int tensor [B], got '
    if isinstance(align, str):
        if align == "top-left":
            return 0, None
        if align != BOTTOM_RIGHT:
            raise ValueError(wrong + repr(align))
        if q_lengths is None and k_lengths is None:
            return k_length - q_length, None
        last_q = q_length if q_lengths is None else q_lengths.clamp(0, q_length)
        last_k = k_length if k_lengths is None else k_lengths.clamp(0, k_length)
        return 0, last_k - last_q
    if isinstance(align, Tensor):
        if align.dtype not in INTEGERS:
            raise TypeError(f"heedful.attention: align: expected an int tensor [B], got a tensor of {align.dtype}")
        return 0, align.to(like.device, torch.int64)
    if is_int(align):
        return align, None
    raise TypeError(wrong + repr(align))


class Grid:
    """The pairs of one call: sizes [B, Hq, Sq, Sk], device, the position of each sequence's first query."""

    def __init__(self, sizes: tuple[int, int, int, int], start: Lengths, device: torch.device) -> None:
        self.batch, self.heads, self.q_length, self.k_length = self.sizes = sizes
        self.start, self.device = start, device

    def each(self, n: Lengths, b: Tensor | None, name: str) -> Lengths:
        """What ``n`` is for the sequences b; without b for all of them, [B, 1, 1, 1]."""
        if not isinstance(n, Tensor):
            return n
        if n.dim() != 1 or n.shape[0] != self.batch:
            raise RuntimeError(f"{name}: expected an int tensor [{self.batch}], got {list(n.shape)}")
        return n[:, None, None, None] if b is None else n[b]

    def position(self, b: Tensor, i: Tensor) -> Tensor:
        """Where query i of sequence b sits."""
        return i + self.each(self.start, b, "heedful.attention: q_starts")

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        """The first and the last query of each tile, [1, 1, Tq, 1]."""
        first, last = spans(self.q_length, self.device)
        return first[None, None, :, None], last[None, None, :, None]

    @property
    def keys(self) -> tuple[Tensor, Tensor]:
        """The first and the last key of each tile, [1, 1, 1, Tk]."""
        first, last = spans(self.k_length, self.device)
        return first[None, None, None], last[None, None, None]

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """The first and the last position of each tile, [B or 1, 1, Tq, 1]."""
        start = self.each(self.start, None, "heedful.attention: q_starts")
        first, last = self.queries
        return first + start, last + start

    @property
    def distances(self) -> tuple[Tensor, Tensor]:
        """The least and the largest ``key - position`` of each tile; all in between occur too."""
        (first_key, last_key), (first, last) = self.keys, self.positions
        return first_key - last, last_key - first


def is_int(n: object) -> bool:
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool)


def checked_int(n: int | None, name: str, least: int, *, optional: bool = False) -> int | None:
    """``n``, an int that is at least ``least``; with ``optional``, None too."""
    if optional and n is None:
        return None
    if not is_int(n):
        raise TypeError(f"{name}: expected an int{' or None' if optional else ''}, got {n!r}")
    if n < least:
        raise ValueError(f"{name}: expected {least} or more{', or None (unbounded)' if optional else ''}, got {n}")
    return n


def checked_lengths(n: int | Sequence[int] | Tensor, name: str) -> Lengths:
    if isinstance(n, (list, tuple)):
        n = torch.tensor(n)
    if isinstance(n, Tensor):
        if n.dtype not in INTEGERS or n.dim() != 1:
            raise TypeError(f"{name}: expected an int tensor [B], got a tensor of {n.dtype} {list(n.shape)}")
        return n.to(torch.int64)
    if not is_int(n):
        raise TypeError(f"{name}: expected an int, a list of ints or an int tensor [B], got {n!r}")
    return n


def for_each(n: Lengths, batch: int, like: Tensor) -> Tensor:
    """``n`` as a tensor, int64 [B], on the device of ``like``."""
    return n.to(like.device) if isinstance(n, Tensor) else like.new_full((batch,), n, dtype=torch.int64)


def shorter(a: Lengths, b: Lengths) -> Lengths:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def at_rank_4(tensor: Tensor, name: str) -> Tensor:
    """``tensor`` with dimensions of 1 in front, up to four."""
    if tensor.dim() > 4:
        raise RuntimeError(f"heedful.attention: {name}: expected at most 4 dimensions, got {tensor.dim()}")
    return tensor if tensor.dim() == 4 else tensor[(None,) * (4 - tensor.dim())]
