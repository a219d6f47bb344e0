#!/usr/bin/env python3
"""Everything that a GPU can tell about the CUDA kernels, in one go: under eight minutes.

    python benchmarks/gpu_report.py [--parts build tests ...] [--out benchmarks/results] [--minutes 8]

Needs a GPU, torch with CUDA, nvcc, cmake, ninja and pytest. Each part runs in a process of its own, so that one that
fails or dies leaves the others alone. Writes <date>-<GPU>.md and .json; the exit status is 1 where a part failed, and 2
where no GPU is here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
TURNS, TURN_SECONDS = 5, 0.01  # of a timed call: the best turn counts
BUSY = 0.5  # seconds in which nvidia-smi reads the clock
REPEATS = 20  # runs whose bits are compared
AGREED = 0.03  # the largest difference from torch's results, over their largest value, that is no mistake
LOG_LINES = 30  # of a part that failed

Found = dict[str, Any]  # "lines" of Markdown, and whatever else goes into the JSON file


class Failed(RuntimeError):
    """What a part found wrong, in words."""


def output(*command: str, **options: Any) -> str:
    """Of a command that succeeds; Failed with the end of what it said where it does not."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: exit status {done.returncode}\n{tail(done.stdout)}")
    return done.stdout


def tail(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_LINES:])


def tool(name: str) -> str:
    """A program of CUDA's."""
    places = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    if home := os.environ.get("CUDA_HOME"):
        places.append(f"{home}/bin")
    found = shutil.which(name, path=os.pathsep.join(places))
    if not found:
        raise Failed(f"no {name} on PATH, in CUDA_HOME or in /usr/local/cuda")
    return found


def smi(fields: str) -> list[str]:
    """What the driver says of this GPU, field by field."""
    device = f"--id={torch.cuda.current_device()}"
    return output("nvidia-smi", device, f"--query-gpu={fields}", "--format=csv,noheader").strip().split(", ")


# ---- parts ----------------------------------------------------------------------------------------------------------


def machine() -> Found:
    """What all else holds for."""
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    found = dict(zip(fields.split(","), smi(fields), strict=True))
    found["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    found["nvcc"] = re.search(r"release (\S+),", output(tool("nvcc"), "--version"))[1]
    return {"lines": [f"- {name}: {value}" for name, value in found.items()], **found}


def build() -> Found:
    """The libraries, into python/heedful; with the pybind11 headers that torch brings, where pybind11 is missing."""
    with tempfile.TemporaryDirectory() as directory:
        if subprocess.run([sys.executable, "-c", "import pybind11"], capture_output=True).returncode:
            stand_in_for_pybind11(Path(directory) / "pybind11")
        path = os.pathsep.join([directory, os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"HEEDFUL_CUDA": "on", "PYTHONPATH": path}
        output(sys.executable, "setup.py", "build_ext", "--inplace", cwd=ROOT, env=environment)
    built = sorted(path.name for path in (ROOT / "python/heedful").glob("*.so"))
    return {"lines": [", ".join(built)]}


def stand_in_for_pybind11(package: Path) -> None:
    package.mkdir()
    (package / "__init__.py").write_text("def get_cmake_dir():\n    return __path__[0]\n")
    include = Path(torch.__file__).parent / "include"
    (package / "pybind11Config.cmake").write_text(
        "macro(pybind11_add_module name type ignored)\n"
        "  Python_add_library(${name} ${type} WITH_SOABI ${ARGN})\n"
        f'  target_include_directories(${{name}} SYSTEM PRIVATE "{include}")\n'
        "endmacro()\n"
    )


def tests() -> Found:
    """The test suite's part on CUDA. None collected is a failure: pytest's exit status says so."""
    which = "test_cuda or test_on_gpu or ([cuda and not [cuda-emulated)"
    said = output(sys.executable, "-m", "pytest", "-q", "-k", which, cwd=ROOT)
    return {"lines": [said.splitlines()[-1]]}


def calls(small: bool) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """By name: forward and backward of shapes and options that take every kernel, with what they compute."""
    import heedful

    def case(B: int, Hq: int, Hk: int, Sq: int, Sk: int, D: int, dtype: torch.dtype, **options: Any) -> Callable:
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(heads: int, rows: int) -> Tensor:
            return torch.randn(B, heads, rows, D, generator=generator, device="cuda").to(dtype)

        leaves = [x.requires_grad_() for x in (normal(Hq, Sq), normal(Hk, Sk), normal(Hk, Sk))]
        gradient = normal(Hq, Sq)

        def run() -> list[Tensor]:
            out = heedful.attention(*leaves, **options)
            return [out, *torch.autograd.grad(out, leaves, gradient)]

        return run

    S = 150 if small else 2048
    causal, half = heedful.Causal(), torch.bfloat16
    for dtype in (torch.float16, torch.bfloat16):
        for D in (64, 128, 256):
            yield f"plain, {dtype}, head dim {D}", case(2, 4, 2, S, S, D, dtype, mask=causal)
            yield f"capped, {dtype}, head dim {D}", case(2, 4, 2, S, S, D, dtype, mask=causal, softcap=30.0)
            yield f"decoding, {dtype}, head dim {D}", case(2, 8, 2, 1, 4 * S, D, dtype)
    yield "dropout", case(2, 4, 4, S, S, 64, half, dropout_p=0.2, seed=1)
    bias = torch.randn(1, 4, S, S, device="cuda").to(half)
    yield "bias", case(2, 4, 4, S, S, 64, half, bias=bias)
    yield "cosine", case(1, 4, 4, S, S, 64, half, similarity="cosine", scale=10.0)
    yield "float32", case(1, 2, 2, min(S, 512), min(S, 512), 64, torch.float32, mask=causal)


def bits() -> Found:
    """The same bits in every run, while another stream keeps the GPU's multiprocessors busy in its own rhythm."""
    wrong, names, other = [], [], torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for name, run in calls(small=False):
        names.append(name)
        first = run()
        for n in range(REPEATS):
            with torch.cuda.stream(other):
                for _ in range(n % 4):
                    a @ a
            if not all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(first, run())):
                wrong.append(name)
                break
        torch.cuda.synchronize()
    if wrong:
        raise Failed(f"other bits in another run: {'; '.join(wrong)}")
    return {"lines": [f"{REPEATS} runs of each of {len(names)} calls, forward and backward, gave the same bits"]}


def small_calls() -> Found:
    """What the sanitizers watch."""
    for _, run in calls(small=True):
        assert all(x.isfinite().all() for x in run())
    return {"lines": []}


def sanitizer(name: str) -> Found:
    options = "--error-exitcode", "86", "--kernel-name", "kns=heedful", "--print-limit", "20"
    run = sys.executable, str(Path(__file__)), "--run", "small_calls"
    exact = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # allocations that end where their tensors do
    said = output(tool("compute-sanitizer"), "--tool", name, *options, *run, cwd=ROOT, env=exact)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", said)
    if not summaries:
        raise Failed(f"compute-sanitizer gave no summary\n{tail(said)}")
    return {"lines": summaries}


# ---- speed ----------------------------------------------------------------------------------------------------------


def seconds(every: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Of one call each, in turns, by the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")

    def turn(call: Callable[[], object], repeats: int) -> float:
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    repeats = {
        name: max(1, int(TURN_SECONDS / max(turn(call, 1), turn(call, 1), 1e-6))) for name, call in every.items()
    }
    turns = [{name: turn(call, repeats[name]) for name, call in every.items()} for _ in range(TURNS)]
    return {name: min(times[name] for times in turns) for name in every}


def peers(row: Any) -> dict[str, Callable[..., Tensor]]:
    """heedful, and what torch has, as functions of q, k and v."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    import heedful

    causal, grouped = row.form == "causal", row.Hq != row.Hk

    def of_backend(backend: SDPBackend) -> Callable[..., Tensor]:
        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

        return function

    def flex() -> Callable[..., Tensor]:
        torch._dynamo.reset()
        mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, row.Sq, row.Sk) if causal else None
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)

    mask = heedful.Causal() if causal else None
    return {
        "heedful": lambda q, k, v: heedful.attention(q, k, v, mask=mask),
        "cuDNN": of_backend(SDPBackend.CUDNN_ATTENTION),
        "FlashAttention": of_backend(SDPBackend.FLASH_ATTENTION),
        "efficient": of_backend(SDPBackend.EFFICIENT_ATTENTION),
        "FlexAttention": flex(),
    }


def speed_rows() -> list[Any]:
    from heedful.bench.rows import Row

    shapes = [
        *((1, 16, 16, 16384, 16384, D, form) for D in (128, 64) for form in ("full", "causal")),
        (1, 8, 8, 8192, 8192, 256, "causal"),
        (4, 16, 16, 4096, 4096, 128, "causal"),
        (2, 32, 8, 4096, 4096, 128, "causal"),
        (16, 16, 16, 512, 512, 64, "full"),
        *((8, 32, 8, 1, 16384, 128), (1, 32, 8, 1, 65536, 128), (1, 32, 1, 1, 65536, 128), (16, 16, 16, 1, 8192, 64)),
    ]
    return [Row("bfloat16", *shape) for shape in shapes]


def speed() -> Found:
    """TFLOP/s, or TB/s where one query decodes, of everybody; over the best of torch's."""
    from heedful.bench.report import Notes, table

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    limits = seconds({"copy": source.clone, "product": functools.partial(torch.mm, a, a)})
    copied, product = 2 * source.numel() / limits["copy"], 2 * 8192**3 / limits["product"]
    del source, a
    notes, measured, failures, body, head = Notes(), [], [], [], []
    for row in speed_rows():
        found = measure(row, failures)
        measured.append({"name": row.name, **found})
        for direction in row.directions:
            work = row.bytes(direction) if row.decodes else row.flops(direction)
            of = found[direction]
            head = ["", *of, "heedful / best of torch", "MHz"]
            cells = [f"{work / x / 1e12:.3g}" if isinstance(x, float) else notes.mark(x) for x in of.values()]
            others = [x for name, x in of.items() if name != "heedful" and isinstance(x, float)]
            ratio = f"{min(others) / of['heedful']:.2f}" if others and isinstance(of["heedful"], float) else "-"
            body.append([f"{row.name}, {direction}", *cells, ratio, found["clock"]])
    lines = [
        f"A copy moves {copied / 1e12:.2f} TB/s, a matrix product does {product / 1e12:.0f} TFLOP/s (bfloat16).",
        "",
    ]
    lines += [
        "TFLOP/s, and TB/s of q, k, v and out where one query decodes:",
        "",
        *table(head, body),
        "",
        *notes.lines(),
    ]
    return {"lines": lines, "copy": copied, "product": product, "rows": measured, "failures": failures}


def measure(row: Any, failures: list[str]) -> Found:
    """Seconds of everybody by direction, or why there are none; what is wrong with ours goes into `failures`."""
    leaves = [
        torch.randn(row.B, heads, rows, row.D, device="cuda", dtype=row.torch_dtype).requires_grad_()
        for heads, rows in ((row.Hq, row.Sq), (row.Hk, row.Sk), (row.Hk, row.Sk))
    ]
    functions, reasons, graphs, expected = peers(row), {}, {}, None
    gradient = torch.randn_like(leaves[0])
    with contextlib.suppress(Exception):
        expected = functions["FlashAttention"](*leaves).detach().float()
    for name, function in functions.items():
        try:
            with contextlib.nullcontext() if "backward" in row.directions else torch.no_grad():
                graphs[name] = function(*leaves)
            if "backward" in row.directions:
                torch.autograd.grad(graphs[name], leaves, gradient, retain_graph=True)
            error = 0 if expected is None else (graphs[name].float() - expected).abs().max() / expected.abs().max()
            if not error <= AGREED:
                raise Failed(f"its results are off by {error:.2g} of the largest")
        except Exception as error:
            graphs.pop(name, None)
            reasons[name] = f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[0][:160]}"
            if name == "heedful":
                failures.append(f"{row.name}: {reasons[name]}")
    found: Found = {"clock": ""}
    for direction in row.directions:

        def backward(name: str) -> object:
            return torch.autograd.grad(graphs[name], leaves, gradient, retain_graph=True)

        def forward(name: str) -> object:
            with torch.no_grad():
                return functions[name](*leaves)

        call = forward if direction == "forward" else backward
        times = seconds({name: lambda name=name, call=call: call(name) for name in graphs})
        found[direction] = {name: times.get(name, reasons.get(name)) for name in functions}
        found["clock"] = clock(functools.partial(call, "heedful"), times["heedful"]) if "heedful" in times else "-"
    return found


def clock(call: Callable[[], object], takes: float) -> str:
    """The multiprocessors' clock in MHz while the GPU is busy with the call."""
    for _ in range(int(BUSY / takes)):
        call()
    return smi("clocks.sm")[0].removesuffix(" MHz")


# ---- the report -----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], Found]] = {
    "machine": machine,
    "build": build,
    "tests": tests,
    "bits": bits,
    **{name: lambda name=name: sanitizer(name) for name in ("memcheck", "racecheck", "synccheck")},
    "speed": speed,
}


def run_apart(name: str, limit: float) -> Found:
    """A part's findings, from a process of its own that gets so many seconds; "failed" says what went wrong."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "found.json"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
        }
        command, start = [sys.executable, __file__, "--run", name, "--result", str(result)], time.monotonic()
        with open(Path(directory) / "log", "w+") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                failed = f"exit status {status}" if (status := process.wait(max(limit, 0.1))) else ""
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                failed = f"not done after {limit:.0f} s"
            log.seek(0)
            said = tail(log.read())
        found: Found = json.loads(result.read_text()) if result.exists() else {"lines": []}
    if failed or found.get("failures"):
        found["failed"] = "\n".join(filter(None, [failed, *found.get("failures", []), said]))
    return found | {"seconds": round(time.monotonic() - start, 1)}


def text(found: dict[str, Found]) -> str:
    """All parts, in Markdown."""
    failed = [name for name, part in found.items() if "failed" in part]
    lines = ["# GPU report", "", f"{time.strftime('%Y-%m-%d')}. FAILED: {', '.join(failed) or 'nothing'}.", ""]
    for name, part in found.items():
        lines += [f"## {name}: {'FAILED' if 'failed' in part else 'passed'}, {part['seconds']} s", ""]
        lines += [*part["lines"], ""] if part["lines"] else []
        lines += ["```", part["failed"], "```", ""] if "failed" in part else []
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--run", choices=[*PARTS, "small_calls"], help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"gpu_report: no GPU is here: torch {torch.__version__} finds none. Nothing was run.", file=sys.stderr)
        return 2
    if arguments.run:
        try:
            found = PARTS.get(arguments.run, small_calls)()
        except Failed as error:
            print(error)
            return 1
        if arguments.result:
            arguments.result.write_text(json.dumps(found))
        return 0
    end, found = time.monotonic() + 60 * arguments.minutes, {}
    for name in arguments.parts:
        found[name] = run_apart(name, end - time.monotonic())
        print(f"{name}: {'FAILED' if 'failed' in found[name] else 'passed'}, {found[name]['seconds']} s", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = arguments.out / f"{time.strftime('%Y-%m-%d')}-{gpu}.md"
    path.write_text(text(found))
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"Wrote {path} and {path.with_suffix('.json').name}")
    return int(any("failed" in part for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
