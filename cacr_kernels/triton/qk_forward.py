"""Forward kernels of the query/key variant: online row numbers of X = U Q_a^T against Y = c Q_a K_a^T, and their sum.

A row keeps m_x, l_x = sum exp(x - m_x), m_y, l_y and E_p[d], E_q[d] with d = (x - m_x) - (y - m_y); its symmetric KL is
E_p[d] - E_q[d]. Tiles are computed in units of log2: U carries a factor log2(e), y is scaled by c log2(e). The stored
maxima are in these units, the expectations are natural.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .qk_tiles import open_head, open_rows, operand


@triton.jit
def online_update(
    b_x,  # [M, N] float32, log2 units; columns beyond the span at -1e30
    b_y,
    m_x,  # [M] running maximum, sum of exp and sum of p d, all relative to the running maxima
    l_x,
    a_x,
    m_y,
    l_y,
    a_y,
):
    """One tile of columns into the six running numbers; d is re-referenced whenever a maximum moves."""
    m_x_new = tl.maximum(m_x, tl.max(b_x, axis=1))
    m_y_new = tl.maximum(m_y, tl.max(b_y, axis=1))
    shift_x = m_x - m_x_new
    shift_y = m_y - m_y_new
    shift = shift_x - shift_y
    rescale_x = tl.exp2(shift_x)
    rescale_y = tl.exp2(shift_y)
    b_x -= m_x_new[:, None]
    b_y -= m_y_new[:, None]
    b_d = b_x - b_y
    b_p = tl.exp2(b_x)
    b_q = tl.exp2(b_y)
    a_x = (a_x + l_x * shift) * rescale_x + tl.sum(b_p * b_d, axis=1)
    a_y = (a_y + l_y * shift) * rescale_y + tl.sum(b_q * b_d, axis=1)
    l_x = l_x * rescale_x + tl.sum(b_p, axis=1)
    l_y = l_y * rescale_y + tl.sum(b_q, axis=1)
    return m_x_new, l_x, a_x, m_y_new, l_y, a_y


@triton.jit
def store_rows(stats, spans, i_bh, is_text, o_m, mask_m, m_x, l_x, a_x, m_y, l_y, a_y, SOFTMAX: tl.constexpr):
    """The numbers of a tile of rows, 0 beyond the span up to the spans' bound.

    For kind "softmax" the cross block's maxima and sums of exp are there already.
    """
    rows = spans.n_text + spans.n_vision
    mask = o_m < tl.where(is_text, spans.n_text, spans.n_vision)
    p = stats + i_bh * 8 * rows + tl.where(is_text, 0, spans.n_text) + o_m
    tl.store(p, tl.where(mask_m, m_x, 0.0), mask=mask)
    tl.store(p + rows, tl.where(mask_m, l_x, 0.0), mask=mask)
    tl.store(p + 2 * rows, tl.where(mask_m, m_y, 0.0), mask=mask)
    tl.store(p + 3 * rows, tl.where(mask_m, l_y, 0.0), mask=mask)
    e_p = a_x / tl.where(mask_m, l_x, 1.0) * 0.6931471805599453
    e_q = a_y / tl.where(mask_m, l_y, 1.0) * 0.6931471805599453
    tl.store(p + 4 * rows, tl.where(mask_m, e_p, 0.0), mask=mask)
    tl.store(p + 5 * rows, tl.where(mask_m, e_q, 0.0), mask=mask)
    if not SOFTMAX:
        tl.store(p + 6 * rows, tl.zeros_like(m_x), mask=mask)
        tl.store(p + 7 * rows, tl.zeros_like(m_x), mask=mask)


@triton.jit(do_not_specialize=["spans", "n_tokens", "heads", "group", "tiles_text"])
def qk_forward_kernel(
    q,  # Block [B, H, N, D]
    k,  # Block [B, Hk, N, D]
    u_hi,  # [B, H, N, D]
    u_lo,
    u_exp,  # float32 [B, H, N]
    stats,  # float32 [B, H, 8, n_text + n_vision]
    spans,  # SpanArgs
    n_tokens,
    heads,
    group,
    tiles_text,
    y_scale,  # c log2(e)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAIR: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The six numbers of BLOCK_M rows of one side."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    i_h = i_bh % heads
    is_text = i_tile < tiles_text
    start, n, _, _ = open_rows(spans, i_b, is_text)
    first = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    mask_m = o_m < n
    mask_d = o_d < D
    mask_md = mask_m[:, None] & mask_d[None, :]
    p_q = open_head(q, i_b, i_h, start)
    p_k = open_head(k, i_b, i_h // group, start)
    o_u = (i_bh * n_tokens + start + o_m)[:, None] * D + o_d[None, :]
    b_q_rows = operand(
        tl.load(p_q + o_m.to(tl.int64)[:, None] * q.s_r + o_d[None, :] * q.s_c, mask=mask_md, other=0.0), UPCAST
    )
    b_u = operand(tl.load(u_hi + o_u, mask=mask_md, other=0.0), UPCAST)
    if PAIR:
        b_u_lo = operand(tl.load(u_lo + o_u, mask=mask_md, other=0.0), UPCAST)
    if SCALED:
        b_exp = tl.load(u_exp + i_bh * n_tokens + start + o_m, mask=mask_m, other=1.0)

    m_x = tl.full([BLOCK_M], -1e30, tl.float32)
    m_y = tl.full([BLOCK_M], -1e30, tl.float32)
    l_x = tl.zeros([BLOCK_M], tl.float32)
    l_y = tl.zeros([BLOCK_M], tl.float32)
    a_x = tl.zeros([BLOCK_M], tl.float32)
    a_y = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, tl.where(first < n, n, 0), BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        mask_n = o_n < n
        mask_dn = mask_d[:, None] & mask_n[None, :]
        o_n = o_n.to(tl.int64)
        b_qt = operand(tl.load(p_q + o_n[None, :] * q.s_r + o_d[:, None] * q.s_c, mask=mask_dn, other=0.0), UPCAST)
        b_kt = operand(tl.load(p_k + o_n[None, :] * k.s_r + o_d[:, None] * k.s_c, mask=mask_dn, other=0.0), UPCAST)
        # a column beyond the span gets -1e30: probability exactly 0, every difference finite
        b_floor = tl.where(mask_n, 0.0, -1e30)[None, :]
        b_x = tl.dot(b_u, b_qt, input_precision=PRECISION)
        if PAIR:
            b_x = tl.dot(b_u_lo, b_qt, b_x, input_precision=PRECISION)
        if SCALED:
            b_x *= b_exp[:, None]
        b_y = tl.dot(b_q_rows, b_kt, input_precision=PRECISION)
        m_x, l_x, a_x, m_y, l_y, a_y = online_update(
            b_x + b_floor, b_y * y_scale + b_floor, m_x, l_x, a_x, m_y, l_y, a_y
        )
    store_rows(stats, spans, i_bh, is_text, o_m, mask_m, m_x, l_x, a_x, m_y, l_y, a_y, False)


@triton.jit(do_not_specialize=["spans", "heads"])
def qk_loss_kernel(
    stats,  # float32 [B, H, 8, n_text + n_vision]
    loss,  # float32 [B, H]
    spans,  # SpanArgs
    heads,
    BLOCK: tl.constexpr,
    TEXT: tl.constexpr,
    VISION: tl.constexpr,
    ROW_MEAN: tl.constexpr,
):
    """loss = sum over sides and rows of E_p[d] - E_q[d], in a fixed order; NaN for an example with invalid spans."""
    i_bh = tl.program_id(0).to(tl.int64)
    rows = spans.n_text + spans.n_vision
    _, n_text, n_vision, valid = open_rows(spans, i_bh // heads, True)
    stats += i_bh * 8 * rows
    total = 0.0
    if TEXT:
        total += side_loss(stats, rows, n_text, BLOCK, ROW_MEAN)
    if VISION:
        total += side_loss(stats + spans.n_text, rows, n_vision, BLOCK, ROW_MEAN)
    tl.store(loss + i_bh, tl.where(valid, total, float("nan")))


@triton.jit
def side_loss(stats, rows, n, BLOCK: tl.constexpr, ROW_MEAN: tl.constexpr):
    """Sum (or mean) over one side's rows."""
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(0, n, BLOCK):
        o = i + tl.arange(0, BLOCK)
        acc += tl.load(stats + 4 * rows + o, mask=o < n, other=0.0)
        acc -= tl.load(stats + 5 * rows + o, mask=o < n, other=0.0)
    total = tl.sum(acc)
    if ROW_MEAN:
        total = total / tl.maximum(n, 1)
    return total
