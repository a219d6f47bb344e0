"""Masks: predicates of pairs that join by ``&`` and ``|``, and the operators' arguments that they come down to.

A :class:`Mask` knows two things: :meth:`Mask.seen`, whether a pair is there, which defines it, and :meth:`Mask.bound`,
what intervals say about a tile of pairs. ``&`` and ``|`` combine both. :meth:`Mask.lower` gives the operators'
arguments: a tensor, a band of keys around the query's position and the sequences' lengths as they are, everything
else in block form (blocks.py). :func:`allowed` is what those arguments mean.
"""

from __future__ import annotations

import copy
import operator
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import blocks
from .blocks import Blocks, Bound
from .positions import BOTTOM_RIGHT, Align, Grid, at_rank_4, for_each, positions, shorter


class Mask:
    """Every pair. The other masks are made by :class:`Causal` and so on, and by ``&`` and ``|``, with tensors too."""

    parts: tuple[Mask, ...] = ()
    holds: tuple[str, ...] = ()  # attributes that may be tensors
    native: tuple[str, ...] = ()  # attributes that are arguments of the operators; of none, the mask is built as blocks
    _kept: _Kept | None = None  # the blocks that were built last

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i may attend to key j, in sequence b and head h: int tensors that broadcast, to bool."""
        return torch.ones((), dtype=torch.bool, device=grid.device)

    def bound(self, grid: Grid) -> Bound:
        """What is known of each tile without asking about its pairs."""
        every = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=grid.device)
        return Bound(every, every)

    def blocks(self, grid: Grid) -> Blocks | None:
        """The mask in block form, where that is how it is held."""
        return None

    def __and__(self, other: Mask | Tensor) -> Mask:
        return Intersection.of(self, as_mask(other)) if isinstance(other, (Mask, Tensor)) else NotImplemented

    def __rand__(self, other: Tensor) -> Mask:
        return as_mask(other) & self if isinstance(other, Tensor) else NotImplemented

    def __or__(self, other: Mask | Tensor) -> Mask:
        return Union.of(self, as_mask(other)) if isinstance(other, (Mask, Tensor)) else NotImplemented

    def __ror__(self, other: Tensor) -> Mask:
        return as_mask(other) | self if isinstance(other, Tensor) else NotImplemented

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Mask:
        """``&`` and ``|`` with a tensor inside torch.compile, which traces them as operations on tensors."""
        for combine, functions in _TENSOR_OPERATORS.items():
            if function in functions:
                return combine(as_mask(args[0]), as_mask(args[1]))
        return NotImplemented

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that the mask reads."""
        own = [getattr(self, name) for name in self.holds]
        return [x for x in own if isinstance(x, Tensor)] + [x for part in self.parts for x in part.tensors]

    def lead(self) -> tuple[int, int]:
        """The batch and the heads that the mask tells apart, 1 where it is the same for all."""
        leads = [part.lead() for part in self.parts]
        return max((b for b, _ in leads), default=1), max((h for _, h in leads), default=1)

    def to(self, device: torch.device | str) -> Mask:
        """The mask with its tensors on ``device``."""
        if all(x.device == torch.device(device) for x in self.tensors):
            return self
        moved = copy.copy(self)
        for name in self.holds:
            if isinstance(x := getattr(self, name), Tensor):
                setattr(moved, name, x.to(device))
        moved.parts = tuple(part.to(device) for part in self.parts)
        moved._kept = None
        return moved

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
        """The operators' arguments for this mask: those it has of mask, tiles, bits, q_lengths, k_lengths, left, right.

        With them comes q_starts or q_start, the position of the first query. Tensors are on the device of ``like``,
        but for the mask, which stays where it is. lengths: of packed sequences, queries and keys, int64 [batch], that
        positions are counted by; ``q_length`` and ``k_length`` are then the longest ones.

        Blocks are kept until the next call that needs others, so that one mask serves many layers.
        """
        arguments = self._native()
        q_start, q_starts = self._positions(arguments, q_length, k_length, batch, like, align, lengths)
        for name in ("q_lengths", "k_lengths"):
            if name in arguments:
                arguments[name] = for_each(arguments[name], batch, like)
        if "mask" in arguments:
            arguments["mask"] = at_rank_4(arguments["mask"], "mask")
        built = [part for part in self._conjuncts() if not part.native]
        if built:
            start = q_start if q_starts is None else q_starts
            grid = Grid((batch, heads, q_length, k_length), start, like.device)
            inputs = (align, *(lengths or ()))
            arguments["tiles"], arguments["bits"] = self._blocks(grid, built, inputs)
        return arguments | ({"q_start": q_start} if q_starts is None else {"q_starts": q_starts})

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
        aligned = [align] if isinstance(align, Tensor) else []
        tensors = self.tensors + aligned
        if device is None:
            device = tensors[0].device if tensors else "cpu"
        if batch is None:
            batch = max(self.lead()[0], *(x.numel() for x in aligned), 1)
        if heads is None:
            heads = self.lead()[1]
        mask = self.to(device)
        b, h, i, j = (torch.arange(n, device=device) for n in (batch, heads, q_length, k_length))
        q_start, q_starts = self._positions(self._native(), q_length, k_length, batch, j, align)
        grid = Grid((batch, heads, q_length, k_length), q_start if q_starts is None else q_starts, j.device)
        return mask.seen(grid, b[:, None, None, None], h[:, None, None], i[:, None], j).expand(grid.sizes)

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

    def _conjuncts(self) -> tuple[Mask, ...]:
        """The masks that this one is the intersection of."""
        return () if type(self) is Mask else (self,)

    def _native(self) -> dict[str, Any]:
        """The operators' arguments among the conjuncts, as they were given."""
        arguments: dict[str, Any] = {}
        for part in self._conjuncts():
            for name in part.native:
                value = getattr(part, name)
                if value is not None:
                    arguments[name] = _INTERSECT[name](arguments[name], value) if name in arguments else value
        return arguments

    def _positions(
        self,
        native: dict[str, Any],
        q_length: int,
        k_length: int,
        batch: int,
        like: Tensor,
        align: Align,
        lengths: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[int, Tensor | None]:
        """Where the first queries sit: :func:`positions`, by the lengths of the sequences and of the mask."""
        both = []
        for name, longest in zip(("q_lengths", "k_lengths"), lengths or (None, None)):
            n = for_each(native[name], batch, like) if name in native else longest
            both.append(n if longest is None or n is longest else torch.minimum(n, longest))
        return positions(align, q_length, k_length, *both, like)

    def _blocks(self, grid: Grid, built: list[Mask], inputs: tuple) -> Blocks:
        """Tiles and bits of the intersection of ``built``, which the operators intersect with the other conjuncts."""
        if len(built) == 1 and (ready := built[0].to(grid.device).blocks(grid)):
            return ready
        others = [part for part in self._conjuncts() if part.native and not isinstance(part, TensorMask)]
        if not _eager(grid.device):
            return build(grid, built, others, eager=False)
        key = (*grid.sizes, grid.device, *(None if isinstance(x, Tensor) else x for x in inputs))
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        tensors += [x for part in (*built, *others) for x in part.tensors]
        if self._kept is None or not self._kept.serves(key, tensors):
            with torch.inference_mode(False):  # what is kept must serve outside of inference mode too
                self._kept = _Kept(key, tensors, build(grid, built, others, eager=True))
        return self._kept.blocks


class Intersection(Mask):
    """The pairs that every one of ``parts`` allows."""

    def __init__(self, *parts: Mask) -> None:
        self.parts = parts

    @staticmethod
    def of(*masks: Mask) -> Mask:
        parts = [part for mask in masks for part in mask._conjuncts()]
        return parts[0] if len(parts) == 1 else Intersection(*parts) if parts else Mask()

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return reduce(operator.and_, (part.seen(grid, b, h, i, j) for part in self.parts))

    def bound(self, grid: Grid) -> Bound:
        return reduce(operator.and_, (part.bound(grid) for part in self.parts))

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Union) else repr(part) for part in self.parts)

    def _conjuncts(self) -> tuple[Mask, ...]:
        return self.parts


class Union(Mask):
    """The pairs that any one of ``parts`` allows. Lengths among them only say which pairs, not where queries sit."""

    def __init__(self, *parts: Mask) -> None:
        self.parts = parts

    @staticmethod
    def of(*masks: Mask) -> Mask:
        return Union(*(part for mask in masks for part in (mask.parts if isinstance(mask, Union) else (mask,))))

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return reduce(operator.or_, (part.seen(grid, b, h, i, j) for part in self.parts))

    def bound(self, grid: Grid) -> Bound:
        return reduce(operator.or_, (part.bound(grid) for part in self.parts))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))


class TensorMask(Mask):
    """A boolean tensor broadcastable to [B, Hq, Sq, Sk], True where the query may attend to the key."""

    holds = native = ("mask",)

    def __init__(self, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"heedful: mask: expected a bool tensor or a heedful mask, got {type(tensor).__name__}")
        if tensor.dtype is not torch.bool:
            raise TypeError(
                f"heedful: mask: expected a bool tensor or a heedful mask, got a tensor of {tensor.dtype}"
                " (what is added to the scores is given as bias)"
            )
        self.mask = tensor

    def lead(self) -> tuple[int, int]:
        return tuple(at_rank_4(self.mask, "mask").shape[:2])

    def fitting(self, grid: Grid) -> Tensor:
        """The tensor at rank 4, if it fits the call."""
        mask = at_rank_4(self.mask, "mask")
        if any(n not in (1, size) for n, size in zip(mask.shape, grid.sizes)):
            raise RuntimeError(
                f"heedful.attention: mask: expected a tensor broadcastable to {list(grid.sizes)},"
                f" got {list(self.mask.shape)}"
            )
        return mask

    def seen(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.fitting(grid).expand(grid.sizes)[b, h, i, j]

    def bound(self, grid: Grid) -> Bound:
        mask = self.fitting(grid)
        return Bound(*(blocks.by_tile(blocks.by_tile(mask, -1, f), -2, f) for f in (torch.any, torch.all)))

    def __repr__(self) -> str:
        return f"TensorMask({list(self.mask.shape)})"


def as_mask(mask: Mask | Tensor) -> Mask:
    """A mask of what may be a boolean tensor; TypeError for anything else."""
    return mask if isinstance(mask, Mask) else TensorMask(mask)


def allowed(
    rows: Tensor,
    k_length: int,
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
    if tiles is not None:
        seen = seen & blocks.rows(tiles, bits, rows, k_length)
    return seen


class _Kept:
    """Blocks, with what they were built for: sizes and options, and tensors as they were."""

    def __init__(self, key: tuple, tensors: list[Tensor], built: Blocks) -> None:
        self.key, self.blocks = key, built
        self.tensors = [(x, _version(x), x.clone() if x.dim() < 2 or x.is_inference() else None) for x in tensors]

    def serves(self, key: tuple, tensors: list[Tensor]) -> bool:
        return key == self.key and all(self._same(*kept, now) for kept, now in zip(self.tensors, tensors, strict=True))

    @staticmethod
    def _same(kept: Tensor, version: int | None, values: Tensor | None, now: Tensor) -> bool:
        """The same tensor, not written to since; or a small one of the same values, such as lengths made anew."""
        if kept is now and version is not None and version == _version(now):
            return True
        return values is not None and values.device == now.device and torch.equal(values, now)


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version  # an inference tensor has none: its values are compared


def _eager(device: torch.device) -> bool:
    """Whether tensors hold numbers that shapes may depend on, and that may be kept."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or is_in_torch_dispatch_mode()
        or device.type == "meta"
    )


def build(grid: Grid, built: list[Mask], others: list[Mask], *, eager: bool) -> Blocks:
    """Blocks of the intersection of ``built``; tiles that the ``others`` leave empty are empty."""
    mask = Intersection(*(part.to(grid.device) for part in built))
    bound = mask.bound(grid)
    near = Intersection(Mask(), *(part.to(grid.device) for part in others)).bound(grid).any
    if bound.any.shape[0] == 1:  # blocks that are the same for all sequences stay so
        near = near.any(0, keepdim=True)
    if bound.any.shape[1] == 1:
        near = near.any(1, keepdim=True)
    bound = Bound(bound.any & near, bound.all)
    return blocks.build(bound, lambda *pair: mask.seen(grid, *pair), grid.q_length, grid.k_length, eager=eager)


_INTERSECT = {"mask": operator.and_, "left": min, "right": min, "q_lengths": shorter, "k_lengths": shorter}
_TENSOR_OPERATORS = {
    operator.and_: (Tensor.__and__, Tensor.__rand__, Tensor.bitwise_and),
    operator.or_: (Tensor.__or__, Tensor.__ror__, Tensor.bitwise_or),
}
