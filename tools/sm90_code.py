"""Compiles the wrappers of sm_90a's instructions (csrc/cuda/sm90/check.cu) and reads the machine code: every one is
there, nothing is spilled, and the compiler has nothing to say, such as that it made wgmma wait.

python tools/sm90_code.py
Needs nvcc and cuobjdump, as tools/cuda_kernels.py does.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from cuda_kernels import LOCAL_MEMORY, ROOT, lines_of, tool

SOURCE = ROOT / "csrc" / "cuda" / "sm90" / "check.cu"
COLUMNS = (*range(8, 49, 8), *range(64, 129, 16), *range(144, 193, 16), 224, 256)
EXPECTED = {
    "SYNCS.EXCH": "init_mbarrier",
    "MEMBAR.ALL.CTA": "fence_mbarrier_init",
    "SYNCS.ARRIVE.TRANS64.A1T0": "arrive",
    "SYNCS.ARRIVE.TRANS64 ": "arrive_expecting",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT": "try_wait",
    "FENCE.VIEW.ASYNC.S": "fence_async_shared",
    "FENCE.VIEW.ASYNC.G": "fence_async_global",
    "UTMACCTL.PF": "prefetch",
    **{f"UTMALDG.{n}D": f"load_tile of {n} dimensions" for n in (2, 3, 4)},
    **{f"UTMASTG.{n}D": f"store_tile of {n} dimensions" for n in (2, 3, 4)},
    **{f"UTMAREDG.{n}D.ADD": f"add_tile of {n} dimensions" for n in (2, 3, 4)},
    "UBLKCP.S.G": "load_bulk",
    "UBLKRED.G.S.ADD.F32": "add_bulk",
    "UTMACMDFLUSH": "commit_stores",
    "DEPBAR": "wait_stores",
    "BAR.SYNC": "sync_named",
    "BAR.ARV": "arrive_named",
    "USETMAXREG.DEALLOC": "lower_registers",
    "USETMAXREG.TRY_ALLOC": "raise_registers",
    "STSM.16.M88.4": "stmatrix",
    "STSM.16.MT88.4": "stmatrix_transposed",
    "WARPGROUP.ARRIVE": "fence_wgmma",
    "WARPGROUP.DEPBAR": "wait_wgmma",
    **{f"HGMMA.64x{n}x16.F32 ": f"wgmma of {n} columns in float16" for n in COLUMNS},
    **{f"HGMMA.64x{n}x16.F32.BF16 ": f"wgmma of {n} columns in bfloat16" for n in COLUMNS},
}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        cubin = str(Path(directory, "check.cubin"))
        command = [
            tool("nvcc"),
            "-std=c++20",
            "-O3",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-cubin",
            "-o",
            cubin,
            SOURCE,
        ]
        compiled = subprocess.run(command, capture_output=True, text=True)
        if said := compiled.stdout + compiled.stderr:
            sys.exit(said)
        usage = "".join(lines_of(tool("cuobjdump"), "--dump-resource-usage", cubin))
        operations: Counter[str] = Counter()
        for line in lines_of(tool("cuobjdump"), "-sass", cubin):
            if match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S* )", line):
                operations[match[1]] += 1
    faults = [f"no {op.strip()}: {of}" for op, of in EXPECTED.items() if not any(o.startswith(op) for o in operations)]
    faults += [f"local memory is touched by {op}" for op in operations if op.startswith(LOCAL_MEMORY)]
    if kernels := re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", usage):
        faults += ["a kernel has a stack" for stack, local in kernels if int(stack) or int(local)]
    else:
        faults.append("no kernels")
    if faults:
        sys.exit("\n".join(faults))
    products = sum(count for op, count in operations.items() if op.startswith("HGMMA"))
    print(f"{len(kernels)} kernels for sm_90a: {len(EXPECTED)} instructions, {products} HGMMA, no spills, no remarks")


if __name__ == "__main__":
    main()
