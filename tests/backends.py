"""The backends that run every case, and whether this machine can run them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import heedful._info
from cases import PARAMETERS, Case
from heedful import ops

CUDA, EMULATED = "cuda", "cuda-emulated"
# Each machine runs those up to its own capability. The last ones have kernels of bfloat16 alone; the others are those
# of avx512.
OF_BF16 = ("avx512_bf16", "amx_bf16")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", *OF_BF16)
BACKENDS = (*(f"cpu-{isa}" for isa in INSTRUCTION_SETS), EMULATED, CUDA)

# The CUDA kernels' operators on the CPU (CMakeLists.txt, HEEDFUL_EMULATED_TEST), which no wheel has.
EMULATED_LIBRARY = Path(
    os.environ.get("HEEDFUL_EMULATED")
    or Path(__file__).parent.parent / "build" / "emulated_test" / "libheedful_emulated.so"
)


@dataclass(frozen=True)
class Backend:
    """Where a test runs: the device of its tensors, and the instruction set that is forced there."""

    name: str
    device: str
    isa: str | None = None

    @classmethod
    def named(cls, name: str) -> Backend:
        if name == EMULATED:
            return cls(name, "cpu")
        device, _, isa = name.partition("-")
        return cls(name, device, isa or None)

    @property
    def of_bf16(self) -> bool:
        """Whether it has kernels of bfloat16 alone."""
        return self.isa in OF_BF16

    def missing(self) -> str | None:
        """Why this machine cannot run the backend, or None where it can."""
        if self.name == CUDA:
            return ops.no_gpu() or None
        if self.name == EMULATED:
            return None if EMULATED_LIBRARY.exists() else f"not built: there is no {EMULATED_LIBRARY}"
        built = heedful._info.build_info()["isas"]
        if self.isa not in built:
            return f"not built: the library has {', '.join(built)}"
        best = heedful._info.cpu_capability()
        if INSTRUCTION_SETS.index(self.isa) > INSTRUCTION_SETS.index(best):
            return f"this machine runs {best} at best"
        return None


def available_backends() -> list[Backend]:
    """The backends that this machine can run."""
    return [backend for backend in map(Backend.named, BACKENDS) if backend.missing() is None]


@contextmanager
def emulated_operators() -> Iterator[None]:
    """In here heedful's operators on the CPU are those of the CUDA kernels on the emulator."""
    torch.ops.load_library(EMULATED_LIBRARY)
    library = torch.library.Library("heedful", "IMPL", "CPU")
    try:
        for name in ("attention_forward", "attention_backward", "plain_forward", "plain_backward"):
            library.impl(name, getattr(torch.ops.heedful_emulated, name).default, allow_override=True)
        yield
    finally:
        library._destroy()


# The emulator runs cases that take it at most this long, by what one core was measured to take for a pair row by row,
# for a product of tensor cores, and for a pair in the gradient of a parameter.
MOST_EMULATED_SECONDS = 0.15
SECONDS_OF_PAIR, SECONDS_OF_PRODUCT, SECONDS_OF_GRADIENT = 3e-5, 5e-8, 3e-5


def emulated_seconds(case: Case, dtype: torch.dtype) -> float:
    """An estimate of the time of a case, forward and backward."""
    b, hq, _, sq, sk, d, dv = case.sizes
    pairs, width = b * hq * sq * sk, max(d, dv)
    seconds = SECONDS_OF_GRADIENT * pairs * sum(getattr(case, name) is not None for name in PARAMETERS)
    if dtype in (torch.bfloat16, torch.float16) and width <= 256:  # tiles of 64 x 32 rows of 64 columns
        tiles = math.ceil(sq / 64) * math.ceil(sk / 32) * math.ceil((d + dv) / 64)
        return seconds + SECONDS_OF_PRODUCT * b * hq * tiles * 64**2 * 32
    return seconds + SECONDS_OF_PAIR * pairs * (1 + width // 64)
