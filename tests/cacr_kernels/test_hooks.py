"""QueriesAndKeys: the q and k of a layer's own attention whatever its options, and clear words where there are none."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cacr_kernels import QueriesAndKeys, fused_cacr_qk

LAYERS = {
    "batch first": {"batch_first": True},
    "sequence first": {},
    "no bias": {"bias": False, "batch_first": True},
    "keys of another width": {"kdim": 24, "vdim": 16},
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_of_multihead_attention(options, named):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, **options)
    for bias in (layer.in_proj_bias, layer.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    last = QueriesAndKeys(layer)
    shape = (3, 7) if layer.batch_first else (7, 3)
    inputs = {
        "query": torch.randn(*shape, 16),
        "key": torch.randn(*shape, layer.kdim),
        "value": torch.randn(*shape, 16),
    }
    if named:
        _, attention = layer(**inputs, average_attn_weights=False)
    else:
        _, attention = layer(*inputs.values(), average_attn_weights=False)
    q, k = last()
    assert q.shape == k.shape == (3, 4, 7, 4)
    torch.testing.assert_close((q @ k.mT / 2).softmax(-1), attention)


def test_of_one_example_without_a_batch():
    layer = nn.MultiheadAttention(16, 4)
    last, x = QueriesAndKeys(layer), torch.randn(7, 16)
    _, attention = layer(x, x, x, average_attn_weights=False)
    q, k = last()
    torch.testing.assert_close((q @ k.mT / 2).softmax(-1)[0], attention)


class Attention(nn.Module):
    """As in Hugging Face's models: two heads for one head of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.query, self.key, self.value))
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def of_linears(layer):
    return QueriesAndKeys.of_linears(layer.query, layer.key, 4, key_heads=2)


def test_of_linears():
    layer, x = Attention(), torch.randn(3, 7, 16)
    last = of_linears(layer)
    layer(x)
    q, k = last()
    assert (q.shape, k.shape) == ((3, 4, 7, 4), (3, 2, 7, 4))
    torch.testing.assert_close(q[:, 1], layer.query(x)[..., 4:8])
    torch.testing.assert_close(k[:, 1], layer.key(x)[..., 4:])
    fused_cacr_qk(q, k, 3).backward()
    assert layer.key.weight.grad.abs().sum() > 0


def test_inside_a_compiled_step():
    torch._dynamo.reset()
    layer, x = Attention(), torch.randn(3, 7, 16)
    last = of_linears(layer)

    def step(x):
        return layer(x).sum() + fused_cacr_qk(*last(), 3)

    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(x), step(x))


def test_checkpointed_layers():
    layer, x = Attention(), torch.randn(3, 7, 16, requires_grad=True)
    last = of_linears(layer)
    checkpoint(layer, x, use_reentrant=False)
    kept = torch.autograd.grad(fused_cacr_qk(*last(), 3), layer.query.weight)[0]
    layer(x)
    torch.testing.assert_close(kept, torch.autograd.grad(fused_cacr_qk(*last(), 3), layer.query.weight)[0])
    checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        last()
    with torch.no_grad():
        layer(x)
        assert torch.isfinite(fused_cacr_qk(*last(), 3))


def test_a_model_with_hooks_can_be_saved_and_copied():
    model = nn.Sequential(nn.Linear(16, 16), Attention())
    last, x = of_linears(model[1]), torch.randn(3, 7, 16)
    model(x)
    torch.save(model, io.BytesIO())
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), model(x))
    assert last()[0].requires_grad


def test_bad_layers_and_calls():
    with pytest.raises(TypeError, match=r"expects an nn.MultiheadAttention, got Linear: .*of_linears"):
        QueriesAndKeys(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no add_bias_kv"):
        QueriesAndKeys(nn.MultiheadAttention(16, 4, add_bias_kv=True))
    layer = Attention()
    last = QueriesAndKeys.of_linears(layer.query, layer.key, 3)
    with pytest.raises(RuntimeError, match="run the model first"):
        last()
    layer(torch.randn(3, 7, 16))
    with pytest.raises(ValueError, match=r"\[B, N, 3 heads \* D\], got \[3, 7, 16\]"):
        last()


class Stack(nn.Module):
    def __init__(self, layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_compiled_layers_that_share_code_have_their_own_hooks():
    """Dynamo leaves hooks out of its guards unless told: the last layer would run the code of the first."""
    torch._dynamo.reset()
    model = Stack([Attention(), Attention(), Attention()])  # the first has code of its own: its input has no gradient
    last = of_linears(model.layers[-1])
    inputs = [torch.randn(3, 7, 16) for _ in range(2)]
    model(inputs[0])
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    model(inputs[1])
    compiled = [x.detach() for x in last()]
    last.remove()
    again = of_linears(model.layers[-1])
    with torch._dynamo.config.patch(disable=True):
        model(inputs[1])
    torch.testing.assert_close(compiled, [x.detach() for x in again()])


def test_removed_hooks_catch_nothing():
    layer, x = Attention(), torch.randn(3, 7, 16)
    last = of_linears(layer)
    layer(x)
    last.remove()
    layer(x)
    with pytest.raises(RuntimeError, match="has seen no call"):
        last()
    assert not layer.query._forward_hooks


def test_a_model_and_its_hooks_are_copied_together():
    layer, x = Attention(), torch.randn(3, 7, 16)
    copied, last = copy.deepcopy((layer, of_linears(layer)))
    copied(x)
    assert last()[0].shape == (3, 4, 7, 4)
    last.remove()
    assert not copied.query._forward_hooks


def test_inputs_of_another_dtype_than_the_weights():
    """The model ran under autocast, and `last()` is called after it."""
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    last, x = QueriesAndKeys(layer), torch.randn(3, 7, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, x, x)
    q, k = last()
    assert q.dtype == k.dtype == torch.bfloat16
    fused_cacr_qk(q, k, 3).backward()
    assert layer.in_proj_weight.grad.dtype == torch.float32


def test_nested_tensors_are_refused_in_words():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    last = QueriesAndKeys(model.layers[0].self_attn)
    query, key = (torch.nested.nested_tensor([torch.randn(n, 16) for n in (3, 5)]) for _ in "qk")
    last._keep_inputs(model, (query, key), {})
    with torch.no_grad(), pytest.raises(TypeError, match=r"nested tensor .*enable_nested_tensor=False"):
        last()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(2)}, TypeError, "query to be an nn.Module, got Tensor"),
        ({"heads": "4"}, TypeError, "heads to be an int, got str"),
        ({"heads": True}, TypeError, "heads to be an int, got bool"),
        ({"heads": 0}, ValueError, "heads to be at least 1, got 0"),
        ({"key_heads": 0}, ValueError, "key_heads to be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(change, error, message):
    layer = Attention()
    with pytest.raises(error, match=message):
        QueriesAndKeys.of_linears(**{"query": layer.query, "key": layer.key, "heads": 4, **change})
    assert not layer.key._forward_hooks


def test_one_linear_for_queries_and_keys_is_refused():
    fused = nn.Linear(16, 48)
    with pytest.raises(ValueError, match="fused projection"):
        QueriesAndKeys.of_linears(fused, fused, 4)


def test_a_layer_with_several_outputs_is_refused():
    last = QueriesAndKeys.of_linears(nn.Linear(4, 4), nn.Linear(4, 4), 2)
    last._query = last._key = (torch.ones(1), torch.ones(1))
    last._with_graph = True
    with pytest.raises(TypeError, match=r"queries in a dense tensor \[B, N, H \* D\], got tuple"):
        last()
