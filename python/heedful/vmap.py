"""vmap of the operators: one call, with the mapped dimension folded into the batch.

q [V, B, ...] -> [V * B, ...] -> attention -> [V * B, ...] -> [V, B, ...]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .definition import DIFFERENTIABLE, TENSORS

BACKWARD_TENSORS = ("dout", "dlse", "q", "k", "v", "out", "lse", *TENSORS[3:])
BROADCAST = ("bias", "mask", "tiles")  # [B, ...], or [1, ...] for the whole batch
SHARED = {"scales": 1, "sinks": 1, "slopes": 1, "table": 2, "seed": 0}  # the rank without a batch dimension
PARAMETERS = DIFFERENTIABLE[3:]  # whose gradients are computed only where they are wanted

Tensors = tuple[Tensor | None, ...]


def forward(
    call: Callable[..., Tensors], size: int, dims: Sequence[int | None], tensors: Tensors, options: dict
) -> tuple:
    """(results, their mapped dimensions) of ``call``, attention_forward, of ``size`` sets of the tensors of TENSORS."""
    folded, batch = _fold_all(size, dims, TENSORS, tensors, ())
    options = _with_batch(options, batch)
    return tuple(x.unflatten(0, (size, batch)) for x in call(*folded, **options)), (0, 0)


def backward(
    call: Callable[..., Tensors], size: int, dims: Sequence[int | None], tensors: Tensors, options: dict
) -> tuple:
    """Likewise of attention_backward."""
    wanted = [name for name in PARAMETERS if options.get(f"{name}_grad")]
    folded, batch = _fold_all(size, dims, BACKWARD_TENSORS, tensors, wanted)
    options = _with_batch(options, batch)
    grads = [None if x is None else x.unflatten(0, (size, batch)) for x in call(*folded, **options)]
    for at, name in enumerate(PARAMETERS, 3):
        if grads[at] is not None:  # summed over the batch where the parameter has none
            x, dim = tensors[BACKWARD_TENSORS.index(name)], dims[BACKWARD_TENSORS.index(name)]
            shape = [n for d, n in enumerate(x.shape) if d != dim]
            if name in SHARED and len(shape) == SHARED[name]:
                grads[at] = grads[at].sum(1)
            elif name not in SHARED and shape[0] == 1:
                grads[at] = grads[at].sum(1, keepdim=True)
    return tuple(grads), tuple(None if x is None else 0 for x in grads)


def _with_batch(options: dict, batch: int) -> dict:
    """Dropout counts sequences as it does without vmap."""
    return {**options, "dropout_batch": options.get("dropout_batch") or batch} if options.get("dropout_p") else options


def _fold_all(
    size: int, dims: Sequence[int | None], names: Sequence[str], tensors: Tensors, each: Sequence[str]
) -> tuple[list[Tensor | None], int]:
    """The tensors folded, and the batch size. Those named in ``each`` get an entry for each of the batch."""
    given = dict(zip(names, zip(tensors, dims)))
    if given["q_offsets"][0] is not None:
        raise NotImplementedError("heedful.varlen_attention: vmap: expected unpacked sequences: use heedful.attention")
    if given["buckets"][1] is not None:
        raise NotImplementedError("heedful.attention: vmap: expected one tensor of buckets for all, got a mapped one")
    q, dim = given["q"]
    batch = q.shape[0 if dim is None else int(dim == 0)]
    given["tiles"], given["bits"] = _joined_tiles(size, given["tiles"], given["bits"])
    return [_fold(name, *given[name], size, batch, name in each) for name in names], batch


def _fold(name: str, x: Tensor | None, dim: int | None, size: int, batch: int, each: bool) -> Tensor | None:
    """x, mapped along ``dim`` or not at all, with [size * batch, ...] in front; as it is where all share it."""
    if x is None or name in ("buckets", "bits"):
        return x
    rank = x.dim() - (dim is not None)
    shared = rank == SHARED[name] or (name == "seed" and x.numel() == 1) if name in SHARED else name in BROADCAST
    if shared and dim is None and not each and (name in SHARED or x.shape[0] == 1):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    if name in SHARED and rank == SHARED[name]:
        x = x.unsqueeze(1)
    # Of all others a wrong batch size is for the operator to report.
    broadcasts = x.shape[1] == 1 and (name in SHARED or name in BROADCAST)
    return (x.expand(size, batch, *x.shape[2:]) if broadcasts else x).flatten(0, 1)


def _joined_tiles(size: int, tiles: tuple, bits: tuple) -> tuple:
    """Tiles that count in the bits of all: those of set n come after those of the sets before it."""
    (index, index_dim), (words, words_dim) = tiles, bits
    if index is None or words_dim is None:
        return tiles, bits
    words = words.movedim(words_dim, 0)
    index = index.expand(size, *index.shape) if index_dim is None else index.movedim(index_dim, 0)
    first = torch.arange(size, dtype=index.dtype, device=index.device) * words.shape[1]
    index = torch.where(index > 1, index + first[:, None, None, None, None], index)
    return (index, 0), (words.flatten(0, 1), None)
