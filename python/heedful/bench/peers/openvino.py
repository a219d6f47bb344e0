"""OpenVINO's ScaledDotProductAttention on its CPU plugin."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from torch import Tensor

from ..rows import Inputs, Row
from .base import Call, CannotRun, Peer


class OpenVINO(Peer):
    def prepare(self, row: Row, inputs: Inputs) -> Call:
        if row.form == "dropout":
            raise CannotRun("ScaledDotProductAttention has no dropout")
        given = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
        if inputs.bias is not None:
            given["mask"] = inputs.bias
        elif inputs.allowed is not None:
            given["mask"] = inputs.allowed
        given = {name: x.contiguous() for name, x in given.items()}
        tensors = {name: _tensor(x) for name, x in given.items()}
        nodes = {name: ops.parameter(list(x.shape), x.element_type, name=name) for name, x in tensors.items()}
        k, v = (_repeated(nodes[name], row) if row.Hq != row.Hk else nodes[name] for name in "kv")
        mask = nodes.get("mask")
        attention = ops.scaled_dot_product_attention(nodes["q"], k, v, mask, causal=row.form == "causal")
        core = openvino.Core()
        # Left to itself it rounds float32 to bfloat16 where the machine has that.
        in_bf16 = row.dtype is torch.bfloat16 and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        config = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32",
        }
        model = openvino.Model([attention], list(nodes.values()))
        request = core.compile_model(model, "CPU", config).create_infer_request()
        for i, x in enumerate(tensors.values()):
            request.set_input_tensor(i, x)

        def infer(held: dict[str, Tensor] = given) -> None:  # bfloat16's tensors are views of these
            request.infer()

        def results(direction: str) -> dict[str, Tensor]:
            infer()
            return {"out": _values(request.get_output_tensor(0), row.dtype)}

        kept = "OpenVINO makes its buffers with the model, and keeps them"
        return Call(infer, results, no_backward="OpenVINO only infers", no_memory=kept)


def _repeated(x: Any, row: Row) -> Any:
    """[B, Hk, S, D] -> [B, Hq, S, D], as models that share keys and values write it."""
    shape = [row.B, row.Hk, row.Hq // row.Hk, row.Sk, row.D]
    spread = ops.broadcast(ops.unsqueeze(x, ops.constant(2)), ops.constant(shape), "BIDIRECTIONAL")
    return ops.reshape(spread, ops.constant([row.B, row.Hq, row.Sk, row.D]), special_zero=False)


def _tensor(x: Tensor) -> Any:
    if x.dtype is torch.bool:
        return openvino.Tensor(x.numpy())
    if x.dtype is torch.bfloat16:
        return openvino.Tensor(x.view(torch.int16).numpy(), list(x.shape), openvino.Type.bf16)
    return openvino.Tensor(x.numpy())


def _values(x: Any, dtype: str) -> Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(np.array(x.data).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(x.data))
