"""The network: published sizes and keys, the written formula, padding, initialisation, configuration."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cacr_uniter.data.batch import Batch, collate
from cacr_uniter.errors import UserError
from cacr_uniter.model import UniterConfig, UniterForRetrieval

from .tiny_model import FIXTURES, TINY, make_batch, make_pairs

model = FIXTURES


def pad(batch: Batch, columns: int, regions: int) -> Batch:
    """The same pairs with more padding, filled with numbers that must not matter."""
    return Batch(
        input_ids=F.pad(batch.input_ids, (0, columns), value=7),
        text_mask=F.pad(batch.text_mask, (0, columns)),
        features=F.pad(batch.features, (0, 0, 0, regions), value=9.0),
        boxes=F.pad(batch.boxes, (0, 0, 0, regions), value=3.0),
        region_mask=F.pad(batch.region_mask, (0, regions)),
        n_text=batch.n_text,
        n_regions=batch.n_regions,
    )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (UniterConfig.base(), (22_665_216, 1_588_480, 85_054_464, 590_592, 109_898_752, 109_901_059)),
        (UniterConfig.large(), (30_220_288, 2_116_608, 302_309_376, 1_049_600, 335_695_872, 335_698_947)),
    ],
    ids=["base", "large"],
)
def test_parameter_counts(config: UniterConfig, sizes: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = UniterForRetrieval(config)
    core = model.uniter
    parts = (core.embeddings, core.img_embeddings, core.encoder, core.pooler, core, model)
    assert tuple(count(part) for part in parts) == sizes


def test_state_dict_keys_and_shapes_are_the_published_ones(model: UniterForRetrieval) -> None:
    hidden, inner = TINY.hidden_size, TINY.intermediate_size
    expected: dict[str, list[int]] = {
        "embeddings.word_embeddings.weight": [40, hidden],
        "embeddings.position_embeddings.weight": [24, hidden],
        "embeddings.token_type_embeddings.weight": [2, hidden],
        "img_embeddings.mask_embedding.weight": [2, 10],
    }
    linears = {"img_embeddings.img_linear": [hidden, 10], "img_embeddings.pos_linear": [hidden, 7]}
    norms = ["embeddings.LayerNorm"]
    norms += [f"img_embeddings.{name}" for name in ("img_layer_norm", "pos_layer_norm", "LayerNorm")]
    for index in range(3):
        layer = f"encoder.layer.{index}"
        linears |= {f"{layer}.attention.self.{name}": [hidden, hidden] for name in ("query", "key", "value")}
        linears |= {f"{layer}.attention.output.dense": [hidden, hidden]}
        linears |= {f"{layer}.intermediate.dense": [inner, hidden], f"{layer}.output.dense": [hidden, inner]}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    linears["pooler.dense"] = [hidden, hidden]
    expected |= {f"{name}.weight": shape for name, shape in linears.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    expected |= {f"{name}.{part}": [hidden] for name in norms for part in ("weight", "bias")}
    expected = {f"uniter.{name}": shape for name, shape in expected.items()}
    expected |= {"itm_output.weight": [2, hidden], "itm_output.bias": [2]}
    expected |= {"rank_output.weight": [1, hidden], "rank_output.bias": [1]}
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected


def written_out(model: UniterForRetrieval, batch: Batch, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank score and last input of one pair from the formulas, without padding and without the model's modules."""
    weights = dict(model.state_dict())

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * weights[name + ".weight"] + weights[name + ".bias"]

    text, regions = int(batch.n_text[row]) + 2, int(batch.n_regions[row])
    types = weights["uniter.embeddings.token_type_embeddings.weight"]
    words = weights["uniter.embeddings.word_embeddings.weight"][batch.input_ids[row, :text]]
    positions = weights["uniter.embeddings.position_embeddings.weight"][:text]
    e_text = norm(words + positions + types[0], "uniter.embeddings.LayerNorm")
    image = "uniter.img_embeddings."
    looks = norm(linear(batch.features[row, :regions].double(), image + "img_linear"), image + "img_layer_norm")
    places = norm(linear(batch.boxes[row, :regions].double(), image + "pos_linear"), image + "pos_layer_norm")
    x = torch.cat([e_text, norm(looks + places + types[1], image + "LayerNorm")])
    entering = x
    for index in range(TINY.num_hidden_layers):
        entering, layer = x, f"uniter.encoder.layer.{index}."
        heads = []
        for head in range(TINY.num_attention_heads):
            part = slice(head * TINY.head_dim, (head + 1) * TINY.head_dim)
            q, k, v = (linear(x, f"{layer}attention.self.{name}")[:, part] for name in ("query", "key", "value"))
            heads.append(torch.softmax(q @ k.T / math.sqrt(TINY.head_dim), dim=-1) @ v)
        x = norm(
            x + linear(torch.cat(heads, -1), layer + "attention.output.dense"), layer + "attention.output.LayerNorm"
        )
        inner = linear(x, layer + "intermediate.dense")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(x + linear(inner, layer + "output.dense"), layer + "output.LayerNorm")
    pooled = torch.tanh(linear(x[0], "uniter.pooler.dense"))
    return linear(pooled, "rank_output")[0], entering


def scrambled(model: UniterForRetrieval) -> UniterForRetrieval:
    """Weights of deviation 0.4 instead of 0.02, so that every part of the network shows in the result."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return model


def test_forward_is_the_written_formula(model: UniterForRetrieval) -> None:
    model = scrambled(model).double().eval()
    batch = make_batch()
    output = model(as_double(batch))
    width = batch.input_ids.shape[1]
    for row in range(3):
        score, entering = written_out(model, batch, row)
        text, regions = int(batch.n_text[row]) + 2, int(batch.n_regions[row])
        torch.testing.assert_close(output.rank_scores[row], score, rtol=1e-10, atol=1e-10)
        kept = torch.cat([output.last_input[row, :text], output.last_input[row, width : width + regions]])
        torch.testing.assert_close(kept, entering, rtol=1e-10, atol=1e-10)


def as_double(batch: Batch) -> Batch:
    batch.features, batch.boxes = batch.features.double(), batch.boxes.double()
    return batch


def test_padding_changes_nothing(model: UniterForRetrieval) -> None:
    model = scrambled(model).eval()
    batch = make_batch()
    plain, padded = model(batch), model(pad(batch, 4, 6))
    torch.testing.assert_close(padded.rank_scores, plain.rank_scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded.itm_logits, plain.itm_logits, rtol=1e-5, atol=1e-5)
    for row in range(len(batch)):
        alone = model(make_pairs().batch(slice(row, row + 1)))
        torch.testing.assert_close(alone.rank_scores[0], plain.rank_scores[row], rtol=1e-5, atol=1e-5)


def test_regions_begin_at_the_padded_text_width(model: UniterForRetrieval) -> None:
    """One image with texts of different lengths: no region may be lost to a shorter last text."""
    model = scrambled(model).eval()
    image = (torch.randn(4, 10), torch.rand(4, 7))
    together = collate([[5, 6, 7, 8, 9, 10], [11]], [image, image], cls=2, sep=3).batch()
    alone = collate([[5, 6, 7, 8, 9, 10]], [image], cls=2, sep=3).batch()
    torch.testing.assert_close(model(together).rank_scores[0], model(alone).rank_scores[0], rtol=1e-5, atol=1e-5)
    assert together.spans()["vision_start"] == 8
    assert together.spans()["max_n_text"] == 6


def test_region_order_does_not_matter_but_word_order_does(model: UniterForRetrieval) -> None:
    model = scrambled(model).eval()
    features, boxes = torch.randn(4, 10), torch.rand(4, 7)
    order = torch.tensor([2, 0, 3, 1])
    images = [(features, boxes), (features[order], boxes[order]), (features, boxes)]
    scores = model(collate([[5, 6, 7], [5, 6, 7], [7, 6, 5]], images, cls=2, sep=3).batch()).rank_scores
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-5)
    assert (scores[2] - scores[0]).abs() > 1e-3


def test_last_layer_qk_are_the_layers_own(model: UniterForRetrieval) -> None:
    output = model(make_batch())
    q, k = model.last_layer_qk(output.last_input)
    rows = output.last_input.shape[1]
    assert q.shape == k.shape == (3, 2, rows, 8)
    attention = model.uniter.encoder.last.attention.self
    torch.testing.assert_close(q.transpose(1, 2).flatten(2), attention.query(output.last_input))
    torch.testing.assert_close(k.transpose(1, 2).flatten(2), attention.key(output.last_input))
    (q.square().sum() + k.square().sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    last, below = "uniter.encoder.layer.2.", "uniter.encoder.layer.1."
    for name in (
        last + "attention.self.query.weight",
        last + "attention.self.key.weight",
        below + "output.dense.weight",
    ):
        gradient = gradients[name]
        assert gradient is not None
        assert gradient.abs().sum() > 0
    assert gradients[last + "attention.self.value.weight"] is None
    assert gradients[last + "output.dense.weight"] is None


def test_dropout_is_overwritten_everywhere(model: UniterForRetrieval) -> None:
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(make_batch()).rank_scores, model(make_batch()).rank_scores)
    model.set_dropout(0.0)
    assert torch.equal(model(make_batch()).rank_scores, model(make_batch()).rank_scores)
    with pytest.raises(ValueError, match="probability"):
        model.set_dropout(1.0)


def test_initialisation(model: UniterForRetrieval) -> None:
    torch.manual_seed(1)
    first = UniterForRetrieval(TINY).state_dict()
    torch.manual_seed(1)
    second = UniterForRetrieval(TINY).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert model.uniter.embeddings.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.uniter.img_embeddings.mask_embedding.weight[0].any()
    assert not model.uniter.pooler.dense.bias.any()


def test_wrong_widths_are_named(model: UniterForRetrieval) -> None:
    batch = make_batch()
    batch.features = batch.features[..., :8]
    with pytest.raises(ValueError, match="img_dim=10, got 8"):
        model(batch)
    with pytest.raises(ValueError, match="at most 24 columns"):
        model(pad(make_batch(), 30, 0))


def test_batch_select() -> None:
    batch = make_batch()
    chosen = batch.select([1, 1, 0])
    assert chosen.n_text.tolist() == [1, 1, 3]
    assert chosen.input_ids.shape == batch.input_ids.shape
    assert len(batch.select([])) == 0


def test_pairs_keep_a_text_and_an_image_once_and_pad_to_the_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [(torch.randn(n, 10, generator=generator).half(), torch.rand(n, 7, generator=generator)) for n in (2, 4)]
    pairs = collate([[5, 6, 7], [8]], images, cls=2, sep=3, which=[(0, 1), (1, 0), (0, 0), (1, 0)])
    assert (len(pairs), len(pairs.input_ids), len(pairs.features)) == (4, 2, 2)
    assert pairs.features.dtype == torch.float16
    whole = pairs.batch()
    assert whole.features.dtype == torch.float32
    assert torch.equal(whole.features[2, :2], images[0][0].float())
    assert torch.equal(whole.boxes[0], images[1][1])
    assert whole.n_text.tolist() == whole.text_mask.sum(1).sub(2).tolist() == [3, 1, 3, 1]
    assert whole.n_regions.tolist() == whole.region_mask.sum(1).tolist() == [4, 2, 2, 2]
    for rows in (slice(1, 4), torch.tensor([1, 2, 3])):
        part = pairs.batch(rows)
        assert part.input_ids.tolist() == [[2, 8, 3, 0, 0], [2, 5, 6, 7, 3], [2, 8, 3, 0, 0]]
        assert part.features.shape == (3, 2, 10)
    assert pairs.batch(torch.tensor([3, 1])).input_ids.tolist() == [[2, 8, 3]] * 2
    assert len(pairs.batch(slice(0, 0))) == 0
    assert pairs.to("meta").batch(slice(1, 4)).features.shape == (3, 2, 10), "no length is read from the device"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 15}, "multiple of num_attention_heads"),
        ({"hidden_act": "relu"}, "gelu"),
        ({"num_hidden_layers": 0}, "positive int"),
        ({"hidden_dropout_prob": 1.0}, "probability"),
        ({"vocabulary": {"CLS": 101}}, "expected size and ids"),
        ({"vocabulary": {"size": "many"}}, "expected size and ids"),
    ],
)
def test_bad_configuration_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniterConfig(**values)


def test_published_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "uniter-large.json"
    keys = {key: value for key, value in UniterConfig.large().to_dict().items() if key != "img_dim"}
    assert len(keys) == 11
    path.write_text(json.dumps(keys))
    assert UniterConfig.from_json(path) == UniterConfig.large()
    for text, message in (("{", "not valid JSON"), ("[]", "JSON object"), ('{"layers": 3}', "unknown keys layers")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            UniterConfig.from_json(path)
    with pytest.raises(UserError, match="cannot be read"):
        UniterConfig.from_json(tmp_path / "absent.json")
