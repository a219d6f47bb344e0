"""heedful: attention operators for PyTorch, exact about what is masked."""

from . import nn, reference
from ._version import __version__
from .biases import ALiBi, Bias, RelativeBias
from .explain import explain
from .functional import attention, varlen_attention
from .masks import (
    BlockMask,
    Causal,
    Dilated,
    Documents,
    Global,
    KeyLengths,
    Mask,
    PrefixLM,
    QueryLengths,
    SlidingWindow,
    Strided,
)
from .sdpa import scaled_dot_product_attention
from .similarity import Gaussian
from .states import attention_weights, merge_states
from .swap import patched, swap

__all__ = [
    "ALiBi",
    "Bias",
    "BlockMask",
    "Causal",
    "Dilated",
    "Documents",
    "Gaussian",
    "Global",
    "KeyLengths",
    "Mask",
    "PrefixLM",
    "QueryLengths",
    "RelativeBias",
    "SlidingWindow",
    "Strided",
    "__version__",
    "attention",
    "attention_weights",
    "explain",
    "merge_states",
    "nn",
    "patched",
    "reference",
    "scaled_dot_product_attention",
    "swap",
    "varlen_attention",
]
