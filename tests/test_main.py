"""The program: what it prints and writes, and that it fails where something is wrong."""

from __future__ import annotations

import copy
import importlib.util
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import heedful
from heedful import __main__ as program
from heedful import demo, ops, selfcheck
from heedful.demo import model, text, train

needs_extra = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("matplotlib", "rich")), reason="needs heedful[demo]"
)


def run_program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "heedful", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)


# ---- the program


def test_alone_it_checks_itself(tmp_path: Path) -> None:
    done = run_program("--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for word in ("built", "machine", "runs", *("float32", "float64", "bfloat16", "float16"), "gradcheck", "threads: 1"):
        assert word in done.stdout
    assert "FAILED" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert list(tmp_path.iterdir()) == []


def test_why_no_gpu_is_told_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 columns, whatever the reason."""
    reason = "not loaded: " + " ".join(["reason"] * 40)
    monkeypatch.setattr(ops, "NO_CUDA", reason)
    lines = program.about().splitlines()
    assert max(map(len, lines)) <= 100 and reason in " ".join(" ".join(lines).split())


def test_why_kernels_are_not_used_is_told_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise, where a machine lacks a lot."""
    reason = "cpu/kernel: this machine lacks " + " ".join(["feature"] * 40)
    monkeypatch.setattr(program, "_explained", lambda dtype: types.SimpleNamespace(kernel="cpu/avx2", reasons=[reason]))
    lines = program.about().splitlines()
    assert max(map(len, lines)) <= 100 and reason in " ".join(" ".join(lines).split())


def test_help_says_all(tmp_path: Path) -> None:
    done = run_program("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("demo", "--out", "--steps", "--seed", "--characters", "--threads", "--version", "exit status"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        program.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"heedful {heedful.__version__}\n"


@pytest.mark.parametrize("arguments", [["demo", "--steps", "0"], ["--threads", "-1"], ["walk"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        program.main(arguments)
    assert exit.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@needs_extra
def test_demo(tmp_path: Path) -> None:
    done = run_program("demo", "--steps", "3", "--characters", "20", "--threads", "1", "--out", "tmp", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("Error", "Warning", "FAILED"):
        assert word not in done.stderr
    for word in ("gradcheck", "3/3", "tokens/s", "Largest difference in the first 3 steps", "A sample", "Wrote"):
        assert word in done.stdout
    pictures = sorted(path.name for path in (tmp_path / "tmp").iterdir())
    assert pictures == ["attention_maps.png", "loss_curves.png"]
    for name in pictures:
        assert (tmp_path / "tmp" / name).read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("lacking", "advice"), [("rich", "pip install 'heedful[demo]'"), ("pydoc_data", "standard library")]
)
def test_demo_names_what_it_lacks(
    lacking: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lacking else object())
    assert program.main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert lacking in (error := capsys.readouterr().err)
    assert advice in error
    assert not (tmp_path / "out").exists()


# ---- a planted failure is found, reported, and gives status 1


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return 1.01 * gradient


def wrong_value(q, k, v, **options):
    return attention(1.01 * q, k, v, **options)


def wrong_gradient(q, k, v, **options):
    return attention(q, WrongGradient.apply(k), v, **options)


def ignores_masks(q, k, v, mask=None, **options):
    return attention(q, k, v, **options)


def ignores(option: str):
    return lambda q, k, v, **options: attention(q, k, v, **{n: x for n, x in options.items() if n != option})


def not_a_number(q, k, v, **options):
    return attention(q, k, v * math.nan, **options)


def raises(q, k, v, **options):
    raise RuntimeError("planted")


attention = heedful.attention


def test_every_check_passes_in_every_dtype() -> None:
    results = selfcheck.run()
    assert [str(r) for r in results if not r.ok] == []
    names = {check.name for check in selfcheck.checks()}
    for dtype in selfcheck.DTYPES:
        assert {r.name for r in results if r.dtype is dtype and r.tensor != selfcheck.GRADCHECK} == names
    assert {r.name for r in results if r.tensor == selfcheck.GRADCHECK} == names
    assert {"out", "dq", "dk", "dv", "dbias", "dx", "lse", "weights"} <= {r.tensor for r in results}
    references = {check.name for check in selfcheck.checks() if check.by_reference}
    assert {r.name for r in results if math.isnan(r.rms_ratio)} >= references


@pytest.mark.parametrize(
    ("wrong", "check", "tensor"),
    [
        (wrong_value, "full", "out"),
        (wrong_gradient, "full", "dk"),
        (wrong_gradient, "full", "gradcheck"),
        (ignores_masks, "sliding window", "out"),
        (ignores_masks, "lengths of keys", "dv"),
        (ignores("mask"), "block mask", "out"),
        (ignores("bias"), "ALiBi", "run"),
        (ignores("bias"), "T5's relative bias", "run"),
        (ignores("softcap"), "softcap", "dk"),
        (ignores("sinks"), "sinks", "run"),
        (ignores("similarity"), "cosine, scaled by head", "out"),
        (ignores("similarity"), "Gaussian", "run"),
        (ignores("dropout_p"), "dropout", "dv"),
        (not_a_number, "causal", "out"),
        (raises, "boolean mask", "run"),
        (raises, "boolean mask", "gradcheck"),
    ],
)
def test_a_wrong_operator_is_found(wrong, check: str, tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [c for c in selfcheck.checks() if c.name == check]
    small = [c for c in selfcheck.checks(selfcheck.SMALL) if c.name == check]
    monkeypatch.setattr(selfcheck, "checks", lambda sizes: chosen if sizes is selfcheck.LARGE else small)
    monkeypatch.setattr(heedful, "attention", wrong)
    results = selfcheck.run([torch.float32])
    assert tensor in {r.tensor for r in results if not r.ok}
    table = str(selfcheck.Table(results))
    assert f"FAILED  {check}, {tensor}" in table


def test_wrong_packing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [c for c in selfcheck.checks() if c.name == "packed sequences, causal"]
    monkeypatch.setattr(selfcheck, "checks", lambda sizes: chosen)
    monkeypatch.setattr(selfcheck, "_gradcheck", lambda check: selfcheck.Result(check.name, "", torch.float64, 0, 0))
    whole = heedful.varlen_attention
    monkeypatch.setattr(heedful, "varlen_attention", lambda q, k, v, o, **x: whole(q, k, v, [0, o[-1]], **x))
    assert {r.tensor for r in selfcheck.run([torch.float32]) if not r.ok} == {"out", "dq", "dk", "dv"}


def test_status_1_where_a_check_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(heedful, "attention", ignores_masks)
    assert program.main([]) == 1
    printed = capsys.readouterr()
    assert "FAILED  sliding window, out, float32: error" in printed.out
    assert "FAILED  sliding window, out, float32: error" in printed.err
    assert "FAILED  full" not in printed.err


@needs_extra
def test_status_1_where_the_curves_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swap_and_spoil(module: torch.nn.Module):
        swapped = heedful_swap(module)
        with torch.no_grad():
            module.head.weight.mul_(1.1)
        return swapped

    heedful_swap = heedful.swap
    monkeypatch.setattr(heedful, "swap", swap_and_spoil)
    monkeypatch.setattr(selfcheck, "run", lambda: [])
    monkeypatch.setattr(demo, "_draw", lambda *of: [])
    assert program.main(["demo", "--steps", "2", "--characters", "1", "--out", str(tmp_path)]) == 1
    assert "FAILED  loss curves: " in capsys.readouterr().err


# ---- the pieces of the demo


def test_curves_are_compared() -> None:
    a, b = [1.0, 2.0, 3.0, 4.0], [1.0, 2.25, 3.0, 8.0]
    assert train.largest_difference(a, b) == train.Difference(4.0, 4)
    assert train.largest_difference(a, b, first=3) == train.Difference(0.25, 2)
    assert train.largest_difference(a, a, first=100) == train.Difference(0.0, 1)
    assert train.largest_difference(a, [1.0, math.nan, 3.0, 8.0]) == train.Difference(math.inf, 2)
    assert train.largest_difference([math.inf], [math.inf]).value == math.inf
    for bad in (a[:3], []):
        with pytest.raises(ValueError, match="curves: expected one length"):
            train.largest_difference(a, bad)


def test_corpus() -> None:
    corpus = text.load()
    assert len(corpus.codes) > 100_000
    assert 60 < len(corpus.characters) < 200
    whole = corpus.decode(corpus.codes)
    assert "lambda" in whole and "  \n" not in whole
    assert torch.equal(corpus.encode(whole[:1000]), corpus.codes[:1000])
    with pytest.raises(ValueError, match="not in the corpus"):
        corpus.encode("\0")
    assert corpus.encode(demo.PROMPT + demo.MAP_TEXT).dtype is torch.int64


def test_batches_come_from_the_seed() -> None:
    corpus = text.load()
    first, again, other = (list(corpus.batches(3, 2, 8, seed)) for seed in (5, 5, 6))
    assert len(first) == 3
    for (codes, following), (codes_again, _) in zip(first, again):
        assert codes.shape == following.shape == (2, 8)
        assert torch.equal(codes[:, 1:], following[:, :-1])
        assert torch.equal(codes, codes_again)
    assert not torch.equal(first[0][0], other[0][0])


@pytest.fixture
def gpt() -> model.CharacterGPT:
    torch.manual_seed(0)
    return model.CharacterGPT(50, length=32, width=32, heads=2, layers=2)


def test_the_model_sees_no_later_character(gpt: model.CharacterGPT) -> None:
    codes = torch.randint(50, (2, 20))
    changed = codes.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 50
    before, after = gpt(codes), gpt(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_maps_of_both_attentions_agree(gpt: model.CharacterGPT) -> None:
    codes = torch.randint(50, (20,))
    swapped = copy.deepcopy(gpt)
    heedful.swap(swapped)
    maps = model.attention_maps(gpt, codes)
    assert maps.shape == (2, 2, 20, 20)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 20))
    assert maps.triu(1).abs().max() == 0
    torch.testing.assert_close(model.attention_maps(swapped, codes), maps)


def test_samples_come_from_the_seed(gpt: model.CharacterGPT) -> None:
    prompt = torch.tensor([3, 4])
    sample = model.generate(gpt, prompt, 40, seed=1)  # longer than the model's length
    assert sample.shape == (42,)
    assert torch.equal(sample[:2], prompt)
    assert torch.equal(sample, model.generate(gpt, prompt, 40, seed=1))
    assert not torch.equal(sample, model.generate(gpt, prompt, 40, seed=2))


def test_attention_share_is_measured_for_both(gpt: model.CharacterGPT) -> None:
    swapped = copy.deepcopy(gpt)
    heedful.swap(swapped)
    codes = torch.randint(50, (2, 32))
    for module in (gpt, swapped):
        share = train.attention_share(module, (codes, codes), steps=2)
        assert 0 < share.attention < share.all
    with pytest.raises(RuntimeError, match="no attention operator was called"):
        train.attention_share(torch.nn.Embedding(50, 50), (codes, codes), steps=1)


def test_training_takes_turns_and_lowers_the_loss(gpt: model.CharacterGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = text.load()
    copies = {"a": gpt, "b": copy.deepcopy(gpt)}
    for module in copies.values():
        module.characters = torch.nn.ModuleList(torch.nn.Embedding(len(corpus.characters), 32) for _ in range(3))
        module.head = torch.nn.Linear(32, len(corpus.characters))
    copies["b"].load_state_dict(gpt.state_dict())
    calls: list[int] = []
    monkeypatch.setattr(train, "RISE", 1)
    runs = train.train_together(
        copies, corpus.batches(20, 4, 32, 0), 20, lambda runs: calls.append(len(runs["b"].losses))
    )
    assert calls == list(range(1, 21))
    assert runs["a"].losses == runs["b"].losses
    assert runs["a"].losses[-1] < runs["a"].losses[0] - 0.5
    assert len(runs["a"].seconds) == 20 and runs["a"].seconds_per_step() > 0
