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


def from_jagged(
    function: str, names: Sequence[str], *tensors: Tensor
) -> tuple[tuple[Tensor, ...], Offsets, Callable[[Tensor], Tensor]]:
    """Jagged q, k, v [B, H, j, D] as packed [1, H, T, D], their offsets, and what makes results jagged as q is.

    Raises where some of them are something else; ``function`` and ``names`` say whose and which.
    """
    for name, x in zip(names, tensors):
        if problem := _problem(x):
            raise NotImplementedError(
                f"{function}: {name}: expected a jagged tensor [B, H, j, D] without holes, as the others, got {problem}"
                "; torch.nested.to_padded_tensor pads it, and heedful.attention takes mask=heedful.KeyLengths(lengths)"
            )
    q, k, v = tensors
    if k.shape[2] != v.shape[2]:
        expected = f"the offsets of {names[1]} (torch.nested.nested_tensor_from_jagged takes them)"
        raise RuntimeError(f"{function}: {names[2]}: expected {expected}, got its own")

    def to_jagged(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(x[0], q.offsets(), jagged_dim=2)

    return tuple(x.values()[None] for x in tensors), (q.offsets(), k.offsets()), to_jagged


def _problem(x: Tensor) -> str | None:
    if not x.is_nested:
        return "a tensor that is not nested"
    if x.layout is not torch.jagged:
        return f"a nested tensor of layout {x.layout}"
    if x.dim() != 4 or x._ragged_idx != 2:
        return f"a nested tensor {list(x.shape)}"
    return None if x.lengths() is None else "a nested tensor with holes (it has lengths)"
