"""Kind "softmax" from queries and keys, forward: row numbers, P_ab and the factor U = s P_ab P_bb.

P is the row softmax of a block of S = c q k^T. X_a = U P_ab^T is compared with S_aa by the kernels of qk_wide.py. Only
matrices [n_a, n_b] are stored, in the compact layout of its Factors; P_bb and S_aa are recomputed tile by tile. Scores
and maxima are in units of log2.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_args import SpanArgs, plain_spans, plain_tokens
from .qk_products import projection_factor
from .qk_tiles import chunked_product, open_head, open_rows
from .qk_wide import open_factor


@triton.jit
def row_softmax_numbers(stats, spans, i_bh, is_text, SLOT: tl.constexpr):
    """Pointer to number SLOT, a maximum, of a side's rows; and the distance to the next number, 1 / its sum of exp."""
    rows = spans.n_text + spans.n_vision
    return stats + i_bh * 8 * rows + tl.where(is_text, 0, spans.n_text) + SLOT * rows, rows


@triton.jit
def probabilities(b_s, numbers, s_n, o_r, mask_r, AXIS: tl.constexpr):
    """exp2(s - m) / l of a tile of scores whose softmax rows o_r lie along AXIS; finite beyond the span."""
    b_m = tl.load(numbers + o_r, mask=mask_r, other=0.0)
    b_r = tl.load(numbers + s_n + o_r, mask=mask_r, other=1.0)
    if AXIS == 0:
        return tl.exp2(b_s - b_m[:, None]) * b_r[:, None]
    else:
        return tl.exp2(b_s - b_m[None, :]) * b_r[None, :]


@triton.jit(do_not_specialize=["heads", "group", "tiles_text"])
def qk_numbers_kernel(
    q,  # BlockArg [B, H, N, D]
    k,  # BlockArg [B, Hk, N, D]
    stats,  # float32 [B, H, 8, n_text + n_vision]: numbers 2, 3 (S_aa) and 6, 7 (S_ab) are written
    spans,  # SpanArgs
    heads,
    group,
    tiles_text,
    y_scale,  # c log2(e)
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Maximum and sum of exp of BLOCK_M rows of S_ab (third grid index 0) or S_aa (1); zeros beyond the span."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    q = plain_tokens(q)
    k = plain_tokens(k)
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    own = tl.program_id(2) == 1
    i_b = i_bh // heads
    i_h = i_bh % heads
    is_text = i_tile < tiles_text
    start, n, _, _ = open_rows(spans, i_b, is_text)
    start_c, n_c, _, _ = open_rows(spans, i_b, is_text == own)
    first = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M
    o_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_m = o_m < n
    p_q = open_head(q, i_b, i_h, start)
    p_k = open_head(k, i_b, i_h // group, start_c)
    b_m = tl.full([BLOCK_M], -1e30, tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, tl.where(first < n, n_c, 0), BLOCK_N):
        o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = o_n < n_c
        b_s = chunked_product(
            p_q, q.s_r, q.s_c, o_m, mask_m, p_k, k.s_r, k.s_c, o_n, mask_n, D,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        b_s = b_s * y_scale + tl.where(mask_n, 0.0, -1e30)[None, :]
        b_new = tl.maximum(b_m, tl.max(b_s, axis=1))
        b_l = b_l * tl.exp2(b_m - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), axis=1)
        b_m = b_new
    p, s_n = row_softmax_numbers(stats, spans, i_bh, is_text, 0)
    p += o_m + tl.where(own, 2, 6) * s_n
    mask = o_m < tl.where(is_text, spans.n_text, spans.n_vision)
    tl.store(p, tl.where(mask_m, b_m, 0.0), mask=mask)
    tl.store(p + s_n, tl.where(mask_m, 1.0 / b_l, 0.0), mask=mask)


@triton.jit(do_not_specialize=["heads", "group", "tiles_text"])
def qk_probabilities_kernel(
    q,  # BlockArg [B, H, N, D]
    k,  # BlockArg [B, Hk, N, D]
    stats,
    out,  # float32 [B, H, 2 T R], compact: P_ab
    spans,  # SpanArgs
    heads,
    group,
    tiles_text,
    y_scale,  # c log2(e)
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of P_ab."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    q = plain_tokens(q)
    k = plain_tokens(k)
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    i_h = i_bh % heads
    is_text = i_tile < tiles_text
    start, n, n_b, _ = open_rows(spans, i_b, is_text)
    start_b, _, _, _ = open_rows(spans, i_b, is_text == 0)
    o_m = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    o_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = o_m < n
    mask_n = o_n < n_b
    b_s = chunked_product(
        open_head(q, i_b, i_h, start), q.s_r, q.s_c, o_m, mask_m,
        open_head(k, i_b, i_h // group, start_b), k.s_r, k.s_c, o_n, mask_n, D,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    numbers, s_n = row_softmax_numbers(stats, spans, i_bh, is_text, 6)
    b_p = probabilities(b_s * y_scale, numbers, s_n, o_m, mask_m, 0)
    p, s_r = open_factor(out, spans, i_bh, 0, is_text, 0, D, True)
    tl.store(p + o_m[:, None] * s_r + o_n[None, :], b_p, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["heads", "group", "tiles_text"])
def qk_mixed_kernel(
    q,  # BlockArg [B, H, N, D]
    k,  # BlockArg [B, Hk, N, D]
    stats,
    x,  # float32 [B, H, 2 T R], compact: A [n_a, n_b]
    out,  # the same layout: written
    spans,  # SpanArgs
    heads,
    group,
    tiles_text,
    y_scale,  # c log2(e)
    factor,
    MEAN: tl.constexpr,  # factor is divided by n_b^2
    TRANSPOSED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """factor A P_bb, or factor A P_bb^T if TRANSPOSED: one tile, P_bb recomputed from q and k."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    q = plain_tokens(q)
    k = plain_tokens(k)
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    i_h = i_bh % heads
    is_text = i_tile < tiles_text
    _, n, n_b, _ = open_rows(spans, i_b, is_text)
    start_b, _, _, _ = open_rows(spans, i_b, is_text == 0)
    o_m = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    o_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = o_m < n
    mask_n = o_n < n_b
    p_q = open_head(q, i_b, i_h, start_b)
    p_k = open_head(k, i_b, i_h // group, start_b)
    numbers, s_n = row_softmax_numbers(stats, spans, i_bh, is_text == 0, 2)
    p_x, s_r = open_factor(x, spans, i_bh, 0, is_text, 0, D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_c in range(0, n_b, BLOCK_N):
        o_c = (i_c + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_c = o_c < n_b
        if TRANSPOSED:
            b_s = chunked_product(
                p_k, k.s_r, k.s_c, o_c, mask_c, p_q, q.s_r, q.s_c, o_n, mask_n, D,
                BLOCK_N, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
            b_s = b_s * y_scale + tl.where(mask_c, 0.0, -1e30)[:, None]
            b_p = probabilities(b_s, numbers, s_n, o_n, mask_n, 1)
        else:
            b_s = chunked_product(
                p_q, q.s_r, q.s_c, o_c, mask_c, p_k, k.s_r, k.s_c, o_n, mask_n, D,
                BLOCK_N, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
            b_s = b_s * y_scale + tl.where(mask_n, 0.0, -1e30)[None, :]
            b_p = probabilities(b_s, numbers, s_n, o_c, mask_c, 0)
        b_x = tl.load(p_x + o_m[:, None] * s_r + o_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        acc = tl.dot(b_x, b_p, acc, input_precision=PRECISION)
    acc *= projection_factor(factor, n_b, MEAN)
    p, s_r = open_factor(out, spans, i_bh, 0, is_text, 0, D, True)
    tl.store(p + o_m[:, None] * s_r + o_n[None, :], acc, mask=mask_m[:, None] & mask_n[None, :])
