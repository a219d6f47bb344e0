"""heedful against torch's built-in attention: every operator, in every dtype, forward and gradients.

Each check computes the same thing twice: with heedful and with plain torch; with heedful.reference where torch's own
operator has no such option. Errors are taken against float64, on the very inputs that the dtype holds. What is allowed
is what torch's operator, or the reference, does in that dtype: twice its largest error, plus a rounding of the result's
largest value. Gradients are also checked by torch.autograd.gradcheck, in float64.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import heedful

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Roundings allowed beside torch's own error. Half precision accumulates in float32 and rounds once, at the end; in the
# others the order of some hundred additions shows.
ROUNDINGS = {torch.float32: 32, torch.float64: 32, torch.bfloat16: 1, torch.float16: 1}
GRADCHECK = "gradcheck"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """The same results from heedful and from torch, as functions of named inputs."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    ours: Callable[[Tensors], Tensors]
    torchs: Callable[[Tensors], Tensors]
    by_reference: bool = False  # `torchs` is heedful.reference


@dataclass(frozen=True)
class Result:
    """How far one tensor of a check is from float64, and how far it may be. For gradcheck, error is 0 or inf."""

    name: str  # of the check
    tensor: str  # "out", "dq", ... or "gradcheck"
    dtype: torch.dtype
    error: float
    allowed: float
    rms_ratio: float = math.nan  # root mean square error over that of torch's operator; NaN where there is none
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.name}, {self.tensor}, {dtype}"
        return f"{text}: {self.note}" if self.note else f"{text}: error {self.error:.2e}, allowed {self.allowed:.2e}"


@dataclass(frozen=True)
class Sizes:
    """Tensors are q [batch, heads, queries, dim], k [batch, kv_heads, keys, dim], v [batch, kv_heads, keys, v_dim]."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    queries: int = 83
    keys: int = 150
    dim: int = 40
    v_dim: int = 24


LARGE = Sizes()
SMALL = Sizes(queries=4, keys=6, heads=2, kv_heads=1, dim=3, v_dim=2)


def checks(n: Sizes = LARGE) -> list[Check]:
    """Every check, at these sizes."""
    q, k = (n.batch, n.heads, n.queries, n.dim), (n.batch, n.heads, n.keys, n.dim)
    v = (*k[:3], n.v_dim)
    plain = {"q": q, "k": k, "v": v}
    square = {"q": q, "k": q, "v": (*q[:3], n.v_dim)}
    grouped = {"q": q, "k": (n.batch, n.kv_heads, *k[2:]), "v": (n.batch, n.kv_heads, *v[2:])}
    pairs = (n.batch, n.heads, n.queries, n.keys)
    generator = torch.Generator().manual_seed(1)
    dense = torch.rand(pairs, generator=generator) < 0.7
    lengths = torch.tensor([n.keys - 1] + [n.keys // 2 + 1] * (n.batch - 1))
    position = torch.arange(n.queries)[:, None] + n.keys - n.queries
    key = torch.arange(n.keys)
    left, right = n.keys // 4, 1
    causal, window = key <= position, (key >= position - left) & (key <= position + right)
    padding = (key < lengths[:, None])[:, None, None, :]
    masks = heedful.SlidingWindow(left, right) & heedful.KeyLengths(lengths)
    blocks = heedful.Global(3) | heedful.Dilated(n.keys // 8, 0, 2)
    by_head = {"x": (n.heads,)}  # an input for one of the options

    return [
        _attention("full", plain, {}, {}),
        _attention("causal", square, {"mask": heedful.Causal()}, {"is_causal": True}),
        _attention("causal, fewer queries than keys", plain, {"mask": heedful.Causal()}, {"attn_mask": causal}),
        _attention("sliding window", plain, {"mask": heedful.SlidingWindow(left, right)}, {"attn_mask": window}),
        _attention("lengths of keys", plain, {"mask": heedful.KeyLengths(lengths)}, {"attn_mask": padding}),
        _attention("boolean mask", plain, {"mask": dense}, {"attn_mask": dense}),
        _attention("bias, one for the batch", plain | {"bias": (1, *pairs[1:])}, {}, {}),
        _attention("grouped queries", grouped, {}, {"enable_gqa": True}),
        _attention(  # with queries that have nothing to attend to: 0, in torch too
            "all of these together",
            grouped | {"bias": (1, n.heads, 1, n.keys)},
            {"mask": masks & dense, "align": n.keys - n.queries, "scale": 0.3},
            {"attn_mask": window & padding & dense, "enable_gqa": True, "scale": 0.3},
        ),
        Check("log-sum-exp", {"q": q, "k": k}, _lse, _torch_lse),
        _attention("block mask", plain, {"mask": blocks}, {"attn_mask": blocks.to_dense(n.queries, n.keys)}),
        _biased(
            "ALiBi",
            plain | by_head,
            lambda x: heedful.ALiBi(x.sigmoid() / 4),
            lambda x: -x.sigmoid()[:, None, None] / 4 * (key - position).abs(),
        ),
        _biased(
            "T5's relative bias",
            plain | {"x": (8, n.heads)},
            heedful.RelativeBias,
            lambda x: heedful.RelativeBias(x).to_dense(n.queries, n.keys),
        ),
        _option("softcap", grouped, lambda x: {"softcap": 2.0}),
        _option("sinks", grouped | by_head, lambda x: {"sinks": x["x"], "mask": masks}),
        _option("cosine, scaled by head", grouped | by_head, lambda x: {"similarity": "cosine", "scale": x["x"]}),
        _option("Gaussian", grouped | by_head, lambda x: {"similarity": heedful.Gaussian(6.0 + x["x"])}),
        _option("dropout", grouped, lambda x: {"dropout_p": 0.3, "seed": 1}),
        _packed("packed sequences, causal", n),
        _drop_in("scaled_dot_product_attention", square, is_causal=True),
        _drop_in("  with a mask, grouped", grouped, attn_mask=dense, enable_gqa=True),
        _module("nn.MultiheadAttention, swapped", n),
    ]


def _attention(name: str, shapes: dict[str, tuple[int, ...]], ours: dict, torchs: dict) -> Check:
    """heedful.attention with the options `ours` against scaled_dot_product_attention with `torchs`."""

    def run_ours(x: Tensors) -> Tensors:
        return {"out": heedful.attention(x["q"], x["k"], x["v"], bias=x.get("bias"), **ours)}

    def run_torchs(x: Tensors) -> Tensors:
        options = dict(torchs)
        if "bias" in x:
            mask = options.get("attn_mask")
            options["attn_mask"] = x["bias"] if mask is None else x["bias"].masked_fill(~mask, -math.inf)
        return {"out": F.scaled_dot_product_attention(x["q"], x["k"], x["v"], **options)}

    return Check(name, shapes, run_ours, run_torchs)


def _biased(
    name: str, shapes: dict[str, tuple[int, ...]], bias: Callable[[Tensor], heedful.Bias], dense: Callable[..., Tensor]
) -> Check:
    """heedful.attention with a bias made of the input x against scaled_dot_product_attention with a tensor."""
    return Check(
        name,
        shapes,
        lambda x: {"out": heedful.attention(x["q"], x["k"], x["v"], bias=bias(x["x"]))},
        lambda x: {"out": F.scaled_dot_product_attention(x["q"], x["k"], x["v"], dense(x["x"]).to(x["q"].dtype))},
    )


def _option(name: str, shapes: dict[str, tuple[int, ...]], options: Callable[[Tensors], dict]) -> Check:
    """heedful.attention against heedful.reference.attention, with the same options."""
    return Check(
        name,
        shapes,
        lambda x: {"out": heedful.attention(x["q"], x["k"], x["v"], **options(x))},
        lambda x: {"out": heedful.reference.attention(x["q"], x["k"], x["v"], **options(x))},
        by_reference=True,
    )


def _packed(name: str, n: Sizes) -> Check:
    """heedful.varlen_attention against scaled_dot_product_attention of one sequence after the other."""
    offsets = [0, n.queries // 3, n.queries]

    def run_torchs(x: Tensors) -> Tensors:
        parts = ([x[m][a:b].transpose(0, 1) for m in "qkv"] for a, b in itertools.pairwise(offsets))
        return {
            "out": torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], 1).transpose(
                0, 1
            )
        }

    return Check(
        name,
        {m: (n.queries, n.heads, n.dim) for m in "qkv"},
        lambda x: {"out": heedful.varlen_attention(x["q"], x["k"], x["v"], offsets, mask=heedful.Causal())},
        run_torchs,
    )


def _lse(x: Tensors) -> Tensors:
    return {"lse": heedful.attention(x["q"], x["k"], x["k"], return_lse=True)[1]}


def _torch_lse(x: Tensors) -> Tensors:
    return {"lse": torch.logsumexp(x["q"] @ x["k"].mT / math.sqrt(x["q"].shape[-1]), -1)}


def _drop_in(name: str, shapes: dict[str, tuple[int, ...]], **options) -> Check:
    return Check(
        name,
        shapes,
        lambda x: {"out": heedful.scaled_dot_product_attention(x["q"], x["k"], x["v"], **options)},
        lambda x: {"out": F.scaled_dot_product_attention(x["q"], x["k"], x["v"], **options)},
    )


def _module(name: str, n: Sizes) -> Check:
    """A causal torch.nn.MultiheadAttention that gives its weights too, and the same one after heedful.swap."""
    width = n.heads * n.dim
    module = torch.nn.MultiheadAttention(width, n.heads, batch_first=True, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / math.sqrt(width))
    swapped = copy.deepcopy(module)
    heedful.swap(swapped)
    mask = torch.ones(n.queries, n.queries, dtype=torch.bool).triu(1)  # True: masked, as torch.nn has it

    def run(attention: torch.nn.Module, x: Tensors) -> Tensors:
        parameters = {name: p.detach().to(x["x"].dtype) for name, p in attention.named_parameters()}
        parameters["in_proj_weight"] = parameters["in_proj_weight"] * x["gain"]
        arguments = (x["x"], x["x"], x["x"])
        out, weights = torch.func.functional_call(attention, parameters, arguments, {"attn_mask": mask})
        return {"out": out, "weights": weights}

    shapes = {"x": (n.batch, n.queries, width), "gain": (width,)}
    return Check(name, shapes, lambda x: run(swapped, x), lambda x: run(module, x))


def run(dtypes: Iterable[torch.dtype] = DTYPES, progress: Callable[[str], None] = lambda name: None) -> list[Result]:
    """Runs every check in every dtype, and gradcheck; calls progress with the name of each before it starts."""
    results = []
    for check, small in zip(checks(LARGE), checks(SMALL)):
        progress(check.name)
        for dtype in dtypes:
            results += _compare(check, dtype)
        results.append(_gradcheck(small))
    return results


def _compare(check: Check, dtype: torch.dtype) -> list[Result]:
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {name: draw(shape) for name, shape in check.shapes.items()}
    exact_inputs = {name: x.double() for name, x in inputs.items()}
    with torch.no_grad():
        cotangents = {name: draw(out.shape) for name, out in check.torchs(exact_inputs).items()}
    exact = _with_gradients(check.torchs, exact_inputs, cotangents)
    torchs = _with_gradients(check.torchs, inputs, cotangents)
    try:
        ours = _with_gradients(check.ours, inputs, cotangents)
    except Exception as error:  # reported as the failure that it is
        return [Result(check.name, "run", dtype, math.inf, 0.0, note=_first_line(error))]
    return [_judge(check, name, dtype, ours[name], torchs[name], exact[name]) for name in exact]


def _with_gradients(function: Callable[[Tensors], Tensors], inputs: Tensors, cotangents: Tensors) -> Tensors:
    """The outputs, and the gradients of the inputs as "dq", "dk", ..."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    outputs = function(leaves)
    seeds = [cotangents[name].to(out.dtype) for name, out in outputs.items()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), seeds)
    return {name: out.detach() for name, out in outputs.items()} | {f"d{name}": g for name, g in zip(leaves, gradients)}


def _judge(check: Check, tensor: str, dtype: torch.dtype, ours: Tensor, torchs: Tensor, exact: Tensor) -> Result:
    if ours.shape != exact.shape:
        note = f"expected the shape {list(exact.shape)}, got {list(ours.shape)}"
        return Result(check.name, tensor, dtype, math.inf, 0.0, note=note)
    our_error, torch_error = (ours.double() - exact).abs(), (torchs.double() - exact).abs()
    rounding = torch.finfo(dtype).eps * exact.abs().max().item()
    allowed = 2 * torch_error.max().item() + ROUNDINGS[dtype] * rounding
    rms = torch_error.square().mean().sqrt().item()
    ratio = our_error.square().mean().sqrt().item() / rms if rms > 0 and not check.by_reference else math.nan
    return Result(check.name, tensor, dtype, our_error.max().item(), allowed, ratio)


def _gradcheck(check: Check) -> Result:
    generator = torch.Generator().manual_seed(3)
    names = list(check.shapes)
    inputs = [torch.randn(check.shapes[n], generator=generator, dtype=torch.float64, requires_grad=True) for n in names]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # gradcheck warns of what would make its answer meaningless
            torch.autograd.gradcheck(lambda *x: tuple(check.ours(dict(zip(names, x))).values()), inputs)
    except Exception as error:  # reported as the failure that it is
        return Result(check.name, GRADCHECK, torch.float64, math.inf, 0.0, note=_first_line(error))
    return Result(check.name, GRADCHECK, torch.float64, 0.0, 0.0)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@dataclass
class Table:
    """The results as text: one row a check, one column a dtype, and what failed below it."""

    results: list[Result]
    dtypes: tuple[torch.dtype, ...] = field(init=False)

    def __post_init__(self) -> None:
        present = {r.dtype for r in self.results if r.tensor != GRADCHECK}
        self.dtypes = tuple(d for d in DTYPES if d in present)

    @property
    def failures(self) -> list[Result]:
        return [r for r in self.results if not r.ok]

    def __str__(self) -> str:
        names = list(dict.fromkeys(r.name for r in self.results))
        titles = [str(d).removeprefix("torch.") for d in self.dtypes]
        lines = [self._row("share of the allowed error", titles, GRADCHECK)]
        for name in names:
            rows = [r for r in self.results if r.name == name]
            cells = [self._share([r for r in rows if r.dtype == d and r.tensor != GRADCHECK]) for d in self.dtypes]
            lines.append(self._row(name, cells, "ok" if all(r.ok for r in rows if r.tensor == GRADCHECK) else "FAILED"))
        lines.append(self._row("rms error over torch's, mean", [self._ratio(d) for d in self.dtypes], ""))
        lines.append("")
        lines.append(f"{len(self.results) - len(self.failures)} of {len(self.results)} checks passed.")
        lines += [f"FAILED  {r}" for r in self.failures]
        return "\n".join(lines)

    @staticmethod
    def _row(name: str, cells: list[str], last: str) -> str:
        return f"{name:<32}" + "".join(f"{c:>11}" for c in cells) + f"{last:>12}"

    @staticmethod
    def _share(rows: list[Result]) -> str:
        """The largest error of a row's tensors as a share of what is allowed."""
        worst = max((math.inf if math.isnan(r.error) else r.error / r.allowed if r.allowed else math.inf) for r in rows)
        return f"{worst:.2f}" if all(r.ok for r in rows) else "FAILED"

    def _ratio(self, dtype: torch.dtype) -> str:
        """The geometric mean over every tensor of every check."""
        logs = [math.log(r.rms_ratio) for r in self.results if r.dtype == dtype and 0 < r.rms_ratio < math.inf]
        return f"{math.exp(sum(logs) / len(logs)):.2f}" if logs else "-"
