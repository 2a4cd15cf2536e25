"""A Triton kernel that does nothing but exp2: the rate of a GPU's exp unit."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

ROUNDS = 256
BLOCK = 1024


@triton.jit
def exp2_kernel(  # type: ignore[no-untyped-def]
    x,  # [n] float32
    n,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # x <- 2^-x keeps every number in [1/2, 1] for ever: no overflow, nothing the compiler can fold
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + offsets, mask=offsets < n, other=0.5)
    for _ in range(ROUNDS):
        b_x = tl.exp2(-b_x)
    tl.store(x + offsets, b_x, mask=offsets < n)


def exp2_rounds(numbers: torch.Tensor) -> Any:
    """``ROUNDS`` exponentials of every number, in registers."""
    return exp2_kernel[(triton.cdiv(len(numbers), BLOCK),)](numbers, len(numbers), ROUNDS, BLOCK)
