"""What the tests of the functions that users call share: tensors from a seed, and what is close."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BOOL = torch.bool


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def holes(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.3


def assert_close(got: Tensor, want: Tensor) -> None:
    """Equal up to rounding: for half precision, of the largest values."""
    if got.dtype in (torch.bfloat16, torch.float16) and got.numel():
        torch.testing.assert_close(got, want, rtol=0, atol=2 * torch.finfo(got.dtype).eps * want.abs().max().item())
    else:
        torch.testing.assert_close(got, want)
