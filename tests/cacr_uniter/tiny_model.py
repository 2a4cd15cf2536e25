"""A tiny UNITER, batches for it, and a tiny run: what several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cacr_uniter import cli
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


TINY_RUN = (
    *("--model.hidden_size=16", "--model.num_hidden_layers=2", "--model.num_attention_heads=2"),
    *("--model.intermediate_size=32", "--optim.steps=3", "--optim.warmup=1", "--run.validate_every=0"),
    *("--run.tensorboard=false", "--run.report=false", "--run.device=cpu", "--batch.anchors=4"),
)
"""Options of `cacr train --preset demo`."""


def write_scenes_and_run(folder: Path) -> Path:
    """The folder, with `scenes` of 12 Winoground-like examples and a finished `run`."""
    sizes = ["--n-train", "24", "--n-val", "8", "--n-winoground", "12", "--size", "64", "--things", "6"]
    assert cli.main(["data", "scenes", "--out", str(folder / "scenes"), *sizes]) == 0
    train = ["--preset", "demo", f"--data.scenes={folder / 'scenes'}", f"--run.out={folder / 'run'}", *TINY_RUN]
    assert cli.main(["train", *train]) == 0
    return folder
