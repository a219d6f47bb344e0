"""benchmarks/gpu_report.py, as far as it goes without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_report.py"


@pytest.fixture
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(*arguments: str) -> subprocess.CompletedProcess:
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)


def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = script("--out", str(tmp_path / "results"))
    assert done.returncode == 2 and "no GPU is here" in done.stderr and torch.__version__ in done.stderr
    assert not (tmp_path / "results").exists()


def test_names_the_parts_that_there_are() -> None:
    done = script("--parts", "nonsense")
    assert done.returncode == 2 and "nonsense" in done.stderr and "'racecheck'" in done.stderr


def test_tells_what_failed(report: ModuleType) -> None:
    text = report.text(
        {
            "build": {"lines": ["libheedful.so"], "seconds": 1.5},
            "bits": {"lines": [], "seconds": 2.0, "failed": "other bits"},
        }
    )
    assert "FAILED: bits." in text and "## build: passed, 1.5 s\n\nlibheedful.so" in text
    assert "## bits: FAILED, 2.0 s\n\n```\nother bits\n```" in text


def test_a_part_that_dies_or_hangs_has_failed(report: ModuleType, tmp_path: Path, monkeypatch) -> None:
    for code, limit, expected in (
        ("import os; print('so far'); os.abort()", 60, "so far"),
        ("import time; time.sleep(60)", 1, "not done after 1 s"),
    ):
        part = tmp_path / "part.py"
        part.write_text(code)
        monkeypatch.setattr(report, "__file__", str(part))
        start = time.monotonic()
        found = report.run_apart("bits", limit)
        assert expected in found["failed"] and time.monotonic() - start < 50


def test_a_command_that_fails_says_how(report: ModuleType) -> None:
    with pytest.raises(report.Failed, match="exit status 3\nwhy"):
        report.output(sys.executable, "-c", "print('why'); raise SystemExit(3)")


def test_the_suite_on_cuda_is_found(report: ModuleType, monkeypatch) -> None:
    """By the backend's name in the tests' names, and no other backend's."""
    commands = []
    monkeypatch.setattr(report, "output", lambda *command, **options: commands.append(command) or "last line")
    report.tests()
    (command,) = commands
    tests = SCRIPT.parent.parent / "tests"
    files = [tests / f"test_{name}.py" for name in ("forward", "cuda", "on_gpu")]
    selected = subprocess.run(
        [*command, "--collect-only", "-p", "no:cacheprovider", *files],
        capture_output=True, text=True, check=True, cwd=tests,
    ).stdout  # fmt: skip
    names = [line for line in selected.splitlines() if "::" in line]
    expected = ("test_cuda.py", "test_on_gpu.py", "[cuda]", "[cuda-")
    assert all(any(part in name for name in names) for part in expected)
    assert all(any(part in name for part in expected) for name in names)
    assert not any("emulated" in name or "cpu-" in name for name in names)


def test_speed_table(report: ModuleType, monkeypatch) -> None:
    """Rates, ratios to the best of torch's and reasons, from times."""
    from heedful.bench.rows import Row

    rows = [Row("bfloat16", 1, 2, 2, 1000, 1000, 64), Row("bfloat16", 1, 2, 1, 1, 1000, 64)]
    times = {"heedful": 1e-3, "cuDNN": 2e-3, "FlashAttention": 5e-4, "efficient": "efficient: takes no groups"}
    monkeypatch.setattr(report, "speed_rows", lambda: rows)
    monkeypatch.setattr(report, "seconds", lambda every: dict.fromkeys(every, 1.0))
    monkeypatch.setattr(
        report, "measure", lambda row, failures: {"clock": "1980"} | {direction: times for direction in row.directions}
    )
    anything = SimpleNamespace(clone=None, numel=lambda: 2**30)
    monkeypatch.setattr(report.torch, "empty", lambda *a, **k: anything)
    monkeypatch.setattr(report.torch, "randn", lambda *a, **k: anything)
    lines = report.speed()["lines"]
    full, backward, decoding = (
        next(line for line in lines if what in line) for what in (", forward", "backward", "/1000")
    )
    assert [cell.strip() for cell in full.split("|")[2:-1]] == ["0.512", "0.256", "1.02", "[1]", "0.50", "1980"]
    assert [cell.strip() for cell in backward.split("|")[2:4]] == ["1.28", "0.64"]
    assert "0.000257" in decoding and "[1] efficient: takes no groups  " in lines
