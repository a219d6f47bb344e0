"""What is measured: one row a shape, dtype and form of attention, and the inputs that every peer gets for it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
WINDOW = 256  # keys that a query sees in the form "window", itself included
DROPOUT = 0.1
FORMS = {
    "full": "every query sees every key",
    "causal": "keys up to the query's own position",
    "window": f"the last {WINDOW} keys",
    "padded": "a bool mask [B, 1, 1, Sk]: the first half of the keys in the first sequence, all in the last",
    "lengths": "the same, as lengths where a peer takes them",
    "mask": "a bool mask [B, 1, Sq, Sk], nine pairs of ten allowed",
    "bias": "a bias [1, H, Sq, Sk]",
    "bias-gradient": "the same, with its gradient",
    "dropout": f"every tenth weight dropped ({DROPOUT})",
    "varlen": "sequences of S / 2 to S queries, packed where a peer takes that, else padded",
}


@dataclass(frozen=True)
class Row:
    """q [B, Hq, Sq, D], k and v [B, Hk, Sk, D] of one dtype, and a form of attention."""

    dtype: str
    B: int
    Hq: int
    Hk: int
    Sq: int
    Sk: int
    D: int
    form: str = "full"

    @property
    def name(self) -> str:
        heads = f"H{self.Hq}" if self.Hq == self.Hk else f"H{self.Hq}/{self.Hk}"
        lengths = f"S{self.Sq}" if self.Sq == self.Sk else f"S{self.Sq}/{self.Sk}"
        return f"{SHORT[self.dtype]} {self.form} B{self.B} {heads} {lengths} D{self.D}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def decodes(self) -> bool:
        """One query on many keys: nobody differentiates that."""
        return self.Sq == 1 < self.Sk

    @property
    def lengths(self) -> Tensor:
        """Of the sequences of a ragged batch, int64 [B]."""
        spread = torch.linspace(self.Sk / 2, self.Sk, self.B) if self.B > 1 else torch.tensor([self.Sk * 3 / 4])
        return spread.ceil().long()

    def flops(self, direction: str) -> float:
        """4 B H Sq Sk D, of the pairs that the form keeps; half for causal, 2.5 times that backward."""
        pairs = float(self.Sq * self.Sk * self.B)
        if self.form == "causal":
            pairs /= 2
        elif self.form == "window":
            pairs *= min(1.0, WINDOW / self.Sk)
        elif self.form in ("padded", "lengths"):
            pairs = float(self.Sq * self.lengths.sum())
        elif self.form == "varlen":
            pairs = float(self.lengths.square().sum())
        return 4 * pairs * self.Hq * self.D * (1 if direction == "forward" else 2.5)

    def bytes(self, direction: str) -> float:
        """Of q, k, v and out, each moved once; twice that backward, which reads them and writes three gradients."""
        elements = 2 * self.B * self.D * (self.Hq * self.Sq + self.Hk * self.Sk)
        return elements * self.torch_dtype.itemsize * (1 if direction == "forward" else 2)

    def draw(self) -> Inputs:
        """The inputs: the same bits in every process, whatever else was drawn there."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.torch_dtype)

        q, k, v = normal(self.B, self.Hq, self.Sq, self.D), *(normal(self.B, self.Hk, self.Sk, self.D) for _ in "kv")
        inputs = Inputs(q, k, v, normal(*q.shape))
        if self.form in ("padded", "lengths", "varlen"):
            inputs.lengths = self.lengths
            inputs.allowed = (torch.arange(self.Sk) < self.lengths[:, None])[:, None, None]
        elif self.form == "mask":
            inputs.allowed = torch.rand(self.B, 1, self.Sq, self.Sk, generator=generator) > 0.1
        elif self.form == "window":
            i, j = torch.arange(self.Sq)[:, None] + self.Sk - self.Sq, torch.arange(self.Sk)
            inputs.allowed = ((j <= i) & (j > i - WINDOW))[None, None]
        elif self.form in ("bias", "bias-gradient"):
            inputs.bias = normal(1, self.Hq, self.Sq, self.Sk)
        if self.form == "varlen":  # what lies behind a sequence's end belongs to nobody
            inputs.gradient *= inputs.allowed.transpose(2, 3)
        return inputs


@dataclass
class Inputs:
    """Tensors of one row. `allowed` says in bool, broadcastable to [B, Hq, Sq, Sk], what the form masks, if not causal."""

    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor  # of the result, for backward
    allowed: Tensor | None = None
    lengths: Tensor | None = None
    bias: Tensor | None = None
