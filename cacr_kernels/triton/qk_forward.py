"""Forward kernels of the query/key variant: online row numbers of X = U Q_a^T against Y = c Q_a K_a^T, and their sum.

A row keeps m_x, l_x = sum exp(x - m_x), m_y, l_y, E_p[d] with d = (x - m_x) - (y - m_y), and its symmetric KL
E_p[d] - E_q[d]. Tiles are computed in units of log2: U carries a factor log2(e), y is scaled by c log2(e). The stored
maxima are in these units, E_p[d] and the KL are natural. float32 queries are centred, X = U (Q_a - 1 q)^T with q the
side's first one: see products.projected_tile.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_args import SpanArgs, plain_spans, plain_tokens
from .qk_tiles import first_row, load_tokens, open_head, open_rows, operand, rows_dot
from .rows import rows_advance, rows_finish, rows_start, rows_update, store_numbers


@triton.jit
def store_rows(stats, spans, i_bh, is_text, o_m, mask_m, m_x, l_x, s_x, m_y, l_y, s_y, c, SOFTMAX: tl.constexpr):
    """The numbers of a tile of rows, 0 beyond the span up to the spans' bound: m_x, 1 / l_x, m_y, 1 / l_y, E_p[d], KL.

    KL and not E_q[d]: the difference of two rounded expectations would lose the loss of nearly uniform rows. For kind
    "softmax" the cross block's maxima and sums of exp are there already.
    """
    rows = spans.n_text + spans.n_vision
    mask = o_m < tl.where(is_text, spans.n_text, spans.n_vision)
    p = stats + i_bh * 8 * rows + tl.where(is_text, 0, spans.n_text)
    b_loss, e_p, _ = rows_finish(l_x, s_x, l_y, s_y, c)
    e_p, b_loss = e_p * 0.6931471805599453, b_loss * 0.6931471805599453
    PRESENT: tl.constexpr = 0b11000000 if SOFTMAX else 0
    store_numbers(p, rows, o_m, mask, mask_m, m_x, 1.0 / l_x, m_y, 1.0 / l_y, e_p, b_loss, PRESENT)


@triton.jit
def logits_tile(
    q, k, p_q, p_k, i_n, n, b_u, b_u_lo, b_exp, b_q_rows, b_first,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PAIR: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(X, Y / (c log2(e))) of one tile [M, N] from column i_n: X = U (Q - 1 q)^T, q only for float32; Y = Q K^T."""
    b_q = operand(load_tokens(p_q, q.s_r, q.s_c, i_n, n, D, BLOCK_D, BLOCK_N, MASKED), UPCAST)
    b_k = operand(load_tokens(p_k, k.s_r, k.s_c, i_n, n, D, BLOCK_D, BLOCK_N, MASKED), UPCAST)
    if not PAIR:
        b_q -= b_first[None, :]
    b_x = rows_dot(b_u, b_q, None, False, PRECISION)
    if PAIR:
        b_x = rows_dot(b_u_lo, b_q, b_x, False, PRECISION)
    if SCALED:
        b_x *= b_exp[:, None]
    return b_x, rows_dot(b_q_rows, b_k, None, False, PRECISION)


@triton.jit(do_not_specialize=["n_tokens", "heads", "group", "tiles_text"])
def qk_forward_kernel(
    q,  # BlockArg [B, H, N, D]
    k,  # BlockArg [B, Hk, N, D]
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
    PEEL: tl.constexpr,
):
    """The six numbers of BLOCK_M rows of one side. PEEL: the first and the last tile are code of their own.

    Fewer instructions a tile then, and more registers.
    """
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    q = plain_tokens(q)
    k = plain_tokens(k)
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
    else:
        b_u_lo = b_u
    if SCALED:
        b_exp = tl.load(u_exp + i_bh * n_tokens + start + o_m, mask=mask_m, other=1.0)
    else:
        b_exp = tl.zeros([BLOCK_M], tl.float32)
    b_first = first_row(p_q, q.s_c, n, D, BLOCK_D)
    # c y = |c| (sign(c) y): see rows_update
    b_q_rows *= tl.where(y_scale < 0, -1.0, 1.0).to(b_q_rows.dtype)
    y_scale = tl.abs(y_scale)
    rows = rows_start(BLOCK_M)
    i_1 = tl.where(first < n, n, 0)  # end of the columns that rows_update takes in
    if PEEL:
        i_1 = tl.minimum(i_1, BLOCK_N)
    for i_n in range(0, i_1, BLOCK_N):
        b_x, b_y = logits_tile(
            q, k, p_q, p_k, i_n, n, b_u, b_u_lo, b_exp, b_q_rows, b_first,
            D, BLOCK_D, BLOCK_N, True, PAIR, SCALED, PRECISION, UPCAST,
        )  # fmt: skip
        inside = (i_n + tl.arange(0, BLOCK_N) < n)[None, :]
        rows = rows_update(*rows, b_x, b_y, y_scale, inside, True)
    if PEEL:
        whole = n // BLOCK_N * BLOCK_N
        for i_n in range(BLOCK_N, tl.where(first < n, whole, 0), BLOCK_N):
            b_x, b_y = logits_tile(
                q, k, p_q, p_k, i_n, n, b_u, b_u_lo, b_exp, b_q_rows, b_first,
                D, BLOCK_D, BLOCK_N, False, PAIR, SCALED, PRECISION, UPCAST,
            )  # fmt: skip
            rows = rows_advance(*rows, b_x, b_y, y_scale, None, False)
        if (first < n) & (whole > 0) & (whole < n):
            b_x, b_y = logits_tile(
                q, k, p_q, p_k, whole, n, b_u, b_u_lo, b_exp, b_q_rows, b_first,
                D, BLOCK_D, BLOCK_N, True, PAIR, SCALED, PRECISION, UPCAST,
            )  # fmt: skip
            inside = (whole + tl.arange(0, BLOCK_N) < n)[None, :]
            rows = rows_advance(*rows, b_x, b_y, y_scale, inside, True)
    m_x, l_x, s_x, m_y, l_y, s_y, c = rows
    store_rows(stats, spans, i_bh, is_text, o_m, mask_m, m_x, l_x, s_x, m_y, l_y, s_y, c, False)


@triton.jit(do_not_specialize=["heads"])
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
    """loss = sum over sides of the rows' KL, in a fixed order; NaN for an example with invalid spans."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
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
        acc += tl.load(stats + 5 * rows + o, mask=o < n, other=0.0)
    total = tl.sum(acc)
    if ROW_MEAN:
        total = total / tl.maximum(n, 1)
    return total
