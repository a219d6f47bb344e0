"""Which pairs dropout keeps: a counter-based hash, so that every kernel and every order of computing agrees.

Philox4x32-10 (Salmon et al., 2011) turns four counters and two key words, each of 32 bits, into four words of 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEEP_ALL = 1 << 16  # keep probabilities are multiples of 1 / KEEP_ALL
_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_STEPS = 0x9E3779B9, 0xBB67AE85

Words = tuple[Tensor, ...]


def philox(counter: Words, key: Words) -> Words:
    """The four words of four counters and two key words: int64 tensors in [0, 2^32) that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # all 64 bits of the products, though the sign may be wrong
        c0, c1, c2, c3 = _high(b) ^ c1 ^ k0, b & _WORD, _high(a) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + _STEPS[0]) & _WORD, (k1 + _STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & _WORD


def keep_factors(seed: Tensor, dropout_p: float, rows: Tensor, k_length: int, heads: int, sequences: Tensor) -> Tensor:
    """What each weight is multiplied by, float64 [B, heads, n, k_length]: 1 / keep probability, or 0 to drop it.

    seed: int64, 1 element or one for each sequence. rows [n], sequences [B]: the indices of queries and of sequences.
    """
    threshold = round((1 - dropout_p) * KEEP_ALL)
    groups = torch.arange((k_length + 7) // 8, device=rows.device)  # of 8 keys, which share one hash: 16 bits for each
    of_heads, seed = torch.arange(heads, device=rows.device)[:, None, None], seed.reshape(-1, 1, 1, 1)
    words = philox((groups, rows[:, None], of_heads, sequences[:, None, None, None]), (seed & _WORD, _high(seed)))
    words = torch.stack(torch.broadcast_tensors(*words), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(-3)[..., :k_length]
    return (halves < threshold).to(torch.float64) * (KEEP_ALL / max(threshold, 1))
