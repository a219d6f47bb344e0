"""heedful.swap and heedful.patched in torch's transformers and in others: equal results, by kernels that really ran."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.utils._python_dispatch import TorchDispatchMode

import heedful

N, H, E, L, S = 3, 2, 8, 6, 4


class Count(TorchDispatchMode):
    """Calls of heedful's forward and backward kernels."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.heedful.attention_forward.default
        self.backward += func is torch.ops.heedful.attention_backward.default
        return func(*args, **(kwargs or {}))


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def causal(length):
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


def padding(length):
    mask = torch.zeros(N, length, dtype=torch.bool)
    mask[1, length - 2 :] = True
    return mask


def build(make):
    torch.manual_seed(0)
    return make()


OPTIONS = {"d_model": E, "nhead": H, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}


def encoder_layer(**kwargs):
    return nn.TransformerEncoderLayer(**OPTIONS, **kwargs)


MODELS = {  # name: (constructor, number of attention modules, arguments, more arguments with which there is padding)
    "encoder layer": (encoder_layer, 1, (rand(N, L, E),), {"src_key_padding_mask": padding(L)}),
    "encoder layer, norm first, gelu": (
        lambda: encoder_layer(norm_first=True, activation="gelu"),
        1,
        (rand(N, L, E), causal(L)),
        {"src_key_padding_mask": padding(L).double().masked_fill(padding(L), -torch.inf), "is_causal": True},
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(encoder_layer(), 2),
        2,
        (rand(N, L, E),),
        {"src_key_padding_mask": padding(L)},
    ),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(**OPTIONS),
        2,
        (rand(N, L, E), rand(N, S, E), causal(L)),
        {"tgt_is_causal": True, "memory_key_padding_mask": padding(S)},
    ),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**OPTIONS), 2),
        4,
        (rand(N, L, E), rand(N, S, E), causal(L)),
        {"tgt_is_causal": True, "memory_key_padding_mask": padding(S)},
    ),
    "transformer": (
        lambda: nn.Transformer(**OPTIONS, num_encoder_layers=2, num_decoder_layers=1),
        4,
        (rand(N, S, E), rand(N, L, E), None, causal(L)),
        {"tgt_is_causal": True, "src_key_padding_mask": padding(S), "memory_key_padding_mask": padding(S)},
    ),
}


@pytest.fixture(params=MODELS)
def models(request):
    make, count, inputs, padded = MODELS[request.param]
    theirs, ours = build(make), build(make)
    report = heedful.swap(ours)
    assert len(report.replaced) == count and not report.left
    # torch's encoder writes zeros to padded positions in its native fast path: those are not compared.
    kept = ~padding(L) if request.param.startswith("encoder") else torch.ones(N, L, dtype=torch.bool)
    return theirs, ours, count, inputs, padded, kept


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("pad", [False, True])
def test_train(models, pad):
    theirs, ours, count, inputs, padded, _ = models
    given = padded if pad else {}
    torch.manual_seed(1)
    downstream = rand(N, L, E)
    want = theirs(*inputs, **given)
    (want * downstream).sum().backward()
    with Count() as calls:
        got = ours(*inputs, **given)
        (got * downstream).sum().backward()
    assert (calls.forward, calls.backward) == (count, count)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("pad", [False, True])
def test_eval_without_grad(models, pad):
    theirs, ours, count, inputs, padded, kept = models
    given = padded if pad else {}
    theirs.eval(), ours.eval()
    with torch.no_grad():
        want = theirs(*inputs, **given)
        with Count() as calls:
            got = ours(*inputs, **given)
    assert calls.forward == count
    torch.testing.assert_close(got[kept], want[kept], rtol=1e-9, atol=1e-10)


def test_keeps_the_module_and_all_that_is_in_it():
    model = nn.Sequential(nn.Linear(E, E), nn.MultiheadAttention(E, H, dtype=torch.float64).eval())
    module = model[1]
    seen = []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    parameters = dict(model.named_parameters())
    heedful.swap(model)
    assert model[1] is module and type(module) is heedful.nn.MultiheadAttention and not module.training
    assert all(p is parameters[name] for name, p in model.named_parameters())
    x = rand(L, N, E)
    with Count() as calls:
        module(x, x, x)
    assert seen == ["forward"] and calls.forward == 1


def test_optimizer_made_before():
    module = build(lambda: nn.MultiheadAttention(E, H, dtype=torch.float64))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    heedful.swap(module)
    x = rand(L, N, E)
    before = module(x, x, x, need_weights=False)[0].square().sum()
    before.backward()
    optimizer.step()
    assert module(x, x, x, need_weights=False)[0].square().sum() < before


def test_the_model_itself():
    module = nn.MultiheadAttention(E, H)
    assert heedful.swap(module).replaced == ("",)
    assert type(module) is heedful.nn.MultiheadAttention


def test_shared_module_stays_shared():
    shared = nn.MultiheadAttention(E, H)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.MultiheadAttention(E, H)])})
    assert heedful.swap(model).replaced == ("a", "b.1")
    assert model["a"] is model["b"][0] and type(model["a"]) is heedful.nn.MultiheadAttention


class Louder(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


def test_what_is_left_alone_is_said():
    parametrized, replaced_forward = nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H)
    nn.utils.parametrizations.weight_norm(parametrized, "in_proj_weight")
    replaced_forward.forward = lambda *args: args
    model = nn.ModuleDict(
        {
            "plain": nn.MultiheadAttention(E, H),
            "subclass": Louder(E, H),
            "parametrized": parametrized,
            "replaced": replaced_forward,
            "ours": heedful.nn.MultiheadAttention(E, H),
        }
    )
    classes = {name: type(m) for name, m in model.items()}
    report = heedful.swap(model)
    assert report.replaced == ("plain",)
    assert report.left.keys() == {"subclass", "parametrized", "replaced"}
    assert {name for name, m in model.items() if type(m) is not classes[name]} == {"plain"}
    said = repr(report)
    assert "1 torch.nn.MultiheadAttention replaced" in said and "  plain\n" in said
    assert "subclass: Louder is a subclass" in said
    assert "parametrized: ParametrizedMultiheadAttention is a subclass" in said
    assert "replaced: its forward was replaced" in said


def test_fast_paths_are_said_and_a_second_swap_finds_nothing():
    model = nn.Sequential(nn.TransformerEncoder(encoder_layer(), 2))
    report = heedful.swap(model)
    assert report.fast_paths == ("0", "0.layers.0", "0.layers.1")
    assert "3 native fast paths turned off" in repr(report)
    again = heedful.swap(model)
    assert (again.replaced, again.left, again.fast_paths) == ((), {}, ())


def test_layer_without_swapped_attention_keeps_its_fast_path():
    layer = encoder_layer()
    layer.self_attn = Louder(E, H, batch_first=True)
    model = nn.ModuleList([layer, nn.MultiheadAttention(E, H)])
    assert heedful.swap(model).fast_paths == ()
    assert layer.activation_relu_or_gelu == 1


def test_not_a_module():
    with pytest.raises(TypeError, match=r"heedful\.swap: model: expected a torch\.nn\.Module, got function"):
        heedful.swap(lambda x: x)


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load], ids=["deepcopy", "pickle", "save"]
)
def test_copies_of_a_swapped_model(clone):
    model = build(lambda: nn.TransformerEncoder(encoder_layer(), 2)).eval()
    heedful.swap(model)
    x = rand(N, L, E)
    other = clone(model)
    with torch.no_grad(), Count() as calls:
        got = other(x, src_key_padding_mask=padding(L))
        want = model(x, src_key_padding_mask=padding(L))
    assert calls.forward == 4
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_checkpoints_fit_both_ways():
    make = MODELS["transformer"][0]
    theirs, ours = make(), make()
    heedful.swap(ours)
    ours.load_state_dict(theirs.state_dict())
    fresh = make()
    fresh.load_state_dict(ours.state_dict())
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=0, atol=0)


def graphs_of(function):
    """`function` compiled without graph breaks, and the list to which every graph's text is added."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend), graphs


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_compile_fullgraph(models):
    theirs, ours, _, inputs, padded, _ = models
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    want, got = theirs(*inputs, **padded), compiled(*inputs, **padded)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    want.sum().backward()
    got.sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10)


def test_swap_of_a_compiled_model():
    model = build(encoder_layer)
    compiled, graphs = graphs_of(model)
    x = rand(N, L, E)
    want = compiled(x)
    assert "heedful" not in graphs[-1]
    assert heedful.swap(compiled).replaced == ("_orig_mod.self_attn",)
    torch.testing.assert_close(compiled(x), want, rtol=1e-9, atol=1e-10)
    assert "heedful" in graphs[-1]


# patched


def qkv():
    return tuple(rand(N, H, L, E) for _ in range(3))


@pytest.mark.parametrize(
    "call",
    [
        F.scaled_dot_product_attention,
        imported_by_name,
        lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True, scale=0.3),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(L, L, dtype=torch.bool).tril()),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    ],
    ids=["attribute", "imported by name", "keywords", "mask", "gqa"],
)
def test_patched(call):
    arguments = qkv()
    want = call(*arguments)
    with Count() as calls:
        with heedful.patched():
            got = call(*arguments)
        assert calls.forward == 1
        call(*arguments)
    assert calls.forward == 1, "a call after the block was routed"
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_patched_nests_and_ends_with_an_exception():
    with Count() as calls:
        with heedful.patched():
            with heedful.patched():
                F.scaled_dot_product_attention(*qkv())
            F.scaled_dot_product_attention(*qkv())
        with pytest.raises(ZeroDivisionError), heedful.patched():
            raise ZeroDivisionError
        F.scaled_dot_product_attention(*qkv())
    assert calls.forward == 2


def test_patched_is_a_decorator():
    call = heedful.patched()(F.scaled_dot_product_attention)
    for _ in range(2):
        with Count() as calls:
            call(*qkv())
        assert calls.forward == 1


def test_patched_leaves_other_threads_alone():
    entered, checked, counts = threading.Event(), threading.Event(), {}

    def count(name):
        with Count() as calls:
            F.scaled_dot_product_attention(*qkv())
        counts[name] = calls.forward

    def inside():
        with heedful.patched():
            entered.set()
            assert checked.wait(10)
            count("inside")

    thread = threading.Thread(target=inside)
    thread.start()
    assert entered.wait(10)
    count("outside")
    checked.set()
    thread.join()
    assert counts == {"inside": 1, "outside": 0}


def test_dropout_in_training():
    """A swapped model and a patched one drop weights by torch's generator, and are exact again in eval."""
    model = nn.TransformerEncoderLayer(**{**OPTIONS, "dropout": 0.5})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # what is left is attention's own
    swapped, x = copy.deepcopy(model), rand(N, L, E)
    heedful.swap(swapped)

    def patched(x):
        with heedful.patched():
            return model(x)

    for run in (swapped, patched):
        swapped.train(), model.train()
        outputs = []
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            outputs.append(run(x))
        assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
        swapped.eval(), model.eval()
        torch.testing.assert_close(run(x), model(x))


def test_patched_does_not_fall_back():
    with (
        heedful.patched(),
        pytest.raises(RuntimeError, match="heedful.*expected float32, float64, bfloat16 or float16"),
    ):
        F.scaled_dot_product_attention(*(x.to(torch.float8_e4m3fn) for x in qkv()))


@pytest.mark.parametrize("device", [False, True], ids=["", "under a default device"])
@pytest.mark.parametrize("no_grad", [False, True], ids=["grad", "no grad"])
def test_patched_reaches_torch_modules(no_grad, device):
    model = build(MODELS["transformer"][0]).train(not no_grad)
    _, count, inputs, _ = MODELS["transformer"]
    with torch.set_grad_enabled(not no_grad):
        want = model(*inputs)
        with torch.device("cpu") if device else torch.set_grad_enabled(not no_grad):
            with Count() as calls, heedful.patched():
                got = model(*inputs)
    assert calls.forward == count
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_patched_keeps_the_rest_of_multi_head_attention():
    module = build(lambda: nn.MultiheadAttention(E, H, add_bias_kv=True, add_zero_attn=True, dtype=torch.float64))
    x = rand(L, N, E)
    for need_weights in (True, False):
        want = module(x, x, x, need_weights=need_weights, key_padding_mask=padding(L))
        with heedful.patched():
            got = module(x, x, x, need_weights=need_weights, key_padding_mask=padding(L))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_patched_around_a_compiled_function():
    call, graphs = graphs_of(lambda *qkv: F.scaled_dot_product_attention(*qkv) + 1)
    arguments = qkv()
    want = call(*arguments)
    with heedful.patched():
        got = call(*arguments)
    assert call(*arguments).equal(want)
    assert ["heedful" in graph for graph in graphs] == [False, True]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_patched_inside_a_compiled_function():
    def function(*qkv):
        with heedful.patched():
            routed = F.scaled_dot_product_attention(*qkv)
        return routed, F.scaled_dot_product_attention(*qkv)

    call, graphs = graphs_of(function)
    got, want = call(*qkv())
    assert len(graphs) == 1
    assert "heedful.attention_forward" in graphs[0] and "scaled_dot_product_attention" in graphs[0]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def bert(transformers):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.BertModel(config)


def gpt2(transformers):
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_implementation="sdpa",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(transformers):  # grouped queries
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_patched_hugging_face_model(make, pad):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = build(lambda: make(transformers)).eval()
    ids = torch.randint(50, (N, L))
    mask = (~padding(L)).long() if pad else None
    want = model(ids, attention_mask=mask)[0]
    with Count() as calls, heedful.patched():
        got = model(ids, attention_mask=mask)[0]
    assert calls.forward == 2
    kept = torch.ones(N, L, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(got[kept], want[kept], rtol=1e-4, atol=1e-5)
