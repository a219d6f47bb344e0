"""Training the same model more than once, side by side, and what comes of it: losses, and times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Batch = tuple[Tensor, Tensor]

WARM_UP_STEPS = 5  # at the start, left out of the speed
PEAK_RATE = 6e-3
RISE = 60  # steps until the learning rate is at its peak
LAST_SHARE = 0.1  # of the peak, at the last step


@dataclass
class Run:
    """One training: the loss of every step, and the seconds that the step took."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def seconds_per_step(self) -> float:
        """The mean without the warm-up, where there are steps after it."""
        counted = self.seconds[WARM_UP_STEPS:] or self.seconds
        return sum(counted) / len(counted)


class Trainer:
    """One model with its optimizer and learning rate."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.run = Run(model.train())
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: rate(i, steps))

    def step(self, batch: Batch) -> None:
        start = time.perf_counter()
        loss = forward_backward(self.run.model, batch)
        nn.utils.clip_grad_norm_(self.run.model.parameters(), 1.0)
        self.optimizer.step()
        self.run.losses.append(loss.item())
        self.run.seconds.append(time.perf_counter() - start)
        self.rates.step()


def rate(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: a straight rise, then half a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / RISE) * (LAST_SHARE + (1 - LAST_SHARE) * cosine)


def forward_backward(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of the next character; leaves its gradients in the parameters."""
    codes, following = batch
    model.zero_grad()
    loss = F.cross_entropy(model(codes).flatten(0, 1), following.flatten())
    loss.backward()
    return loss.detach()


def train_together(
    models: dict[str, nn.Module], batches: Iterable[Batch], steps: int, progress: Callable[[dict[str, Run]], None]
) -> dict[str, Run]:
    """Trains every model on the same batches, one step of each in turn, so that all meet the same state of the machine.

    Who goes first alternates. progress is called after every batch.
    """
    trainers = {name: Trainer(model, steps) for name, model in models.items()}
    runs = {name: trainer.run for name, trainer in trainers.items()}
    order = list(trainers.values())
    for batch in batches:
        for trainer in order:
            trainer.step(batch)
        order.reverse()
        progress(runs)
    return runs


@dataclass(frozen=True)
class Difference:
    """The largest difference between two curves, and the step, from 1, where it is."""

    value: float
    step: int


def largest_difference(a: list[float], b: list[float], first: int | None = None) -> Difference:
    """Of two curves of one length, or of their `first` steps; a NaN makes it infinite. ValueError for other lengths."""
    if len(a) != len(b) or not a:
        raise ValueError(f"heedful.demo: curves: expected one length, above 0, got {len(a)} and {len(b)}")
    differences = [math.inf if math.isnan(x - y) else abs(x - y) for x, y in zip(a[:first], b[:first])]
    value = max(differences)
    return Difference(value, differences.index(value) + 1)


@dataclass(frozen=True)
class Share:
    """Seconds of a forward and backward, and how many of them are attention's."""

    all: float
    attention: float


class _AttentionTimer(TorchDispatchMode):
    """Within it, `seconds` adds up the time of every operator, torch's or heedful's, that has attention in its name."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if "attention" in func.name():
            self.seconds += time.perf_counter() - start
        return result


def attention_share(model: nn.Module, batch: Batch, steps: int = 5) -> Share:
    """What attention's own operators take of one forward and backward: a mean of `steps`.

    RuntimeError where there were none.
    """
    forward_backward(model, batch)
    with _AttentionTimer() as timer:
        start = time.perf_counter()
        for _ in range(steps):
            forward_backward(model, batch)
        seconds = time.perf_counter() - start
    model.zero_grad()
    if timer.seconds == 0:
        raise RuntimeError("heedful.demo: no attention operator was called")
    return Share(seconds / steps, timer.seconds / steps)
