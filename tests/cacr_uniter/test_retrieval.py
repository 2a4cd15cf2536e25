"""Retrieval recall: ranks against a plain sort, the tie rules, and a matrix that survives a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cacr_uniter.data.box_rule import BoxRule
from cacr_uniter.data.dataset import RetrievalDataset
from cacr_uniter.data.lmdb import ImageDB, ImageDBWriter, TextDB, TextDBWriter
from cacr_uniter.errors import UserError
from cacr_uniter.evaluation import matrix
from cacr_uniter.evaluation.retrieval import caption_ranks, image_ranks, recall, subset
from cacr_uniter.model import UniterConfig, UniterForRetrieval
from cacr_uniter.training.testing import synthetic_source, write_databases

IMAGE_OF = np.array([0, 0, 1, 2, 2, 2, 4])


def by_sorting(scores: np.ndarray, ties: str) -> tuple[list[int], list[int]]:
    """Ranks by sorting every row and column; a pessimistic tie is a rival whose score is a little higher."""
    n_txt, n_img = scores.shape
    images, captions = [], []
    for t in range(n_txt):
        row = scores[t].astype(np.float64).copy()
        if ties == "pessimistic":
            row[np.arange(n_img) != IMAGE_OF[t]] += 1e-6
        images.append(1 + int(np.argsort(-row, kind="stable").tolist().index(int(IMAGE_OF[t]))))
    for v in range(n_img):
        column, own = scores[:, v].astype(np.float64).copy(), v == IMAGE_OF
        if ties == "pessimistic":
            column[~own] += 1e-6
        order = np.argsort(-column, kind="stable")
        ranks = [1 + i for i, t in enumerate(order.tolist()) if own[t]]
        captions.append(min(ranks, default=n_txt + 1))
    return images, captions


@pytest.mark.parametrize("ties", ["index", "pessimistic"])
def test_ranks_are_those_of_a_sort(ties: str) -> None:
    rng = np.random.default_rng(0)
    for trial in range(50):
        scores = rng.integers(0, 4 if trial % 2 else 1000, (7, 5)).astype(np.float32)
        images, captions = by_sorting(scores, ties)
        assert image_ranks(scores, IMAGE_OF, ties).tolist() == images
        assert caption_ranks(scores, IMAGE_OF, ties).tolist() == captions


def test_recall_by_hand() -> None:
    image_of = np.repeat(np.arange(12), 2)
    scores = np.zeros((24, 12), dtype=np.float32)
    scores[np.arange(24), image_of] = 2
    scores[0, 1:] = 3  # caption 0 ranks its image last, 12th
    scores[2, 5:9] = 3  # caption 2 ranks its image fifth
    found = recall(scores, image_of)
    assert found["ir_r1"] == pytest.approx(100 * 22 / 24)
    assert found["ir_r5"] == pytest.approx(100 * 23 / 24)
    assert found["ir_r10"] == pytest.approx(100 * 23 / 24)
    # image 0 keeps caption 1 first; captions 0 and 2 stand before those of images 5 to 8, caption 0 before the others
    assert found["tr_r1"] == pytest.approx(100 / 12)
    assert found["tr_r5"] == found["tr_r10"] == 100.0
    assert found["rsum"] == pytest.approx(sum(found[f"{a}_r{k}"] for a in ("ir", "tr") for k in (1, 5, 10)))


def test_each_caption_counts_once() -> None:
    """A caption whose image ranks first is one hit, however its index compares: recall never exceeds 100."""
    n = 10
    perfect = np.eye(n, dtype=np.float32)
    found = recall(perfect, np.arange(n))
    assert found["ir_r1"] == found["ir_r10"] == found["tr_r1"] == 100.0
    worst = recall(1 - perfect, np.arange(n))
    assert worst["ir_r1"] == worst["ir_r5"] == 0.0


def test_equal_scores_are_no_success_by_the_pessimistic_rule() -> None:
    flat = np.zeros((7, 5), dtype=np.float32)
    assert recall(flat, IMAGE_OF, "pessimistic")["ir_r1"] == 0.0
    assert recall(flat, IMAGE_OF, "index")["ir_r1"] == pytest.approx(100 * 2 / 7)


def test_subset_keeps_the_captions_of_the_first_images() -> None:
    assert subset(IMAGE_OF.tolist(), 2) == [0, 1, 2]


@pytest.fixture(scope="module")
def world():
    source = synthetic_source(n_images=9)
    torch.manual_seed(0)
    config = UniterConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        img_dim=source.img_dim,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return source, UniterForRetrieval(config).eval()


def identity(**change: object) -> matrix.Identity:
    values = {"weights": "w", "head": "rank", "captions": "c", "images": "i", "block": 4, **change}
    return matrix.Identity(**values)


def compute(folder: Path, world, rank: int = 0, processes: int = 1, batch_size: int = 7) -> None:
    source, model = world
    matrix.open_parts(folder, identity())
    matrix.score_blocks(
        folder, model, source, np.arange(9)[::-1], len(source.image_of), 4, "rank", batch_size, rank, processes
    )


def test_matrix_is_that_of_single_pairs(world, tmp_path: Path) -> None:
    source, model = world
    compute(tmp_path, world)
    scores = matrix.join_parts(tmp_path, np.arange(9)[::-1], len(source.image_of), 4)
    with torch.inference_mode():
        for caption in (0, 5, 17):
            for image in (0, 3, 8):
                single = model(source.pairs(np.array([caption]), np.array([image])).batch()).rank_scores.item()
                assert scores[caption, image] == pytest.approx(single, abs=1e-5)
    assert scores.std() > 1e-3


def test_parts_of_a_stopped_run_are_kept(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute(tmp_path / "whole", world)
    compute(tmp_path / "stopped", world, rank=1, processes=2)
    kept = tmp_path / "stopped" / matrix.part_name(1)
    before = kept.stat().st_mtime_ns
    written: list[str] = []
    save = matrix._write
    monkeypatch.setattr(matrix, "_write", lambda path, part: (written.append(path.name), save(path, part)))
    compute(tmp_path / "stopped", world)
    assert kept.stat().st_mtime_ns == before
    assert written == [matrix.part_name(0), matrix.part_name(2)]
    order, captions = np.arange(9)[::-1], len(world[0].image_of)
    one, two = (matrix.join_parts(tmp_path / name, order, captions, 4) for name in ("whole", "stopped"))
    np.testing.assert_array_equal(one, two)


def test_parts_of_another_model_are_refused(tmp_path: Path) -> None:
    matrix.open_parts(tmp_path, identity())
    with pytest.raises(UserError, match="different weights, head"):
        matrix.open_parts(tmp_path, identity(weights="other", head="itm"))


def test_damaged_part_is_named(world, tmp_path: Path) -> None:
    compute(tmp_path, world)
    path = tmp_path / matrix.part_name(1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"part-000001\.npy"):
        matrix.join_parts(tmp_path, np.arange(9)[::-1], len(world[0].image_of), 4)


def test_weights_decide_the_identity(world) -> None:
    _, model = world
    before = matrix.weights_digest(model)
    assert matrix.weights_digest(model) == before
    with torch.no_grad():
        model.rank_output.bias += 1e-3
    assert matrix.weights_digest(model) != before


def pairs_on_disk(root: Path, rule: BoxRule | None = None) -> RetrievalDataset:
    write_databases(root, rule)
    return RetrievalDataset(TextDB(root / "txt" / "train.db"), ImageDB(root / "img"))


def test_contents_decide_the_identity(tmp_path: Path) -> None:
    """The same names are not enough: other features, other regions of them or other captions are another matrix."""
    first, moved = pairs_on_disk(tmp_path / "a"), pairs_on_disk(tmp_path / "b")
    images, captions = matrix.images_digest(first), matrix.captions_digest(first)
    assert (matrix.images_digest(moved), matrix.captions_digest(moved)) == (images, captions), "wherever they lie"
    assert matrix.images_digest(pairs_on_disk(tmp_path / "c", BoxRule(fixed=2))) != images
    with ImageDBWriter(tmp_path / "img", dtype="float32") as writer:
        for name in first.image_db.names():
            record = first.image_db.record(name)
            writer.write(name, record["features"] + (name == "7.npz"), record["norm_bb"])
    changed = RetrievalDataset(first.text_db, ImageDB(tmp_path / "img"))
    assert changed.image_names == first.image_names
    assert matrix.images_digest(changed) != images
    with TextDBWriter(tmp_path / "texts.db", {"UNK": 1, "CLS": 2, "SEP": 3, "MASK": 4}, 30, "v") as texts:
        for key in first.caption_ids:
            pieces, image, _ = first.text_db.caption(key)
            texts.write(key, pieces[::-1], image)
    changed = RetrievalDataset(TextDB(tmp_path / "texts.db"), first.image_db)
    assert matrix.captions_digest(changed) != captions
