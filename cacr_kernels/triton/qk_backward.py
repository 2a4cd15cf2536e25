"""Backward kernels of the query/key variant: tiles of X and Y are recomputed along rows, then along columns.

With d = x - y: dX = p (d - E_p[d]) + p - q, dY = -q (d - E_q[d]) - p + q. Rows give dU = dX Q_a and dQ_a += c dY K_a,
columns give dQ_a += dX^T U and dK_a += c dY^T Q_a. X is that of qk_forward.py, so float32 queries are centred. One
program writes an output element, in a fixed order of additions.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .common import plain_spans
from .qk_tiles import first_row, narrow, open_head, open_rows, operand, rows_dot


@triton.jit
def load_rows(stats, rows, mask):
    """(m_x, 1 / l_x, 1 - E_p[d], m_y, 1 / l_y, 1 + E_q[d]) of a tile of rows; finite beyond the span."""
    m_x = tl.load(stats, mask=mask, other=0.0)
    r_x = 1.0 / tl.load(stats + rows, mask=mask, other=1.0)
    m_y = tl.load(stats + 2 * rows, mask=mask, other=0.0)
    r_y = 1.0 / tl.load(stats + 3 * rows, mask=mask, other=1.0)
    e_p = tl.load(stats + 4 * rows, mask=mask, other=0.0)
    e_q = e_p - tl.load(stats + 5 * rows, mask=mask, other=0.0)
    return m_x, r_x, 1.0 - e_p, m_y, r_y, 1.0 + e_q


@triton.jit
def tile_gradients(b_x, b_y, m_x, r_x, c_x, m_y, r_y, c_y):
    """(dX, dY) of one tile without the factor of grad_loss: p (d + 1 - E_p[d]) - q and q (1 + E_q[d] - d) - p.

    x, y and the maxima in log2 units; row numbers as in :func:`load_rows`, broadcast along the tile.
    """
    b_x -= m_x
    b_y -= m_y
    b_d = (b_x - b_y) * 0.6931471805599453
    b_p = tl.exp2(b_x) * r_x
    b_q = tl.exp2(b_y) * r_y
    return b_p * (b_d + c_x) - b_q, b_q * (c_y - b_d) - b_p


@triton.jit
def row_weight(grad, s_gb, s_gh, i_b, i_h, n, ROW_MEAN: tl.constexpr):
    """grad_loss of one problem, divided by n_a for the row mean."""
    weight = tl.load(grad + i_b * s_gb + i_h * s_gh).to(tl.float32)
    if ROW_MEAN:
        weight = weight / tl.maximum(n, 1)
    return weight


@triton.jit(do_not_specialize=["s_gb", "s_gh", "n_tokens", "heads", "group", "tiles_text"])
def qk_columns_kernel(
    q,
    k,
    u_hi,
    u_lo,
    u_exp,
    stats,
    grad,  # [B, H]
    dq,  # float32 [B, H, N, D] by absolute position: written, dX^T U
    dk,  # float32 [B, H, N, D]: written, c dY^T Q_a
    s_gb,
    s_gh,
    spans,  # SpanArgs
    n_tokens,
    heads,
    group,
    tiles_text,
    scale,  # c
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_Y: tl.constexpr,
    ROW_MEAN: tl.constexpr,
    PAIR: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BLOCK_N columns of one side: tiles are held transposed, [BLOCK_N, BLOCK_M]."""
    spans = plain_spans(spans)
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    i_h = i_bh % heads
    rows = spans.n_text + spans.n_vision
    is_text = i_tile < tiles_text
    start, n, _, _ = open_rows(spans, i_b, is_text)
    first = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_N
    if first >= n:
        return
    o_n = first + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    mask_n = o_n < n
    mask_d = o_d < D
    mask_nd = mask_n[:, None] & mask_d[None, :]
    p_q = open_head(q, i_b, i_h, start)
    p_k = open_head(k, i_b, i_h // group, start)
    o_n64 = o_n.to(tl.int64)
    b_q_cols = operand(tl.load(p_q + o_n64[:, None] * q.s_r + o_d[None, :] * q.s_c, mask=mask_nd, other=0.0), UPCAST)
    b_k_cols = operand(tl.load(p_k + o_n64[:, None] * k.s_r + o_d[None, :] * k.s_c, mask=mask_nd, other=0.0), UPCAST)
    if not PAIR:
        b_q_cols -= first_row(p_q, q.s_c, n, D, BLOCK_D)[None, :]
    row_u = i_bh * n_tokens + start
    stats += i_bh * 8 * rows + tl.where(is_text, 0, spans.n_text)
    y_scale = scale * 1.4426950408889634

    acc_q = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_m in range(0, n, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        mask_m = o_m < n
        mask_md = mask_m[:, None] & mask_d[None, :]
        b_q = operand(
            tl.load(p_q + o_m.to(tl.int64)[:, None] * q.s_r + o_d[None, :] * q.s_c, mask=mask_md, other=0.0), UPCAST
        )
        o_u = (row_u + o_m)[:, None] * D + o_d[None, :]
        b_u = operand(tl.load(u_hi + o_u, mask=mask_md, other=0.0), UPCAST)
        b_x = rows_dot(b_q_cols, b_u, None, True, PRECISION)
        if PAIR:
            b_u_lo = operand(tl.load(u_lo + o_u, mask=mask_md, other=0.0), UPCAST)
            b_x = rows_dot(b_q_cols, b_u_lo, b_x, True, PRECISION)
        if SCALED:
            b_exp = tl.load(u_exp + row_u + o_m, mask=mask_m, other=1.0)
            b_x *= b_exp[None, :]
        b_y = rows_dot(b_k_cols, b_q, None, True, PRECISION) * y_scale
        m_x, r_x, c_x, m_y, r_y, c_y = load_rows(stats + o_m, rows, mask_m)
        # rows beyond the span need no mask: their U and Q are 0 and the tile stays finite
        b_dx, b_dy = tile_gradients(
            b_x, b_y, m_x[None, :], r_x[None, :], c_x[None, :], m_y[None, :], r_y[None, :], c_y[None, :]
        )
        if GRAD_X:
            if SCALED:
                b_dx *= b_exp[None, :]
            acc_q = gradient_dot(b_dx, b_u, acc_q, SCALED, PRECISION, UPCAST)
        if GRAD_Y:
            acc_k = gradient_dot(b_dy, b_q, acc_k, SCALED, PRECISION, UPCAST)
    weight = row_weight(grad, s_gb, s_gh, i_b, i_h, n, ROW_MEAN)
    o_out = (row_u + o_n)[:, None] * D + o_d[None, :]
    if GRAD_X:
        tl.store(dq + o_out, acc_q * (weight * 0.6931471805599453), mask=mask_nd)
    if GRAD_Y:
        tl.store(dk + o_out, acc_k * (weight * scale), mask=mask_nd)


@triton.jit
def gradient_dot(b_grad, b_operand, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + G A with the float32 tile G rounded to A's dtype. For float16 (WIDE) both go through tf32 instead, in
    which A is exact and G keeps its range: gradients neither overflow nor become subnormal."""
    if WIDE:
        acc = tl.dot(b_grad, b_operand.to(tl.float32), acc, input_precision="tf32")
    else:
        if UPCAST:
            b_grad = narrow(b_grad, tl.bfloat16, UPCAST)
        acc = tl.dot(b_grad.to(b_operand.dtype), b_operand, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["s_gb", "s_gh", "n_tokens", "heads", "group", "tiles_text"])
def qk_rows_kernel(
    q,
    k,
    u_hi,
    u_lo,
    u_exp,
    stats,
    grad,  # [B, H]
    du,  # float32 [B, H, N, D] by absolute position: written, dX Q_a
    dq,  # float32 [B, H, N, D]: dX^T U is there, c dY K_a is added
    s_gb,
    s_gh,
    spans,  # SpanArgs
    n_tokens,
    heads,
    group,
    tiles_text,
    scale,  # c
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_Y: tl.constexpr,
    ROW_MEAN: tl.constexpr,
    PAIR: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BLOCK_M rows of one side."""
    spans = plain_spans(spans)
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    i_h = i_bh % heads
    rows = spans.n_text + spans.n_vision
    is_text = i_tile < tiles_text
    start, n, _, _ = open_rows(spans, i_b, is_text)
    first = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M
    if first >= n:
        return
    o_m = first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    mask_m = o_m < n
    mask_d = o_d < D
    mask_md = mask_m[:, None] & mask_d[None, :]
    p_q = open_head(q, i_b, i_h, start)
    p_k = open_head(k, i_b, i_h // group, start)
    row_u = i_bh * n_tokens + start
    o_u = (row_u + o_m)[:, None] * D + o_d[None, :]
    b_q_rows = operand(
        tl.load(p_q + o_m.to(tl.int64)[:, None] * q.s_r + o_d[None, :] * q.s_c, mask=mask_md, other=0.0), UPCAST
    )
    b_u = operand(tl.load(u_hi + o_u, mask=mask_md, other=0.0), UPCAST)
    if PAIR:
        b_u_lo = operand(tl.load(u_lo + o_u, mask=mask_md, other=0.0), UPCAST)
    if SCALED:
        b_exp = tl.load(u_exp + row_u + o_m, mask=mask_m, other=1.0)
    stats += i_bh * 8 * rows + tl.where(is_text, 0, spans.n_text) + o_m
    m_x, r_x, c_x, m_y, r_y, c_y = load_rows(stats, rows, mask_m)
    y_scale = scale * 1.4426950408889634

    if not PAIR:
        b_first = first_row(p_q, q.s_c, n, D, BLOCK_D)
    acc_u = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_n in range(0, n, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        mask_n = o_n < n
        mask_nd = mask_n[:, None] & mask_d[None, :]
        o_n = o_n.to(tl.int64)
        b_q = operand(tl.load(p_q + o_n[:, None] * q.s_r + o_d[None, :] * q.s_c, mask=mask_nd, other=0.0), UPCAST)
        b_k = operand(tl.load(p_k + o_n[:, None] * k.s_r + o_d[None, :] * k.s_c, mask=mask_nd, other=0.0), UPCAST)
        if not PAIR:
            b_q -= b_first[None, :]  # in dX Q too: the rows of dX sum to 0
        b_x = rows_dot(b_u, b_q, None, False, PRECISION)
        if PAIR:
            b_x = rows_dot(b_u_lo, b_q, b_x, False, PRECISION)
        if SCALED:
            b_x *= b_exp[:, None]
        b_y = rows_dot(b_q_rows, b_k, None, False, PRECISION)
        # a column beyond the span gets -1e30: probability and gradient exactly 0
        b_floor = tl.where(mask_n, 0.0, -1e30)[None, :]
        b_dx, b_dy = tile_gradients(
            b_x + b_floor,
            b_y * y_scale + b_floor,
            m_x[:, None],
            r_x[:, None],
            c_x[:, None],
            m_y[:, None],
            r_y[:, None],
            c_y[:, None],
        )
        if GRAD_X:
            acc_u = gradient_dot(b_dx, b_q, acc_u, SCALED, PRECISION, UPCAST)
        if GRAD_Y:
            acc_q = gradient_dot(b_dy, b_k, acc_q, SCALED, PRECISION, UPCAST)
    weight = row_weight(grad, s_gb, s_gh, i_b, i_h, n, ROW_MEAN)
    if GRAD_X:
        tl.store(du + o_u, acc_u * weight, mask=mask_md)
    if GRAD_Y:
        acc_q *= weight * scale
        if GRAD_X:
            acc_q += tl.load(dq + o_u, mask=mask_md, other=0.0)
        tl.store(dq + o_u, acc_q, mask=mask_md)
