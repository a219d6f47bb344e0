"""torch's FlexAttention, compiled for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..rows import WINDOW, Inputs, Row
from .base import CannotRun, Function, TorchPeer


class Flex(TorchPeer):
    def function(self, row: Row, inputs: Inputs) -> Function:
        if row.form == "dropout":
            raise CannotRun("has no dropout")
        torch._dynamo.reset()  # each row is compiled for its own shapes
        compiled = torch.compile(flex_attention, dynamic=False)
        options = {"enable_gqa": row.Hq != row.Hk, "block_mask": _block_mask(row, inputs)}
        if inputs.bias is not None:
            bias = inputs.bias.detach()
            options["score_mod"] = lambda score, b, h, i, j: score + bias[0, h, i, j]
        return lambda q, k, v: compiled(q, k, v, **options)


def _block_mask(row: Row, inputs: Inputs) -> Any:
    """Of the form's pairs, made once, as for all layers of a model."""
    allowed, lengths, shift = inputs.allowed, inputs.lengths, row.Sk - row.Sq

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + shift

    def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i + shift) & (j > i + shift - WINDOW)

    def shorter(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < lengths[b]

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return allowed[b, 0, i, j]

    masks = {"causal": causal, "window": window, "mask": mask} | dict.fromkeys(("padded", "lengths", "varlen"), shorter)
    if row.form not in masks:
        return None
    batch = 1 if row.form in ("causal", "window") else row.B
    return create_block_mask(masks[row.form], batch, None, row.Sq, row.Sk, device="cpu")
