"""torch's scaled_dot_product_attention: as it chooses its backend, and with one chosen."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..rows import DROPOUT, Inputs, Row
from .base import CannotRun, Function, TorchPeer


class Torch(TorchPeer):
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
                try:
                    return attention(q, k, v)
                except RuntimeError as error:
                    if "No available kernel" not in str(error):
                        raise
                    raise CannotRun(f"torch's backend {self.backend.name} does not take the form {row.form}") from None

        return function


class Flash(_OneBackend):
    backend = SDPBackend.FLASH_ATTENTION


class Math(_OneBackend):
    backend = SDPBackend.MATH
