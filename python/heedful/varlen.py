"""Sequences of different lengths in one call: packed with offsets, or in torch's nested (jagged) tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Offsets = tuple[Tensor, Tensor]  # of queries and keys, int64 [N + 1]


def packed(x: Tensor) -> Tensor:
    """[T, H, D] -> [1, H, T, D], the operators' form; a view."""
    return x.transpose(0, 1)[None]


def unpacked(x: Tensor) -> Tensor:
    """[1, H, T, ...] -> [T, H, ...]; a view."""
    return x[0].transpose(0, 1)


def is_jagged(function: str, names: Sequence[str], tensors: Sequence[Tensor]) -> bool:
    """Whether q, k and v are nested tensors, all of them, that can be read as packed ones; an error where some are."""
    if not any(x.is_nested for x in tensors):
        return False
    for name, x in zip(names, tensors):
        if problem := _problem(x):
            raise NotImplementedError(
                f"{function}: {name}: expected a jagged tensor [B, H, j, D] without holes, as the others, got {problem}"
                "; torch.nested.to_padded_tensor pads it, and heedful.attention takes mask=heedful.KeyLengths(lengths)"
            )
    if tensors[1].shape[2] != tensors[2].shape[2]:
        expected = f"offsets of {names[1]} (make both of one torch.nested.nested_tensor_from_jagged offsets)"
        raise RuntimeError(f"{function}: {names[2]}: expected {expected}, got others")
    return True


def _problem(x: Tensor) -> str | None:
    if not x.is_nested:
        return "a tensor that is not nested"
    if x.layout is not torch.jagged:
        return f"a nested tensor of layout {x.layout}"
    if x.dim() != 4 or x._ragged_idx != 2:
        return f"a nested tensor {list(x.shape)}"
    return None if x.lengths() is None else "a nested tensor with holes (it has lengths)"


def from_jagged(*tensors: Tensor) -> tuple[tuple[Tensor, ...], Offsets, Callable[[Tensor], Tensor]]:
    """Jagged q, k, v [B, H, j, D] as packed [1, H, T, D], their offsets, and what makes results jagged as q."""
    q, k, _ = tensors

    def to_jagged(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(x[0], q.offsets(), jagged_dim=2)

    return tuple(x.values()[None] for x in tensors), (q.offsets(), k.offsets()), to_jagged
