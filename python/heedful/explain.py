"""Which kernel a call runs, and for each one that cannot, every reason why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _info, ops
from .arguments import lower
from .masks import as_mask


@dataclass(frozen=True, repr=False)
class Explanation:
    """What :func:`explain` found. Its repr says it in words."""

    call: str
    kernel: str | None  # forward's; None: this call cannot run
    backward: str | None  # backward's kernel
    isa: str | None  # the instruction set, of kernels for the CPU
    tiles: Mapping[str, int]  # sizes that the kernel works in, by name
    reasons: tuple[str, ...]  # "kernel: why it does not run this call", for all the others

    def __repr__(self) -> str:
        lines = [f"heedful.attention of {self.call}"]
        if self.kernel is None:
            lines.append("cannot run; heedful.reference.attention runs on any device, slowly")
        else:
            both = self.kernel == self.backward
            lines.append(f"runs {self.kernel}{', forward and backward' if both else f'; backward {self.backward}'}")
            lines += [f"  {name} = {size}" for name, size in self.tiles.items()]
        if self.reasons:
            lines += ["does not run", *(f"  {reason}" for reason in self.reasons)]
        return "\n".join(lines)


def explain(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Any) -> Explanation:
    """Which kernel :func:`heedful.attention` runs for these arguments, and why not the others of q's device. Nothing is
    computed.

    The choice depends on the options, on q's device and dtype, on the machine, and on HEEDFUL_CPU_ISA. The options are
    those of :func:`heedful.attention`, and are checked as there.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"heedful.explain: {name}: expected a tensor, got {type(x).__name__}")
        if x.is_nested or x.dim() != 4:
            got = "a nested tensor" if x.is_nested else x.dim()
            raise RuntimeError(f"heedful.explain: {name}: expected 4 dimensions, got {got}")
    arguments = lower(q, k, **options)
    features = [{"similarity": x, "normalizer": "hard"}.get(name, name) for name, x in arguments.items()]
    features += ["allow_tf32"] if ops.allows_tf32(q) else []
    (b, hq, sq, d), (hk, sk), dv = q.shape, k.shape[1:3], v.shape[3]
    dtype, device = str(q.dtype).removeprefix("torch."), q.device.type
    call = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, {dtype} on {q.device}"
    call += "".join(f", {name} {_show(name, x)}" for name, x in options.items() if x is not None)
    try:
        sizes = {"B": b, "Hq": hq, "Hk": hk, "Sq": sq, "Sk": sk, "D": d, "Dv": dv}
        found = _info.explain(device=device, dtype=dtype, **sizes, features=features, **_gpu(q))
    except ValueError as error:  # a dtype that no kernel has
        return Explanation(call, None, None, None, {}, (f"every kernel: {error}",))
    return Explanation(call, found["kernel"], found["backward"], found["isa"], found["tiles"], tuple(found["reasons"]))


def _gpu(q: Tensor) -> dict[str, Any]:
    """What the choice of a kernel for GPUs depends on."""
    if not q.is_cuda:
        return {"no_cuda": ops.NO_CUDA}
    if reason := ops.no_gpu():
        return {"no_cuda": reason}
    major, minor = torch.cuda.get_device_capability(q.device)
    return {"no_cuda": "", "cuda_capability": 10 * major + minor}


def _show(name: str, option: Any) -> str:
    if name == "mask":
        return repr(as_mask(option))
    return str(list(option.shape)) if isinstance(option, Tensor) else str(option)
