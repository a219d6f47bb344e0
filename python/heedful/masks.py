"""Which pairs of a query and a key may meet: mask objects, and the arguments that they come down to.

Every mask is an intersection of four things, so they are all that a :class:`Mask` holds: a boolean tensor, a band of
keys around the query's position, and how many queries and keys each sequence of the batch has. ``&`` intersects them
one by one, :meth:`Mask.lower` hands them to the operators, and :func:`allowed` is their definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Lengths = int | Tensor | None
Align = str | int | Tensor

BOTTOM_RIGHT = "bottom-right"
_TENSOR_AND = (Tensor.__and__, Tensor.__rand__, Tensor.bitwise_and)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


# A mask as the operators take it, in their order: mask, q_lengths, k_lengths, q_starts, q_start, left, right.
Lowered = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int | None, int | None]


class Mask:
    """An intersection of masks, made by :class:`Causal` and the others and by ``&``, with boolean tensors too."""

    __slots__ = ("k_lengths", "left", "q_lengths", "right", "tensor")

    def __init__(
        self,
        tensor: Tensor | None = None,
        left: int | None = None,
        right: int | None = None,
        q_lengths: Lengths = None,
        k_lengths: Lengths = None,
    ) -> None:
        self.tensor = tensor
        self.left = left
        self.right = right
        self.q_lengths = q_lengths
        self.k_lengths = k_lengths

    def __and__(self, other: Mask | Tensor) -> Mask:
        if not isinstance(other, (Mask, Tensor)):
            return NotImplemented
        other = as_mask(other)
        return Mask(
            _both(self.tensor, other.tensor, torch.logical_and),
            _both(self.left, other.left, min),
            _both(self.right, other.right, min),
            _both(self.q_lengths, other.q_lengths, _shorter),
            _both(self.k_lengths, other.k_lengths, _shorter),
        )

    __rand__ = __and__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Mask:
        """``&`` with a tensor inside torch.compile, which traces it as an operation on tensors."""
        return as_mask(args[0]) & as_mask(args[1]) if function in _TENSOR_AND else NotImplemented

    def __repr__(self) -> str:
        band, parts = (self.left, self.right), []
        if band == (None, 0):
            parts.append("Causal()")
        elif band != (None, None):
            parts.append(f"SlidingWindow(left={self.left}, right={self.right})")
        if self.q_lengths is not None:
            parts.append(f"QueryLengths({_show(self.q_lengths)})")
        if self.k_lengths is not None:
            parts.append(f"KeyLengths({_show(self.k_lengths)})")
        if self.tensor is not None:
            parts.append(f"TensorMask({list(self.tensor.shape)})")
        return " & ".join(parts) or "Mask()"

    def lower(self, q_length: int, k_length: int, batch: int, like: Tensor, align: Align) -> Lowered:
        """The operators' arguments for this mask. Lengths move to the device of ``like``; the boolean tensor stays."""
        q_lengths = None if self.q_lengths is None else _lengths(self.q_lengths, batch, like)
        k_lengths = None if self.k_lengths is None else _lengths(self.k_lengths, batch, like)
        q_start, q_starts = positions(align, q_length, k_length, q_lengths, k_lengths, like)
        mask = None if self.tensor is None else at_rank_4(self.tensor, "mask")
        return mask, q_lengths, k_lengths, q_starts, q_start, self.left, self.right

    def to_dense(
        self,
        q_length: int,
        k_length: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
        align: Align = BOTTOM_RIGHT,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The mask as a boolean tensor [batch, heads, q_length, k_length], True where the query may attend to the key.

        ``batch``, ``heads`` and ``device`` default to those of the tensors in the mask, or to 1, 1 and the CPU.
        """
        tensors = [t for t in (self.tensor, self.q_lengths, self.k_lengths, align) if isinstance(t, Tensor)]
        if device is None:
            device = tensors[0].device if tensors else "cpu"
        if batch is None:
            batch = max([1, *(t.numel() for t in tensors if t.dim() == 1 and t is not self.tensor)])
            batch = max(batch, 1 if self.tensor is None else at_rank_4(self.tensor, "mask").shape[0])
        if heads is None:
            heads = 1 if self.tensor is None else at_rank_4(self.tensor, "mask").shape[1]
        rows = torch.arange(q_length, device=device)
        lowered = self.lower(q_length, k_length, batch, rows, align)
        return allowed(rows, k_length, *lowered).expand(batch, heads, q_length, k_length)

    def plot(
        self,
        q_length: int,
        k_length: int,
        *,
        batch: int = 0,
        head: int = 0,
        align: Align = BOTTOM_RIGHT,
        ax: Any = None,
    ) -> Any:
        """Draws the mask of one sequence and head with matplotlib and returns the axes."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("heedful: Mask.plot needs matplotlib: pip install matplotlib") from error
        ax = pyplot.subplots()[1] if ax is None else ax
        picture = self.to_dense(q_length, k_length, align=align)[batch, head]
        ax.imshow(picture.cpu().numpy(), cmap="Greys", vmin=0, vmax=1)
        ax.set(xlabel="key", ylabel="query", title=repr(self))
        return ax


class Causal(Mask):
    """Keys at or before the query's position."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(right=0)


class SlidingWindow(Mask):
    """Keys from ``position - left`` to ``position + right``, both included; None is unbounded."""

    __slots__ = ()

    def __init__(self, left: int | None, right: int | None) -> None:
        for name, value in (("left", left), ("right", right)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
                raise TypeError(f"heedful.SlidingWindow: {name}: expected an int or None, got {value!r}")
            if value is not None and value < 0:
                raise ValueError(f"heedful.SlidingWindow: {name}: expected 0 or more, or None (unbounded), got {value}")
        super().__init__(left=left, right=right)


class KeyLengths(Mask):
    """The first ``n[b]`` keys of sequence b. ``n``: an int tensor [B], a list of ints, or an int for all."""

    __slots__ = ()

    def __init__(self, n: int | Sequence[int] | Tensor) -> None:
        super().__init__(k_lengths=_checked_lengths(n, "heedful.KeyLengths"))


class QueryLengths(Mask):
    """The first ``n[b]`` queries of sequence b; the others attend to nothing. ``n``: as for :class:`KeyLengths`."""

    __slots__ = ()

    def __init__(self, n: int | Sequence[int] | Tensor) -> None:
        super().__init__(q_lengths=_checked_lengths(n, "heedful.QueryLengths"))


class TensorMask(Mask):
    """A boolean tensor broadcastable to [B, Hq, Sq, Sk], True where the query may attend to the key."""

    __slots__ = ()

    def __init__(self, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"heedful: mask: expected a bool tensor or a heedful mask, got {type(tensor).__name__}")
        if tensor.dtype is not torch.bool:
            raise TypeError(
                f"heedful: mask: expected a bool tensor or a heedful mask, got a tensor of {tensor.dtype}"
                " (what is added to the scores is given as bias)"
            )
        super().__init__(tensor)


def as_mask(mask: Mask | Tensor) -> Mask:
    """A mask of what may be a boolean tensor; TypeError for anything else."""
    return mask if isinstance(mask, Mask) else TensorMask(mask)


def allowed(
    rows: Tensor,
    k_length: int,
    mask: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    q_starts: Tensor | None,
    q_start: int,
    left: int | None,
    right: int | None,
) -> Tensor:
    """What a lowered mask means for the queries ``rows``, int64 [n]: bool, broadcastable to [B, Hq, n, k_length]."""
    keys = torch.arange(k_length, device=rows.device)
    position = rows[:, None] + (q_start if q_starts is None else q_starts[:, None, None, None])
    seen = torch.ones(1, 1, len(rows), k_length, dtype=torch.bool, device=rows.device)
    if left is not None:
        seen = seen & (keys >= position - left)
    if right is not None:
        seen = seen & (keys <= position + right)
    if q_lengths is not None:
        seen = seen & (rows[:, None] < q_lengths[:, None, None, None])
    if k_lengths is not None:
        seen = seen & (keys < k_lengths[:, None, None, None])
    if mask is not None:
        seen = seen & (mask if mask.shape[2] == 1 else mask.index_select(2, rows))
    return seen


def positions(
    align: Align,
    q_length: int,
    k_length: int,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    like: Tensor,
) -> tuple[int, Tensor | None]:
    """The position of the first query: (one for all, None), or (0, int64 [B])."""
    wrong = f'heedful.attention: align: expected "top-left", "bottom-right", an int or an int tensor [B], got {align!r}'
    if isinstance(align, str):
        if align == "top-left":
            return 0, None
        if align != BOTTOM_RIGHT:
            raise ValueError(wrong)
        if q_lengths is None and k_lengths is None:
            return k_length - q_length, None
        last_q = q_length if q_lengths is None else q_lengths.clamp(0, q_length)
        last_k = k_length if k_lengths is None else k_lengths.clamp(0, k_length)
        return 0, last_k - last_q
    if isinstance(align, Tensor):
        if align.dtype not in INTEGERS:
            raise TypeError(f"heedful.attention: align: expected an int tensor [B], got a tensor of {align.dtype}")
        return 0, align.to(like.device, torch.int64)
    if isinstance(align, (int, torch.SymInt)) and not isinstance(align, bool):
        return align, None
    raise TypeError(wrong)


def at_rank_4(tensor: Tensor, name: str) -> Tensor:
    """``tensor`` with dimensions of 1 in front, up to four."""
    if tensor.dim() > 4:
        raise RuntimeError(f"heedful.attention: {name}: expected at most 4 dimensions, got {tensor.dim()}")
    return tensor if tensor.dim() == 4 else tensor[(None,) * (4 - tensor.dim())]


def _both(a: Any, b: Any, intersect: Any) -> Any:
    return b if a is None else a if b is None else intersect(a, b)


def _shorter(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def _checked_lengths(n: int | Sequence[int] | Tensor, name: str) -> int | Tensor:
    if isinstance(n, (list, tuple)):
        n = torch.tensor(n)
    if isinstance(n, Tensor):
        if n.dtype not in INTEGERS or n.dim() != 1:
            raise TypeError(f"{name}: expected an int tensor [B], got a tensor of {n.dtype} {list(n.shape)}")
        return n.to(torch.int64)
    if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, a list of ints or an int tensor [B], got {n!r}")
    return n


def _lengths(n: int | Tensor, batch: int, like: Tensor) -> Tensor:
    return n.to(like.device) if isinstance(n, Tensor) else like.new_full((batch,), n, dtype=torch.int64)


def _show(n: int | Tensor) -> str:
    if isinstance(n, Tensor) and n.numel() > 8:
        return f"int64 [{n.numel()}]"
    return str(n.tolist() if isinstance(n, Tensor) else n)
