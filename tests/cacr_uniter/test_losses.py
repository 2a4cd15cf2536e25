"""The matching loss against its formula, the auxiliary loss against the specification of the kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cacr_kernels.reference import block_softmax, cacr_closed_form, iais_loss
from cacr_uniter.data.batch import Batch
from cacr_uniter.errors import UserError
from cacr_uniter.model import UniterConfig, UniterForRetrieval
from cacr_uniter.training.checks import check
from cacr_uniter.training.config import AuxConfig, LossConfig, TrainConfig
from cacr_uniter.training.losses import AuxiliaryLoss, matching_loss
from cacr_uniter.training.testing import VOCABULARY, synthetic_source


def test_margin_loss_by_hand() -> None:
    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    scores = torch.tensor([[logit(0.6), logit(0.5), logit(0.3)], [logit(0.2), logit(0.9), logit(0.2)]])
    expected = [(0.1 + 0.0) / 2, (0.9 + 0.2) / 2]
    torch.testing.assert_close(matching_loss(scores, LossConfig()), torch.tensor(expected))


def test_softmax_loss_is_cross_entropy_of_the_matched_pair() -> None:
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(5, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(matching_loss(scores, LossConfig(kind="softmax")), expected)


@pytest.mark.parametrize("kind", ["margin", "softmax"])
def test_half_precision_scores_are_compared_in_float32(kind: Any) -> None:
    scores = torch.randn(3, 4, dtype=torch.bfloat16)
    assert matching_loss(scores, LossConfig(kind=kind)).dtype == torch.float32


def scores_config(**fields: Any) -> AuxConfig:
    """CACR on each head's raw scores, by the reference backend."""
    return AuxConfig(**{"kind": "scores", "heads": "each", "backend": "reference"} | fields)


def pairs() -> tuple[Batch, Tensor, Tensor]:
    """Five ragged pairs with queries and keys [5, 3, S, 4]."""
    source = synthetic_source()
    captions = torch.arange(5).numpy() * 2
    batch = source.pairs(captions, source.image_of[captions]).batch()
    length = batch.input_ids.shape[1] + batch.features.shape[1]
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(5, 3, length, 4, generator=generator) for _ in range(2))
    return batch, q, k


def pair_scores(q: Tensor, k: Tensor, batch: Batch, i: int, tokens: int = 0) -> tuple[Tensor, int]:
    """Scores [A, n, n] of one pair without padding, and its number of text rows."""
    width, n_text, n_regions = batch.input_ids.shape[1], int(batch.n_text[i]), int(batch.n_regions[i])
    text = range(1 - tokens, 1 + n_text + tokens)
    keep = [*text, *range(width, width + n_regions)]
    return (q[i, :, keep].double() @ k[i, :, keep].double().mT) / math.sqrt(q.shape[-1]), len(text)


KINDS = [
    ("scores", "each"),
    ("softmax", "each"),
    ("probs", "mean"),
    ("scores", "mean-scores"),
    ("scores", "sum-scores"),
]


@pytest.mark.parametrize(("kind", "heads"), KINDS)
@pytest.mark.parametrize("sides", ["both", "text", "vision"])
@pytest.mark.parametrize("special_tokens", [False, True])
def test_cacr_of_a_ragged_batch_is_the_sum_over_its_pairs(
    kind: Any, heads: Any, sides: Any, special_tokens: bool
) -> None:
    batch, q, k = pairs()
    config = AuxConfig(kind=kind, heads=heads, sides=sides, special_tokens=special_tokens, backend="reference")
    expected = 0.0
    for i in range(5):
        scores, n_text = pair_scores(q, k, batch, i, int(special_tokens))
        if heads == "mean":
            scores = block_softmax(scores[None], n_text, heads="mean")[0]
        elif heads != "each":
            scores = scores.mean(0) if heads == "mean-scores" else scores.sum(0)
        expected += cacr_closed_form(scores, n_text, kind=kind, sides=sides, row_reduction="mean").item()
    actual = AuxiliaryLoss(config)(q, k, batch, "image")
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    "options", [{"projection_scale": "mean"}, {"projection_scale": 0.25}, {"row_reduction": "sum"}]
)
@pytest.mark.parametrize("scaled", [True, False])
def test_scales_and_reductions_reach_the_kernels(options: dict[str, Any], scaled: bool) -> None:
    batch, q, k = pairs()
    expected = 0.0
    for i in range(5):
        scores, n_text = pair_scores(q, k, batch, i)
        scores = scores if scaled else scores * math.sqrt(q.shape[-1])
        expected += cacr_closed_form(scores, n_text, **({"row_reduction": "mean"} | options)).item()
    config = scores_config(scaled=scaled, **options)
    assert AuxiliaryLoss(config)(q, k, batch, "image").item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("heads", ["each", "sum-scores"])
@pytest.mark.parametrize("kind", ["scores", "softmax"])
def test_from_queries_and_keys_it_is_the_same_loss(heads: Any, kind: Any) -> None:
    batch, q, k = pairs()
    losses = [
        AuxiliaryLoss(AuxConfig(source=source, kind=kind, heads=heads, backend="reference"))(q, k, batch, "image")
        for source in ("scores", "qk")
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["singular", "distributed"])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_iais_of_a_ragged_batch_is_the_sum_over_its_pairs(mode: Any, heads: Any) -> None:
    batch, q, k = pairs()
    expected = 0.0
    for i in range(5):
        scores, n_text = pair_scores(q, k, batch, i)
        expected += iais_loss(scores[None], n_text, mode=mode, heads=heads).item()
    actual = AuxiliaryLoss(AuxConfig(loss=f"iais-{mode}", heads=heads))(q, k, batch, "image")  # type: ignore[arg-type]
    assert actual.item() == pytest.approx(expected, rel=2e-5)


def test_alternating_sides_follow_the_half() -> None:
    batch, q, k = pairs()

    def loss(sides: Any, half: Any) -> float:
        return AuxiliaryLoss(scores_config(sides=sides))(q, k, batch, half).item()

    assert loss("alternate", "image") == loss("vision", "image")
    assert loss("alternate", "text") == loss("text", "image")
    assert loss("vision", "image") != loss("text", "image")


@pytest.mark.parametrize("stop", ["none", "target", "projection"])
def test_stop_gradient_keeps_the_value_and_cuts_the_gradient(stop: Any) -> None:
    batch, q, k = pairs()
    q.requires_grad_()
    loss = AuxiliaryLoss(scores_config(kind="softmax", stop_gradient=stop))(q, k, batch, "image")
    (gradient,) = torch.autograd.grad(loss, q)
    free = AuxiliaryLoss(scores_config(kind="softmax"))(q, k, batch, "image")
    (full,) = torch.autograd.grad(free, q)
    assert loss.item() == pytest.approx(free.item(), rel=1e-6)
    assert torch.allclose(gradient, full) == (stop == "none")


def test_the_auxiliary_loss_trains_only_what_lies_below_the_last_scores() -> None:
    torch.manual_seed(0)
    sizes = UniterConfig(VOCABULARY, 16, 2, 2, 32, img_dim=12)
    model = UniterForRetrieval(sizes).eval()
    batch, _, _ = pairs()
    q, k = model.last_layer_qk(model(batch).last_input)
    AuxiliaryLoss(scores_config())(q, k, batch, "image").backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    last = "uniter.encoder.layer.1."
    inside = {f"{last}attention.self.{part}.weight" for part in ("query", "key")}
    assert {name for name in reached if name.startswith(last) and name.endswith("weight")} == inside
    assert "uniter.encoder.layer.0.output.dense.weight" in reached
    assert not [name for name in reached if "pooler" in name or "output." in name.split("uniter.")[0]]


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        (AuxConfig(kind="probs", heads="each"), "kind probs and heads mean, both or neither"),
        (AuxConfig(kind="scores", heads="mean"), "kind probs and heads mean, both or neither"),
        (AuxConfig(source="qk", loss="iais-singular", heads="mean"), r"take aux\.source scores"),
        (AuxConfig(source="qk", kind="scores", heads="mean-scores"), r"take aux\.source scores"),
        (AuxConfig(loss="iais-singular", heads="sum-scores"), "give mean"),
        (AuxConfig(loss="iais-singular", stop_gradient="target"), r"aux\.stop_gradient is target: it belongs to"),
        (AuxConfig(loss="iais-singular", projection_scale=0.5), r"aux\.projection_scale is 0\.5: it belongs to"),
        (AuxConfig(loss="iais-distributed", row_reduction="sum"), r"aux\.row_reduction is sum: .* give mean"),
        (AuxConfig(loss="iais-singular", kind="softmax"), r"aux\.kind is softmax: .* give probs"),
        (AuxConfig(loss="iais-singular", backend="triton"), r"aux\.backend is triton: .* give auto"),
        (AuxConfig(layers=[]), r"aux\.layers"),
        (AuxConfig(layers=[-1, -1]), r"aux\.layers"),
    ],
)
def test_contradictory_options_are_refused(aux: AuxConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(TrainConfig(aux=aux))
