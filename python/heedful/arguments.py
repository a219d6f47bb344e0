"""From what users type to the operators' arguments, the same for every function that takes attention's options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .biases import Bias, as_bias
from .masks import BOTTOM_RIGHT, Align, Mask, as_mask
from .similarity import Gaussian

NORMALIZERS = ("softmax", "hard", "hard-st")
NUMBERS = (int, float, torch.SymInt, torch.SymFloat)

Arguments = dict[str, Any]
Forward = Callable[..., tuple[Tensor, Tensor]]


def lower(
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    align: Align = BOTTOM_RIGHT,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    similarity: str | Gaussian = "dot",
    normalizer: str = "softmax",
    offsets: tuple[Tensor, Tensor] | None = None,
) -> Arguments:
    """The operators' arguments beside q [B, Hq, Sq, D], k [B, Hk, Sk, D] and v: those that differ from their defaults.

    The options are those of :func:`heedful.attention`. offsets: of packed sequences, as :func:`checked_offsets`; q is
    [1, Hq, T, D] and k [1, Hk, Tk, D] then. A normalizer of "hard-st" stays: see :func:`straight_through`.
    """
    q_shape, k_shape = q.shape, k.shape
    for name, shape in (("q", q_shape), ("k", k_shape)):
        if len(shape) != 4:
            raise _error(RuntimeError, name, "4 dimensions", len(shape))
    batch, heads, q_length, _ = q_shape
    if offsets is not None:
        batch = offsets[0].numel() - 1
    arguments = {} if offsets is None else {"q_offsets": offsets[0], "k_offsets": offsets[1]}
    if bias is not None:
        arguments |= as_bias(bias).lower()
    if mask is not None or bias is not None or align is not BOTTOM_RIGHT:
        sizes = batch, heads, q_length, k_shape[2]
        arguments |= _lower_mask(Mask() if mask is None else as_mask(mask), sizes, q, align, offsets)
    if softcap is not None:
        arguments["softcap"] = _positive("softcap", softcap)
    if sinks is not None:
        arguments["sinks"] = _of_heads("sinks", sinks, batch, heads)
    if scale is not None or similarity != "dot":
        arguments |= _factor(scale, similarity, batch, heads)
    if dropout_p != 0.0:
        arguments |= dropout(dropout_p, seed, batch, q)
    if normalizer != "softmax":
        if normalizer not in NORMALIZERS:
            raise _error(ValueError, "normalizer", " or ".join(map(repr, NORMALIZERS)), repr(normalizer))
        arguments["normalizer"] = normalizer
    return arguments


def _lower_mask(
    mask: Mask, sizes: tuple[int, int, int, int], like: Tensor, align: Align, offsets: tuple[Tensor, Tensor] | None
) -> Arguments:
    (batch, heads, q_length, k_length), lengths = sizes, None
    if offsets is not None:
        lengths = offsets[0].diff(), offsets[1].diff()
        if any(not part.native for part in mask._conjuncts()):  # else no size is needed, and a GPU not waited for
            if torch.compiler.is_compiling():  # as a whole graph; without fullgraph=True this part runs uncompiled
                expected = "Causal, SlidingWindow, lengths or a tensor where packed sequences are compiled"
                raise _error(NotImplementedError, "mask", expected, repr(mask), "varlen_attention")
            q_length, k_length = (int(n.max()) if batch else 0 for n in lengths)
    arguments = mask.lower(q_length, k_length, batch, heads, like, align, lengths)
    # A position of 0 is the default, which torch takes a microsecond to pass. To ask would guard what is compiled.
    if not torch.compiler.is_compiling() and type(start := arguments.get("q_start")) is int and start == 0:
        del arguments["q_start"]
    return arguments


def _factor(scale: float | Tensor | None, similarity: str | Gaussian, batch: int, heads: int) -> Arguments:
    """The similarity, and what it is multiplied by: one number, or one a head."""
    if isinstance(scale, Tensor):
        scale = _of_heads("scale", scale, batch, heads)
    elif scale is not None and (isinstance(scale, bool) or not isinstance(scale, NUMBERS)):
        raise _error(TypeError, "scale", "a number or a tensor [Hq] or [B, Hq]", repr(scale))
    if isinstance(similarity, Gaussian):
        similarity, scale = "gaussian", _over_squared(1.0 if scale is None else scale, similarity, batch, heads)
    elif similarity not in ("dot", "cosine"):
        raise _error(ValueError, "similarity", "'dot', 'cosine' or heedful.Gaussian(bandwidth)", repr(similarity))
    arguments = {} if similarity == "dot" else {"similarity": similarity}
    return arguments if scale is None else arguments | {"scales" if isinstance(scale, Tensor) else "scale": scale}


def _over_squared(scale: float | Tensor, gaussian: Gaussian, batch: int, heads: int) -> float | Tensor:
    """scale / bandwidth^2; of a half-precision bandwidth in float32, as its square would be rounded."""
    bandwidth = gaussian.bandwidth
    if isinstance(bandwidth, Tensor):
        bandwidth = _of_heads("bandwidth", bandwidth, batch, heads)
        bandwidth = bandwidth.to(torch.promote_types(bandwidth.dtype, torch.float32))
    return scale / (bandwidth * bandwidth)


def dropout(p: float, seed: int | Tensor | None, batch: int, like: Tensor) -> Arguments:
    """dropout_p, and its seed: int64 [1] or [B] on the device of ``like``, drawn there where none is given."""
    if isinstance(p, bool) or not isinstance(p, NUMBERS):
        raise _error(TypeError, "dropout_p", "a number from 0 to 1", repr(p))
    if not 0 <= p <= 1:
        raise _error(ValueError, "dropout_p", "a number from 0 to 1", p)
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=like.device)
    elif isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.shape not in ((), (1,), (batch,)):
            got = f"a tensor of {seed.dtype} {list(seed.shape)}"
            raise _error(TypeError, "seed", f"an int or a torch.int64 tensor [1] or [{batch}]", got)
        seed = seed.reshape(-1)
    elif isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise _error(TypeError, "seed", "an int or an int64 tensor [1] or [B]", repr(seed))
    elif not -(2**63) <= seed < 2**63:
        raise _error(ValueError, "seed", "an int of 64 bits", seed)
    else:
        seed = torch.full((1,), seed, dtype=torch.int64, device=like.device)
    return {"dropout_p": p, "seed": seed}


def checked_offsets(q_offsets: Any, k_offsets: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where packed sequences begin and end, among queries and keys: int64 [N + 1] each, on the device of ``like``."""
    both = []
    for name, x in (("q_offsets", q_offsets), ("k_offsets", q_offsets if k_offsets is None else k_offsets)):
        if isinstance(x, Sequence) and not isinstance(x, str):
            x = torch.tensor(x, dtype=torch.int64)
        expected = "an int32 or int64 tensor [N + 1] or a list of ints"
        if not isinstance(x, Tensor):
            raise _error(TypeError, name, expected, type(x).__name__, "varlen_attention")
        if x.dtype not in (torch.int32, torch.int64) or x.dim() != 1 or not x.numel():
            raise _error(TypeError, name, expected, f"a tensor of {x.dtype} {list(x.shape)}", "varlen_attention")
        both.append(x.to(like.device, torch.int64))
    if both[0].shape != both[1].shape:
        expected, got = (list(x.shape) for x in both)
        raise _error(RuntimeError, "k_offsets", f"{expected}, as q_offsets", got, "varlen_attention")
    return both[0], both[1]


def straight_through(forward: Forward, q: Tensor, k: Tensor, v: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """``forward``'s hard attention, with the gradients of softmax for everything but v."""
    out, lse = forward(q, k, v, **arguments | {"normalizer": "hard"})
    if not _differentiated(q, k, *arguments.values()):
        return out, lse
    soft_out, soft_lse = forward(q, k, v.detach(), **arguments | {"normalizer": "softmax"})
    return out + _zero(soft_out), lse + _zero(soft_lse)


def _zero(x: Tensor) -> Tensor:
    """0, with the gradient of x; with none where x is not finite, as at the lse of a query that sees nothing."""
    x = x.nan_to_num(0.0, 0.0, 0.0)
    return x - x.detach()


def _differentiated(*values: Any) -> bool:
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values)


def _of_heads(name: str, x: Any, batch: int, heads: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise _error(TypeError, name, f"a tensor [{heads}] or [{batch}, {heads}]", type(x).__name__)
    if not x.is_floating_point():
        raise _error(TypeError, name, f"a tensor [{heads}] or [{batch}, {heads}] of floating point", x.dtype)
    if x.shape not in ((heads,), (batch, heads)):
        raise _error(RuntimeError, name, f"a tensor [{heads}] or [{batch}, {heads}]", list(x.shape))
    return x


def _positive(name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, NUMBERS):
        raise _error(TypeError, name, "a number above 0 or None", repr(x))
    if not 0 < x < math.inf:
        raise _error(ValueError, name, "a finite number above 0 or None", x)
    return x


def _error(kind: type[Exception], name: str, expected: str, got: Any, function: str = "attention") -> Exception:
    return kind(f"heedful.{function}: {name}: expected {expected}, got {got}")
