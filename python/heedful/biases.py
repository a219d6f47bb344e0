"""What is added to the scores: bias objects, and the arguments that they come down to.

Every bias is a sum of three things, so they are all that a :class:`Bias` holds: a tensor, a slope for each head, and a
table of numbers looked up by distance. ``+`` adds them one by one, :meth:`Bias.lower` hands them to the operators.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .definition import biases
from .positions import BOTTOM_RIGHT, Align, at_rank_4, positions

_TENSOR_ADD = (Tensor.__add__, Tensor.__radd__, Tensor.add, torch.add)


class Bias:
    """A sum of biases, made by :class:`ALiBi`, :class:`RelativeBias` and ``+``, with tensors too.

    tensor: broadcastable to [B, Hq, Sq, Sk]; -inf masks.
    slopes: [Hq] or [B, Hq]: -slope * |distance|, where distance is how far a key lies after the query's position.
    table, buckets: [N, Hq] or [B, N, Hq], and int64 [2 M + 1]: table[buckets[distance + M], h], with a distance of at
        most M either way.

    All but buckets are differentiable.
    """

    def __init__(
        self,
        tensor: Tensor | None = None,
        slopes: Tensor | None = None,
        table: Tensor | None = None,
        buckets: Tensor | None = None,
    ) -> None:
        self.tensor, self.slopes, self.table, self.buckets = tensor, slopes, table, buckets

    def __add__(self, other: Bias | Tensor) -> Bias:
        if not isinstance(other, (Bias, Tensor)):
            return NotImplemented
        other = as_bias(other)
        if self.table is not None and other.table is not None and not _same(self.buckets, other.buckets):
            raise ValueError(
                "heedful.RelativeBias: table: expected the same buckets in both of a sum (as many rows, the same"
                " bidirectional and max_distance), got others; to_dense() makes a tensor of one of them"
            )
        return Bias(
            _sum(self.tensor, other.tensor),
            _sum(self.slopes, other.slopes),
            _sum(self.table, other.table),
            other.buckets if self.buckets is None else self.buckets,
        )

    __radd__ = __add__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Bias:
        """``+`` with a tensor in front."""
        return as_bias(args[0]) + as_bias(args[1]) if function in _TENSOR_ADD else NotImplemented

    def __repr__(self) -> str:
        shown = {"TensorBias": self.tensor, "ALiBi": self.slopes, "RelativeBias": self.table}
        return " + ".join(f"{name}({list(x.shape)})" for name, x in shown.items() if x is not None) or "Bias()"

    def lower(self) -> dict[str, Tensor]:
        """The operators' arguments for this bias: those that it has of bias, slopes, table and buckets."""
        tensor = None if self.tensor is None else at_rank_4(self.tensor, "bias")
        given = {"bias": tensor, "slopes": self.slopes, "table": self.table, "buckets": self.buckets}
        return {name: x for name, x in given.items() if x is not None}

    def to_dense(
        self,
        q_length: int,
        k_length: int,
        *,
        align: Align = BOTTOM_RIGHT,
        batch: int | None = None,
        heads: int | None = None,
    ) -> Tensor:
        """The bias as a tensor [batch, heads, q_length, k_length]; both default to those of the tensors in it, or 1."""
        arguments = self.lower()
        like = next(iter(arguments.values()), torch.zeros(()))
        q_start, q_starts = positions(align, q_length, k_length, None, None, like)
        queries = torch.arange(q_length, device=like.device)
        terms = biases(arguments | {"q_starts": q_starts}, {"q_start": q_start}, queries, k_length)
        dense = sum(terms, torch.zeros(1, 1, q_length, k_length, dtype=like.dtype, device=like.device))
        return dense.expand(batch or dense.shape[0], heads or dense.shape[1], q_length, k_length)

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
        """Draws the bias of one sequence and head with matplotlib and returns the axes."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("heedful: Bias.plot needs matplotlib: pip install matplotlib") from error
        ax = pyplot.subplots()[1] if ax is None else ax
        picture = ax.imshow(self.to_dense(q_length, k_length, align=align)[batch, head].detach().float().cpu().numpy())
        ax.set(xlabel="key", ylabel="query", title=repr(self))
        ax.figure.colorbar(picture, ax=ax)
        return ax


class ALiBi(Bias):
    """-slope_h * |distance| between the query's position and the key. slopes: [Hq] or [B, Hq].

    Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation".
    """

    def __init__(self, slopes: Tensor) -> None:
        super().__init__(slopes=_checked("heedful.ALiBi: slopes", slopes, "[Hq] or [B, Hq]", (1, 2)))

    @staticmethod
    def default_slopes(heads: int) -> Tensor:
        """The paper's slopes, float32 [heads]: 2^(-8 / heads), its square and so on.

        Where heads is no power of 2: those of the power below it, then every other one of the power above it.
        """
        if heads < 1:
            raise ValueError(f"heedful.ALiBi.default_slopes: heads: expected 1 or more, got {heads}")
        whole = 1 << (heads.bit_length() - 1)
        slopes = [2 ** (-8 * n / whole) for n in range(1, whole + 1)]
        slopes += [2 ** (-4 * n / whole) for n in range(1, 2 * (heads - whole), 2)]
        return torch.tensor(slopes)


class RelativeBias(Bias):
    """table[bucket(distance), h]: T5's learned biases, one for each bucket of distances.

    table: [num_buckets, Hq] or [B, num_buckets, Hq]. Small distances have a bucket each, larger ones share them, on a
    logarithmic scale up to max_distance. bidirectional: half of the buckets are for keys after the query's position;
    otherwise those count as distance 0 (an encoder's attention is bidirectional, a decoder's is not).

    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer".
    """

    def __init__(self, table: Tensor, bidirectional: bool = True, max_distance: int = 128) -> None:
        table = _checked("heedful.RelativeBias: table", table, "[num_buckets, Hq] or [B, num_buckets, Hq]", (2, 3))
        sides = 2 if bidirectional else 1
        exact = table.shape[-2] // sides // 2
        if exact == 0:
            raise ValueError(
                f"heedful.RelativeBias: table: expected {2 * sides} buckets or more, got {table.shape[-2]}"
            )
        if max_distance <= exact:
            raise ValueError(f"heedful.RelativeBias: max_distance: expected more than {exact}, got {max_distance}")
        distances = torch.arange(-max_distance, max_distance + 1)
        super().__init__(
            table=table, buckets=_t5_buckets(distances, table.shape[-2], bidirectional, max_distance).to(table.device)
        )

    @staticmethod
    def clipped(table: Tensor) -> Bias:
        """A bias for every distance up to M either way, farther ones as M: table [2 M + 1, Hq] or [B, 2 M + 1, Hq].

        Shaw et al., "Self-Attention with Relative Position Representations", with scalars.
        """
        table = _checked("heedful.RelativeBias.clipped: table", table, "[2 M + 1, Hq] or [B, 2 M + 1, Hq]", (2, 3))
        if table.shape[-2] % 2 == 0:
            raise ValueError(
                f"heedful.RelativeBias.clipped: table: expected an odd number of rows, got {table.shape[-2]}"
            )
        return Bias(table=table, buckets=torch.arange(table.shape[-2], device=table.device))


def as_bias(bias: Bias | Tensor) -> Bias:
    """A bias of what may be a tensor; TypeError for anything else."""
    if isinstance(bias, Bias):
        return bias
    if not isinstance(bias, Tensor):
        raise TypeError(f"heedful.attention: bias: expected a tensor or a heedful bias, got {type(bias).__name__}")
    return Bias(bias)


def _t5_buckets(distance: Tensor, count: int, bidirectional: bool, max_distance: int) -> Tensor:
    """Which bucket each distance goes to; in float32, as T5 has it, since rounding decides at the borders."""
    if bidirectional:
        count //= 2
        first, far = count * (distance > 0), distance.abs()
    else:
        first, far = 0, (-distance).clamp(min=0)
    exact = count // 2
    scale = math.log(max_distance / exact)
    shared = exact + (torch.log(far.clamp(min=1).float() / exact) / scale * (count - exact)).to(torch.int64)
    return first + torch.where(far < exact, far, shared.clamp(max=count - 1))


def _checked(name: str, x: Tensor, shape: str, ranks: tuple[int, ...]) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating-point tensor {shape}, got {got}")
    if x.dim() not in ranks:
        raise ValueError(f"{name}: expected {shape}, got {list(x.shape)}")
    return x


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
