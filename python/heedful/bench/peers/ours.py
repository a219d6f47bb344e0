"""heedful itself, called as its users call it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import heedful

from ..rows import DROPOUT, WINDOW, Inputs, Row
from .base import Function, TorchPeer


class Heedful(TorchPeer):
    def function(self, row: Row, inputs: Inputs) -> Function:
        if row.form == "varlen":
            offsets = F.pad(inputs.lengths.cumsum(0), (1, 0))
            return lambda q, k, v: heedful.varlen_attention(q, k, v, offsets)
        if row.form in ("window", "lengths"):
            mask = heedful.Causal() & heedful.SlidingWindow(WINDOW - 1, 0)
            options = {"mask": mask if row.form == "window" else heedful.KeyLengths(inputs.lengths)}
            return lambda q, k, v: heedful.attention(q, k, v, **options)
        options = {"enable_gqa": row.Hq != row.Hk, "attn_mask": inputs.allowed if inputs.bias is None else inputs.bias}
        options |= {"is_causal": row.form == "causal", "dropout_p": DROPOUT if row.form == "dropout" else 0.0}
        return lambda q, k, v: heedful.scaled_dot_product_attention(q, k, v, **options)

    def pack(self, row: Row, inputs: Inputs, x: Tensor) -> Tensor:
        return x.transpose(1, 2)[_kept(inputs)] if row.form == "varlen" else x

    def unpack(self, row: Row, inputs: Inputs, x: Tensor) -> Tensor:
        if row.form != "varlen":
            return x
        padded = x.new_zeros(*_kept(inputs).shape, *x.shape[1:])
        padded[_kept(inputs)] = x
        return padded.transpose(1, 2)


def _kept(inputs: Inputs) -> Tensor:
    return inputs.allowed[:, 0, 0]  # [B, S]
