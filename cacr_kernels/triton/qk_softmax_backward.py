"""Kind "softmax" from queries and keys, backward: through the row softmax of S_ab and S_bb into q and k.

With G = s dX, V = G P_ab and Z = G^T P_ab P_bb (from qk_wide.py): dP_ab = W + Z with W = V P_bb^T, dP_bb = P_ab^T V,
and for a row softmax dS = P o (dP - rowsum(P o dP)); the row sums of P_bb o dP_bb are r_k = sum_i P_ab[i, k] W[i, k].
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2_E
from .kernel_args import SpanArgs, plain_spans, plain_tokens
from .qk_products import projection_factor
from .qk_softmax_forward import probabilities, row_softmax_numbers
from .qk_tiles import chunked_product, open_head, open_rows
from .qk_wide import open_factor


@triton.jit(do_not_specialize=["heads", "tiles_text"])
def qk_inner_sums_kernel(
    p,  # float32 [B, H, 2 T R], compact: P_ab
    w,  # the same layout: W
    sums,  # float32 [B, H, n_text + n_vision]: r_k is written at the rows of b
    spans,  # SpanArgs
    heads,
    tiles_text,  # tiles of the text as inner block
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """r_k = sum_i P_ab[i, k] W[i, k] for BLOCK_M tokens k of block b."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    b_is_text = i_tile < tiles_text
    _, n_b, n_a, _ = open_rows(spans, i_bh // heads, b_is_text)
    o_k = tl.where(b_is_text, i_tile, i_tile - tiles_text) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    mask_k = o_k < n_b
    p_p, s_r = open_factor(p, spans, i_bh, 0, b_is_text == 0, 0, 1, True)
    p_w, _ = open_factor(w, spans, i_bh, 0, b_is_text == 0, 0, 1, True)
    acc = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, n_a, BLOCK_N):
        o_i = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        o = o_i[:, None] * s_r + o_k[None, :]
        mask = (o_i < n_a)[:, None] & mask_k[None, :]
        acc += tl.sum(tl.load(p_p + o, mask=mask, other=0.0) * tl.load(p_w + o, mask=mask, other=0.0), axis=0)
    o_out = i_bh * (spans.n_text + spans.n_vision) + tl.where(b_is_text, 0, spans.n_text) + o_k
    tl.store(sums + o_out, acc, mask=mask_k)


@triton.jit(do_not_specialize=["heads", "tiles_text"])
def qk_cross_scores_kernel(
    p,  # float32 [B, H, 2 T R], compact: P_ab
    w,  # W
    z,  # Z, overwritten by dS_ab
    spans,  # SpanArgs
    heads,
    tiles_text,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dS_ab = P_ab o (dP_ab - rowsum(P_ab o dP_ab)) with dP_ab = W + Z, for BLOCK_M rows."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    is_text = i_tile < tiles_text
    _, n, n_b, _ = open_rows(spans, i_bh // heads, is_text)
    o_m = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    p_p, s_r = open_factor(p, spans, i_bh, 0, is_text, 0, 1, True)
    p_w, _ = open_factor(w, spans, i_bh, 0, is_text, 0, 1, True)
    p_z, _ = open_factor(z, spans, i_bh, 0, is_text, 0, 1, True)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, n_b, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        o = o_m[:, None] * s_r + o_n[None, :]
        mask = (o_m < n)[:, None] & (o_n < n_b)[None, :]
        b_dp = tl.load(p_w + o, mask=mask, other=0.0) + tl.load(p_z + o, mask=mask, other=0.0)
        b_sum += tl.sum(tl.load(p_p + o, mask=mask, other=0.0) * b_dp, axis=1)
    tl.debug_barrier()  # tiles smaller than the block of threads: others read what is written now
    for i_n in range(0, n_b, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        o = o_m[:, None] * s_r + o_n[None, :]
        mask = (o_m < n)[:, None] & (o_n < n_b)[None, :]
        b_dp = tl.load(p_w + o, mask=mask, other=0.0) + tl.load(p_z + o, mask=mask, other=0.0)
        tl.store(p_z + o, tl.load(p_p + o, mask=mask, other=0.0) * (b_dp - b_sum[:, None]), mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "heads", "group", "tiles_text"])
def qk_cross_gradient_kernel(
    x,  # BlockArg [B, H or Hk, N, D]: k for rows, q for COLUMNS
    ds,  # float32 [B, H, 2 T R], compact: dS_ab
    out,  # float32 [B, H, N, D]: dq (rows) or dk (COLUMNS), added to
    spans,  # SpanArgs
    n_tokens,
    heads,
    group,  # query heads per head of x
    tiles_text,
    scale,  # c
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq_a += c dS_ab K_b, or dk_b += c dS_ab^T Q_a: tiles count the tokens that are written."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    x = plain_tokens(x)
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    i_h = i_bh % heads
    is_text = i_tile < tiles_text
    start, n, n_in, _ = open_rows(spans, i_b, is_text)
    start_in, _, _, _ = open_rows(spans, i_b, is_text == 0)
    o_m = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    o_o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_m = o_m < n
    mask_o = o_o < D
    p_x = open_head(x, i_b, i_h // group, start_in)
    if COLUMNS:
        p_s, s_n = open_factor(ds, spans, i_bh, 0, is_text == 0, 0, D, True)
        s_m = 1
    else:
        p_s, s_m = open_factor(ds, spans, i_bh, 0, is_text, 0, D, True)
        s_n = 1
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for i_n in range(0, n_in, BLOCK_N):
        o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = o_n < n_in
        b_s = tl.load(p_s + o_m[:, None] * s_m + o_n[None, :] * s_n, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        b_x = tl.load(
            p_x + o_n[:, None] * x.s_r + o_o[None, :] * x.s_c, mask=mask_n[:, None] & mask_o[None, :], other=0.0
        )
        acc = tl.dot(b_s, b_x.to(tl.float32), acc, input_precision=PRECISION)
    o_out = (i_bh * n_tokens + start + o_m)[:, None] * D + o_o[None, :]
    mask_out = mask_m[:, None] & mask_o[None, :]
    tl.store(out + o_out, tl.load(out + o_out, mask=mask_out, other=0.0) + acc * scale, mask=mask_out)


@triton.jit(do_not_specialize=["n_tokens", "heads", "group", "tiles_text"])
def qk_inner_gradient_kernel(
    q,  # BlockArg [B, H, N, D]
    k,  # BlockArg [B, Hk, N, D]
    stats,
    p,  # float32 [B, H, 2 T R], compact: P_ab
    v,  # V / s
    sums,  # float32 [B, H, n_text + n_vision]: r
    out,  # float32 [B, H, N, D]: dq (rows) or dk (COLUMNS), added to
    spans,  # SpanArgs
    n_tokens,
    heads,
    group,
    tiles_text,  # tiles of the text as inner block
    scale,  # c
    factor,  # s, divided by n_b^2 if MEAN
    MEAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dq_b += c dS_bb K_b, or dk_b += c dS_bb^T Q_b, with dS_bb = P_bb o (P_ab^T V - r) recomputed tile by tile."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    q = plain_tokens(q)
    k = plain_tokens(k)
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    i_h = i_bh % heads
    b_is_text = i_tile < tiles_text
    start, n, n_a, _ = open_rows(spans, i_b, b_is_text)
    o_m = tl.where(b_is_text, i_tile, i_tile - tiles_text) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    o_o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_m = o_m < n
    mask_o = o_o < D
    p_q = open_head(q, i_b, i_h, start)
    p_k = open_head(k, i_b, i_h // group, start)
    numbers, s_n = row_softmax_numbers(stats, spans, i_bh, b_is_text, 2)
    p_p, s_r = open_factor(p, spans, i_bh, 0, b_is_text == 0, 0, D, True)
    p_v, _ = open_factor(v, spans, i_bh, 0, b_is_text == 0, 0, D, True)
    sums += i_bh * (spans.n_text + spans.n_vision) + tl.where(b_is_text, 0, spans.n_text)
    y_scale = scale * LOG2_E
    s = projection_factor(factor, n, MEAN)
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for i_n in range(0, n, BLOCK_N):
        o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = o_n < n
        mask_no = mask_n[:, None] & mask_o[None, :]
        if COLUMNS:
            b_s = chunked_product(
                p_k, k.s_r, k.s_c, o_m, mask_m, p_q, q.s_r, q.s_c, o_n, mask_n, D,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
            b_p = probabilities(b_s * y_scale, numbers, s_n, o_n, mask_n, 1)
            b_dp = chunked_product(
                p_v, 1, s_r, o_m, mask_m, p_p, 1, s_r, o_n, mask_n, n_a,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, False,
            )  # fmt: skip
            b_ds = b_p * (b_dp * s - tl.load(sums + o_n, mask=mask_n, other=0.0)[None, :])
            b_x = tl.load(p_q + o_n[:, None] * q.s_r + o_o[None, :] * q.s_c, mask=mask_no, other=0.0)
        else:
            b_s = chunked_product(
                p_q, q.s_r, q.s_c, o_m, mask_m, p_k, k.s_r, k.s_c, o_n, mask_n, D,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
            b_s = b_s * y_scale + tl.where(mask_n, 0.0, -1e30)[None, :]
            b_p = probabilities(b_s, numbers, s_n, o_m, mask_m, 0)
            b_dp = chunked_product(
                p_p, 1, s_r, o_m, mask_m, p_v, 1, s_r, o_n, mask_n, n_a,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, False,
            )  # fmt: skip
            b_ds = b_p * (b_dp * s - tl.load(sums + o_m, mask=mask_m, other=0.0)[:, None])
            b_x = tl.load(p_k + o_n[:, None] * k.s_r + o_o[None, :] * k.s_c, mask=mask_no, other=0.0)
        acc = tl.dot(b_ds, b_x.to(tl.float32), acc, input_precision=PRECISION)
    o_out = (i_bh * n_tokens + start + o_m)[:, None] * D + o_o[None, :]
    mask_out = mask_m[:, None] & mask_o[None, :]
    tl.store(out + o_out, tl.load(out + o_out, mask=mask_out, other=0.0) + acc * scale, mask=mask_out)
