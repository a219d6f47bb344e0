"""Modules: drop-in replacements for those of torch.nn."""

from .attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
