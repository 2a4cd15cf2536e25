"""Tile sizes, warps and dot precision of the query/key kernels, by kernel, architecture, dtype and head size."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: tokens summed by one program of the Gram kernel; longer spans are summed in chunks, then over the chunks
GRAM_CHUNK = 1024


class Launch(NamedTuple):
    """``m`` rows x ``n`` columns a tile; ``precision`` of the dots of float32 operands."""

    m: int
    n: int
    warps: int
    stages: int
    precision: str


def block_d(d: int) -> int:
    """Head size padded to a power of two, at least 16 (the smallest contraction of a tensor-core dot)."""
    return max(16, 1 << (d - 1).bit_length())


def launch(kernel: str, arch: int, dtype: torch.dtype, d: int) -> Launch:
    """``kernel``: "forward", "rows", "columns", "gram", "mix" (D x D products), "tokens" (token rows times D x D).

    ``arch``: compute capability as 10 * major + minor; 0 is the interpreter.
    """
    if arch == 0:
        return Launch(32, 32, 4, 1, "ieee")
    return Launch(64, 64, 4, 2, "ieee")
