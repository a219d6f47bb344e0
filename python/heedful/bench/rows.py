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
        """One query on a cache of keys."""
        return self.Sq == 1 < self.Sk

    @property
    def directions(self) -> tuple[str, ...]:
        """Nobody differentiates decoding."""
        return ("forward",) if self.decodes else ("forward", "backward")

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
    """Tensors of one row. `allowed`, bool and broadcastable to [B, Hq, Sq, Sk], is what a form but causal masks by."""

    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor  # of the result, for backward
    allowed: Tensor | None = None
    lengths: Tensor | None = None
    bias: Tensor | None = None


def _rows(dtype: str, *shapes: tuple) -> list[Row]:
    return [Row(dtype, *shape) for shape in shapes]


SINGLE = {
    "float32": [
        (1, 12, 12, 1024, 1024, 64, "full"),
        (1, 12, 12, 1024, 1024, 64, "causal"),
        (1, 4, 4, 4096, 4096, 128, "full"),
        (1, 4, 4, 4096, 4096, 128, "causal"),
        (1, 16, 2, 2048, 2048, 64, "causal"),
        (1, 8, 8, 1024, 1024, 32, "full"),
        (1, 4, 4, 1024, 1024, 256, "causal"),
        (32, 12, 12, 64, 64, 64, "full"),
        (1, 12, 12, 197, 197, 64, "full"),  # a vision transformer's
        (8, 12, 12, 512, 512, 64, "padded"),
        (8, 12, 12, 512, 512, 64, "lengths"),
        (8, 12, 12, 512, 512, 64, "varlen"),
        (1, 12, 12, 1024, 1024, 64, "mask"),
        (1, 12, 12, 1024, 1024, 64, "bias"),
        (1, 12, 12, 1024, 1024, 64, "bias-gradient"),
        (1, 4, 4, 4096, 4096, 64, "window"),
    ],
    "bfloat16": [
        (1, 12, 12, 1024, 1024, 64, "full"),
        (1, 12, 12, 1024, 1024, 64, "causal"),
        (1, 4, 4, 4096, 4096, 128, "causal"),
        (1, 16, 2, 2048, 2048, 64, "causal"),
        (32, 12, 12, 64, 64, 64, "full"),
    ],
    "float16": [(1, 12, 12, 1024, 1024, 64, "causal"), (1, 4, 4, 4096, 4096, 128, "causal")],
}
DECODING = [(8, 32, 8, 1, 4096, 128), (1, 32, 8, 1, 16384, 128), (1, 8, 8, 1, 16384, 128), (1, 32, 1, 1, 65536, 128)]
CURVES = [  # dtype, form, heads, S: one line a peer in the pictures
    ("float32", "full", 8, (128, 256, 512, 1024, 2048, 4096)),
    ("float32", "causal", 8, (128, 256, 512, 1024, 2048, 4096)),
    ("bfloat16", "causal", 8, (128, 256, 512, 1024, 2048, 4096)),
]
CACHES = (256, 1024, 4096, 16384)  # keys of one query
MEMORY = [Row("float32", 1, 4, 4, s, s, 64, "causal") for s in (1024, 2048, 4096, 8192)]


def rows() -> list[Row]:
    """All that `python -m heedful bench` measures."""
    found = [row for dtype, shapes in SINGLE.items() for row in _rows(dtype, *shapes)]
    found += [row for dtype in SHORT for row in _rows(dtype, *DECODING)]
    for dtype, form, heads, lengths in CURVES:
        found += _rows(dtype, *((1, heads, heads, s, s, 64, form) for s in lengths))
    found += [row for dtype in SHORT for row in _rows(dtype, *((1, 32, 8, 1, s, 128) for s in CACHES))]
    return list(dict.fromkeys(found))


def quick_rows() -> list[Row]:
    """A few small ones."""
    found = _rows(
        "float32", *((1, 8, 8, s, s, 64, "causal") for s in (128, 256, 512)), (4, 4, 4, 256, 256, 64, "padded")
    )
    return [
        *found,
        Row("float32", 1, 4, 4, 256, 256, 64, "bias-gradient"),
        Row("float32", 1, 32, 8, 1, 1024, 128),
        Row("bfloat16", 1, 8, 8, 256, 256, 64, "causal"),
        Row("float16", 1, 8, 8, 256, 256, 64, "causal"),
    ]
