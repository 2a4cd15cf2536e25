"""Defects of the published UNITER and IAIS programs that must not come back here.

a: regions begin at the last text's length, not the padded one: test_model, test_regions_begin_at_the_padded_text_width
b: the baseline attends padding where IAIS does not: here
c: a fine-tuned ranking head is overwritten: test_checkpoint, test_a_fine_tuned_rank_head_is_kept
d: inference crashes after training: test_winoground_model, test_retrieval
e: a module imports what is not there: here
f: image recall counts both columns of nonzero(): test_retrieval, test_each_caption_counts_once
g: scores kept in half precision tie: here
h: the logarithm of a vanished probability: here
i: the large configuration names the base weights: here
j: counting boxes without nbb.json crashes: test_lmdb, test_all_folder_is_cut_by_the_rule
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cacr_uniter
from cacr_uniter.evaluation import matrix
from cacr_uniter.model import UniterConfig, UniterForRetrieval
from cacr_uniter.training.command import load_config
from cacr_uniter.training.losses import AuxiliaryLoss
from cacr_uniter.training.testing import small_config, small_run, synthetic_source


@pytest.mark.parametrize("loss", ["cacr", "iais-singular"])
def test_b_the_baseline_and_the_regularised_run_see_the_same_pairs(tmp_path: Path, loss: str) -> None:
    """Mined hard negatives included: with weight 0 nothing else differs, so neither may any number."""
    fields = {"aux__sides": "alternate", "aux__heads": "mean", "aux__kind": "probs", "optim__steps": 4}
    plain = small_run(small_config(tmp_path / "none", aux__loss="none", optim__steps=4))
    zero = small_run(small_config(tmp_path / loss, aux__loss=loss, aux__weight=0.0, **fields))
    for one, other in zip(plain.history, zero.history, strict=True):
        assert [one[name] for name in ("matching", "first", "grad_norm")] == [
            other[name] for name in ("matching", "first", "grad_norm")
        ]


def test_e_every_module_can_be_imported() -> None:
    names = [module.name for module in pkgutil.walk_packages(cacr_uniter.__path__, "cacr_uniter.")]
    assert len(names) > 60
    for name in names:
        importlib.import_module(name)


def test_g_scores_that_half_precision_cannot_tell_apart(tmp_path: Path) -> None:
    """A model with one large bias: its scores differ by less than a float16 step."""
    source = synthetic_source(n_images=5)
    torch.manual_seed(0)
    config = UniterConfig(64, 16, 2, 2, 32, img_dim=source.img_dim, initializer_range=0.2)
    model = UniterForRetrieval(config).eval()
    with torch.no_grad():
        model.rank_output.weight.mul_(0.02)
        model.rank_output.bias.fill_(60.0)
    identity = matrix.Identity(weights="w", head="rank", captions="c", images="i", block=8)
    matrix.open_parts(tmp_path, identity)
    captions = len(source.image_of)
    matrix.score_blocks(tmp_path, model, source, np.arange(5), captions, 8, "rank", 64)
    scores = matrix.join_parts(tmp_path, np.arange(5), captions, 8)
    assert scores.dtype == np.float32
    assert len(np.unique(scores.astype(np.float16))) < len(np.unique(scores)) / 4


@pytest.mark.parametrize("loss", ["cacr", "iais-singular", "iais-distributed"])
@pytest.mark.parametrize("kind", ["probs", "softmax"])
def test_h_vanished_probabilities_have_a_finite_loss(loss: str, kind: str) -> None:
    """Scores so far apart that nearly every probability is 0, from half-precision queries and keys."""
    source = synthetic_source()
    batch = source.pairs(np.arange(4), source.image_of[:4]).batch()
    length = batch.input_ids.shape[1] + batch.features.shape[1]
    torch.manual_seed(0)
    q, k = ((40 * torch.randn(4, 2, length, 8)).half().requires_grad_() for _ in range(2))
    options: dict[str, Any] = {"aux__loss": loss, "aux__kind": kind, "aux__backend": "reference"}
    options["aux__heads"] = "mean" if kind == "probs" else "each"
    value = AuxiliaryLoss(small_config("unused", **options).aux)(q, k, batch, "image")
    value.backward()
    assert F.softmax((q.float() @ k.float().mT), dim=-1).eq(0).float().mean() > 0.5
    assert torch.isfinite(value)
    for x in (q, k):
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("size", ["base", "large"])
def test_i_a_preset_names_the_weights_of_its_size(size: str) -> None:
    model = load_config(f"flickr-{size}").model
    assert model.size == size
    assert model.checkpoint is not None
    assert Path(model.checkpoint).name == f"uniter-{size}.pt"
