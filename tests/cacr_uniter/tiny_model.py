"""A tiny UNITER and batches for it: what the tests of the network share."""

from __future__ import annotations

import pytest
import torch

from cacr_uniter.data.batch import Batch, Pairs, collate
from cacr_uniter.model import UniterConfig, UniterForRetrieval

TINY = UniterConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
    img_dim=10,
)


def make_pairs(seed: int = 0, lengths: tuple[int, ...] = (3, 1, 5), regions: tuple[int, ...] = (2, 4, 3)) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(5, 40, (n,), generator=generator).tolist() for n in lengths]
    images = [(torch.randn(n, 10, generator=generator), torch.rand(n, 7, generator=generator)) for n in regions]
    return collate(texts, images, cls=2, sep=3)


def make_batch(seed: int = 0, lengths: tuple[int, ...] = (3, 1, 5), regions: tuple[int, ...] = (2, 4, 3)) -> Batch:
    return make_pairs(seed, lengths, regions).batch()


@pytest.fixture
def model() -> UniterForRetrieval:
    torch.manual_seed(0)
    return UniterForRetrieval(TINY)


#: for the test files, under the name of the fixture
FIXTURES = model
