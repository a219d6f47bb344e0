"""The one table of cases that every backend runs, how a case becomes tensors, and how results are judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import heedful
import oracle

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
FULL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLAIN, BSHD = "contiguous", "bshd"
LAYOUTS = (PLAIN, BSHD, "sbhd", "packed", "bhds", "strided", "offset", "overlap", "negated")
EXPANDED = ("expand_b", "expand_h", "expand_s", "expand_d", "scalar")


def short(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def filled(shape: tuple[int, ...], layout: str, generator: torch.Generator) -> Tensor:
    """float64 standard normal values of the 4-D `shape`, laid out as `layout` says (see LAYOUTS, EXPANDED)."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    b, h, s, d = shape
    if layout == PLAIN:
        return normal(b, h, s, d)
    if layout == BSHD:  # [B, S, H, D] in memory
        return normal(b, s, h, d).transpose(1, 2)
    if layout == "sbhd":
        return normal(s, b, h, d).permute(1, 2, 0, 3)
    if layout == "packed":  # one third of a fused projection
        return normal(b, s, 3, h, d)[:, :, 1].transpose(1, 2)
    if layout == "bhds":  # the last dimension is not the dense one
        return normal(b, h, d, s).mT
    if layout == "strided":  # odd strides everywhere
        return normal(b, h + 1, 2 * s + 1, 3 * d + 1)[:, 1:, 1::2, 1::3]
    if layout == "offset":  # dense, and not aligned to anything but its own type
        return normal(b * h * s * d + 1)[1:].view(shape)
    if layout == "overlap":  # row i + 1 starts one element after row i
        return normal(b, h, s + d).unfold(-1, d, 1)[:, :, :s]
    if layout == "negated":  # torch's lazy negation: the memory holds -x
        return torch.complex(torch.zeros(shape, dtype=torch.float64), -normal(*shape)).conj().imag
    dimension = {"expand_b": 0, "expand_h": 1, "expand_s": 2, "expand_d": 3}.get(layout)
    sizes = [1 if dimension in (None, n) else size for n, size in enumerate(shape)]
    return normal(*sizes).expand(shape)


def mapped(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x), elementwise, with x's layout in memory kept: strides of zero, offsets, overlaps, lazy negation."""
    if x.is_neg():
        return torch._neg_view(mapped(torch._neg_view(x), lambda memory: -function(-memory)))
    if not x.numel():
        return torch.as_strided(function(x), x.shape, x.stride())
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return torch.as_strided(function(memory), x.shape, x.stride(), x.storage_offset())


def cast(x: Tensor, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """x in `dtype` on `device`, with its layout."""
    return mapped(x, lambda values: values.to(device, dtype))


@dataclass(frozen=True)
class Case:
    """One problem: sizes are (B, Hq, Hk, Sq, Sk, D, Dv); the rest is as in torch.ops.heedful.attention_forward.

    `mask` and `bias` name, out of "bhqk", the dimensions that are not broadcast: "bk" is [B, 1, 1, Sk]; None is absent.
    """

    sizes: tuple[int, int, int, int, int, int, int]
    left: int | None = None
    right: int | None = None
    q_start: int = 0
    q_starts: tuple[int, ...] | None = None
    q_lengths: tuple[int, ...] | None = None
    k_lengths: tuple[int, ...] | None = None
    mask: str | None = None
    bias: str | None = None
    wide_bias: bool = False  # a float32 bias (float64 beside float64)
    holes: float = 0.0  # the share of -inf in the bias
    scale: float | None = None
    layouts: tuple[str, ...] = (PLAIN,)  # of q, k, v, dout, mask, bias; the last one repeats
    gain: float = 1.0  # multiplies q: peaked scores
    shift: float = 0.0  # added to v
    seed: int = 0

    def __str__(self) -> str:
        options = [
            f"{name}={value}" for name, value in vars(self).items()
            if name != "sizes" and value != type(self).__dataclass_fields__[name].default
        ]  # fmt: skip
        return " ".join(["x".join(map(str, self.sizes)), *options]).replace("'", "")


def causal(case_sizes: tuple[int, ...], **options: Any) -> Case:
    """The case of a causal mask, aligned bottom-right."""
    return Case(case_sizes, right=0, q_start=case_sizes[4] - case_sizes[3], **options)


@dataclass
class Problem:
    """The tensors of a case, and the options in the form that the ops take them."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def forward(self) -> tuple[Tensor, Tensor]:
        return torch.ops.heedful.attention_forward(self.q, self.k, self.v, **self.options)

    def results(self) -> dict[str, Tensor]:
        """out, lse, dq, dk, dv and, with a bias, dbias, of the two ops called directly."""
        out, lse = self.forward()
        bias_grad = "bias" in self.options
        gradients = torch.ops.heedful.attention_backward(
            self.dout, self.dlse, self.q, self.k, self.v, out, lse, **self.options, bias_grad=bias_grad
        )
        assert (gradients[3] is not None) == bias_grad
        return dict(zip(NAMES, (out, lse, *(gradients if bias_grad else gradients[:3])), strict=False))

    def truth(self, gradients: bool = True, **how: Any) -> oracle.Truth:
        if gradients:
            how |= {"dout": self.dout, "dlse": self.dlse}
        return oracle.attention(self.q, self.k, self.v, **self.options, **how)


def build(case: Case, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Draw the tensors of `case`, the same values (before rounding to `dtype`) for every dtype and device."""
    b, hq, hk, sq, sk, d, dv = case.sizes
    generator = torch.Generator().manual_seed(case.seed)
    layouts = (*case.layouts, *case.layouts[-1:] * 6)
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def draw(shape: tuple[int, ...], layout: str, gain: float = 1.0, shift: float = 0.0) -> Tensor:
        return cast(mapped(filled(shape, layout, generator), lambda values: values * gain + shift), dtype, device)

    def partial(dimensions: str, layout: str) -> Tensor:
        shape = tuple(size if name in dimensions else 1 for name, size in zip("bhqk", (b, hq, sq, sk), strict=True))
        return filled(shape, layout, generator)

    def punched(values: Tensor) -> Tensor:
        return values.masked_fill(torch.rand(values.shape, generator=generator) < case.holes, -math.inf)

    q = draw((b, hq, sq, d), layouts[0], gain=case.gain)
    k = draw((b, hk, sk, d), layouts[1])
    v = draw((b, hk, sk, dv), layouts[2], shift=case.shift)
    dout = draw((b, hq, sq, dv), layouts[3])
    dlse = cast(torch.randn(b, hq, sq, generator=generator, dtype=torch.float64), wide, device)
    options: dict[str, Any] = {}
    if case.mask is not None:  # three in four pairs are allowed
        values = partial(case.mask, PLAIN if layouts[4] == "negated" else layouts[4])
        options["mask"] = mapped(values, lambda values: (values > -0.67).to(device))
    if case.bias is not None:
        bias = partial(case.bias, layouts[5])
        options["bias"] = cast(mapped(bias, punched) if case.holes else bias, wide if case.wide_bias else dtype, device)
    for name in ("q_starts", "q_lengths", "k_lengths"):
        if getattr(case, name) is not None:
            options[name] = torch.tensor(getattr(case, name), dtype=torch.int64, device=device)
    for name in ("q_start", "left", "right", "scale"):
        if getattr(case, name) not in (None, type(case).__dataclass_fields__[name].default):
            options[name] = getattr(case, name)
    return Problem(case, q, k, v, dout, dlse, options)


def api_arguments(problem: Problem) -> dict[str, Any]:
    """The problem's options as heedful.attention takes them: mask objects joined by &, and `align`."""
    options = dict(problem.options)
    align = options.pop("q_starts", options.pop("q_start", 0))
    masks = []
    if "mask" in options:
        masks.append(options.pop("mask"))
    if "k_lengths" in options:
        masks.append(heedful.KeyLengths(options.pop("k_lengths")))
    if "q_lengths" in options:
        masks.append(heedful.QueryLengths(options.pop("q_lengths")))
    left, right = options.pop("left", None), options.pop("right", None)
    if (left, right) == (None, 0):
        masks.append(heedful.Causal())
    elif (left, right) != (None, None):
        masks.append(heedful.SlidingWindow(left, right))
    options.pop("q_start", None)
    mask = None
    for one in masks:
        mask = one if mask is None else mask & one
    return {"mask": mask, "align": align, **options}


def function_results(problem: Problem, function: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What problem.results() holds, of `function` (heedful.attention or one like it) and of autograd through it."""
    inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    arguments = api_arguments(problem)
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"].detach().requires_grad_()
        inputs.append(arguments["bias"])
    out, lse = function(*inputs[:3], **arguments, return_lse=True)
    gradients = torch.autograd.grad((out, lse), inputs, (problem.dout, problem.dlse))
    return dict(zip(NAMES, (out.detach(), lse.detach(), *gradients), strict=False))


def reference_results(problem: Problem) -> dict[str, Tensor]:
    """problem.results() of heedful.reference."""
    return function_results(problem, heedful.reference.attention)


def differences(results: dict[str, Tensor], truth: oracle.Truth, dtype: torch.dtype) -> list[str]:
    """What is wrong with `results`, one line for each tensor: a wrong dtype or shape, NaN, or an error past its bound.

    Non-finite values must stand exactly where the truth has some; -inf must be -inf.
    """
    wrong = []
    for name, result in results.items():
        want = truth.values[name]
        if result.shape != want.shape:
            wrong.append(f"{name}: shape {tuple(result.shape)}, expected {tuple(want.shape)}")
            continue
        got = result.detach().cpu().double()
        bad = got.isfinite() != want.isfinite()
        bad |= ((got == -math.inf) != (want == -math.inf)) if name == "lse" else False
        error = (got - want).abs()
        bound = truth.bound(name, dtype)
        bad |= want.isfinite() & (error > bound)
        if bad.any():
            at = tuple(int(n[0]) for n in torch.where(bad))
            ratio = (error / bound)[want.isfinite() & got.isfinite() & bad]
            worst = f", worst {ratio.max():.3g} x the bound" if ratio.numel() else ""
            wrong.append(
                f"{name}: {int(bad.sum())} of {bad.numel()} wrong, the first at {list(at)}: got {float(got[at])!r}, "
                f"expected {float(want[at])!r} +- {float(bound[at]):.3g}{worst}"
            )
    return wrong


def check(problem: Problem, results: dict[str, Tensor] | None = None, truth: oracle.Truth | None = None) -> None:
    """Fail with the case and every wrong tensor unless `results` (by default the ops' own) are the truth."""
    results = problem.results() if results is None else results
    dtype = problem.q.dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    dtypes = {name: wide if name == "lse" else dtype for name in results}
    if "dbias" in results:
        dtypes["dbias"] = problem.options["bias"].dtype
    wrong = [
        f"{n}: dtype {short(x.dtype)}, expected {short(dtypes[n])}" for n, x in results.items() if x.dtype != dtypes[n]
    ]
    wrong += differences(results, problem.truth("dq" in results) if truth is None else truth, dtype)
    assert not wrong, "\n".join([f"{problem.case} {short(dtype)}", *wrong])


# Sizes that meet, or just miss, the ends of query panels (8..64), key blocks (64..256) and backward blocks (64..128).
LENGTHS = (1, 2, 5, 7, 8, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 197, 255, 257, 300)
WIDTHS = (1, 2, 3, 5, 8, 16, 17, 32, 33, 40, 64, 80, 96, 128, 129, 160, 256, 300)

SMALL = (2, 4, 2, 19, 23, 8, 8)
TILES = (1, 2, 1, 70, 150, 16, 24)
BROADCASTS = tuple("".join(c for n, c in enumerate("bhqk") if bits >> n & 1) for bits in range(16))

TABLE = (
    Case((2, 3, 3, 5, 7, 4, 4)),
    Case(SMALL),
    Case(TILES),
    Case((1, 1, 1, 1, 300, 64, 64)),
    Case((1, 1, 1, 300, 1, 64, 64)),
    Case((1, 2, 2, 129, 257, 40, 33)),
    Case((3, 6, 1, 9, 65, 17, 5), seed=1),
    Case((2, 8, 2, 1, 130, 32, 32), seed=2),
    # Scales, and scores far apart.
    Case(SMALL, scale=0.0),
    Case(SMALL, scale=-0.5),
    Case(TILES, gain=8.0),
    Case(TILES, scale=3.0, shift=5.0),
    # Positions.
    causal(SMALL),
    causal(TILES),
    Case(TILES, right=0),
    causal((1, 2, 2, 197, 197, 32, 32)),
    causal((1, 1, 1, 300, 100, 16, 16)),
    Case((1, 1, 1, 150, 70, 16, 16), right=0, q_start=-40),
    Case(TILES, right=0, q_start=1000),
    Case(TILES, right=0, q_start=-1000),
    Case(TILES, left=20, right=0, q_start=80),
    Case(TILES, left=0, q_start=30),
    Case(TILES, left=5, right=70, q_start=-10),
    Case(TILES, left=-3, right=40, q_start=20),
    Case(TILES, left=2, right=-5),
    Case((3, 2, 2, 33, 90, 8, 8), right=0, q_starts=(57, -3, 20)),
    Case((3, 2, 1, 33, 90, 8, 8), left=17, right=3, q_starts=(0, 100, -200)),
    # Lengths, beyond their range too.
    Case((4, 2, 1, 70, 150, 16, 16), k_lengths=(150, 0, 65, 1)),
    Case((4, 2, 2, 70, 70, 16, 16), q_lengths=(0, 70, 64, 33)),
    Case(
        (4, 2, 2, 20, 30, 8, 8), q_lengths=(-5, 99, 20, 3), k_lengths=(7, -1, 31, 12), right=0, q_starts=(4, 0, 10, 9)
    ),
    Case((3, 2, 1, 130, 140, 16, 16), q_lengths=(130, 65, 1), k_lengths=(129, 140, 64), left=50, right=0, q_start=10),
    # Masks and biases of every shape that broadcasts.
    *(Case((2, 4, 2, 19, 23, 4, 4), mask=shape, seed=n) for n, shape in enumerate(BROADCASTS)),
    *(Case((2, 4, 2, 19, 23, 4, 4), bias=shape, wide_bias=n % 3 == 0, seed=n) for n, shape in enumerate(BROADCASTS)),
    Case(TILES, mask="qk"),
    Case((2, 2, 2, 70, 150, 16, 16), mask="bk", right=0, q_start=80),
    Case(TILES, bias="hqk", holes=0.3),
    Case(TILES, bias="hqk", wide_bias=True, left=70, right=0, q_start=80),
    Case((2, 2, 1, 130, 130, 8, 8), bias="k", mask="q", right=0),
    Case(
        (2, 2, 2, 70, 150, 16, 16), bias="bhqk", mask="bhqk", holes=0.1, k_lengths=(140, 65), q_lengths=(70, 9), left=90
    ),
    Case((2, 2, 2, 40, 70, 8, 8), bias="qk", mask="bhqk", layouts=(PLAIN,) * 4 + ("bhds", "strided")),
    Case((2, 2, 2, 40, 70, 8, 8), bias="bhqk", mask="bhqk", layouts=(PLAIN,) * 4 + ("expand_s", "expand_d")),
    Case((2, 2, 2, 40, 70, 8, 8), bias="bhqk", mask="bhqk", layouts=(PLAIN,) * 4 + ("overlap", "scalar")),
    # Long enough for several groups of keys in backward.
    Case((2, 2, 1, 33, 1100, 8, 8), k_lengths=(1100, 600)),
    causal((1, 1, 1, 130, 1300, 8, 12), bias="k"),
    Case((1, 3, 1, 600, 700, 5, 8), mask="hk", left=300, right=200),
    # Layouts.
    *(Case((2, 4, 2, 35, 70, 24, 24), layouts=(layout,), right=0, q_start=35) for layout in LAYOUTS[1:] + EXPANDED),
    Case((2, 2, 2, 35, 70, 17, 9), layouts=(BSHD, "bhds", "strided", "scalar")),
    Case((2, 2, 2, 35, 70, 17, 9), layouts=("strided", "expand_b", "packed", BSHD)),
)

# Nothing to attend to, nothing to ask, or nothing at all.
EMPTY = (
    Case((0, 2, 2, 5, 7, 4, 4)),
    Case((2, 0, 0, 5, 7, 4, 4)),
    Case((2, 0, 2, 5, 7, 4, 4)),
    Case((2, 2, 1, 0, 7, 4, 4)),
    Case((2, 2, 1, 5, 0, 4, 4)),
    Case((2, 2, 1, 0, 0, 4, 4)),
    Case((2, 2, 1, 5, 7, 0, 4)),
    Case((2, 2, 1, 5, 7, 4, 0)),
    Case((2, 2, 1, 5, 7, 0, 0), right=0),
    Case((2, 2, 1, 70, 150, 0, 3), scale=0.5, bias="qk"),
    Case((0, 2, 2, 5, 7, 4, 4), bias="bhqk", mask="bhqk", q_lengths=(), k_lengths=(), q_starts=(), right=0),
    Case((0, 2, 2, 5, 7, 4, 4), bias="hqk"),
    Case((2, 2, 1, 5, 0, 4, 4), bias="bhqk", mask="bhqk"),
    Case((2, 2, 1, 5, 0, 4, 4), bias="hq", mask="bq"),
    Case((2, 2, 1, 0, 7, 4, 4), bias="bhqk", mask="bhqk"),
    Case((2, 2, 1, 0, 7, 4, 4), bias="k", mask="b"),
    Case((2, 2, 1, 5, 7, 4, 4), k_lengths=(0, 0)),
    Case((2, 2, 1, 5, 7, 4, 4), q_lengths=(0, 0)),
    Case((2, 2, 1, 70, 150, 4, 4), right=0, q_start=-1000),
    Case((2, 2, 1, 70, 150, 4, 4), bias="bhqk", holes=1.0),
    Case((2, 2, 1, 70, 70, 4, 4), left=-1, right=0),
    *(Case((2, 2, 1, 5, 0, 4, 4), layouts=(layout,)) for layout in ("bshd", "strided", "scalar")),
    *(Case((2, 2, 1, 5, 7, 0, 4), layouts=(layout,)) for layout in ("bhds", "expand_d", "scalar")),
    *(Case((2, 2, 1, 5, 7, 4, 0), layouts=(layout,)) for layout in ("bhds", "expand_d", "scalar")),
)


# Bands of (left, right), for sweeps over the position of the first query.
WINDOWS = [(None, 0), (0, 0), (0, None), (None, 2), (2, None), (3, 1), (0, 4), (-1, 3), (4, -2), (9, 9)]
