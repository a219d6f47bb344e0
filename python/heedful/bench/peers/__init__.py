"""What heedful is compared with: one module a library."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Peer


@dataclass(frozen=True)
class Entry:
    """Where a peer is, and which packages it needs: the first one's version is told."""

    module: str
    type: str
    packages: tuple[str, ...]

    @property
    def missing(self) -> str:
        """What to install, in words; "" where nothing is missing."""
        lacking = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: pip install {' '.join(lacking)}" if lacking else ""

    @property
    def version(self) -> str:
        return f"{self.packages[0]} {importlib.metadata.version(self.packages[0])}"

    def load(self, threads: int, keeps_memory: bool = True) -> Peer:
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), self.type)(threads, keeps_memory)


OURS = "heedful"
PEERS = {
    OURS: Entry("ours", "Heedful", ("heedful",)),
    "torch-flash": Entry("sdpa", "Flash", ("torch",)),
    "torch-math": Entry("sdpa", "Math", ("torch",)),
    "flex": Entry("flex", "Flex", ("torch",)),
    "ort-mha": Entry("onnx", "MultiHeadAttention", ("onnxruntime", "onnx")),
    "ort-gqa": Entry("onnx", "GroupQueryAttention", ("onnxruntime", "onnx")),
    "ort-attention": Entry("onnx", "Attention", ("onnxruntime", "onnx")),
    "openvino": Entry("openvino", "OpenVINO", ("openvino",)),
    "jax": Entry("jax", "Jax", ("jax",)),
}
