"""Backward kernels of the query/key variant: tiles of X and Y are recomputed along rows, then along columns.

With d = x - y: dX = p (d - E_p[d]) + p - q, dY = -q (d - E_q[d]) - p + q. Rows give dU = dX Q_a and dQ_a += c dY K_a,
columns give dQ_a += dX^T U and dK_a += c dY^T Q_a. X is that of qk_forward.py, so float32 queries are centred. One
program writes an output element, in a fixed order of additions.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2_E
from .kernel_args import SpanArgs, plain_spans, plain_tokens
from .qk_tiles import first_row, load_tokens, narrow, open_head, open_rows, operand, rows_dot


@triton.jit
def load_number(p, mask, other):
    """One number of a tile of rows, ``other`` outside ``mask``; None masks nothing."""
    if mask is None:
        b = tl.load(p)
    else:
        b = tl.load(p, mask=mask, other=other)
    return b


@triton.jit
def load_rows(stats, rows, mask):
    """(m_x, 1 / l_x, 1 - E_p[d], m_y, 1 / l_y, 1 + E_q[d]) of a tile of rows; finite beyond the span."""
    m_x = load_number(stats, mask, 0.0)
    r_x = load_number(stats + rows, mask, 1.0)
    m_y = load_number(stats + 2 * rows, mask, 0.0)
    r_y = load_number(stats + 3 * rows, mask, 1.0)
    e_p = load_number(stats + 4 * rows, mask, 0.0)
    e_q = e_p - load_number(stats + 5 * rows, mask, 0.0)
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


@triton.jit
def columns_step(
    acc, q, p_q, p_u, p_lo, p_exp, stats, i_m, n, b_q_cols, b_k_cols, y_scale, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
    GRAD_X: tl.constexpr, GRAD_Y: tl.constexpr,
    PAIR: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(dX^T U, dY^T Q) of the rows before i_m, and of those from there."""
    acc_q, acc_k = acc
    o_m = i_m + tl.arange(0, BLOCK_M)
    b_q = operand(load_tokens(p_q, q.s_r, q.s_c, i_m, n, D, BLOCK_D, BLOCK_M, MASKED), UPCAST)
    b_u = operand(load_tokens(p_u, D, 1, i_m, n, D, BLOCK_D, BLOCK_M, MASKED), UPCAST)
    b_x = rows_dot(b_q_cols, b_u, None, True, PRECISION)
    if PAIR:
        b_u_lo = operand(load_tokens(p_lo, D, 1, i_m, n, D, BLOCK_D, BLOCK_M, MASKED), UPCAST)
        b_x = rows_dot(b_q_cols, b_u_lo, b_x, True, PRECISION)
    mask_m = None
    if MASKED:
        mask_m = o_m < n
    if SCALED:
        b_exp = load_number(p_exp + o_m, mask_m, 1.0)
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
    return acc_q, acc_k


@triton.jit(do_not_specialize=["s_gb", "s_gh", "n_tokens", "heads", "group", "tiles_text"])
def qk_columns_kernel(
    q,  # BlockArg [B, H, N, D]
    k,  # BlockArg [B, Hk, N, D]
    u_hi,  # [B, H, N, D]
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
    PEEL: tl.constexpr,
):
    """BLOCK_N columns of one side: tiles are held transposed, [BLOCK_N, BLOCK_M]."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    q = plain_tokens(q)
    k = plain_tokens(k)
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
    u_hi += row_u * D
    if PAIR:
        u_lo += row_u * D
    if SCALED:
        u_exp += row_u
    stats += i_bh * 8 * rows + tl.where(is_text, 0, spans.n_text)
    y_scale = scale * LOG2_E

    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    whole = n
    if PEEL:
        whole = n // BLOCK_M * BLOCK_M
    for i_m in range(0, whole, BLOCK_M):
        acc = columns_step(
            acc, q, p_q, u_hi, u_lo, u_exp, stats, i_m, n, b_q_cols, b_k_cols, y_scale, rows,
            D, BLOCK_D, BLOCK_M, not PEEL, GRAD_X, GRAD_Y, PAIR, SCALED, PRECISION, UPCAST,
        )  # fmt: skip
    if PEEL and (whole < n):
        acc = columns_step(
            acc, q, p_q, u_hi, u_lo, u_exp, stats, whole, n, b_q_cols, b_k_cols, y_scale, rows,
            D, BLOCK_D, BLOCK_M, True, GRAD_X, GRAD_Y, PAIR, SCALED, PRECISION, UPCAST,
        )  # fmt: skip
    acc_q, acc_k = acc
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


@triton.jit
def rows_step(
    acc, q, k, p_q, p_k, i_n, n, b_u, b_u_lo, b_exp, b_q_rows, b_first, numbers, y_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    GRAD_X: tl.constexpr, GRAD_Y: tl.constexpr,
    PAIR: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(dX Q, dY K) of the columns before i_n, and of those from there."""
    acc_u, acc_q = acc
    m_x, r_x, c_x, m_y, r_y, c_y = numbers
    b_q = operand(load_tokens(p_q, q.s_r, q.s_c, i_n, n, D, BLOCK_D, BLOCK_N, MASKED), UPCAST)
    b_k = operand(load_tokens(p_k, k.s_r, k.s_c, i_n, n, D, BLOCK_D, BLOCK_N, MASKED), UPCAST)
    if not PAIR:
        b_q -= b_first[None, :]  # in dX Q too: the rows of dX sum to 0
    b_x = rows_dot(b_u, b_q, None, False, PRECISION)
    if PAIR:
        b_x = rows_dot(b_u_lo, b_q, b_x, False, PRECISION)
    if SCALED:
        b_x *= b_exp[:, None]
    b_y = rows_dot(b_q_rows, b_k, None, False, PRECISION) * y_scale
    b_dx, b_dy = tile_gradients(
        b_x, b_y, m_x[:, None], r_x[:, None], c_x[:, None], m_y[:, None], r_y[:, None], c_y[:, None]
    )
    if MASKED:
        inside = (i_n + tl.arange(0, BLOCK_N) < n)[None, :]
        b_dx = tl.where(inside, b_dx, 0.0)
        b_dy = tl.where(inside, b_dy, 0.0)
    if GRAD_X:
        acc_u = gradient_dot(b_dx, b_q, acc_u, SCALED, PRECISION, UPCAST)
    if GRAD_Y:
        acc_q = gradient_dot(b_dy, b_k, acc_q, SCALED, PRECISION, UPCAST)
    return acc_u, acc_q


@triton.jit(do_not_specialize=["s_gb", "s_gh", "n_tokens", "heads", "group", "tiles_text"])
def qk_rows_kernel(
    q,  # BlockArg [B, H, N, D]
    k,  # BlockArg [B, Hk, N, D]
    u_hi,  # [B, H, N, D]
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
    PEEL: tl.constexpr,
):
    """BLOCK_M rows of one side."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    q = plain_tokens(q)
    k = plain_tokens(k)
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
    else:
        b_u_lo = b_u
    if SCALED:
        b_exp = tl.load(u_exp + row_u + o_m, mask=mask_m, other=1.0)
    else:
        b_exp = tl.zeros([BLOCK_M], tl.float32)
    stats += i_bh * 8 * rows + tl.where(is_text, 0, spans.n_text) + o_m
    numbers = load_rows(stats, rows, mask_m)
    y_scale = scale * LOG2_E
    b_first = first_row(p_q, q.s_c, n, D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = n
    if PEEL:
        whole = n // BLOCK_N * BLOCK_N
    for i_n in range(0, whole, BLOCK_N):
        acc = rows_step(
            acc, q, k, p_q, p_k, i_n, n, b_u, b_u_lo, b_exp, b_q_rows, b_first, numbers, y_scale,
            D, BLOCK_D, BLOCK_N, not PEEL, GRAD_X, GRAD_Y, PAIR, SCALED, PRECISION, UPCAST,
        )  # fmt: skip
    if PEEL and (whole < n):
        acc = rows_step(
            acc, q, k, p_q, p_k, whole, n, b_u, b_u_lo, b_exp, b_q_rows, b_first, numbers, y_scale,
            D, BLOCK_D, BLOCK_N, True, GRAD_X, GRAD_Y, PAIR, SCALED, PRECISION, UPCAST,
        )  # fmt: skip
    acc_u, acc_q = acc
    weight = row_weight(grad, s_gb, s_gh, i_b, i_h, n, ROW_MEAN)
    if GRAD_X:
        tl.store(du + o_u, acc_u * weight, mask=mask_md)
    if GRAD_Y:
        acc_q *= weight * scale
        if GRAD_X:
            acc_q += tl.load(dq + o_u, mask=mask_md, other=0.0)
        tl.store(dq + o_u, acc_q, mask=mask_md)
