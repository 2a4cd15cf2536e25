"""What the gradient of attention is outside the spans: 0, and NaN over the whole of an invalid example."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_spans, store_tile
from .kernel_args import Matrix, SpanArgs, plain_spans


@triton.jit(do_not_specialize=["n_heads", "n_r", "n_c"])
def fill_kernel(
    grad_attn,  # contiguous [B * H, n_r, n_c]
    spans,  # SpanArgs
    n_heads,
    n_r,
    n_c,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """BLOCK_I rows of one problem."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    n_tiles = tl.cdiv(n_r, BLOCK_I)
    i_problem = tl.program_id(0) // n_tiles
    i = (tl.program_id(0) % n_tiles) * BLOCK_I
    _, _, _, _, valid = load_spans(spans, (i_problem // n_heads).to(tl.int64))
    p = grad_attn + i_problem.to(tl.int64) * n_r * n_c
    m = Matrix(p, n_c.to(tl.int64), 1, n_r, n_c, p, 0)
    b = tl.zeros([BLOCK_I, BLOCK_J], tl.float32) + tl.where(valid, 0.0, float("nan"))
    for j in range(0, n_c, BLOCK_J):
        store_tile(m, b, i, j, BLOCK_I, BLOCK_J)
