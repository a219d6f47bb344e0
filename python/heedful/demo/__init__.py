"""The demo: one small GPT trained twice, with torch's attention and with heedful's, and the two compared."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import heedful

from . import text as texts
from .model import CharacterGPT, attention_maps, generate
from .train import WARM_UP_STEPS, Difference, Run, attention_share, largest_difference, train_together

if TYPE_CHECKING:
    from rich.progress import Progress

LIMIT, FIRST_STEPS = 1e-3, 100  # how far the loss curves may be apart, and for how many steps
BATCH, LENGTH = 4, 256
PROMPT = "The value of "
MAP_TEXT = "def f(x):\n    return x"
NAMES = ("torch", "heedful")


class CannotRun(RuntimeError):
    """What the demo needs beyond heedful is not there."""


@dataclass(frozen=True)
class Settings:
    out: Path
    steps: int
    seed: int
    characters: int  # of the sample


def require() -> None:
    """Raises CannotRun where the packages of heedful's extra "demo", or the text, are not there."""
    missing = [name for name in ("matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRun(f"heedful demo needs {' and '.join(missing)}: pip install 'heedful[demo]'")
    if importlib.util.find_spec("pydoc_data") is None:
        raise CannotRun("heedful demo needs pydoc_data, a part of Python's standard library that this Python lacks")


def run(settings: Settings) -> list[str]:
    """Trains both models, prints what came of it, writes the pictures; returns what failed, in words."""
    settings.out.mkdir(parents=True, exist_ok=True)
    corpus = texts.load()
    models = {name: _model(corpus, settings.seed) for name in NAMES}
    swapped = heedful.swap(models["heedful"])
    parameters = sum(p.numel() for p in models["heedful"].parameters())
    print(f"Text     the documentation of this Python's language: {len(corpus.codes):,} characters, ", end="")
    print(f"{len(corpus.characters)} different ones")
    print(f"Model    torch.nn.TransformerEncoder, {len(swapped.replaced)} layers, {parameters:,} parameters, float32")
    print(f"Swap     in the second of two copies, heedful replaces {len(swapped.replaced)} torch.nn.MultiheadAttention")
    print(f"Steps    {settings.steps} of {BATCH} x {LENGTH} characters; the copies take turns, with the same batches")
    print(flush=True)

    runs = _train(models, corpus, settings)
    early, overall = _differences(runs)
    _print_losses(runs, early, overall)
    _print_speed(runs, corpus, settings.seed)

    model = models["heedful"]
    codes = generate(model, corpus.encode(PROMPT), settings.characters, seed=settings.seed)
    print(f"\nA sample of the swapped model, after {PROMPT!r}:\n")
    for line in corpus.decode(codes).splitlines():
        print(textwrap.fill(line, 100, initial_indent="    ", subsequent_indent="    ", drop_whitespace=False))
    print()
    for path in _draw(runs, model, corpus, settings.out):
        print(f"Wrote {path}")
    if early.value > LIMIT:
        apart = f"{early.value:.1e} apart at step {early.step}"
        return [f"loss curves: {apart}, allowed {LIMIT:.0e} in the first {FIRST_STEPS} steps"]
    return []


def _model(corpus: texts.Corpus, seed: int) -> CharacterGPT:
    torch.manual_seed(seed)
    return CharacterGPT(len(corpus.characters), LENGTH)


def _train(models: dict[str, CharacterGPT], corpus: texts.Corpus, settings: Settings) -> dict[str, Run]:
    with _progress() as bar:
        task = bar.add_task("Training", total=settings.steps, losses="")

        def show(runs: dict[str, Run]) -> None:
            losses = "  ".join(f"{name} {run.losses[-1]:.3f}" for name, run in runs.items())
            bar.update(task, advance=1, losses=f"loss: {losses}")

        batches = corpus.batches(settings.steps, BATCH, LENGTH, settings.seed)
        return train_together(models, batches, settings.steps, show)


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich import progress as rich

    text, losses = rich.TextColumn("{task.description}"), rich.TextColumn("{task.fields[losses]}")
    times = rich.TimeElapsedColumn(), rich.TimeRemainingColumn()
    with rich.Progress(text, rich.BarColumn(24), rich.MofNCompleteColumn(), losses, *times) as bar:
        yield bar


def _differences(runs: dict[str, Run]) -> tuple[Difference, Difference]:
    """The largest of the first steps, and of all."""
    curves = [runs[name].losses for name in NAMES]
    return largest_difference(*curves, first=FIRST_STEPS), largest_difference(*curves)


def _print_losses(runs: dict[str, Run], early: Difference, overall: Difference) -> None:
    print(f"\n{'Loss':<12}{'first step':>12}{'last 20, mean':>16}")
    for name in NAMES:
        losses = runs[name].losses
        print(f"{name:<12}{losses[0]:>12.4f}{sum(losses[-20:]) / len(losses[-20:]):>16.4f}")
    steps = min(FIRST_STEPS, len(runs["torch"].losses))
    verdict = "ok" if early.value <= LIMIT else "FAILED"
    print(f"Largest difference in the first {steps} steps {early.value:.1e} (allowed {LIMIT:.0e}: {verdict}), ", end="")
    print(f"in all {overall.value:.1e} at step {overall.step}")


def _print_speed(runs: dict[str, Run], corpus: texts.Corpus, seed: int) -> None:
    batch = next(corpus.batches(1, BATCH, LENGTH, seed))
    print(f"\n{'Speed':<12}{'tokens/s':>12}{'a step':>12}{'attention':>12}  of forward and backward", end="")
    print(f"   (the first {WARM_UP_STEPS} steps left out)")
    for name in NAMES:
        step, share = runs[name].seconds_per_step(), attention_share(runs[name].model, batch)
        print(f"{name:<12}{BATCH * LENGTH / step:>12,.0f}{step * 1e3:>9.1f} ms", end="")
        print(f"{share.attention * 1e3:>9.1f} ms  {share.attention / share.all:.1%}", flush=True)


def _draw(runs: dict[str, Run], model: CharacterGPT, corpus: texts.Corpus, out: Path) -> list[Path]:
    from . import pictures

    curves, maps = out / "loss_curves.png", out / "attention_maps.png"
    losses = [runs[name].losses for name in NAMES]
    pictures.loss_curves(curves, *losses, LIMIT, FIRST_STEPS, "One model, one seed, the same batches: two attentions")
    weights = attention_maps(model, corpus.encode(MAP_TEXT))
    pictures.attention_maps(maps, MAP_TEXT, weights, "What each head of the trained model attends to")
    return [curves, maps]
