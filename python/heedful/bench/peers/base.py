"""What a peer is to the harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rows import Inputs, Row

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class CannotRun(RuntimeError):
    """A peer cannot run a row; its text says why."""


GRADIENTS = ("dq", "dk", "dv", "dbias")


@dataclass
class Call:
    """One row, ready to be timed. results(direction) computes it anew: "out", or "dq", "dk", "dv" and perhaps "dbias"."""

    forward: Callable[[], object]
    backward: Callable[[], object] | None
    results: Callable[[str], dict[str, Tensor]]
    no_backward: str = ""  # why there is none


class Peer:
    """One implementation of attention, with the threads that it was made for."""

    name: str

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def prepare(self, row: Row, inputs: Inputs) -> Call:
        """Raises CannotRun, or whatever the library raises, where it cannot run the row."""
        raise NotImplementedError


class TorchPeer(Peer):
    """A function of torch tensors."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
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
        leaves = [self.pack(row, inputs, x).clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        gradient = self.pack(row, inputs, inputs.gradient)
        if row.form == "bias-gradient":
            inputs.bias = inputs.bias.clone().requires_grad_()
            leaves.append(inputs.bias)
        function = self.function(row, inputs)
        graph: list[Tensor] = []  # made at the first backward: where there is none, forward still runs

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*leaves[:3])

        def backward() -> tuple[Tensor, ...]:
            if not graph:
                graph.append(function(*leaves[:3]))
            return torch.autograd.grad(graph[0], leaves, gradient, retain_graph=True)

        def results(direction: str) -> dict[str, Tensor]:
            found = {"out": forward()} if direction == "forward" else dict(zip(GRADIENTS, backward()))
            return {name: x if name == "dbias" else self.unpack(row, inputs, x) for name, x in found.items()}

        return Call(forward, backward, results)
