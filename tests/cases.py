"""A case of the tests, how it becomes tensors, what heedful makes of them, and how that is judged."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

import heedful
import oracle
import oracle_scores
from heedful import definition

PARAMETERS = ("bias", "scales", "sinks", "slopes", "table")  # the inputs beside q, k and v that have gradients
NAMES = ("out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in PARAMETERS))
FULL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLAIN, BSHD = "contiguous", "bshd"
BUCKETS = 8
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

    Shapes are named, out of "bhqk", by the dimensions that are not broadcast: "bk" is [B, 1, 1, Sk]; None is absent.
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
    scales: str | None = None  # "h" or "bh", as sinks, slopes and table
    sinks: str | None = None
    slopes: str | None = None
    table: str | None = None
    wide: bool = False  # those four in float32 (float64 beside float64)
    reach: int = 9  # the table's largest distance
    t5: bool = False  # T5's buckets, not random ones
    similarity: str = "dot"
    softcap: float | None = None
    normalizer: str = "softmax"
    dropout_p: float = 0.0
    seeds: bool = False  # a seed for each sequence
    tiles: str | None = None  # random blocks, "", "b", "h" or "bh"
    packed: tuple[tuple[int, int], ...] | None = None  # the lengths of each sequence, of which sizes holds the longest
    outside: int = 0  # rows before all packed sequences, and after them
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


def packed(heads: tuple[int, int], widths: tuple[int, int], *lengths: tuple[int, int], **options: Any) -> Case:
    """The case of packed sequences of the given (queries, keys), of heads (Hq, Hk) and widths (D, Dv)."""
    longest = (max(n[x] for n in lengths) for x in (0, 1))
    return Case((len(lengths), *heads, *longest, *widths), packed=lengths, **options)


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

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Those of PARAMETERS that the problem has."""
        return {name: self.options[name] for name in PARAMETERS if name in self.options}

    def forward(self) -> tuple[Tensor, Tensor]:
        return torch.ops.heedful.attention_forward(self.q, self.k, self.v, **self.options)

    def results(self) -> dict[str, Tensor]:
        """out, lse, dq, dk, dv and the gradient of each parameter, of the two ops called directly."""
        out, lse = self.forward()
        wanted = {f"{name}_grad": True for name in self.parameters}
        gradients = torch.ops.heedful.attention_backward(
            self.dout, self.dlse, self.q, self.k, self.v, out, lse, **self.options, **wanted
        )
        results = dict(zip(NAMES, (out, lse, *gradients), strict=True))
        unwanted = [name for name in PARAMETERS if name not in self.options]
        assert all(results.pop(f"d{name}") is None for name in unwanted), "a gradient that nobody asked for"
        assert all(x is not None for x in results.values())
        return results

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

    def shape(dimensions: str, names: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size if name in dimensions else 1 for name, size in zip(names, sizes, strict=True))

    def punched(values: Tensor) -> Tensor:
        return values.masked_fill(torch.rand(values.shape, generator=generator) < case.holes, -math.inf)

    # Hard attention is decided by the last bit of near-equal scores: numbers that no kernel rounds make ties exact.
    exact = case.normalizer == "hard" and case.similarity != "cosine"

    def on_grid(values: Tensor) -> Tensor:
        return (values * 4).round() / 4 if exact else values

    rows, columns, sequences = sq, sk, b
    if case.packed is not None:
        assert len(case.packed) == b and (sq, sk) == tuple(max((n[x] for n in case.packed), default=0) for x in (0, 1))
        sequences, (rows, columns) = 1, (sum(n[x] for n in case.packed) + 2 * case.outside for x in (0, 1))
    q = draw((sequences, hq, rows, d), layouts[0], gain=case.gain)
    k = draw((sequences, hk, columns, d), layouts[1])
    if exact:
        q, k = (mapped(x, lambda values: values.round().clamp(-2, 2)) for x in (q, k))
    v = draw((sequences, hk, columns, dv), layouts[2], shift=case.shift)
    dout = draw((sequences, hq, rows, dv), layouts[3])
    dlse = cast(torch.randn(sequences, hq, rows, generator=generator, dtype=torch.float64), wide, device)
    options: dict[str, Any] = {}
    if case.bias is not None:
        bias = mapped(filled(shape(case.bias, "bhqk", (b, hq, sq, sk)), layouts[5], generator), on_grid)
        options["bias"] = cast(mapped(bias, punched) if case.holes else bias, wide if case.wide_bias else dtype, device)
    if case.mask is not None:  # three in four pairs are allowed
        layout = PLAIN if layouts[4] == "negated" else layouts[4]
        values = filled(shape(case.mask, "bhqk", (b, hq, sq, sk)), layout, generator)
        options["mask"] = mapped(values, lambda values: (values > -0.67).to(device))
    for name in ("scales", "sinks", "slopes", "table"):
        if (dimensions := getattr(case, name)) is None:
            continue
        sizes = (BUCKETS, hq) if name == "table" else (hq,)
        sizes = (b, *sizes) if "b" in dimensions else sizes
        values = torch.randn(sizes, generator=generator, dtype=torch.float64)
        if name == "scales":  # around the default for "dot", a few for the others
            usual = {"dot": 1 / math.sqrt(max(d, 1)), "cosine": 4.0, "gaussian": 0.2}[case.similarity]
            values = usual * (1 + values / 2)
        values = values * {"slopes": 0.1, "sinks": 2.0}.get(name, 1)
        options[name] = on_grid(values).to(device, wide if case.wide else dtype)
    if case.table is not None:
        distance = torch.arange(-case.reach, case.reach + 1)
        buckets = torch.randint(BUCKETS, distance.shape, generator=generator)
        options["buckets"] = (t5_buckets(distance, BUCKETS, case.reach) if case.t5 else buckets).to(device)
    if case.tiles is not None:
        sizes = shape(case.tiles + "qk", "bhqk", (b, hq, -(-sq // 64), -(-sk // 64)))
        options |= random_blocks(sizes, generator, device)
    if case.dropout_p:
        seeds = torch.randint(-(2**63), 2**63 - 1, (b if case.seeds else 1,), generator=generator)
        options["seed"] = seeds.to(device)
    if case.packed is not None:
        for n, name in enumerate(("q_offsets", "k_offsets")):
            lengths = torch.tensor([case.outside, *(pair[n] for pair in case.packed)], dtype=torch.int64)
            options[name] = lengths.cumsum(0).to(device)
    for name in ("q_starts", "q_lengths", "k_lengths"):
        if getattr(case, name) is not None:
            options[name] = torch.tensor(getattr(case, name), dtype=torch.int64, device=device)
    for name in ("q_start", "left", "right", "scale", "softcap", "similarity", "normalizer", "dropout_p"):
        if getattr(case, name) != type(case).__dataclass_fields__[name].default:
            options[name] = getattr(case, name)
    if exact and case.scales is None:
        options["scale"] = 0.5 if case.scale is None else round(case.scale * 4) / 4
    return Problem(case, q, k, v, dout, dlse, options)


def t5_buckets(distance: Tensor, count: int, furthest: int) -> Tensor:
    """T5's bucket of each distance from a query to a key, in both directions, as transformers computes it."""
    count //= 2
    exact = count // 2
    near = distance.abs()
    far = torch.log(near.float() / exact) / math.log(furthest / exact) * (count - exact)
    far = (exact + far.clamp(min=0).long()).clamp(max=count - 1)
    return torch.where(distance > 0, count, 0) + torch.where(near < exact, near, far)


def random_blocks(shape: tuple[int, ...], generator: torch.Generator, device: str) -> dict[str, Tensor]:
    """tiles of `shape` and their bits: one in five tiles is empty, two are full, two hold random pairs of their own."""
    kind = torch.randint(5, shape, generator=generator)
    partial = kind >= 3
    tiles = torch.where(partial, 1 + partial.flatten().cumsum(0).view(shape), kind.clamp(max=1))
    bits = torch.randint(-(2**63), 2**63 - 1, (int(partial.sum()), 64), generator=generator)
    return {"tiles": tiles.to(device, torch.int32), "bits": bits.to(device)}


def expressible(case: Case) -> bool:
    """Whether users can type the case: windows have no negative sides, tables T5's buckets for all sequences."""
    sides = (case.left or 0) >= 0 and (case.right or 0) >= 0
    return sides and (case.table is None or (case.t5 and case.table == "h"))


def api_arguments(problem: Problem) -> dict[str, Any]:
    """The problem's options as heedful.attention takes them: mask and bias objects, joined by & and +, and `align`.

    Blocks become a mask of single pairs.
    """
    options = {"scale": problem.options.get("scales"), **problem.options}
    start = options.pop("q_start", 0)
    masks, biases = [], []
    if "mask" in options:
        masks.append(options.pop("mask"))
    if "tiles" in options:
        _, _, _, queries, keys, _, _ = problem.case.sizes
        tiles, bits = (options.pop(name).cpu() for name in ("tiles", "bits"))
        masks.append(oracle_scores.of_tiles(tiles, bits, queries, keys).to(problem.q.device))
    if "k_lengths" in options:
        masks.append(heedful.KeyLengths(options.pop("k_lengths")))
    if "q_lengths" in options:
        masks.append(heedful.QueryLengths(options.pop("q_lengths")))
    left, right = options.pop("left", None), options.pop("right", None)
    if (left, right) == (None, 0):
        masks.append(heedful.Causal())
    elif (left, right) != (None, None):
        masks.append(heedful.SlidingWindow(left, right))
    if "bias" in options:
        biases.append(options.pop("bias"))
    if "slopes" in options:
        biases.append(heedful.ALiBi(options.pop("slopes")))
    if "table" in options:
        biases.append(heedful.RelativeBias(options.pop("table"), max_distance=problem.case.reach))
    if options.get("similarity") == "gaussian":
        options["similarity"] = heedful.Gaussian(1.0)
    unknown = ("scales", "buckets", "q_starts", "q_offsets", "k_offsets")
    joined = {
        "mask": reduce(operator.and_, masks) if masks else None,
        "bias": reduce(operator.add, biases) if biases else None,
        "align": options.get("q_starts", start),
    }
    return joined | {name: x for name, x in options.items() if name not in unknown}


def function_results(problem: Problem, module: Any) -> dict[str, Tensor]:
    """What problem.results() holds, of a module's `attention` or `varlen_attention` and of autograd through it."""
    leaves, differentiable = differentiated(problem)
    arguments = api_arguments(differentiable)
    q, k, v = (leaves[name] for name in ("q", "k", "v"))
    if problem.case.packed is None:
        out, lse = module.attention(q, k, v, **arguments, return_lse=True)
    else:
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        offsets = (problem.options["q_offsets"], problem.options["k_offsets"])
        out, lse = module.varlen_attention(*rows, *offsets, **arguments, return_lse=True)
        out, lse = out.transpose(0, 1)[None], lse.transpose(0, 1)[None]
    return with_gradients(problem, leaves, out, lse)


def differentiated(problem: Problem) -> tuple[dict[str, Tensor], Problem]:
    """Every input that has a gradient as a leaf, and the problem made of those."""
    inputs = {name: getattr(problem, name) for name in ("q", "k", "v")} | problem.parameters
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    options = problem.options | {name: leaves[name] for name in problem.parameters}
    return leaves, replace(problem, q=leaves["q"], k=leaves["k"], v=leaves["v"], options=options)


def with_gradients(problem: Problem, leaves: dict[str, Tensor], out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """What problem.results() holds, of out and lse that autograd has recorded."""
    pairs = [(x, dx) for x, dx in ((out, problem.dout), (lse, problem.dlse)) if x.requires_grad]
    outputs, upstream = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, materialize_grads=True)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def reference_results(problem: Problem) -> dict[str, Tensor]:
    """problem.results() of heedful.reference."""
    return function_results(problem, heedful.reference)


def definition_results(problem: Problem) -> dict[str, Tensor]:
    """problem.results() of the definition that heedful.reference calls, which takes what the ops take."""
    leaves, recorded = differentiated(problem)
    named = {"q": recorded.q, "k": recorded.k, "v": recorded.v, **recorded.options}
    tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    out, lse = definition.whole(tensors, {name: x for name, x in named.items() if name not in tensors})
    return with_gradients(problem, leaves, out.to(problem.q.dtype), lse)


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
    dtypes |= {f"d{name}": x.dtype for name, x in problem.parameters.items()}
    wrong = [
        f"{n}: dtype {short(x.dtype)}, expected {short(dtypes[n])}" for n, x in results.items() if x.dtype != dtypes[n]
    ]
    wrong += differences(results, problem.truth("dq" in results) if truth is None else truth, dtype)
    assert not wrong, "\n".join([f"{problem.case} {short(dtype)}", *wrong])
