"""Pairs by number: in memory as from disk, and read ahead in order, with a bound."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from cacr_uniter.errors import UserError
from cacr_uniter.training.source import READ_AHEAD_BYTES, MemorySource, ahead
from cacr_uniter.training.testing import synthetic_source


def test_memory_source_gives_what_it_was_loaded_from() -> None:
    source = synthetic_source()
    copy = MemorySource.load(source, chunk=7)
    captions, images = np.array([3, 0, 39, 3]), np.array([1, 19, 0, 4])
    for name, value in vars(source.pairs(captions, images)).items():
        assert torch.equal(value, getattr(copy.pairs(captions, images), name)), name


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_reading_ahead_keeps_order_and_errors(workers: int) -> None:
    assert list(ahead(lambda x: x * x, range(50), workers)) == [x * x for x in range(50)]

    def fails(x: int) -> int:
        if x == 5:
            raise UserError("record 5 is damaged")
        return x

    seen: list[int] = []
    with pytest.raises(UserError, match="record 5"):
        seen.extend(ahead(fails, range(50), workers))
    assert seen == list(range(5))


@pytest.mark.parametrize(("size", "most"), [(1, 8), (READ_AHEAD_BYTES // 3, 3), (2 * READ_AHEAD_BYTES, 1)])
def test_reading_ahead_is_bounded_in_bytes(size: int, most: int) -> None:
    begun: list[int] = []

    def read(item: int) -> int:
        begun.append(item)
        return item

    waiting = []
    for item in ahead(read, range(40), 4, lambda result: size):
        time.sleep(0.005)
        waiting.append(len(begun) - 1 - item)
    assert max(waiting) == most
