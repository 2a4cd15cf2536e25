"""The network in little memory: frozen layers, recomputation, what is kept for the backward, mixed precision."""

import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cacr_uniter.model import UniterForRetrieval

from .tiny_model import FIXTURES, make_batch

model = FIXTURES


def test_frozen_prefix_keeps_no_activations(model: UniterForRetrieval) -> None:
    model.train()
    model.freeze_layers(2)
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(make_batch())
    assert not output.last_input.requires_grad
    frozen_saved = len(saved)
    output.rank_scores.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(name.startswith(("uniter.encoder.layer.2.", "uniter.pooler.", "rank_output.")) for name in trained)
    assert "uniter.encoder.layer.2.output.dense.weight" in trained
    model.freeze_layers(0)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(make_batch())
    assert len(saved) > 2 * frozen_saved
    assert all(p.requires_grad for name, p in model.named_parameters() if "mask_embedding" not in name)


@pytest.mark.parametrize("count", [-1, 4])
def test_freezing_more_layers_than_there_are_is_refused(model: UniterForRetrieval, count: int) -> None:
    with pytest.raises(ValueError, match="count: expected 0 to 3"):
        model.freeze_layers(count)


def test_recomputed_activations_give_the_same_gradients(model: UniterForRetrieval) -> None:
    model.train()
    gradients = []
    for recompute in (False, True):
        model.checkpoint_activations(recompute)
        model.zero_grad()
        torch.manual_seed(3)
        model(make_batch()).rank_scores.sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name


def test_scores_are_not_rounded_under_autocast(model: UniterForRetrieval) -> None:
    """In bfloat16 the scores of a hundred pairs had two dozen values, and ties decide ranks."""
    batch = make_batch(0, (3, 1, 5, 4) * 25, (2, 4, 3, 1, 5) * 20)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.eval()(batch)
    assert output.rank_scores.dtype == output.itm_logits.dtype == torch.float32
    assert len(output.rank_scores.unique()) == len(output.itm_logits[:, 1].unique()) == 100


def test_layer_norm_is_float32_under_autocast(model: UniterForRetrieval) -> None:
    """A row whose variance float16 cannot hold beside eps: in half precision the norm would be wrong."""
    norm = model.uniter.embeddings.LayerNorm
    row = torch.linspace(-1e-4, 1e-4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = norm(row)
        scores = model(make_batch())
    assert output.dtype == torch.float32
    assert output.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    assert scores.rank_scores.dtype == scores.itm_logits.dtype == scores.last_input.dtype == torch.float32


def test_attention_keeps_its_input_once_under_autocast(model: UniterForRetrieval) -> None:
    attention = model.uniter.encoder.layer[0].attention.self
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    kept = set()

    def keep(x: torch.Tensor) -> torch.Tensor:
        if torch.equal(x.flatten(), hidden.bfloat16().flatten()):
            kept.add(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", dtype=torch.bfloat16):
        context = attention(hidden, torch.ones(2, 1, 1, 5, dtype=torch.bool))
    assert context.requires_grad
    assert len(kept) == 1


def test_only_the_argument_of_gelu_is_kept(model: UniterForRetrieval, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward computes GELU again, to the same gradients as with what it would have kept."""
    model.train().set_dropout(0.0)
    gelu, kept = F.gelu, []

    def watched(x: torch.Tensor) -> torch.Tensor:
        output = gelu(x)
        kept.append(weakref.ref(output.untyped_storage()))
        return output

    monkeypatch.setattr(F, "gelu", watched)
    gradients = []
    for whole in (False, True):
        kept.clear()
        model.zero_grad()
        forward = type(model.uniter.encoder.layer[0]).forward
        for layer in model.uniter.encoder.layer:
            monkeypatch.setattr(layer, "forward", partial(forward, layer, whole=whole))
        loss = model(make_batch()).rank_scores.sum()
        assert len(kept) == 3
        assert [storage() is not None for storage in kept] == [whole] * 3
        loss.backward()
        assert len(kept) == (3 if whole else 6)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name
