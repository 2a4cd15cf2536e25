"""Last kernels of the query/key backward: the D x D terms are added and the gradients of q and k rounded once.

Every token of q and k is written: exactly 0 outside the spans, NaN throughout an example with invalid spans.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_args import SpanArgs, plain_spans, plain_tokens
from .qk_tiles import load_sum, narrow, open_head, open_rows, operand, rows_times_matrix, wide_dot


@triton.jit
def open_tile(spans, i_b, i_tile, tiles_text, TEXT: tl.constexpr, VISION: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile of rows of one side: its first position, rows of the span from there on, and what was asked for.

    (is_text, position, rows, own, inner); own: this side's loss, inner: the loss of the other side, whose X has this
    side's products inside.
    """
    is_text = i_tile < tiles_text
    start, n, _, _ = open_rows(spans, i_b, is_text)
    first = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M
    own = tl.where(is_text, TEXT, VISION)
    inner = tl.where(is_text, VISION, TEXT)
    return is_text, start + first, n - first, own, inner


@triton.jit
def fill_outside(
    out, spans, i_b, first, n_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """0 in the rows of one head of out [n_tokens, D], from ``first``, that are in no span; NaN if spans are invalid."""
    text_start, n_text, n_vision, valid = open_rows(spans, i_b, True)
    vision_start, _, _, _ = open_rows(spans, i_b, False)
    o_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
    o_e = tl.arange(0, BLOCK_D)
    inside = (o_m >= text_start) & (o_m < text_start + n_text)
    inside |= (o_m >= vision_start) & (o_m < vision_start + n_vision)
    mask = ((o_m < n_tokens) & (inside == 0))[:, None] & (o_e < D)[None, :]
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + tl.where(valid, 0.0, float("nan"))
    tl.store(out + o_m[:, None] * D + o_e[None, :], b_out.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "heads", "group", "tiles_text", "tiles"])
def qk_finish_q_kernel(
    k,  # BlockArg [B, Hk, N, D]
    du,  # float32 [B, H, N, D]
    dq,  # float32 [B, H, N, D]: dX^T U + c dY K_a
    products,  # float32 [B, H, 2, 3, D, D]: C, W, M
    grad_cw,  # float32 [B, H, 2, 2, D, D]: dC, dW + dW^T
    out,  # [B, H, N, D] in q's dtype
    spans,  # SpanArgs
    n_tokens,
    heads,
    group,
    tiles_text,
    tiles,  # of both sides; those that follow fill what lies outside
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
    """grad_q = dX^T U + c dY K_a + dU_a M_a^T + K_a dC_a for BLOCK_M rows of one side of one query head."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    k = plain_tokens(k)
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    out += i_bh * n_tokens * D
    if i_tile >= tiles:
        fill_outside(out, spans, i_b, (i_tile - tiles) * BLOCK_M, n_tokens, D, BLOCK_D, BLOCK_M)
        return
    is_text, position, rows, own, inner = open_tile(spans, i_b, i_tile, tiles_text, TEXT, VISION, BLOCK_M)
    if rows <= 0:
        return
    o_m = tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_D)
    mask_m = o_m < rows
    o = o_m[:, None] * D + o_e[None, :]
    mask = mask_m[:, None] & (o_e < D)[None, :]
    row = (i_bh * n_tokens + position) * D
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if GRAD_X:
        i_side = tl.where(is_text, 0, 1)
        m = products + ((i_bh * 2 + 1 - i_side) * 3 + 2) * (D * D)
        dc = grad_cw + (i_bh * 2 + i_side) * (2 * D * D)
        p_k = open_head(k, i_b, i_bh % heads // group, position)
        acc = rows_times_matrix(
            acc, p_k, k.s_r, k.s_c, mask_m, dc, inner, False, False,
            D, BLOCK_M, BLOCK_D, BLOCK_F, PRECISION, UPCAST,
        )  # fmt: skip
        acc = rows_times_matrix(
            acc, du + row, D, 1, mask_m & own, m, own, True, False,
            D, BLOCK_M, BLOCK_D, BLOCK_F, PRECISION, UPCAST,
        )  # fmt: skip
    acc += tl.load(dq + row + o, mask=mask & own, other=0.0)
    tl.store(out + position * D + o, narrow(acc, out.dtype.element_ty, UPCAST), mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "key_heads", "group", "tiles_text", "tiles"])
def qk_finish_k_kernel(
    q,  # BlockArg [B, H, N, D]
    k,  # BlockArg [B, Hk, N, D]
    dk,  # float32 [B, H, N, D]: c dY^T Q_a of every query head
    grad_cw,  # float32 [B, H, 2, 2, D, D]: dC, dW + dW^T
    out,  # [B, Hk, N, D] in k's dtype
    spans,  # SpanArgs
    n_tokens,
    key_heads,
    group,
    tiles_text,
    tiles,  # as in qk_finish_q_kernel
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
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    q = plain_tokens(q)
    k = plain_tokens(k)
    i_bk = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bk // key_heads
    i_k = i_bk % key_heads
    out += i_bk * n_tokens * D
    if i_tile >= tiles:
        fill_outside(out, spans, i_b, (i_tile - tiles) * BLOCK_M, n_tokens, D, BLOCK_D, BLOCK_M)
        return
    is_text, position, rows, own, inner = open_tile(spans, i_b, i_tile, tiles_text, TEXT, VISION, BLOCK_M)
    if rows <= 0:
        return
    o_m = tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_D)
    mask_m = o_m < rows
    o = o_m[:, None] * D + o_e[None, :]
    mask_e = (o_e < D)[None, :]
    mask = mask_m[:, None] & mask_e
    i_bh = i_bk * group
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if GRAD_X:
        dc = grad_cw + (i_bh * 2 + tl.where(is_text, 0, 1)) * (2 * D * D)
        # K times the sum of dW + dW^T
        p_k = open_head(k, i_b, i_k, position)
        o_k = o_m.to(tl.int64)[:, None] * k.s_r
        for f in tl.range(0, D, BLOCK_F):
            o_f = f + tl.arange(0, BLOCK_F)
            mask_f = o_f < D
            b_k = tl.load(p_k + o_k + o_f[None, :] * k.s_c, mask=mask_m[:, None] & mask_f[None, :], other=0.0)
            mask_w = mask_f[:, None] & mask_e & inner
            b_w = load_sum(dc + D * D, o_f[:, None] * D + o_e[None, :], 4 * D * D, group, mask_w, 1)
            acc = wide_dot(operand(b_k, UPCAST), b_w, acc, False, PRECISION)
    for i_g in range(group):
        if GRAD_X:
            acc = rows_times_matrix(
                acc, open_head(q, i_b, i_k * group + i_g, position), q.s_r, q.s_c, mask_m, dc, inner, True, False,
                D, BLOCK_M, BLOCK_D, BLOCK_F, PRECISION, UPCAST,
            )  # fmt: skip
            dc += 4 * D * D
        if GRAD_Y:
            acc += tl.load(dk + ((i_bh + i_g) * n_tokens + position) * D + o, mask=mask & own, other=0.0)
    tl.store(out + position * D + o, narrow(acc, out.dtype.element_ty, UPCAST), mask=mask)
