"""What torch.utils.flop_counter counts for the operators: as much as for torch's own scaled_dot_product_attention.

    forward   2 B Hq Sq Sk (D + Dv)         q k^T and p v
    backward  2 B Hq Sq Sk (3 D + 2 Dv)     q k^T again, dO v^T, p^T dO, ds k and ds^T q

Of packed sequences B Sq Sk is the sum over their lengths. What is masked is not subtracted; as for torch's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .definition import TENSORS
from .vmap import BACKWARD_TENSORS

COUNTER = "torch.utils.flop_counter"


def forward(*tensors: Tensor | None, out_val: Any = None, **arguments: Any) -> int:
    """Of a call of attention_forward."""
    given = dict(zip(TENSORS, tensors)) | arguments
    return 2 * _pairs(given) * (given["q"].shape[3] + given["v"].shape[3])


def backward(*tensors: Tensor | None, out_val: Any = None, **arguments: Any) -> int:
    """Of a call of attention_backward."""
    given = dict(zip(BACKWARD_TENSORS, tensors)) | arguments
    return 2 * _pairs(given) * (3 * given["q"].shape[3] + 2 * given["v"].shape[3])


def register() -> None:
    """Registers both, once the counter is imported: it imports Triton where there is one, which takes half a second."""
    if COUNTER in sys.modules:
        _register_with(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())


def _pairs(given: dict[str, Any]) -> int:
    """How many pairs of a query and a key there are, in all heads and sequences."""
    batch, heads, q_length, _ = given["q"].shape
    k_length, offsets = given["k"].shape[2], (given.get("q_offsets"), given.get("k_offsets"))
    if None in offsets or not all(map(_known, offsets)):  # of unknown lengths, the most there can be
        return batch * heads * q_length * k_length
    return heads * int((offsets[0].diff() * offsets[1].diff()).sum())


def _known(x: Tensor) -> bool:
    """Whether a tensor holds numbers: not on the meta device, not of a compiler."""
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta


def _register_with(counter: ModuleType) -> None:
    ops = torch.ops.heedful
    counter.register_flop_formula(ops.attention_forward, get_raw=True)(forward)
    counter.register_flop_formula(ops.attention_backward, get_raw=True)(backward)


class _Finder(MetaPathFinder):
    """Finds the counter as Python does, and has the formulas registered as soon as it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == COUNTER else None
        if spec is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register_with(module)

        spec.loader.exec_module = load_and_register
        return spec
