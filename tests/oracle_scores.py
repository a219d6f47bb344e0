"""What the truth knows of single pairs: which are there, how alike they are, how far apart, which ones dropout keeps.

In float64 (dropout in integers), from the definitions alone; tests/oracle.py makes attention of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-8  # cosine: norms are no less
ALIKE = 64  # so many equal terms in a row round alike and double the error of their sum
TILE = 64
LOW = 0xFFFFFFFF
MULTIPLIERS, STEPS, ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10  # Philox4x32-10


def per_head(x: Tensor, heads: int) -> Tensor:
    """[B, Hk, S, D] -> [B, heads, S, D]: query head h reads key/value head h // (heads / Hk)."""
    return x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] else x


def per_kv_head(x: Tensor, heads: int) -> Tensor:
    """The transpose of per_head: [B, Hq, S, D] -> [B, heads, S, D], summed over each group of query heads."""
    return x.reshape(x.shape[0], heads, x.shape[1] // max(heads, 1), *x.shape[2:]).sum(2)


def combine(weights: Tensor, rows: Tensor, present: Tensor) -> Tensor:
    """sum_j weights[..., i, j] * rows[..., j, :] over the present pairs alone; NaN where a term is not finite."""
    weights = weights.where(present, 0)
    if (weights.sum() + rows.sum()).isfinite():  # then so is each of them
        return weights @ rows
    total = weights.nan_to_num(0, 0, 0) @ rows.nan_to_num(0, 0, 0)
    spoiled = (~weights.isfinite()).any(-1, keepdim=True)
    if not rows.isfinite().all():
        spoiled = spoiled | (present.double() @ (~rows.isfinite()).double() > 0)
    return total.where(~spoiled, math.nan)


# ---- which pairs are there


def distances(
    batch: int, queries: int, keys: int, q_starts: Tensor | None = None, q_start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The indices i [Sq, 1] and j [1, Sk], and how far key j lies after query i's position, int64 [B, 1, Sq, Sk]."""
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    starts = torch.full((batch,), q_start) if q_starts is None else q_starts
    return i, j, j - (starts[:, None, None, None] + i)


def of_tiles(tiles: Tensor, bits: Tensor | None, queries: int, keys: int) -> Tensor:
    """A mask by blocks as bool [B or 1, Hq or 1, Sq, Sk]."""
    kind = tiles.repeat_interleave(TILE, 2).repeat_interleave(TILE, 3)[:, :, :queries, :keys].long()
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    seen = kind == 1
    if bits is not None and len(bits):
        word = bits[(kind - 2).clamp(0), i % TILE]
        seen |= (kind >= 2) & ((word >> (j % TILE)) & 1 == 1)
    return seen


def seen_pairs(
    sizes: tuple[int, int, int, int],
    *,
    mask: Tensor | None = None,
    tiles: Tensor | None = None,
    bits: Tensor | None = None,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    q_starts: Tensor | None = None,
    q_start: int = 0,
    left: int | None = None,
    right: int | None = None,
) -> Tensor:
    """bool [B, Hq, Sq, Sk]: may query i see key j, by everything but its score. `sizes` is (B, Hq, Sq, Sk)."""
    batch, _, queries, keys = sizes
    i, j, ahead = distances(batch, queries, keys, q_starts, q_start)
    seen = torch.ones(sizes, dtype=torch.bool)
    if left is not None:
        seen &= ahead >= -left
    if right is not None:
        seen &= ahead <= right
    if q_lengths is not None:
        seen &= i < q_lengths[:, None, None, None]
    if k_lengths is not None:
        seen &= j < k_lengths[:, None, None, None]
    if tiles is not None:
        seen &= of_tiles(tiles, bits, queries, keys)
    return seen if mask is None else seen & mask


# ---- how alike they are


@dataclass
class Similarity:
    """Of q [B, Hq, Sq, D] and k [B, Hq, Sk, D]: `value` and the magnitude of its terms, `size`, [B, Hq, Sq, Sk]."""

    kind: str  # dot, cosine, gaussian
    q: Tensor
    k: Tensor

    def __post_init__(self) -> None:
        if self.kind == "cosine":
            self.q_norm, self.k_norm = (x.norm(dim=-1, keepdim=True).clamp(min=EPS) for x in (self.q, self.k))
            self.q_unit, self.k_unit = self.q / self.q_norm, self.k / self.k_norm
            self.value, self.size = self.q_unit @ self.k_unit.mT, self.q_unit.abs() @ self.k_unit.abs().mT
        else:
            self.value, self.size = self.q @ self.k.mT, self.q.abs() @ self.k.abs().mT
        if self.kind == "gaussian":
            q_half, k_half = (x.square().sum(-1, keepdim=True) / 2 for x in (self.q, self.k))
            self.value = -torch.cdist(self.q, self.k, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
            self.size = self.size + q_half + k_half.mT
        self.size = self.size * (1 + self.q.shape[-1] / ALIKE)

    def gradient(self, of: str, weights: Tensor, present: Tensor, magnitude: bool = False) -> Tensor:
        """sum over the pairs of weights x d(value) / d(q_i) or d(k_j): [B, Hq, S, D].

        With `magnitude` the weights are magnitudes, and so is the result: of all the terms that it is the sum of.
        """
        value = self.size if magnitude else self.value
        rows, others = self.q, self.k
        if self.kind == "cosine":
            rows, others = self.q_unit, self.k_unit
        if of == "k":
            rows, others, value, weights, present = others, rows, value.mT, weights.mT, present.mT
        if magnitude:
            rows, others = rows.abs(), others.abs()
        total = combine(weights, others, present)
        if self.kind == "dot":
            return total
        some = present.any(-1, keepdim=True)  # a row that takes part in nothing has no gradient, whatever it holds
        own = weights * value if self.kind == "cosine" else weights
        own = own.where(present, 0).sum(-1, keepdim=True) * rows
        if self.kind == "cosine":
            norm = self.q_norm if of == "q" else self.k_norm
            own = own.where(norm > EPS, 0)
        total = (total + own if magnitude else total - own) / (norm if self.kind == "cosine" else 1)
        return total.where(some, 0)


# ---- dropout


def philox(counter: Sequence[Tensor | int], key: Sequence[Tensor | int]) -> list[Tensor]:
    """Philox4x32-10 of four counter words and two key words, below 2^32 in int64, broadcast. Products wrap at 2^64."""
    c, k = list(counter), list(key)
    for _ in range(ROUNDS):
        first, second = (torch.as_tensor(c[n]) * m for n, m in zip((0, 2), MULTIPLIERS, strict=True))
        c = [(second >> 32) & LOW ^ c[1] ^ k[0], second & LOW, (first >> 32) & LOW ^ c[3] ^ k[1], first & LOW]
        k = [(x + step) & LOW for x, step in zip(k, STEPS, strict=True)]
    return c


def dropout_factors(
    sizes: tuple[int, int, int, int], seed: Tensor, dropout_p: float, first_sequence: int = 0
) -> Tensor:
    """z, float64 [B, Hq, Sq, Sk]: 65536 / T if a pair's 16 random bits are below T = round((1 - p) 65536), else 0."""
    batch, heads, queries, keys = sizes
    seeds = seed.reshape(-1, 1, 1, 1)
    b = torch.arange(batch)[:, None, None, None] + first_sequence
    h, i, group = torch.arange(heads)[:, None, None], torch.arange(queries)[:, None], torch.arange((keys + 7) // 8)
    words = philox((group, i, h, b), (seeds & LOW, (seeds >> 32) & LOW))
    random = torch.stack([(word >> shift) & 0xFFFF for word in words for shift in (0, 16)], -1)
    random = random.flatten(-2)[..., :keys].expand(sizes)
    keep = round((1 - dropout_p) * 65536)
    return (random < keep).double() * (65536 / max(keep, 1))
