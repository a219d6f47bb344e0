"""The backends that run every case, and whether this machine can run them."""

from __future__ import annotations

from dataclasses import dataclass

import heedful._info

BACKENDS = ("cpu-baseline", "cpu-avx2", "cpu-avx512")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")  # each machine runs those up to its own capability


@dataclass(frozen=True)
class Backend:
    """Where a test runs: the device of its tensors, and the instruction set that is forced there."""

    name: str
    device: str
    isa: str | None = None

    @classmethod
    def named(cls, name: str) -> Backend:
        device, _, isa = name.partition("-")
        return cls(name, device, isa or None)

    def missing(self) -> str | None:
        """Why this machine cannot run the backend, or None where it can."""
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
