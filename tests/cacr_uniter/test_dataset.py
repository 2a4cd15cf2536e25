"""Batches from two databases, and the model on them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from cacr_uniter.data.dataset import RetrievalDataset
from cacr_uniter.data.lmdb import ImageDB, ImageDBWriter, TextDB, TextDBWriter
from cacr_uniter.errors import UserError
from cacr_uniter.model import UniterConfig, UniterForRetrieval

TEXTS = {"10": [8, 9, 10], "11": [7], "12": [5, 6, 7, 8, 9], "13": [5, 5]}
IMAGES = {"10": "a.npz", "11": "a.npz", "12": "b.npz", "13": "c.npz"}
SIZES = {"a.npz": 2, "b.npz": 4, "c.npz": 3, "spare.npz": 1}


@pytest.fixture
def databases(tmp_path: Path) -> tuple[TextDB, ImageDB]:
    with TextDBWriter(tmp_path / "t.db", {"UNK": 1, "CLS": 2, "SEP": 3, "MASK": 4}, 20, "vocab") as texts:
        for caption_id, ids in TEXTS.items():
            texts.write(caption_id, ids, IMAGES[caption_id])
    generator = np.random.default_rng(0)
    with ImageDBWriter(tmp_path / "img", dtype="float32") as images:
        for name, size in SIZES.items():
            images.write(name, generator.normal(size=(size, 6)), generator.random((size, 6)))
    return TextDB(tmp_path / "t.db"), ImageDB(tmp_path / "img")


def test_batch_layout(databases: tuple[TextDB, ImageDB]) -> None:
    dataset = RetrievalDataset(*databases)
    assert dataset.caption_ids == list(TEXTS)
    assert dataset.image_names == ["a.npz", "b.npz", "c.npz"]
    assert dataset.img2txts["a.npz"] == ["10", "11"]
    assert dataset.feature_dim == 6
    batch = dataset.batch([("10", "a.npz"), ("12", "b.npz"), ("10", "spare.npz")])
    assert batch.input_ids.tolist() == [[2, 8, 9, 10, 3, 0, 0], [2, 5, 6, 7, 8, 9, 3], [2, 8, 9, 10, 3, 0, 0]]
    assert batch.text_mask.sum(1).tolist() == [5, 7, 5]
    assert batch.n_text.tolist() == [3, 5, 3]
    assert batch.n_regions.tolist() == batch.region_mask.sum(1).tolist() == [2, 4, 1]
    assert batch.features.shape == (3, 4, 6)
    assert batch.boxes.shape == (3, 4, 7)
    features, boxes = databases[1].read("a.npz")
    assert torch.equal(batch.features[0, :2], features)
    assert torch.equal(batch.boxes[0, :2], boxes)
    assert not batch.features[0, 2:].any()
    types = [batch.input_ids.dtype, batch.text_mask.dtype, batch.features.dtype, batch.boxes.dtype]
    types += [batch.region_mask.dtype, batch.n_text.dtype, batch.n_regions.dtype]
    assert types == [torch.int64, torch.bool, torch.float32, torch.float32, torch.bool, torch.int32, torch.int32]
    assert len(dataset.batch([])) == 0


def test_scores_do_not_depend_on_the_company(databases: tuple[TextDB, ImageDB]) -> None:
    dataset = RetrievalDataset(*databases)
    torch.manual_seed(0)
    model = UniterForRetrieval(
        UniterConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
            initializer_range=0.4,
            img_dim=6,
        )
    ).eval()
    pairs = [(caption, name) for caption in TEXTS for name in SIZES]
    with torch.no_grad():
        together = model(dataset.batch(pairs)).rank_scores
        alone = torch.cat([model(dataset.batch([pair])).rank_scores for pair in pairs])
    assert together.std() > 0.05
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_length_filter(databases: tuple[TextDB, ImageDB]) -> None:
    dataset = RetrievalDataset(*databases, max_text_length=2)
    assert dataset.caption_ids == ["11", "13"]
    assert dataset.image_names == ["a.npz", "c.npz"]
    assert dataset.img2txts == {"a.npz": ["11"], "c.npz": ["13"]}
    with pytest.raises(UserError, match="no caption of at most 0"):
        RetrievalDataset(*databases, max_text_length=0)


def test_captions_longer_than_the_model_takes(databases: tuple[TextDB, ImageDB]) -> None:
    dataset = RetrievalDataset(*databases)
    dataset.check_lengths(7)
    with pytest.raises(UserError, match="caption '12' has 5 word pieces and the model takes 4; shorten or remove it"):
        dataset.check_lengths(6)
    dataset.restricted([0, 1]).check_lengths(6)
    with pytest.raises(UserError, match=r"out of the training with data\.max_text 4 or less"):
        RetrievalDataset(*databases, training=True).check_lengths(6)


def test_restricted(databases: tuple[TextDB, ImageDB]) -> None:
    dataset = RetrievalDataset(*databases)
    part = dataset.restricted([3, 1])
    assert part.caption_ids == ["13", "11"]
    assert part.image_names == ["c.npz", "a.npz"]
    assert part.txt2img == {"13": "c.npz", "11": "a.npz"}
    assert dataset.caption_ids == list(TEXTS)
    assert torch.equal(part.batch([("11", "a.npz")]).input_ids, dataset.batch([("11", "a.npz")]).input_ids)


def test_pickled_dataset_reads_the_same(databases: tuple[TextDB, ImageDB]) -> None:
    dataset = RetrievalDataset(*databases)
    pair = [("12", "b.npz")]
    expected = dataset.batch(pair)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy.batch(pair).features, expected.features)


def test_databases_that_do_not_belong_together(databases: tuple[TextDB, ImageDB], tmp_path: Path) -> None:
    with ImageDBWriter(tmp_path / "other") as writer:
        writer.write("b.npz", np.zeros((1, 6)), np.zeros((1, 6)))
    with pytest.raises(UserError, match=r"2 of 3 images of the captions are missing, first 'a.npz'"):
        RetrievalDataset(databases[0], ImageDB(tmp_path / "other"))
    left = RetrievalDataset(databases[0], ImageDB(tmp_path / "other"), skip_missing=True, training=True)
    assert (left.caption_ids, left.image_names) == (["12"], ["b.npz"])
    assert left.skipped is not None
    assert "2 of 3 images of the captions are missing, first 'a.npz': 3 captions left out" in left.skipped
    with pytest.raises(UserError, match=r"2 of 2 images .* belong together"):
        RetrievalDataset(left.text_db, ImageDB(tmp_path / "other"), 3, skip_missing=True, training=True)
    dataset = RetrievalDataset(*databases)
    assert dataset.skipped is None
    with pytest.raises(UserError, match="no record '99'"):
        dataset.batch([("99", "a.npz")])
