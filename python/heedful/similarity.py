"""How alike a query and a key are, where that is not said by a name ("dot", "cosine")."""

from __future__ import annotations

import math

from torch import Tensor


class Gaussian:
    """Similarity ``-|q - k|^2 / (2 bandwidth^2)``: nearest keys weigh most, whatever their length.

    bandwidth: a number above 0, or a tensor [Hq] or [B, Hq] that may need a gradient.
    """

    def __init__(self, bandwidth: float | Tensor) -> None:
        if not isinstance(bandwidth, Tensor):
            if isinstance(bandwidth, bool) or not isinstance(bandwidth, (int, float)):
                got = type(bandwidth).__name__
                raise TypeError(f"heedful.Gaussian: bandwidth: expected a number or a tensor [Hq], got {got}")
            if not 0 < bandwidth < math.inf:
                raise ValueError(f"heedful.Gaussian: bandwidth: expected a finite number above 0, got {bandwidth}")
        self.bandwidth = bandwidth

    def __repr__(self) -> str:
        shown = list(self.bandwidth.shape) if isinstance(self.bandwidth, Tensor) else self.bandwidth
        return f"Gaussian({shown})"
