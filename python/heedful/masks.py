"""The masks that users type: which pairs of a query and a key may meet. They join by ``&`` and ``|`` (algebra.py)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from . import blocks
from .algebra import Mask, TensorMask, allowed, as_mask, build
from .blocks import Blocks, Bound
from .positions import (
    BOTTOM_RIGHT,
    INTEGERS,
    Align,
    Grid,
    Lengths,
    at_rank_4,
    checked_int,
    checked_lengths,
    positions,
)

__all__ = [
    "BOTTOM_RIGHT",
    "Align",
    "BlockMask",
    "Causal",
    "Dilated",
    "Documents",
    "Global",
    "KeyLengths",
    "Mask",
    "PrefixLM",
    "QueryLengths",
    "SlidingWindow",
    "Strided",
    "TensorMask",
    "allowed",
    "as_mask",
    "at_rank_4",
    "positions",
]


class SlidingWindow(Mask):
    """Keys from ``position - left`` to ``position + right``, both included; None is unbounded."""

    native = ("left", "right")

    def __init__(self, left: int | None, right: int | None) -> None:
        self.left = checked_int(left, "heedful.SlidingWindow: left", 0, optional=True)
        self.right = checked_int(right, "heedful.SlidingWindow: right", 0, optional=True)

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        position, sides = grid.position(b, i), []
        if self.left is not None:
            sides.append(j >= position - self.left)
        if self.right is not None:
            sides.append(j <= position + self.right)
        return reduce(operator.and_, sides) if sides else super().seen(grid, b, h, i, j)

    def bound(self, grid: Grid) -> Bound:
        (least, most), bound = grid.distances, super().bound(grid)
        if self.left is not None:
            bound = bound & Bound(most >= -self.left, least >= -self.left)
        return bound if self.right is None else bound & Bound(least <= self.right, most <= self.right)

    def lower(
        self,
        q_length: int,
        k_length: int,
        batch: int,
        heads: int,
        like: Tensor,
        align: Align,
        lengths: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Any]:
        """As every mask's, by the shortest way."""
        if lengths is not None or isinstance(align, Tensor):
            return super().lower(q_length, k_length, batch, heads, like, align, lengths)
        arguments = {"q_start": positions(align, q_length, k_length, None, None, like)[0]}
        if self.left is not None:
            arguments["left"] = self.left
        if self.right is not None:
            arguments["right"] = self.right
        return arguments

    def __repr__(self) -> str:
        return f"SlidingWindow(left={self.left}, right={self.right})"


class Causal(SlidingWindow):
    """Keys at or before the query's position."""

    def __init__(self) -> None:
        super().__init__(None, 0)

    def __repr__(self) -> str:
        return "Causal()"


class Dilated(Mask):
    """Keys ``position + m * dilation`` for whole numbers m from ``-left`` to ``right``; None is unbounded."""

    def __init__(self, left: int | None, right: int | None, dilation: int) -> None:
        self.left = checked_int(left, "heedful.Dilated: left", 0, optional=True)
        self.right = checked_int(right, "heedful.Dilated: right", 0, optional=True)
        self.dilation = checked_int(dilation, "heedful.Dilated: dilation", 1)

    @property
    def window(self) -> SlidingWindow:
        """The window that holds all of it."""
        return SlidingWindow(*(None if m is None else m * self.dilation for m in (self.left, self.right)))

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.window.seen(grid, b, h, i, j) & (grid.position(b, i) % self.dilation == j % self.dilation)

    def bound(self, grid: Grid) -> Bound:
        least, most = grid.distances
        multiple = most // self.dilation * self.dilation >= least  # the largest multiple up to most is in the tile
        return self.window.bound(grid) & Bound(multiple, torch.full_like(multiple, self.dilation == 1))

    def __repr__(self) -> str:
        return f"Dilated(left={self.left}, right={self.right}, dilation={self.dilation})"


class Strided(Dilated):
    """Keys a multiple of ``stride`` away from the position, on both sides.

    The Sparse Transformer's strided pattern is ``Causal() & (SlidingWindow(s - 1, 0) | Strided(s))``.
    """

    def __init__(self, stride: int) -> None:
        super().__init__(None, None, checked_int(stride, "heedful.Strided: stride", 1))

    def __repr__(self) -> str:
        return f"Strided({self.dilation})"


class KeyLengths(Mask):
    """The first ``n[b]`` keys of sequence b. ``n``: an int tensor [B], a list of ints, or an int for all.

    Joined by ``&`` alone, it is the sequence's length: positions are counted from its end for ``align="bottom-right"``.
    """

    holds = native = ("k_lengths",)

    def __init__(self, n: int | Sequence[int] | Tensor) -> None:
        self.k_lengths = checked_lengths(n, "heedful.KeyLengths: n")

    def lead(self) -> tuple[int, int]:
        return _lead(self.k_lengths)

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < grid.each(self.k_lengths, b, "heedful.KeyLengths: n")

    def bound(self, grid: Grid) -> Bound:
        return _below(grid.keys, grid.each(self.k_lengths, None, "heedful.KeyLengths: n"))

    def __repr__(self) -> str:
        return f"KeyLengths({_show(self.k_lengths)})"


class QueryLengths(Mask):
    """The first ``n[b]`` queries of sequence b; the others attend to nothing. ``n``: as for :class:`KeyLengths`."""

    holds = native = ("q_lengths",)

    def __init__(self, n: int | Sequence[int] | Tensor) -> None:
        self.q_lengths = checked_lengths(n, "heedful.QueryLengths: n")

    def lead(self) -> tuple[int, int]:
        return _lead(self.q_lengths)

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i < grid.each(self.q_lengths, b, "heedful.QueryLengths: n")

    def bound(self, grid: Grid) -> Bound:
        return _below(grid.queries, grid.each(self.q_lengths, None, "heedful.QueryLengths: n"))

    def __repr__(self) -> str:
        return f"QueryLengths({_show(self.q_lengths)})"


class Global(Mask):
    """Pairs whose query's position, or whose key, is less than ``n[b]``. ``n``: as for :class:`KeyLengths`.

    Longformer's pattern is ``Global(n) | SlidingWindow(w, w)``.
    """

    holds = ("n",)

    def __init__(self, n: int | Sequence[int] | Tensor) -> None:
        self.n = checked_lengths(n, "heedful.Global: n")

    def lead(self) -> tuple[int, int]:
        return _lead(self.n)

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        n = grid.each(self.n, b, "heedful.Global: n")
        return (grid.position(b, i) < n) | (j < n)

    def bound(self, grid: Grid) -> Bound:
        n = grid.each(self.n, None, "heedful.Global: n")
        return _below(grid.positions, n) | _below(grid.keys, n)

    def __repr__(self) -> str:
        return f"Global({_show(self.n)})"


class PrefixLM(Mask):
    """Causal, and the first ``n[b]`` keys of sequence b for every query. ``n``: as for :class:`KeyLengths`."""

    holds = ("n",)

    def __init__(self, n: int | Sequence[int] | Tensor) -> None:
        self.n = checked_lengths(n, "heedful.PrefixLM: n")

    def lead(self) -> tuple[int, int]:
        return _lead(self.n)

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return Causal().seen(grid, b, h, i, j) | (j < grid.each(self.n, b, "heedful.PrefixLM: n"))

    def bound(self, grid: Grid) -> Bound:
        return Causal().bound(grid) | _below(grid.keys, grid.each(self.n, None, "heedful.PrefixLM: n"))

    def __repr__(self) -> str:
        return f"PrefixLM({_show(self.n)})"


class Documents(Mask):
    """Pairs of equal id: queries attend within their document.

    q_ids: int tensor [B, Sq] or [Sq], the document of each query; k_ids: of each key, by default those of the queries.
    Sorted ids are the fastest to build.
    """

    holds = ("q_ids", "k_ids")

    def __init__(self, q_ids: Tensor, k_ids: Tensor | None = None) -> None:
        for name, ids in (("q_ids", q_ids), ("k_ids", q_ids if k_ids is None else k_ids)):
            wrong = f"heedful.Documents: {name}: expected an int tensor [B, S] or [S], got"
            if not isinstance(ids, Tensor):
                raise TypeError(f"{wrong} {type(ids).__name__}")
            if ids.dtype not in INTEGERS:
                raise TypeError(f"{wrong} a tensor of {ids.dtype}")
            if ids.dim() not in (1, 2):
                raise ValueError(f"{wrong} {list(ids.shape)}")
        self.q_ids, self.k_ids = q_ids, k_ids

    def lead(self) -> tuple[int, int]:
        return max(ids.shape[0] if ids.dim() == 2 else 1 for ids in self.tensors), 1

    def ids(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The ids of queries and keys, [B or 1, S]."""
        both = []
        for name, ids, length in (("q_ids", self.q_ids, grid.q_length), ("k_ids", self.k_ids, grid.k_length)):
            ids = self.q_ids if ids is None else ids
            if ids.shape[-1] != length or (ids.dim() == 2 and ids.shape[0] not in (1, grid.batch)):
                raise RuntimeError(
                    f"heedful.Documents: {name}: expected [{grid.batch}, {length}] or [{length}], got {list(ids.shape)}"
                )
            both.append(ids if ids.dim() == 2 else ids[None])
        return both[0], both[1]

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q_ids, k_ids = (ids.expand(grid.batch, -1) for ids in self.ids(grid))
        return q_ids[b, i] == k_ids[b, j]

    def bound(self, grid: Grid) -> Bound:
        q_ids, k_ids = self.ids(grid)
        q_least, q_most = (blocks.by_tile(q_ids, -1, f)[:, None, :, None] for f in (torch.amin, torch.amax))
        k_least, k_most = (blocks.by_tile(k_ids, -1, f)[:, None, None, :] for f in (torch.amin, torch.amax))
        return Bound((q_most >= k_least) & (k_most >= q_least), (q_least == k_most) & (q_most == k_least))

    def __repr__(self) -> str:
        return f"Documents({', '.join(f'{str(x.dtype)[6:]} {list(x.shape)}' for x in self.tensors)})"


class BlockMask(Mask):
    """A mask in block form: empty, full and partial tiles of 64 queries and 64 keys, and the bits of the partial ones.

    tiles: int32 [B or 1, Hq or 1, ceil(q_length / 64), ceil(k_length / 64)]: 0 empty, 1 full, 2 + n partial: bit
        (j % 64) of bits[n, i % 64] says whether pair (i, j) is there.
    bits: int64 [number of partial tiles, 64].
    """

    holds = ("tiles", "bits")

    def __init__(self, tiles: Tensor, bits: Tensor, q_length: int, k_length: int) -> None:
        shape = [blocks.count(q_length), blocks.count(k_length)]
        for name, x, dtype, expected, fits in (
            ("tiles", tiles, torch.int32, f"[B, H, {shape[0]}, {shape[1]}]", lambda x: list(x.shape[2:]) == shape),
            ("bits", bits, torch.int64, f"[n, {blocks.TILE}]", lambda x: x.dim() == 2 and x.shape[1] == blocks.TILE),
        ):
            wrong = f"heedful.BlockMask: {name}: expected {dtype} {expected}, got"
            if not isinstance(x, Tensor):
                raise TypeError(f"{wrong} {type(x).__name__}")
            if x.dtype is not dtype:
                raise TypeError(f"{wrong} {x.dtype}")
            if not fits(x):
                raise ValueError(f"{wrong} {list(x.shape)}")
        self.tiles, self.bits, self.q_length, self.k_length = tiles, bits, q_length, k_length

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> BlockMask:
        """Of a bool tensor [.., Sq, Sk] with two to four dimensions: an eighth of its size, or less."""
        mask = TensorMask(tensor)
        if tensor.dim() not in (2, 3, 4):
            raise ValueError(f"heedful.BlockMask: tensor: expected 2 to 4 dimensions, got {tensor.dim()}")
        return cls._of(mask, (*mask.lead(), *tensor.shape[-2:]), tensor.device)

    @classmethod
    def from_function(
        cls,
        f: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        q_length: int,
        k_length: int,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """Of ``f(b, h, i, j)``, which takes int64 tensors that broadcast and says which pairs are there, in bool.

        It is called for every pair, some tiles at a time. batch, heads: 1 where they make no difference to f.
        """
        if not callable(f):
            raise TypeError(f"heedful.BlockMask: f: expected a function of b, h, i, j, got {f!r}")
        sizes = {"batch": batch, "heads": heads, "q_length": q_length, "k_length": k_length}
        sizes = tuple(checked_int(n, f"heedful.BlockMask: {name}", 0) for name, n in sizes.items())
        return cls._of(_Function(f), sizes, device)

    @classmethod
    def from_flex(cls, flex_block_mask: Any) -> BlockMask:
        """Of a ``torch.nn.attention.flex_attention.BlockMask``: its full blocks, its mask_mod for the partial ones."""
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        if not isinstance(flex_block_mask, FlexBlockMask):
            raise TypeError(
                "heedful.BlockMask: flex_block_mask: expected a torch.nn.attention.flex_attention.BlockMask,"
                f" got {type(flex_block_mask).__name__}"
            )
        return cls(*blocks.from_flex(flex_block_mask), *flex_block_mask.seq_lengths)

    @classmethod
    def _of(cls, mask: Mask, sizes: tuple[int, int, int, int], device: torch.device | str) -> BlockMask:
        grid = Grid(sizes, 0, torch.device(device))
        with torch.inference_mode(False):  # what is made must serve outside of inference mode too
            return cls(*build(grid, [mask], [], eager=True), *sizes[2:])

    def lead(self) -> tuple[int, int]:
        return tuple(self.tiles.shape[:2])

    def blocks(self, grid: Grid) -> Blocks:
        """Tiles and bits, if they fit the call."""
        (batch, heads), sizes = self.lead(), list(grid.sizes)
        if sizes[2:] != [self.q_length, self.k_length] or batch not in (1, sizes[0]) or heads not in (1, sizes[1]):
            raise RuntimeError(f"heedful.attention: mask: expected a mask for {sizes}, got {self!r}")
        return self.tiles, self.bits

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return blocks.pairs(*self.blocks(grid), b, h, i, j)

    def bound(self, grid: Grid) -> Bound:
        tiles, _ = self.blocks(grid)
        return Bound(tiles != 0, tiles == 1)

    def __repr__(self) -> str:
        return f"BlockMask({[*self.lead(), self.q_length, self.k_length]})"


class _Function(Mask):
    """The pairs that a function allows."""

    def __init__(self, f: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        self.f = f

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        pairs = self.f(b, h, i, j)
        shape = torch.broadcast_shapes(b.shape, h.shape, i.shape, j.shape)
        wrong = "heedful.BlockMask: f: expected to return a bool tensor of what b, h, i, j broadcast to, got"
        if not isinstance(pairs, Tensor) or pairs.dtype is not torch.bool:
            raise TypeError(f"{wrong} {pairs.dtype if isinstance(pairs, Tensor) else type(pairs).__name__}")
        if pairs.dim() != len(shape) or any(n not in (1, size) for n, size in zip(pairs.shape, shape)):
            raise ValueError(f"{wrong} {list(pairs.shape)} where they give {list(shape)}")
        return pairs

    def bound(self, grid: Grid) -> Bound:
        some = torch.ones(grid.batch, grid.heads, 1, 1, dtype=torch.bool, device=grid.device)
        return Bound(some, ~some)


def _below(span: tuple[Tensor, Tensor], n: Lengths) -> Bound:
    """Of a number that runs over ``span`` in each tile: is it less than n?"""
    first, last = span
    return Bound(first < n, last < n)


def _lead(n: Lengths) -> tuple[int, int]:
    return n.numel() if isinstance(n, Tensor) else 1, 1


def _show(n: Lengths) -> str:
    if isinstance(n, Tensor) and n.numel() > 8:
        return f"int64 [{n.numel()}]"
    return str(n.tolist() if isinstance(n, Tensor) else n)
