"""ONNX Runtime's operators on the CPU, each in a model of one node: two of its own, and the standard's."""

from __future__ import annotations

from typing import Any

import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from ..rows import WINDOW, Inputs, Row
from .base import Call, CannotRun, Peer

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}
OPSET, IR = 23, 11  # the first with Attention
OWN = "com.microsoft"


class _Node(Peer):
    """One node of type `operator`."""

    operator: str
    domain = OWN

    def inputs(self, row: Row, inputs: Inputs) -> dict[str, Tensor]:
        """The node's inputs in their order, without those that are left out."""
        raise NotImplementedError

    def attributes(self, row: Row) -> dict[str, Any]:
        raise NotImplementedError

    order: tuple[str, ...]  # of all the inputs that there might be
    in_place: dict[str, str] = {}  # outputs behind the first, and the inputs whose memory they share

    def prepare(self, row: Row, inputs: Inputs) -> Call:
        if row.form == "dropout":
            raise CannotRun(f"{self.operator} has no dropout")
        given = {name: x.contiguous() for name, x in self.inputs(row, inputs).items()}
        outputs = {"out": given["q"]} | {name: given[same] for name, same in self.in_place.items() if same in given}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = self.keeps_memory
        options.log_severity_level = 4
        model = _model(self._node(row, given, list(outputs)), given, outputs)
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        binding, values = session.io_binding(), {name: _value(x) for name, x in given.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        out = _value(torch.empty_like(given["q"]))
        for name in outputs:
            binding.bind_ortvalue_output(name, out if name == "out" else values[self.in_place[name]])

        def forward() -> None:
            session.run_with_iobinding(binding)

        def results(direction: str) -> dict[str, Tensor]:
            forward()
            found = torch.from_numpy(out.numpy().copy())
            return {"out": found if found.dim() == 4 else found.view(row.B, row.Sq, row.Hq, row.D).transpose(1, 2)}

        return Call(forward, results, no_backward="ONNX Runtime only infers")

    def _node(self, row: Row, given: dict[str, Tensor], outputs: list[str]) -> Any:
        names = [name if name in given else "" for name in self.order]
        while not names[-1]:
            names.pop()
        return helper.make_node(self.operator, names, outputs, domain=self.domain, **self.attributes(row))


class MultiHeadAttention(_Node):
    operator = "MultiHeadAttention"
    order = ("q", "k", "v", "projection_bias", "key_padding_mask", "bias")

    def inputs(self, row: Row, inputs: Inputs) -> dict[str, Tensor]:
        if row.Hq != row.Hk:
            raise CannotRun("MultiHeadAttention has as many heads for keys as for queries")
        given = {"q": _rows(inputs.q), "k": _rows(inputs.k), "v": _rows(inputs.v)}
        if row.form in ("padded", "lengths", "varlen"):
            given["key_padding_mask"] = inputs.allowed[:, 0, 0].int()
        elif inputs.bias is not None:
            given["bias"] = inputs.bias
        elif inputs.allowed is not None:  # it has no mask of pairs but a bias
            given["bias"] = (
                torch.zeros(inputs.allowed.shape).masked_fill(~inputs.allowed, -torch.inf).to(inputs.q.dtype)
            )
        return given

    def attributes(self, row: Row) -> dict[str, Any]:
        return {"num_heads": row.Hq, "unidirectional": int(row.form == "causal")}


class GroupQueryAttention(_Node):
    """With its cache: one query reads it and appends its own key; more queries are the cache's first."""

    operator = "GroupQueryAttention"
    order = ("q", "k", "v", "past_k", "past_v", "lengths", "total", "cos", "sin", "positions", "bias")
    in_place = {"present_k": "past_k", "present_v": "past_v"}

    def inputs(self, row: Row, inputs: Inputs) -> dict[str, Tensor]:
        if row.form not in ("causal", "window") and not row.decodes:
            raise CannotRun("GroupQueryAttention is causal")
        if row.Sq not in (1, row.Sk):
            raise CannotRun("GroupQueryAttention starts a cache or appends to it")
        new = row.Sk if row.Sq > 1 else 1
        last = torch.full((row.B,), row.Sk - 1, dtype=torch.int32)
        return {
            "q": _rows(inputs.q),
            "k": _rows(inputs.k[:, :, -new:]),
            "v": _rows(inputs.v[:, :, -new:]),
            "past_k": inputs.k,
            "past_v": inputs.v,
            "lengths": last,
            "total": torch.tensor(row.Sk, dtype=torch.int32),
        }

    def attributes(self, row: Row) -> dict[str, Any]:
        window = {"local_window_size": WINDOW} if row.form == "window" else {}
        return {"num_heads": row.Hq, "kv_num_heads": row.Hk, **window}


class Attention(_Node):
    operator, domain = "Attention", ""
    order = ("q", "k", "v", "mask")

    def inputs(self, row: Row, inputs: Inputs) -> dict[str, Tensor]:
        given = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
        if inputs.bias is not None:
            given["mask"] = inputs.bias
        elif inputs.allowed is not None:
            given["mask"] = inputs.allowed.expand(row.B, 1, row.Sq, row.Sk)
        return given

    def attributes(self, row: Row) -> dict[str, Any]:
        return {"is_causal": int(row.form == "causal")}


def _rows(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H * D]: done before the clock runs."""
    return x.transpose(1, 2).flatten(2)


def _model(node: Any, given: dict[str, Tensor], outputs: dict[str, Tensor]) -> bytes:
    def described(tensors: dict[str, Tensor]) -> list[Any]:
        return [helper.make_tensor_value_info(n, TYPES[x.dtype], list(x.shape)) for n, x in tensors.items()]

    graph = helper.make_graph([node], "attention", described(given), described(outputs))
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(OWN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR).SerializeToString()


def _value(x: Tensor) -> Any:
    if x.dtype is torch.bfloat16:
        bits = x.view(torch.int16).numpy().view("uint16")
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TYPES[x.dtype])
    return onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())
