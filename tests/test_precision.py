"""Low precision is judged against torch in the same dtype, both against the float64 truth (precision.py measures)."""

from __future__ import annotations

import pytest
import torch

import cases
import precision
from backends import Backend
from cases import Case

pytestmark = pytest.mark.xdist_group("precision")  # the averages are of what this process has measured

DTYPES = pytest.mark.parametrize("dtype", precision.DTYPES, ids=cases.short)


@DTYPES
@pytest.mark.parametrize("case", [*precision.BESIDE_TORCH, *precision.BESIDE_REFERENCE], ids=str)
def test_errors_are_no_larger_than_torchs(case: Case, dtype: torch.dtype, backend: Backend) -> None:
    errors = precision.measure(case, dtype, backend.name, backend.device)
    faults = {name: error.faults(name) for name, error in errors.items() if error.faults(name)}
    assert not faults, f"{case} {cases.short(dtype)}: {faults}"


@DTYPES
def test_errors_are_no_larger_on_average(dtype: torch.dtype, backend: Backend) -> None:
    """Over all cases, the geometric mean of the rms ratios of each kind of tensor is at most the dtype's limit."""
    for case in (*precision.BESIDE_TORCH, *precision.BESIDE_REFERENCE):
        precision.measure(case, dtype, backend.name, backend.device)
    means = precision.geometric_means(backend.name, cases.short(dtype))
    assert means.keys() == set(precision.KINDS)
    too_large = {kind: mean for kind, mean in means.items() if mean > precision.mean_at_most(kind, dtype, backend.name)}
    assert not too_large, too_large
    if backend.of_bf16:
        means = precision.geometric_means(backend.name, cases.short(dtype), precision.FUSED)
        too_large = {kind: mean for kind, mean in means.items() if mean > precision.BF16_FUSED_MEAN_AT_MOST}
        assert means and not too_large, too_large


def test_the_rule_can_fail() -> None:
    """An error of two roundings where the peer has one breaks it; the peer's own error does not."""
    truth = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peer = truth.bfloat16()
    assert not precision.Error.of(peer, peer, truth).faults()
    assert len(precision.Error.of((truth * 1.1).bfloat16(), peer, truth).faults()) == 2
    assert precision.Error.of(torch.full_like(peer, torch.nan), peer, truth).faults()
