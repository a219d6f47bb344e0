"""torch's scaled_dot_product_attention: as it chooses its backend, and with one chosen."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..rows import DROPOUT, Inputs, Row
from .base import Function, TorchPeer


class Torch(TorchPeer):
    name = "torch"

    def function(self, row: Row, inputs: Inputs) -> Function:
        options = {"enable_gqa": row.Hq != row.Hk, "attn_mask": inputs.allowed if inputs.bias is None else inputs.bias}
        options |= {"is_causal": row.form == "causal", "dropout_p": DROPOUT if row.form == "dropout" else 0.0}
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


class _OneBackend(Torch):
    backend: SDPBackend

    def function(self, row: Row, inputs: Inputs) -> Function:
        attention = super().function(row, inputs)

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(self.backend):
                return attention(q, k, v)

        return function


class Flash(_OneBackend):
    name, backend = "torch flash", SDPBackend.FLASH_ATTENTION


class Math(_OneBackend):
    name, backend = "torch math", SDPBackend.MATH
