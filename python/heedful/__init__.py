"""heedful: attention operators for PyTorch, exact about what is masked."""

from . import nn, reference
from ._version import __version__
from .explain import explain
from .functional import attention, scaled_dot_product_attention
from .masks import Causal, KeyLengths, Mask, QueryLengths, SlidingWindow
from .swap import patched, swap

__all__ = [
    "Causal",
    "KeyLengths",
    "Mask",
    "QueryLengths",
    "SlidingWindow",
    "__version__",
    "attention",
    "explain",
    "nn",
    "patched",
    "reference",
    "scaled_dot_product_attention",
    "swap",
]
