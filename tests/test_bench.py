"""`python -m heedful bench`: rows, agreement with float64, turns, workers, tables, JSON, pictures, and the sweep."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import heedful
from heedful import __main__ as program
from heedful import bench
from heedful.bench import agreement, measure, report, rows, sweep, timing, worker
from heedful.bench.peers import OURS, PEERS
from heedful.bench.peers.ours import Heedful
from heedful.bench.rows import Row

ROW = Row("float32", 2, 4, 2, 40, 40, 16, "causal")
NAMES = [OURS, "torch-flash", "torch-math"]
find_spec = importlib.util.find_spec


class InProcess:
    """A worker without a process; `spoiled` changes the results of some peers."""

    spoiled: dict[str, Callable[[Any], Any]] = {}

    def __init__(self, name: str, threads: int, frugal: bool = False) -> None:
        self.name, self.alive, self.servant = name, True, worker.Servant(name, threads, frugal)

    def ask(self, method: str, *arguments: Any) -> Any:
        try:
            found = getattr(self.servant, method)(*arguments)
        except Exception as error:
            raise worker.Failed(str(error)) from error
        if method == "results" and self.name in self.spoiled:
            found = {name: self.spoiled[self.name](x) for name, x in found.items()}
        return found

    def close(self) -> None:
        pass


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    monkeypatch.setattr(measure, "Worker", InProcess)
    monkeypatch.setattr(InProcess, "spoiled", {})
    monkeypatch.setattr(timing, "SIZE", 64)
    monkeypatch.setattr(timing, "READ_BYTES", 2**16)
    return InProcess


# ---- what is measured


@pytest.mark.parametrize(
    ("form", "lengths"),
    [(f, n) for f in rows.FORMS if f != "dropout" for n in ((40, 40), (24, 40)) if f != "varlen" or n == (40, 40)],
)
def test_float64_formulas_are_attention(form: str, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "WINDOW", 9)
    monkeypatch.setattr(agreement, "BLOCK", 16)
    row = Row("float32", 2, 4, 4 if "bias" in form else 2, *lengths, 16, form)
    inputs = row.draw()
    expected = agreement.exact(row, inputs, backward=True)
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    mask = heedful.Causal() if form == "causal" else inputs.allowed
    bias = None if inputs.bias is None else inputs.bias.double().requires_grad_()
    out = heedful.reference.attention(*leaves, mask=mask, bias=bias)
    torch.testing.assert_close(expected["out"], out)
    if form == "bias-gradient":
        leaves.append(bias)
    for name, gradient in zip(("dq", "dk", "dv", "dbias"), torch.autograd.grad(out, leaves, inputs.gradient.double())):
        torch.testing.assert_close(expected.pop(name), gradient)
    assert list(expected) == ["out"]


@pytest.mark.parametrize("dtype", list(rows.SHORT))
@pytest.mark.parametrize("form", [form for form in rows.FORMS if form != "dropout"])
def test_heedful_agrees_in_every_form(form: str, dtype: str) -> None:
    row = Row(dtype, 2, 4, 4, 70, 70, 24, form)
    inputs = row.draw()
    call = Heedful(1).prepare(row, inputs)
    call.record()
    results = call.results("forward") | call.results("backward")
    expected = agreement.exact(row, inputs, backward=True)
    assert list(results) == list(expected)
    share, wrong = agreement.apart(row, inputs, results, expected)
    assert wrong == "" and 0 < share < 1


def test_inputs_are_the_same_bits_wherever_they_are_drawn() -> None:
    first = ROW.draw()
    torch.manual_seed(1)
    torch.randn(3)
    assert torch.equal(first.q, ROW.draw().q)
    assert not torch.equal(first.q, first.gradient)


@pytest.mark.parametrize(("longest", "size"), [(0.0, 32), (float("inf"), 64)])
def test_products_that_would_take_long_are_smaller(longest: float, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SIZE": 64, "SMALLEST": 32, "LONGEST": longest}.items():
        monkeypatch.setattr(timing, name, value)
    call, operations = timing.product(torch.float16)
    assert call().shape == (size, size) and operations == 2 * size**3


def test_operations_and_bytes() -> None:
    full = Row("float32", 2, 4, 2, 8, 16, 32)
    assert full.flops("forward") == 4 * 2 * 4 * 8 * 16 * 32
    assert full.flops("backward") == 2.5 * full.flops("forward")
    assert Row("float32", 2, 4, 2, 8, 16, 32, "causal").flops("forward") == full.flops("forward") / 2
    assert full.bytes("forward") == 4 * 2 * (2 * 4 * 8 + 2 * 2 * 16) * 32
    assert Row("float16", 2, 4, 2, 8, 16, 32).bytes("backward") == full.bytes("forward")
    assert Row("float32", 1, 1, 1, 4, 1024, 8, "window").flops("forward") == 4 * 4 * rows.WINDOW * 8
    ragged = Row("float32", 2, 1, 1, 16, 16, 8, "varlen")
    assert ragged.lengths.tolist() == [8, 16]
    assert ragged.flops("forward") == 4 * (8 * 8 + 16 * 16) * 8


def test_rows_are_many_and_none_twice() -> None:
    for some, least in ((rows.rows(), 50), (rows.quick_rows(), 8), (sweep.cells(), 500)):
        assert len(some) >= least
        assert len({row.name for row in some}) == len(some)
    for form in rows.FORMS:
        assert {row.dtype for row in sweep.cells() if row.form == form} == set(rows.SHORT)


# ---- agreement


def test_differences() -> None:
    a = torch.tensor([1.0, -4.0])
    assert agreement.difference(a, a) == 0
    assert agreement.difference(a + 0.5, a) == pytest.approx(0.125)
    assert agreement.difference(a + 0.5, a, least=8.0) == pytest.approx(0.0625)
    assert agreement.difference(a[:1], a) == math.inf
    assert agreement.difference(a * math.nan, a) == math.inf
    assert agreement.difference(torch.zeros(2), torch.zeros(2)) == 0


def test_errors_over_the_bound_are_said() -> None:
    inputs = ROW.draw()
    expected = agreement.exact(ROW, inputs, backward=True)
    share, wrong = agreement.apart(ROW, inputs, {"out": expected["out"] * (1 + 2e-5)}, expected)
    assert share == pytest.approx(2, rel=0.01)
    assert re.fullmatch(r"out is off by 2\.0e-05 of the largest value, allowed 1e-05", wrong)
    assert agreement.apart(ROW, inputs, {"dk": expected["dk"] * (1 + 5e-6)}, expected)[1] == ""
    half = Row("bfloat16", *list(vars(ROW).values())[1:])
    assert agreement.apart(half, inputs, {"dk": expected["dk"] * 1.01}, expected)[1] == ""


# ---- time


def test_turns_take_the_best_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(name: str, *durations: float) -> Callable[[], None]:
        left = list(durations)

        def run() -> None:
            calls.append(name)
            clock[0] += left.pop(0)

        return run

    assert timing.in_turns(2, call("a", 1, 5, 4), call("b", 1, 2, 3), burst=0) == [4, 2]
    assert calls == ["a", "b"] * 3
    assert timing.in_turns(9, call("a", 5, 3, 9), call("b", 5, 2, 9), burst=0, budget=11) == [3, 2]
    assert timing.in_turns(9, call("a", 5), call("b", 6), burst=0, budget=11) == [5, 6]
    assert timing.least(call("a", 3, 2, 4), burst=6) == 2  # one after the other until the burst is over


def test_others_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, busy, own = [10.0], [100.0], [7.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "_busy", lambda: busy[0])
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    others = timing.Others(lambda: own[0])
    clock[0], busy[0], own[0] = 20.0, 112.0, 17.0
    assert others.share() == 0.1


# ---- workers


def test_a_process_for_each_peer() -> None:
    """Their results are those of this process; a row that cannot run says why; a dead one is replaced."""
    wrong_heads = Row("float32", 1, 3, 2, 8, 8, 8)
    with measure.Bench([OURS, "torch-math"], 1, 1) as running:
        ours, math_peer = running.workers.values()
        assert ours.process.pid != math_peer.process.pid
        ours.ask("prepare", ROW)
        found = torch.from_numpy(ours.ask("results", "forward")["out"])
        inputs = ROW.draw()
        assert torch.equal(found, heedful.attention(inputs.q, inputs.k, inputs.v, mask=heedful.Causal()))
        with pytest.raises(worker.Failed, match="expected heads that divide"):
            ours.ask("prepare", wrong_heads)
        ours.process.kill()
        with pytest.raises(worker.Failed, match="its process died, exit code -9"):
            ours.ask("prepare", ROW)
        entry = running.row(ROW)["forward"]["peers"]
        assert set(entry) == {OURS, "torch-math"} and all(e["seconds"] > 0 for e in entry.values())
        assert running.workers[OURS] is not ours


def test_memory_grows_with_the_tokens_and_torchs_math_with_their_square() -> None:
    lengths, heads = (512, 1024), 16
    with measure.Bench([OURS, "torch-math"], 1, 1, frugal=True) as running:
        found = [running.memory(Row("float32", 1, heads, heads, s, s, 64, "causal")) for s in lengths]
    for direction in ("forward", "backward"):
        ours, theirs = ([row[direction][name]["bytes"] for row in found] for name in (OURS, "torch-math"))
        out, scores = heads * 1024 * 64 * 4, heads * 1024 * 1024 * 4
        assert ours[1] > 0.9 * out * (1 if direction == "forward" else 4)  # out, and three gradients
        assert ours[1] < 2.5 * ours[0]
        assert theirs[1] > 3.5 * theirs[0]
        assert theirs[1] > scores


# ---- what comes of it


def bench_main(tmp_path: Path, *arguments: str) -> int:
    return program.main(["bench", "--quick", "--threads", "1", "--out", str(tmp_path / "out"), *arguments])


def without(*packages: str) -> Callable[[str], Any]:
    return lambda name: None if name in packages else find_spec(name)


def test_quick_bench(in_process: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None) -> None:
    assert bench_main(tmp_path, "--peers", "torch-flash,torch-math", "--rows", "f32") == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert set(found) == {"machine", "peers", "repeats", "rows", "memory"}
    assert set(found["machine"]) == {"date", "cpu", "threads", "kernel", "versions"}
    assert found["machine"]["threads"] == 1 and found["peers"] == NAMES
    chosen = [row for row in rows.quick_rows() if "f32" in row.name]
    assert [row["name"] for row in found["rows"]] == [row.name for row in chosen]
    for row, entry in zip(chosen, found["rows"]):
        assert ("backward" in entry) == (not row.decodes)
        assert row.name in printed
        for direction in row.directions:
            measured = entry[direction]
            assert set(measured) == {"flops", "bytes", "peers", "limit", "turns", "others"}
            assert measured["limit"]["by"] in ("products", "reads") and measured["turns"] == bench.QUICK_REPEATS
            assert set(measured["peers"]) == set(NAMES)
            for peer in measured["peers"].values():
                if "reason" not in peer:
                    assert 0 < peer["error"] < 1
                    assert peer["gflops"] == pytest.approx(row.flops(direction) / peer["seconds"] / 1e9)
                    assert peer["share"] == pytest.approx(measured["limit"]["seconds"] / peer["seconds"])
    assert "torch-flash: torch's backend FLASH_ATTENTION does not take the form bias-gradient" in printed
    assert re.search(r"Geometric means, forward: torch-flash [\d.]+ \(\d of 5 below 1\)", printed)
    assert (tmp_path / "out" / "bench.md").read_text().strip() in printed


def test_pictures(in_process: Any, tmp_path: Path, threads: None) -> None:
    pytest.importorskip("matplotlib")
    assert bench_main(tmp_path, "--peers", "torch-math", "--rows", "f32 causal") == 0
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["share_of_the_limit.png", "speed_backward.png", "speed_forward.png"]
    from heedful.bench.pictures import curves

    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    ((title, group),) = curves(found["rows"], "forward").items()
    assert title == "causal, f32, B 1, 8 heads, D 64" and [row["Sk"] for row in group] == [128, 256, 512]


@pytest.mark.parametrize("spoil", [lambda x: 1.001 * x, lambda x: x[..., :1], lambda x: x * math.nan])
@pytest.mark.parametrize("name", [OURS, "torch-math"])
def test_wrong_results_fail_loudly(
    name: str,
    spoil: Callable[[Any], Any],
    in_process: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    threads: None,
) -> None:
    monkeypatch.setitem(in_process.spoiled, name, spoil)
    assert bench_main(tmp_path, "--peers", "torch-flash,torch-math", "--rows", "f32 causal B1 H8 S128") == 1
    printed = capsys.readouterr()
    for direction, tensor in (("forward", "out"), ("backward", "dq")):
        start = f"FAILED  f32 causal B1 H8 S128 D64, {direction}, {name}: its results are wrong: {tensor} is off by "
        assert start in printed.err
    assert f"{name}: its results are wrong: out is off by" in printed.out
    peers = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"][0]["forward"]["peers"]
    assert peers[name]["wrong"] and "seconds" not in peers[name]
    assert all("seconds" in peers[other] for other in NAMES if other != name)


def test_a_missing_peer_is_named_with_what_to_install(
    in_process: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    threads: None,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", without("jax", "onnx", "onnxruntime", "rich", "matplotlib"))
    assert bench_main(tmp_path, "--peers", "jax,ort-mha,torch-math", "--rows", "f32 causal B1 H8 S128") == 0
    printed = capsys.readouterr().out
    assert "jax is not installed: pip install jax; all peers: pip install 'heedful[bench]'" in printed
    assert "jax: not installed: pip install jax" in printed
    assert "ort-mha: not installed: pip install onnxruntime onnx" in printed
    assert "The pictures need matplotlib: pip install 'heedful[bench]'" in printed
    peers = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"][0]["forward"]["peers"]
    assert peers["jax"] == {"reason": "not installed: pip install jax"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "torch-math,xformers"], "--peers: expected some of heedful, torch-flash"),
        (["--rows", "f32 sideways"], "--rows: expected part of a name such as 'f32 causal"),
        (["--sweep", "--rows", "f32 sideways"], "got 'f32 sideways'"),
    ],
)
def test_unknown_peers_and_rows(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    assert bench_main(tmp_path, *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_row_begins_when_time_is_over(
    in_process: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    options = ["--peers", "torch-flash", "--rows", "f32 causal B1 H8 S128,bf16 causal", "--minutes", "0"]
    assert bench_main(tmp_path, *options) == 0
    assert "1 of 2 rows were left out: 0 minutes were over." in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["f32 causal B1 H8 S128 D64"]


def test_peers_that_are_installed_agree(in_process: Any, threads: None) -> None:
    """Those with a package of their own, on a row that each of them runs."""
    names = [n for n, entry in PEERS.items() if n == OURS or (not entry.missing and entry.packages[0] != "torch")]
    if names == [OURS]:
        pytest.skip("no peer is installed: pip install 'heedful[bench]'")
    with measure.Bench(names, 1, 1) as running:
        peers = running.row(Row("float32", 2, 4, 4, 64, 64, 32, "causal"))["forward"]["peers"]
    assert {name: entry.get("reason") for name, entry in peers.items()} == dict.fromkeys(names)


# ---- the table


def entry(seconds: float, **more: Any) -> dict[str, Any]:
    return {"seconds": seconds, "gflops": 1 / seconds, "share": 0.5 / seconds, "error": 0.1} | more


def found_rows(*rates: float, others: float = 0.0) -> list[dict]:
    peers = {OURS: entry(1.0), "torch-flash": entry(2.0), "torch-math": {"reason": "too old"}}
    limit = {"seconds": 0.5, "by": "products", "reads": 10.0}
    forward = {"flops": 1e9, "bytes": 1e6, "peers": peers, "turns": 2, "others": others}
    return [{"name": ROW.name, **vars(ROW), "forward": forward | {"limit": limit | {"products": r}}} for r in rates]


def test_table() -> None:
    found = {"machine": report.machine(2), "peers": NAMES, "rows": found_rows(90, 91), "memory": []}
    text = report.text(found)
    line = next(line for line in text.splitlines() if line.startswith(f"| {ROW.name}"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [ROW.name, "1000.000", "1.0", "0.50", "2.00", "[1]"]
    assert "[1] torch-math: too old" in text
    assert "Geometric means, forward: torch-flash 2.00 (0 of 2 below 1)." in text
    assert "NOTE" not in text and report.failures(found) == []


def test_an_unquiet_machine_is_said() -> None:
    moved = report.warnings({"rows": found_rows(100, 80)})
    assert moved[1:] == ["NOTE: the rate of the matrix product moved by 20% in float32: the machine was not steady"]
    shared = report.warnings({"rows": found_rows(90, 90, others=0.2)})
    assert shared[1:] == ["NOTE: others took over 5% of the processors in 2 of 2 measurements"]


# ---- the sweep


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None) -> None:
    part = "f32 causal B1 H12 S16 D64"
    assert bench_main(tmp_path, "--sweep", "--rows", part) == 0
    path = tmp_path / "out" / "sweep.json"
    (cell,) = json.loads(path.read_text())["cells"]
    assert cell["name"] == part and all(0 < seconds < 1 for seconds in cell["forward"] + cell["backward"])
    assert re.search(r"\d of 2 are slower than torch:", capsys.readouterr().out)
    before = path.read_text()
    assert bench_main(tmp_path, "--sweep", "--rows", part) == 0  # it is there already
    assert path.read_text() == before
    assert bench_main(tmp_path, "--sweep", "--rows", "f32 causal B1 H12 S", "--minutes", "0") == 0
    assert "cells are left: the same command goes on with them" in capsys.readouterr().out
    assert path.read_text() == before


def test_sweep_report() -> None:
    def cell(name: str, form: str, forward: list[float], **more: Any) -> dict[str, Any]:
        return {"name": name, "form": form, "dtype": "float32", "forward": forward, "others, forward": 0.0} | more

    cells = [
        cell("a", "full", [0.002, 0.001]),
        cell("b", "full", [0.001, 0.008]),
        cell("c", "causal", [0.010, 0.009]),
        {"name": "d", "form": "full", "dtype": "float32", "wrong": "forward: out is off"},
    ]
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in sweep.report(cells).splitlines() if "|" in line]
    assert lines[2:4] == [["a", "forward", "2.000", "1.000", "0.50"], ["c", "forward", "10.000", "9.000", "0.90"]]
    assert lines[-2:] == [
        ["causal", "float32", "forward", "1", "1", "0.90", "0.90", "c"],
        ["full", "float32", "forward", "2", "1", "2.00", "0.50", "a"],
    ]
    assert sweep.report(cells).startswith("WRONG  d, forward: out is off\n2 of 3 are slower than torch:")


def test_sweep_tells_wrong_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    right = heedful.scaled_dot_product_attention
    monkeypatch.setattr(heedful, "scaled_dot_product_attention", lambda *x, **options: 1.01 * right(*x, **options))
    assert bench_main(tmp_path, "--sweep", "--rows", "f32 causal B1 H12 S16 D64") == 1
    printed = capsys.readouterr()
    assert "FAILED  f32 causal B1 H12 S16 D64, forward: out is off by 1.0e-02" in printed.err
    assert "WRONG  f32 causal B1 H12 S16 D64" in printed.out
