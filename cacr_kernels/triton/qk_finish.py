"""Last kernels of the query/key backward: the D x D terms are added and the gradients of q and k rounded once.

Every token of q and k is written: exactly 0 outside the spans, NaN throughout an example with invalid spans.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_args import SpanArgs, plain_spans
from .qk_tiles import narrow, open_head, open_rows, rows_times_matrix


@triton.jit(do_not_specialize=["n_tokens", "heads", "group"])
def qk_finish_q_kernel(
    k,  # Block [B, Hk, N, D]
    du,  # float32 [B, H, N, D]
    dq,  # float32 [B, H, N, D]: dX^T U + c dY K_a
    products,  # float32 [B, H, 2, 3, D, D]: C, W, M
    grad_cw,  # float32 [B, H, 2, 2, D, D]: dC, dW + dW^T
    out,  # [B, H, N, D] in q's dtype
    spans,  # SpanArgs
    n_tokens,
    heads,
    group,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    TEXT: tl.constexpr,
    VISION: tl.constexpr,
    GRAD_X: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """grad_q = dX^T U + c dY K_a + dU_a M_a^T + K_a dC_a for BLOCK_M positions of one query head."""
    spans = SpanArgs(spans.table, *plain_spans(spans))
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // heads
    first = tl.program_id(1) * BLOCK_M
    o_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_e = tl.arange(0, BLOCK_D)
    p_k = open_head(k, i_b, i_bh % heads // group, 0)
    dq += i_bh * n_tokens * D
    o_md = o_m[:, None] * D + o_e[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    inside = tl.zeros([BLOCK_M], tl.int1)
    for i_side in tl.static_range(2):
        start, n, _, valid = open_rows(spans, i_b, i_side == 0)
        if (first < start + n) & (first + BLOCK_M > start):
            mask_m = (o_m >= start) & (o_m < start + n)
            inside |= mask_m
            if TEXT if i_side == 0 else VISION:
                acc += tl.load(dq + o_md, mask=mask_m[:, None] & (o_e < D)[None, :], other=0.0)
                if GRAD_X:
                    m = products + ((i_bh * 2 + 1 - i_side) * 3 + 2) * (D * D)
                    acc = rows_times_matrix(
                        acc, du + i_bh * n_tokens * D, D, 1, o_m, mask_m, m, 1, D, D, BLOCK_D, BLOCK_F, PRECISION
                    )
            if GRAD_X and (VISION if i_side == 0 else TEXT):
                dc = grad_cw + (i_bh * 2 + i_side) * (2 * D * D)
                acc = rows_times_matrix(acc, p_k, k.s_r, k.s_c, o_m, mask_m, dc, D, 1, D, BLOCK_D, BLOCK_F, PRECISION)
    # a NaN inside makes D x D terms that are not zero times the zeros outside
    acc = tl.where(inside[:, None], acc, 0.0)
    acc = tl.where(valid, acc, float("nan"))
    out += i_bh * n_tokens * D
    tl.store(out + o_md, narrow(acc, out.dtype.element_ty, UPCAST), mask=(o_m < n_tokens)[:, None] & (o_e < D)[None, :])


@triton.jit(do_not_specialize=["n_tokens", "key_heads", "group"])
def qk_finish_k_kernel(
    q,  # Block [B, H, N, D]
    k,  # Block [B, Hk, N, D]
    dk,  # float32 [B, H, N, D]: c dY^T Q_a of every query head
    grad_cw,  # float32 [B, H, 2, 2, D, D]: dC, dW + dW^T
    out,  # [B, Hk, N, D] in k's dtype
    spans,  # SpanArgs
    n_tokens,
    key_heads,
    group,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    TEXT: tl.constexpr,
    VISION: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_Y: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """grad_k = sum of c dY^T Q_a + Q_a dC_a^T + K_a (dW_a + dW_a^T) over the query heads of one key head, in order."""
    spans = SpanArgs(spans.table, *plain_spans(spans))
    i_bk = tl.program_id(0).to(tl.int64)
    i_b = i_bk // key_heads
    i_k = i_bk % key_heads
    first = tl.program_id(1) * BLOCK_M
    o_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_e = tl.arange(0, BLOCK_D)
    p_k = open_head(k, i_b, i_k, 0)
    o_md = o_m[:, None] * D + o_e[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    inside = tl.zeros([BLOCK_M], tl.int1)
    for i_side in tl.static_range(2):
        start, n, _, valid = open_rows(spans, i_b, i_side == 0)
        if (first < start + n) & (first + BLOCK_M > start):
            mask_m = (o_m >= start) & (o_m < start + n)
            inside |= mask_m
            for i_g in range(group):
                i_h = i_k * group + i_g
                i_bh = i_b * key_heads * group + i_h
                if GRAD_Y and (TEXT if i_side == 0 else VISION):
                    acc += tl.load(
                        dk + i_bh * n_tokens * D + o_md, mask=mask_m[:, None] & (o_e < D)[None, :], other=0.0
                    )
                if GRAD_X and (VISION if i_side == 0 else TEXT):
                    dc = grad_cw + (i_bh * 2 + i_side) * (2 * D * D)
                    acc = rows_times_matrix(
                        acc,
                        open_head(q, i_b, i_h, 0),
                        q.s_r,
                        q.s_c,
                        o_m,
                        mask_m,
                        dc,
                        1,
                        D,
                        D,
                        BLOCK_D,
                        BLOCK_F,
                        PRECISION,
                    )
                    acc = rows_times_matrix(
                        acc, p_k, k.s_r, k.s_c, o_m, mask_m, dc + D * D, D, 1, D, BLOCK_D, BLOCK_F, PRECISION
                    )
    # a NaN inside makes D x D terms that are not zero times the zeros outside
    acc = tl.where(inside[:, None], acc, 0.0)
    acc = tl.where(valid, acc, float("nan"))
    out += i_bk * n_tokens * D
    tl.store(out + o_md, narrow(acc, out.dtype.element_ty, UPCAST), mask=(o_m < n_tokens)[:, None] & (o_e < D)[None, :])
