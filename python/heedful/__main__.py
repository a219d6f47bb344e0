"""The program: `python -m heedful`, `python -m heedful demo` and `python -m heedful bench`."""

from __future__ import annotations

import argparse
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import heedful
from heedful import _info, ops, selfcheck
from heedful.explain import Explanation

FAILED, CANNOT_RUN = 1, 2
LINE = 88  # columns, past the first ten
CHECK = """\
Self-check against torch, results and gradients; where torch has no such option, against its plain
operations (heedful.reference). Allowed is twice the error of torch in the same dtype, plus a
rounding; both errors are taken against float64. Below 1.00 is good."""
PROGRAM = """\
Attention operators for PyTorch. Without a command: says what was built and what runs on this
machine, and checks every operator against torch's; a few seconds."""
DEMO = """\
The self-check; then a character-level GPT made of torch's own layers learns the documentation of
the Python language, twice from one seed: as torch has it, and after heedful.swap(model). Compares
the loss curves and the speed, prints a sample, draws the curves and the attention maps. Under
three minutes on two cores; nothing is downloaded. Needs: pip install 'heedful[demo]'"""
BENCH = """\
heedful beside torch (flash, math), compiled FlexAttention, ONNX Runtime, OpenVINO and jax, each
where it is installed: pip install 'heedful[bench]'. Every peer runs in a process of its own, on
the same inputs, and is compared with float64 before it is timed; they take turns, call by call.
Writes tables, JSON and pictures. With --sweep: some hundred shapes beside torch's own choice in
one process, and where heedful is the slower one. Use a quiet machine."""
STATUS = "exit status: 0; 1 where a check fails or the loss curves part; 2 where the program cannot run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 0, 1 where a check fails, 2 where it cannot run."""
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.command == "demo":
        return _demo(options)
    if options.command == "bench":
        return _bench(options)
    return _end(_about_and_check())


def _demo(options: argparse.Namespace) -> int:
    from heedful import demo

    try:
        demo.require()
    except demo.CannotRun as error:
        print(error, file=sys.stderr)
        return CANNOT_RUN
    start = time.perf_counter()
    failures = _about_and_check()
    print()
    failures += demo.run(demo.Settings(options.out, options.steps, options.seed, options.characters))
    print(f"The demo took {time.perf_counter() - start:.0f} seconds.")
    return _end(failures)


def _bench(options: argparse.Namespace) -> int:
    from heedful import bench

    settings = bench.Settings(
        out=options.out,
        threads=options.threads or torch.get_num_threads(),
        repeats=options.repeats,
        quick=options.quick,
        peers=tuple(options.peers.split(",")) if options.peers else tuple(bench.PEERS),
        rows=options.rows,
        minutes=options.minutes,
    )
    try:
        return _end(bench.run_sweep(settings) if options.sweep else bench.run(settings))
    except bench.CannotRun as error:
        print(error, file=sys.stderr)
        return CANNOT_RUN


def _about_and_check() -> list[str]:
    """Prints what was built, what runs here and the self-check; returns what failed, in words."""
    print(about())
    print(f"\n{CHECK}\n", flush=True)
    start = time.perf_counter()
    table = selfcheck.Table(selfcheck.run())
    print(f"{table}\n{time.perf_counter() - start:.1f} seconds")
    return [str(result) for result in table.failures]


def _end(failures: list[str]) -> int:
    for failure in failures:
        print(f"FAILED  {failure}", file=sys.stderr)
    return FAILED if failures else 0


def about() -> str:
    """What was built, and what of it runs on this machine, for each dtype."""
    built = _info.build_info()
    calls = {str(dtype).removeprefix("torch."): _explained(dtype) for dtype in selfcheck.DTYPES}
    reasons = dict.fromkeys(reason for call in calls.values() for reason in call.reasons)
    on_gpus = f"kernels for GPUs: {ops.no_gpu() or 'loaded; so far run under emulation only. Checked below: the CPU'}"
    rows = {
        "built": [
            f"heedful {built['version']} by {built['compiler']}, for torch {built['torch_target']} and newer",
            f"instruction sets: {', '.join(built['isas'])}",
            on_gpus,
        ],
        "machine": [
            f"{platform.machine()}, best instruction set of these: {_info.cpu_capability()}",
            f"torch {torch.__version__}, Python {platform.python_version()}, threads: {torch.get_num_threads()}",
        ],
        "runs": [f"{name:<10}{call.kernel or 'nothing'}" for name, call in calls.items()],
        "not used": list(reasons),
    }
    rows = {title: [part for line in lines for part in textwrap.wrap(line, LINE)] for title, lines in rows.items()}
    return "\n".join(f"{'' if i else title:<10}{line}" for title, lines in rows.items() for i, line in enumerate(lines))


def _explained(dtype: torch.dtype) -> Explanation:
    q = torch.empty(1, 4, 256, 64, dtype=dtype)
    return heedful.explain(q, q, q, mask=heedful.Causal())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m heedful", description=PROGRAM)
    parser.add_argument("--version", action="version", version=f"heedful {heedful.__version__}")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads that torch uses (default: its choice)")
    commands = parser.add_subparsers(dest="command", title="commands")
    demo = commands.add_parser("demo", help="train a small GPT with both attentions and compare them", description=DEMO)
    out, shown = Path("heedful-demo"), "(default: %(default)s)"
    demo.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"where the pictures go {shown}")
    demo.add_argument("--steps", type=_positive, default=500, metavar="N", help=f"of each training {shown}")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help=f"of model, batches and sample {shown}")
    demo.add_argument("--characters", type=_positive, default=500, metavar="N", help=f"of the sample {shown}")
    bench = commands.add_parser("bench", help="speed and memory beside other libraries", description=BENCH)
    out = Path("heedful-bench")
    bench.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"where results go {shown}")
    bench.add_argument("--repeats", type=_positive, metavar="N", help="turns, of which the best counts")
    bench.add_argument("--quick", action="store_true", help="a few small rows and two turns: does it run?")
    bench.add_argument("--peers", metavar="A,B", help="those to compare with (default: all)")
    bench.add_argument(
        "--rows", default="", metavar="A,B", help='rows whose names hold one of these, such as "bf16 causal"'
    )
    bench.add_argument("--sweep", action="store_true", help="the sweep beside torch; goes on where it stopped")
    bench.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="begin no row after these")
    for command in (demo, bench):  # left out, it must not overwrite what was given before the command
        threads = command.add_argument("--threads", type=_positive, default=argparse.SUPPRESS, metavar="N")
        threads.help = "as above"
    parser.epilog = f"{demo.format_help()}\n{bench.format_help()}\n{STATUS}"
    return parser


class _Parser(argparse.ArgumentParser):
    """Shows descriptions line by line, as they are written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
