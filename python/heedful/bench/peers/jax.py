"""jax.nn.dot_product_attention, compiled by XLA."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from ..rows import WINDOW, Inputs, Row
from .base import GRADIENTS, Call, CannotRun, Peer


class Jax(Peer):
    def prepare(self, row: Row, inputs: Inputs) -> Call:
        if row.form == "dropout":
            raise CannotRun("jax.nn.dot_product_attention has no dropout")
        options: dict[str, Any] = {"is_causal": row.form == "causal", "implementation": "xla"}
        if row.form == "window":
            options |= {"is_causal": True, "local_window_size": (WINDOW - 1, 0)}
        elif row.form in ("lengths", "varlen"):
            options["key_value_seq_lengths"] = _array(inputs.lengths.int())
        elif inputs.allowed is not None:
            options["mask"] = _array(inputs.allowed)
        # [B, S, H, D], as jax wants them: moved before the clock runs
        leaves = [_array(x.transpose(1, 2)) for x in (inputs.q, inputs.k, inputs.v)]
        gradient = _array(inputs.gradient.transpose(1, 2))
        if inputs.bias is not None:
            if row.form == "bias-gradient":
                leaves.append(_array(inputs.bias))
            else:
                options["bias"] = _array(inputs.bias)

        def attention(q: Any, k: Any, v: Any, *bias: Any) -> Any:
            return jax.nn.dot_product_attention(q, k, v, *bias, **options)

        plain = jax.jit(attention)
        recorded = jax.jit(lambda *x: jax.vjp(attention, *x))
        pulled = jax.jit(lambda pullback, gradient: pullback(gradient))
        graph: list[Any] = []

        def forward() -> Any:
            return plain(*leaves).block_until_ready()

        def record() -> None:
            graph.clear()
            graph.append(jax.block_until_ready(recorded(*leaves)[1]))

        def backward() -> Any:
            return jax.block_until_ready(pulled(graph[0], gradient))

        def results(direction: str) -> dict[str, Tensor]:
            if direction == "forward":
                return {"out": _tensor(forward()).transpose(1, 2)}
            found = dict(zip(GRADIENTS, map(_tensor, backward())))
            return {name: x if name == "dbias" else x.transpose(1, 2) for name, x in found.items()}

        return Call(forward, results, record, backward, graph)


def _array(x: Tensor) -> Any:
    x = x.contiguous()
    if x.dtype is torch.bfloat16:
        return jax.numpy.asarray(x.view(torch.int16).numpy().view(jax.numpy.bfloat16))
    return jax.numpy.asarray(x.numpy())


def _tensor(x: Any) -> Tensor:
    return torch.from_numpy(np.array(x.astype(jax.numpy.float32)))
