"""What a peer is to the harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..rows import Inputs, Row

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class CannotRun(RuntimeError):
    """A peer cannot run a row; its text says why."""


GRADIENTS = ("dq", "dk", "dv", "dbias")


@dataclass
class Call:
    """One row, ready to be timed."""

    forward: Callable[[], object]  # without a thought of gradients
    results: Callable[[str], dict[str, Tensor]]  # of a direction: "out", or "dq", "dk", "dv" and perhaps "dbias"
    record: Callable[[], object] | None = None  # a forward that keeps in `graph` what backward needs
    backward: Callable[[], object] | None = None
    graph: list[Any] = field(default_factory=list)
    no_backward: str = ""  # why there is none
    no_memory: str = ""  # why its peak memory cannot be seen


class Peer:
    """One implementation of attention, with the threads that it was made for."""

    def __init__(self, threads: int, keeps_memory: bool = True) -> None:
        """keeps_memory: whether the library may keep memory for its next call, as it does by default."""
        self.threads, self.keeps_memory = threads, keeps_memory

    def prepare(self, row: Row, inputs: Inputs) -> Call:
        """Raises CannotRun, or whatever the library raises, where it cannot run the row."""
        raise NotImplementedError


class TorchPeer(Peer):
    """A function of torch tensors."""

    def __init__(self, threads: int, keeps_memory: bool = True) -> None:
        super().__init__(threads, keeps_memory)
        torch.set_num_threads(threads)

    def function(self, row: Row, inputs: Inputs) -> Function:
        """The row's attention of q, k, v, and of inputs.bias, which requires a gradient where the row asks for it."""
        raise NotImplementedError

    def pack(self, row: Row, inputs: Inputs, x: Tensor) -> Tensor:
        """q, k, v or the gradient, as `function` takes them."""
        return x

    def unpack(self, row: Row, inputs: Inputs, x: Tensor) -> Tensor:
        """What came of such a tensor, in its form in the inputs."""
        return x

    def prepare(self, row: Row, inputs: Inputs) -> Call:
        plain = [self.pack(row, inputs, x) for x in (inputs.q, inputs.k, inputs.v)]
        leaves = [x.detach().requires_grad_() for x in plain]
        gradient = self.pack(row, inputs, inputs.gradient)
        if row.form == "bias-gradient":
            inputs.bias = inputs.bias.detach().requires_grad_()
            leaves.append(inputs.bias)
        function = self.function(row, inputs)
        graph: list[Tensor] = []

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*plain)

        def record() -> None:
            graph.clear()
            graph.append(function(*leaves[:3]))

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(graph[0], leaves, gradient, retain_graph=True)

        def results(direction: str) -> dict[str, Tensor]:
            found = {"out": forward()} if direction == "forward" else dict(zip(GRADIENTS, backward()))
            return {name: x if name == "dbias" else self.unpack(row, inputs, x) for name, x in found.items()}

        return Call(forward, results, record, backward, graph)
