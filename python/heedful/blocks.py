"""The block form of a mask: what each tile of 64 queries and 64 keys holds, and the bits of the tiles that hold both.

    tiles  int32 [B or 1, Hq or 1, ceil(Sq / 64), ceil(Sk / 64)]: 0 empty, 1 full, 2 + n partial
    bits   int64 [number of partial tiles, 64]: bit (j % 64) of bits[n, i % 64] says whether pair (i, j) is there

A mask gives a :class:`Bound` for every tile, from intervals alone, and a predicate of pairs. :func:`build` asks the
predicate only about the tiles that the bound leaves open, some at a time, so memory stays far below Sq x Sk. In the
last row and column of tiles, pairs outside [0, Sq) x [0, Sk) do not count: their bits are 0, and a tile is full
without them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE = 64
CHUNK = 128  # tiles whose pairs are evaluated at once

Blocks = tuple[Tensor, Tensor]  # tiles, bits
Pairs = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # b, h, i, j, broadcasting -> bool: may i attend to j?


@dataclass(eq=False)
class Bound:
    """For every tile, bool broadcastable to [B, Hq, Tq, Tk]: may some pair be there? Is every pair there for sure?"""

    any: Tensor
    all: Tensor

    def __and__(self, other: Bound) -> Bound:
        return Bound(self.any & other.any, self.all & other.all)

    def __or__(self, other: Bound) -> Bound:
        return Bound(self.any | other.any, self.all | other.all)


def count(length: int) -> int:
    """How many tiles cover a sequence."""
    return (length + TILE - 1) // TILE


def spans(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last index in each tile of a sequence, int64 [T]."""
    first = TILE * torch.arange(count(length), device=device)
    return first, (first + TILE - 1).clamp(max=length - 1)


def by_tile(x: Tensor, dim: int, gather: Callable[..., Tensor]) -> Tensor:
    """``gather(x, dim=...)`` (amin, amax, any, all) over each tile of dimension ``dim``, counted from the end."""
    n = count(x.shape[dim])
    at = torch.arange(TILE * n, device=x.device).clamp(max=x.shape[dim] - 1)  # the last one as often as needed
    return gather(x.index_select(dim, at).unflatten(dim, (n, TILE)), dim=dim)


def build(bound: Bound, seen: Pairs, q_length: int, k_length: int, *, eager: bool = True) -> Blocks:
    """Tiles and bits of the mask that ``bound`` and ``seen`` describe.

    eager: whether shapes may depend on data. torch.compile and torch.func forbid it: every tile then gets bits, though
    only the partial ones are marked to use them.
    """
    bounds = torch.broadcast_tensors(bound.any, bound.all)
    some, every = (x.expand(*x.shape[:2], count(q_length), count(k_length)) for x in bounds)
    partial = some & ~every
    if not eager:
        at = torch.meshgrid([torch.arange(n, device=partial.device) for n in partial.shape], indexing="ij")
        bits, empty, full = _evaluate(seen, _summed, *at, q_length, k_length)
        number = 2 + reduce(lambda left, right: left * right[1] + right[0], zip(at[1:], partial.shape[1:]), at[0])
        number = torch.where(empty, 0, torch.where(full, 1, number))
        return torch.where(partial, number, some.to(torch.int64)).to(torch.int32), bits.flatten(0, 3)
    at = partial.nonzero().unbind(1)
    chunks = zip(*(x.split(CHUNK) for x in at))
    bits, empty, full = map(torch.cat, zip(*(_evaluate(seen, _packed, *chunk, q_length, k_length) for chunk in chunks)))
    kept = ~(empty | full)
    tiles = some.to(torch.int32)
    tiles[at] = torch.where(kept, 1 + kept.cumsum(0), full.to(torch.int64)).to(torch.int32)
    return tiles, bits[kept]


def _evaluate(
    seen: Pairs,
    pack: Callable[[Tensor], Tensor],
    b: Tensor,
    h: Tensor,
    row: Tensor,
    column: Tensor,
    q_length: int,
    k_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The bits of n tiles [n, 64], which of them are empty [n], and which are full [n]."""
    within = torch.arange(TILE, device=b.device)
    b, h, row, column = (x[..., None, None] for x in (b, h, row, column))
    i, j = TILE * row + within[:, None], TILE * column + within
    pairs = seen(b, h, i.clamp(max=q_length - 1), j.clamp(max=k_length - 1)).expand(*b.shape[:-2], TILE, TILE)
    inside = pack(j < k_length) * (i < q_length).squeeze(-1)
    bits = pack(pairs) & inside
    return bits, (bits == 0).all(-1), (bits == inside).all(-1)


def _packed(pairs: Tensor) -> Tensor:
    """Bool [.., 64] -> int64 [..], pair n in bit n. A product brings eight bools together in the highest byte."""
    eights = pairs.clone(memory_format=torch.contiguous_format).view(torch.int64)  # of no tiles, too
    return ((eights * 0x0102040810204080) >> 56).to(torch.uint8).view(torch.int64).squeeze(-1)


def _summed(pairs: Tensor) -> Tensor:
    """The same where bools cannot be read as other numbers: slower, but any compiler and transform takes it."""
    return (pairs.to(torch.int64) << torch.arange(TILE, device=pairs.device)).sum(-1)


def _words(tiles: Tensor, bits: Tensor, within: Tensor) -> Tensor:
    """For each tile the 64 pairs of its row ``within``, as bits of an int64."""
    table = torch.cat([bits.new_zeros(1, TILE), bits.new_full((1, TILE), -1), bits])
    return table[tiles.to(torch.int64), within]


def pairs(tiles: Tensor, bits: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Whether the pairs (i, j) of sequences b and heads h are there."""
    tile = tiles[b % max(tiles.shape[0], 1), h % max(tiles.shape[1], 1), i // TILE, j // TILE]
    return (_words(tile, bits, i % TILE) >> (j % TILE)) & 1 != 0


def rows(tiles: Tensor, bits: Tensor, i: Tensor, k_length: int) -> Tensor:
    """The pairs of the queries ``i``, int64 [n], with every key: bool [B or 1, Hq or 1, n, k_length]."""
    words = _words(tiles[:, :, i // TILE], bits, (i % TILE)[:, None])
    j = torch.arange(k_length, device=tiles.device)
    return (words[..., j // TILE] >> (j % TILE)) & 1 != 0


def from_flex(mask: Any) -> Blocks:
    """The blocks of a ``torch.nn.attention.flex_attention.BlockMask``, of any BLOCK_SIZE.

    Pairs of its full blocks are there, and those of its partial blocks that its mask_mod allows.
    """
    q_length, k_length = mask.seq_lengths
    partial = _listed(mask, mask.kv_num_blocks, mask.kv_indices)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None:
        full = _listed(mask, mask.full_kv_num_blocks, mask.full_kv_indices)
    partial, full = torch.broadcast_tensors(partial & ~full, full)
    of_pairs = _mapped(mask.mask_mod) if partial.any() else None

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        block = b, h, i // mask.BLOCK_SIZE[0], j // mask.BLOCK_SIZE[1]
        return full[block] if of_pairs is None else full[block] | partial[block] & of_pairs(b, h, i, j)

    # Which blocks each tile meets, as ranges of rows and of columns.
    (top, bottom), (left, right) = (
        (first // size, last // size + 1)
        for size, (first, last) in zip(mask.BLOCK_SIZE, (spans(n, full.device) for n in mask.seq_lengths))
    )
    area = (bottom - top)[:, None] * (right - left)

    def met(blocks: Tensor) -> Tensor:
        sums = pad(blocks.to(torch.int64).cumsum(2).cumsum(3), (1, 0, 1, 0))
        down = sums[:, :, bottom] - sums[:, :, top]
        return down[..., right] - down[..., left]

    return build(Bound(met(partial | full) > 0, met(full) == area), seen, q_length, k_length)


def _listed(mask: Any, number: Tensor, indices: Tensor) -> Tensor:
    """The blocks that are listed: the first ``number[.., r]`` of ``indices[.., r, :]``; bool [B, Hq, rows, columns]."""
    number, indices = number[(None,) * (3 - number.dim())], indices[(None,) * (4 - indices.dim())].to(torch.int64)
    rows, columns = (-(-n // size) for n, size in zip(mask.seq_lengths, mask.BLOCK_SIZE))
    if number.shape[2] != rows:
        raise ValueError(
            f"heedful.BlockMask: flex_block_mask: expected {rows} rows of blocks for {mask.seq_lengths[0]} queries"
            f" (BLOCK_SIZE {mask.BLOCK_SIZE[0]}), got {number.shape[2]}"
        )
    listed = torch.arange(indices.shape[3], device=indices.device) < number[..., None]
    blocks = torch.zeros(*indices.shape[:3], columns + 1, dtype=torch.bool, device=indices.device)
    return blocks.scatter_(3, torch.where(listed, indices, columns), True)[..., :columns]


def _mapped(mask_mod: Any) -> Pairs:
    """mask_mod over pairs, called as FlexAttention calls it: by vmap, with 0-dimensional indices."""
    if not callable(mask_mod):
        raise TypeError(f"heedful.BlockMask: flex_block_mask.mask_mod: expected a function, got {mask_mod!r}")
    # Here, because it takes seconds to import; whoever has a FlexAttention mask has imported it already.
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    over_j = torch.vmap(mask_mod, (None, None, None, 0))
    over_i = torch.vmap(over_j, (None, None, 0, None))
    over_tiles = torch.vmap(over_i)

    def of_pairs(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        try:
            with TransformGetItemToIndex():
                return over_tiles(b.flatten(), h.flatten(), i.flatten(1), j.flatten(1))
        except Exception as error:  # such as that of a BlockMask that was sliced
            raise ValueError(
                "heedful.BlockMask: flex_block_mask.mask_mod: expected a function that says which pairs of the partial"
                f" blocks are there, got one that raises {type(error).__name__}: {str(error).partition('.')[0]}"
            ) from error

    return of_pairs
