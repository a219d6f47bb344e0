"""Exports a transformer block that attends with heedful, compiles it ahead of time, and saves what eager mode computes.

    python export.py DIRECTORY

writes DIRECTORY/block.pt2, the package that main.cpp runs, and DIRECTORY/expected.pt, cases of (x, lengths, output).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import heedful
from heedful import ALiBi, Causal, KeyLengths


class Block(nn.Module):
    """A decoder's block: x + attention(norm(x)), then x + mlp(norm(x)). Sequences are padded at their end."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.register_buffer("slopes", ALiBi.default_slopes(heads))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x [B, S, width], lengths int64 [B] -> [B, S, width]."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask, bias = Causal() & KeyLengths(lengths), ALiBi(self.slopes)
        heads = heedful.attention(q, k, v, mask=mask, bias=bias, align="top-left")
        x = x + self.project(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def inputs(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Random sequences of these lengths, padded to the longest."""
    return torch.randn(len(lengths), max(lengths), width), torch.tensor(lengths)


def main(directory: Path) -> None:
    torch.manual_seed(0)
    width = 64
    block = Block(width, heads=4).eval()
    batch, length = torch.export.Dim("batch", max=1024), torch.export.Dim("length", max=1 << 16)
    program = torch.export.export(
        block, inputs([5, 9, 7], width), dynamic_shapes={"x": {0: batch, 1: length}, "lengths": {0: batch}}
    )
    torch._inductor.aoti_compile_and_package(program, package_path=str(directory / "block.pt2"))
    cases = []
    with torch.no_grad():
        for lengths in ([5, 9, 7], [1], [300, 17], [64] * 6):
            x, n = inputs(lengths, width)
            cases.append((x, n, block(x, n)))
    torch.save(cases, directory / "expected.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
