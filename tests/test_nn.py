"""heedful.nn.MultiheadAttention against torch.nn.MultiheadAttention with the same parameters."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import heedful

N, H, E, L, S = 3, 2, 8, 5, 7

CONFIGS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv, zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim, vdim": {"kdim": 6, "vdim": 10},
    "kdim, bias_kv, no bias": {"kdim": 6, "add_bias_kv": True, "bias": False},
}
LAYOUTS = ("batch first", "sequence first", "unbatched")
WEIGHTS = {
    "no weights": {"need_weights": False},
    "averaged": {"need_weights": True},
    "per head": {"need_weights": True, "average_attn_weights": False},
}


def pair(*args, **kwargs):
    """torch's module and heedful's with the same parameters, none of them zero."""
    kwargs = {"dtype": torch.float64, **kwargs}
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(*args, **kwargs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    ours = heedful.nn.MultiheadAttention(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def bool_mask(*shape):
    """True = may not attend; key 0 is open to all, so that no row is empty."""
    mask = torch.rand(*shape) < 0.4
    mask[..., 0] = False
    return mask


def float_mask(*shape):
    """Finite values and -inf; a leaf that wants a gradient."""
    mask = rand(*shape).masked_fill(bool_mask(*shape), -torch.inf)
    return mask.requires_grad_()


MASKS = {
    "none": lambda n, length, keys: {},
    "bool": lambda n, length, keys: {"attn_mask": bool_mask(length, keys)},
    "float": lambda n, length, keys: {"attn_mask": float_mask(length, keys)},
    "bool 3d": lambda n, length, keys: {"attn_mask": bool_mask(n * H, length, keys)},
    "float 3d": lambda n, length, keys: {"attn_mask": float_mask(n * H, length, keys)},
    "padding": lambda n, length, keys: {"key_padding_mask": bool_mask(n, keys)},
    "float padding": lambda n, length, keys: {"key_padding_mask": float_mask(n, keys)},
    "bool, padding": lambda n, length, keys: {
        "attn_mask": bool_mask(length, keys),
        "key_padding_mask": bool_mask(n, keys),
    },
    "float, padding": lambda n, length, keys: {
        "attn_mask": float_mask(length, keys),
        "key_padding_mask": bool_mask(n, keys),
    },
    "bool 3d, float padding": lambda n, length, keys: {
        "attn_mask": bool_mask(n * H, length, keys),
        "key_padding_mask": float_mask(n, keys),
    },
    "float 3d, float padding": lambda n, length, keys: {
        "attn_mask": float_mask(n * H, length, keys),
        "key_padding_mask": float_mask(n, keys),
    },
}


def leaves(kind, layout, module):
    """(query, key, value), the same tensor where `kind` says so."""

    def leaf(length, dim):
        shape = {"batch first": (N, length, dim), "sequence first": (length, N, dim), "unbatched": (length, dim)}[
            layout
        ]
        return rand(*shape).requires_grad_()

    query = leaf(L, module.embed_dim)
    if kind == "self":
        return query, query, query
    key = leaf(S, module.kdim)
    return query, key, key if kind == "cross" else leaf(S, module.vdim)


def results(module, inputs, masks, downstream, **kwargs):
    """Outputs and the gradients of every parameter, input and float mask, by name."""
    wanted = dict(module.named_parameters())
    wanted |= {f"input {i}": x for i, x in enumerate(inputs)}
    wanted |= {name: m for name, m in masks.items() if m.is_floating_point()}
    out, weights = module(*inputs, **masks, **kwargs)
    outputs = {"out": out} if weights is None else {"out": out, "weights": weights}
    torch.manual_seed(downstream)
    loss = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in outputs.values())
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return outputs | dict(zip(wanted, grads, strict=True))


def assert_same(ours, theirs, **kwargs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, name=name: f"{name}: {m}", **kwargs)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_agrees_with_torch(config, layout, masks):
    theirs, ours = pair(E, H, batch_first=layout == "batch first", **CONFIGS[config])
    kinds = ("separate",) if theirs.in_proj_weight is None else ("self", "cross", "separate")
    for kind, weights in itertools.product(kinds, WEIGHTS):
        inputs = leaves(kind, layout, theirs)
        given = MASKS[masks](1 if layout == "unbatched" else N, L, L if kind == "self" else S)
        if layout == "unbatched" and "key_padding_mask" in given:
            given["key_padding_mask"] = given["key_padding_mask"].detach().squeeze(0)
            if given["key_padding_mask"].is_floating_point():
                given["key_padding_mask"].requires_grad_()
        arguments = (inputs, given, 1)
        assert_same(
            results(ours, *arguments, **WEIGHTS[weights]),
            results(theirs, *arguments, **WEIGHTS[weights]),
            rtol=1e-9,
            atol=1e-10,
        )


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("masks", ["none", "bool", "padding", "bool, padding"])
def test_agrees_with_torch_native_fast_path(masks, weights):
    theirs, ours = (m.eval() for m in pair(E, H, batch_first=True))
    x = rand(N, L, E)
    given = MASKS[masks](N, L, L)
    with torch.no_grad():
        want, got = (m(x, x, x, **given, **WEIGHTS[weights]) for m in (theirs, ours))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_lower_precision(dtype, weights):
    theirs, ours = pair(E, H, batch_first=True, dtype=dtype)
    x = torch.randn(N, L, E, dtype=dtype)
    mask = torch.randn(L, L, dtype=dtype)
    want, got = (m(x, x, x, attn_mask=mask, **WEIGHTS[weights]) for m in (theirs, ours))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("config", ["plain", "bias_kv", "zero_attn"])
def test_autocast(config, weights):
    theirs, ours = pair(E, H, batch_first=True, dtype=torch.float32, **CONFIGS[config])
    x, mask = torch.randn(N, L, E), torch.randn(L, L)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (m(x, x, x, attn_mask=mask, **WEIGHTS[weights]) for m in (theirs, ours))
    assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)


# Parameters.


@pytest.mark.parametrize("config", CONFIGS)
def test_initialisation_and_state_dict_are_those_of_torch(config):
    drawn = []
    modules = []
    for cls in (nn.MultiheadAttention, heedful.nn.MultiheadAttention):
        torch.manual_seed(3)
        modules.append(cls(E, H, 0.1, batch_first=True, dtype=torch.float32, device="cpu", **CONFIGS[config]))
        drawn.append(torch.rand(1))
    theirs, ours = modules
    assert drawn[0] == drawn[1]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=0)
    assert isinstance(ours, nn.MultiheadAttention)

    theirs, ours = pair(E, H, **CONFIGS[config])
    fresh = nn.MultiheadAttention(E, H, dtype=torch.float64, **CONFIGS[config])
    fresh.load_state_dict(ours.state_dict())
    assert_same(fresh.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(clone):
    _, ours = pair(E, H)
    x = rand(L, N, E)
    other = clone(ours)
    assert type(other) is heedful.nn.MultiheadAttention
    torch.testing.assert_close(other(x, x, x), ours(x, x, x), rtol=0, atol=0)


# The is_causal hint.


@pytest.mark.parametrize("keys", [L, S, L - 2])
@pytest.mark.parametrize("padding", [False, True])
def test_hint_replaces_the_mask(padding, keys):
    theirs, ours = pair(E, H, batch_first=True)
    query, memory = rand(N, L, E), rand(N, keys, E)
    causal = torch.ones(L, keys, dtype=torch.bool).triu(1)
    given = {"key_padding_mask": bool_mask(N, keys)} if padding else {}
    want, _ = theirs(query, memory, memory, attn_mask=causal, need_weights=False, **given)
    unread = torch.full((L, keys), torch.nan, dtype=torch.float64)
    got, _ = ours(query, memory, memory, attn_mask=unread, is_causal=True, need_weights=False, **given)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("config", ["plain", "bias_kv", "zero_attn"])
def test_correct_hint_changes_nothing(config):
    theirs, ours = pair(E, H, batch_first=True, **CONFIGS[config])
    x = rand(N, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    for weights in WEIGHTS.values():
        want = theirs(x, x, x, attn_mask=mask, **weights)
        got = ours(x, x, x, attn_mask=mask, is_causal=True, **weights)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


# Rows with nothing to attend to.


@pytest.mark.parametrize("bool_padding", [True, False])
def test_fully_padded_sequence_is_zero_and_finite(bool_padding):
    _, ours = pair(E, H, batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1] = True
    if not bool_padding:
        padding = torch.zeros(N, L, dtype=torch.float64).masked_fill(padding, -torch.inf)
    for weights in WEIGHTS.values():
        out, w = ours(x, x, x, key_padding_mask=padding, **weights)
        torch.testing.assert_close(out[1], ours.out_proj.bias.expand(L, E), rtol=0, atol=0)
        assert w is None or not w[1].any()
        loss = (out**2).sum() + (0 if w is None else (w**2).sum())
        grad = torch.autograd.grad(loss, [x, *ours.parameters()])
        assert all(g.isfinite().all() for g in grad)
        assert not grad[0][1].any() and grad[0][0].any()


@pytest.mark.parametrize("bool_padding", [True, False])
def test_nothing_comes_through_padding_not_even_nan(bool_padding):
    _, ours = pair(E, H, batch_first=True)
    query, memory = rand(N, L, E).requires_grad_(), rand(N, S, E)
    padding = bool_mask(N, S)
    unfit = memory.masked_fill(padding[..., None], torch.nan)
    if not bool_padding:
        padding = torch.zeros(N, S, dtype=torch.float64).masked_fill(padding, -torch.inf)
    for weights in WEIGHTS.values():
        want, got = (ours(query, m, m, key_padding_mask=padding, **weights) for m in (memory, unfit))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        want, got = (torch.autograd.grad(out.square().sum(), query)[0] for out in (want[0], got[0]))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


# Dropout.


def test_dropout_in_training():
    theirs, ours = pair(E, H, dropout=0.5)
    x = rand(L, N, E)
    both = []
    for m in (theirs, ours):
        torch.manual_seed(5)
        both.append(m(x, x, x))
    torch.testing.assert_close(both[1], both[0], rtol=1e-9, atol=1e-10)
    assert (both[1][1] == 0).any()
    theirs.eval(), ours.eval()
    for weights in WEIGHTS.values():
        torch.testing.assert_close(ours(x, x, x, **weights), theirs(x, x, x, **weights), rtol=1e-9, atol=1e-10)


def test_dropout_without_weights():
    """In the kernel: each weight is dropped, or doubled, as torch's generator says."""
    _, m = pair(E, H, dropout=0.5, bias=False)
    x = rand(L, N, E)
    weights = m.eval()(x, x, x, average_attn_weights=False)[1]
    outputs = []
    for seed in (5, 6, 5):
        torch.manual_seed(seed)
        outputs.append(m.train()(x, x, x, need_weights=False)[0])
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    assert torch.autograd.grad(outputs[0].sum(), m.in_proj_weight)[0].any()

    torch.manual_seed(5)  # of queries that attend to all keys alike, with values that tell these apart
    zeros, eye = x.new_zeros(N, H, L, 1), torch.eye(L, dtype=x.dtype).expand(N, H, L, L)
    factors = L * heedful.attention(zeros, zeros, eye, dropout_p=0.5)
    torch.testing.assert_close(factors.unique(), torch.tensor([0.0, 2.0], dtype=x.dtype))
    v = nn.functional.linear(x, m.in_proj_weight[-E:]).view(L, N, H, E // H).permute(1, 2, 0, 3)
    out = ((weights * factors) @ v).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(outputs[0], m.out_proj(out), rtol=1e-9, atol=1e-10)


# Memory.


class Record(TorchDispatchMode):
    """Every op that runs, and the largest tensor that an op other than attention made."""

    def __init__(self):
        super().__init__()
        self.ops, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_no_copies_and_no_dense_mask(kind):
    long = 200
    _, ours = pair(E, H, batch_first=True, dtype=torch.float32)
    query = torch.randn(N, long, E)
    memory = query if kind == "self" else torch.randn(N, long, E)
    padding = bool_mask(N, long)
    mask = torch.zeros(long, long)
    with Record() as record:
        ours(query, memory, memory, key_padding_mask=padding, attn_mask=mask, is_causal=True, need_weights=False)
    made = {op.split(".")[1] for op in record.ops}
    assert "attention_forward" in made
    # The rest are GEMMs, views, and the one small negation.
    assert made <= {
        "attention_forward", "addmm", "t", "view", "_unsafe_view", "transpose", "split", "split_with_sizes",
        "slice", "unsqueeze", "bitwise_not", "detach", "alias",
    }  # fmt: skip
    assert record.ops.count("aten.addmm.default") == (2 if kind == "self" else 3)
    assert record.largest == N * long * E * (3 if kind == "self" else 2)


@pytest.mark.parametrize("layout", ["batch first", "sequence first"])
def test_result_is_contiguous(layout):
    _, ours = pair(E, H, batch_first=layout == "batch first")
    assert ours(*leaves("self", layout, ours), need_weights=False)[0].is_contiguous()


# Compiling.


@pytest.mark.parametrize("masks", ["none", "bool, padding", "float 3d"])
def test_compile_fullgraph(masks):
    _, ours = pair(E, H, batch_first=True)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    given = MASKS[masks](N, L, L)
    inputs = leaves("self", "batch first", ours)
    for weights in WEIGHTS.values():
        want = results(ours, inputs, given, 1, **weights)
        ours_compiled = results(compiled, inputs, given, 1, **weights)
        assert_same({k.removeprefix("_orig_mod."): v for k, v in ours_compiled.items()}, want, rtol=1e-9, atol=1e-10)


# Errors: the type that torch raises, and a message that says what was wrong.


def bools(*shape):
    return torch.zeros(*shape, dtype=torch.bool)


X = rand(N, L, E)
ERRORS = {
    "query rank": ((X[None], X, X), {}, "2D or batched 3D tensor but received 4-D"),
    "key rank": ((X, X[0], X), {}, "expected `key` and `value` to be 3-D but found 2-D and 3-D"),
    "unbatched ranks": ((X[0], X, X), {}, "expected `key` and `value` to be 2-D"),
    "embed_dim": ((rand(N, L, E + 2),) * 3, {}, "was expecting embedding dimension of 8, but got 10"),
    "key and value": ((X, rand(N, S, E), X), {}, "does not match value"),
    "batch sizes": ((X, X[:2], X[:2]), {}, "3.*2|2.*3"),
    "dtype": ((X.float(),) * 3, {}, "dtype"),
    "mask dtype": ((X,) * 3, {"attn_mask": bools(L, L).int()}, "bool and floating types of attn_mask"),
    "mask rank": ((X,) * 3, {"attn_mask": bools(1, 1, L, L)}, "2-D or 3-D but found 4-D"),
    "mask 2d": ((X,) * 3, {"attn_mask": bools(L, S)}, r"2D attn_mask is .*5, 7.*should be \(5, 5\)"),
    "mask 3d": ((X,) * 3, {"attn_mask": bools(N, L, L)}, r"3D attn_mask is .*3, 5, 5.*should be \(6, 5, 5\)"),
    "unbatched mask 3d": ((X[0],) * 3, {"attn_mask": bools(1, L, L)}, "`attn_mask` shape to be"),
    "padding dtype": ((X,) * 3, {"key_padding_mask": bools(N, L).int()}, "bool and floating types of key_padding_mask"),
    "padding rank": ((X,) * 3, {"key_padding_mask": bools(L)}, "`key_padding_mask` to be `None` or 2-D"),
    "padding size": ((X,) * 3, {"key_padding_mask": bools(N, S)}, r"to be \(3, 5\), but got .*3, 7"),
    "padding batch": ((X,) * 3, {"key_padding_mask": bools(1, L)}, r"to be \(3, 5\), but got .*1, 5"),
    "hint without mask": ((X,) * 3, {"is_causal": True}, "Need attn_mask if specifying the is_causal hint"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_those_of_torch(case):
    inputs, given, message = ERRORS[case]
    theirs, ours = pair(E, H, batch_first=True)
    for weights in ({"need_weights": False}, {"need_weights": True}):
        with pytest.raises((AssertionError, RuntimeError)) as expected:
            theirs(*inputs, **given, **weights)
        with pytest.raises(expected.type, match=message):
            ours(*inputs, **given, **weights)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ((N, S, 7), (N, S, 10), "key .*dimension of 6, but got 7"),
        ((N, S, 6), (N, S, 9), "value .*dimension of 10, but got 9"),
        ((N, S, 6), (N, L, 10), "do not match value's"),
    ],
)
def test_errors_of_separate_dims_are_those_of_torch(key, value, message):
    theirs, ours = pair(E, H, batch_first=True, **CONFIGS["kdim, vdim"])
    inputs = X, rand(*key), rand(*value)
    with pytest.raises(AssertionError):
        theirs(*inputs)
    with pytest.raises(AssertionError, match=message):
        ours(*inputs)


def test_constructor_errors_are_those_of_torch():
    with pytest.raises(AssertionError, match="divisible"):
        heedful.nn.MultiheadAttention(7, 2)
    with pytest.raises(ValueError, match="greater than 0"):
        heedful.nn.MultiheadAttention(0, 2)


def test_nested_tensors_raise():
    _, ours = pair(E, H, batch_first=True)
    x = torch.nested.nested_tensor([rand(3, E), rand(4, E)], layout=torch.jagged)
    with pytest.raises(AssertionError, match="nested"):
        ours(x, x, x)


def test_a_layer_that_would_bypass_it_raises():
    layer = nn.TransformerEncoderLayer(E, H, dropout=0.0, batch_first=True).eval()
    want_from = copy.deepcopy(layer)
    ours = heedful.nn.MultiheadAttention(E, H, batch_first=True).eval()
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    x = torch.randn(N, L, E)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"heedful\.swap\(model\)"):
            layer(x)
        report = heedful.swap(layer)
        assert report.replaced == () and report.fast_paths == ("",)
        torch.testing.assert_close(layer(x), want_from(x))
