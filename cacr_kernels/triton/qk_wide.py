"""Tiles of X = U F^T whose contraction is too long to keep on chip: chunked factors, a launch axis over output columns.

Serves kind "softmax", where U = s P_ab P_bb and F = P_ab are float32 [n_a, n_b], and kind "scores" with wide float32
heads, where U = Q_a M and F = Q_a, centred. The mathematics are those of qk_forward.py and qk_backward.py.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import LOG2_E
from .kernel_args import SpanArgs, plain_spans, plain_tokens
from .qk_backward import load_rows, row_weight, tile_gradients
from .qk_forward import store_rows
from .qk_tiles import chunked_product, open_head, open_rows
from .rows import rows_start, rows_update


class Factors(NamedTuple):
    """Kernel argument: the factors u, f of X and their gradients du, df, float32, as one of two layouts.

    COMPACT (kind "softmax"): each [B, H, 2 T R], text's [T, R] before vision's [R, T], T and R the spans' bounds.
    Otherwise [B, H, N, D] by absolute position, and f is q itself, in its own strides.
    """

    u: Any
    f: Any
    du: Any
    df: Any


@triton.jit
def open_factor(p, spans, i_bh, start, is_text, n_tokens, D: tl.constexpr, COMPACT: tl.constexpr):
    """(pointer to row 0 of one side of u, du or df, its row stride); columns are contiguous."""
    if COMPACT:
        bound_text = spans.n_text.to(tl.int64)
        bound_vision = spans.n_vision.to(tl.int64)
        p += i_bh * (2 * bound_text * bound_vision) + tl.where(is_text, 0, bound_text * bound_vision)
        s_r = tl.where(is_text, bound_vision, bound_text)
    else:
        p += (i_bh * n_tokens + start) * D
        s_r = D
    return p, s_r


@triton.jit
def open_outer(f, q, p_q, spans, i_bh, is_text, n_b, D: tl.constexpr, COMPACT: tl.constexpr):
    """The factor F of one side: (pointer to its row 0, row stride, column stride, columns); F is q unless COMPACT."""
    if COMPACT:
        p_f, s_r = open_factor(f, spans, i_bh, 0, is_text, 0, D, COMPACT)
        return p_f, s_r, 1, n_b
    else:
        return p_q, q.s_r, q.s_c, D


@triton.jit(do_not_specialize=["n_tokens", "heads", "group", "tiles_text"])
def qk_wide_forward_kernel(
    q,  # BlockArg [B, H, N, D]
    k,  # BlockArg [B, Hk, N, D]
    factors,  # Factors: u carries log2(e)
    stats,  # float32 [B, H, 8, n_text + n_vision]
    spans,  # SpanArgs
    n_tokens,
    heads,
    group,
    tiles_text,
    y_scale,  # c log2(e)
    COMPACT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The six numbers of BLOCK_M rows of one side."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    q = plain_tokens(q)
    k = plain_tokens(k)
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    i_h = i_bh % heads
    is_text = i_tile < tiles_text
    start, n, n_b, _ = open_rows(spans, i_b, is_text)
    first = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M
    o_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_m = o_m < n
    p_q = open_head(q, i_b, i_h, start)
    p_k = open_head(k, i_b, i_h // group, start)
    p_u, s_ur = open_factor(factors.u, spans, i_bh, start, is_text, n_tokens, D, COMPACT)
    p_f, s_fr, s_fc, width = open_outer(factors.f, q, p_q, spans, i_bh, is_text, n_b, D, COMPACT)
    sign = tl.where(y_scale < 0, -1.0, 1.0)
    m_x, l_x, s_x, m_y, l_y, s_y, c = rows_start(BLOCK_M)
    for i_n in range(0, tl.where(first < n, n, 0), BLOCK_N):
        o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = o_n < n
        b_x = chunked_product(
            p_u, s_ur, 1, o_m, mask_m, p_f, s_fr, s_fc, o_n, mask_n, width,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, False, CENTRE_R=not COMPACT,
        )  # fmt: skip
        b_y = chunked_product(
            p_q, q.s_r, q.s_c, o_m, mask_m, p_k, k.s_r, k.s_c, o_n, mask_n, D,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        m_x, l_x, s_x, m_y, l_y, s_y, c = rows_update(
            m_x, l_x, s_x, m_y, l_y, s_y, c, b_x, b_y * sign, tl.abs(y_scale), mask_n[None, :], True
        )
    store_rows(stats, spans, i_bh, is_text, o_m, mask_m, m_x, l_x, s_x, m_y, l_y, s_y, c, COMPACT)


@triton.jit(do_not_specialize=["s_gb", "s_gh", "n_tokens", "heads", "group", "tiles_text"])
def qk_wide_gradient_kernel(
    q,  # BlockArg [B, H, N, D]
    k,  # BlockArg [B, Hk, N, D]
    factors,  # Factors; columns write df = ln2 dX^T (u log2(e)), rows write du = dX F
    stats,
    grad,  # [B, H]
    own,  # float32 [B, H, N, D]: columns write c dY^T Q_a (for dk), rows write c dY K_a (for dq)
    s_gb,
    s_gh,
    spans,  # SpanArgs
    n_tokens,
    heads,
    group,
    tiles_text,
    scale,  # c
    COLUMNS: tl.constexpr,
    COMPACT: tl.constexpr,
    ADD: tl.constexpr,  # rows: own holds dX^T U already
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_Y: tl.constexpr,
    ROW_MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BLOCK_M rows (or columns) of one side and BLOCK_O columns of what they give; the tiles run over the other index.

    Tiles of COLUMNS are held transposed, so that either way the outputs are tile times [BLOCK_N, BLOCK_O].
    """
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    q = plain_tokens(q)
    k = plain_tokens(k)
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    i_h = i_bh % heads
    rows = spans.n_text + spans.n_vision
    is_text = i_tile < tiles_text
    start, n, n_b, _ = open_rows(spans, i_b, is_text)
    first = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M
    if first >= n:
        return
    o_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_m = o_m < n
    p_q = open_head(q, i_b, i_h, start)
    p_k = open_head(k, i_b, i_h // group, start)
    p_u, s_ur = open_factor(factors.u, spans, i_bh, start, is_text, n_tokens, D, COMPACT)
    p_f, s_fr, s_fc, width = open_outer(factors.f, q, p_q, spans, i_bh, is_text, n_b, D, COMPACT)
    stats += i_bh * 8 * rows + tl.where(is_text, 0, spans.n_text)
    y_scale = scale * LOG2_E
    if not COLUMNS:
        m_x, r_x, c_x, m_y, r_y, c_y = load_rows(stats + o_m, rows, mask_m)
    mask_x = o_o < width
    mask_y = o_o < D
    acc_x = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    acc_y = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for i_n in range(0, n, BLOCK_N):
        o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = o_n < n
        if COLUMNS:
            b_x = chunked_product(
                p_f, s_fr, s_fc, o_m, mask_m, p_u, s_ur, 1, o_n, mask_n, width,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, False, CENTRE_L=not COMPACT, SWAPPED=True,
            )  # fmt: skip
            b_y = chunked_product(
                p_k, k.s_r, k.s_c, o_m, mask_m, p_q, q.s_r, q.s_c, o_n, mask_n, D,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST, SWAPPED=True,
            )  # fmt: skip
            n_m_x, n_r_x, n_c_x, n_m_y, n_r_y, n_c_y = load_rows(stats + o_n, rows, mask_n)
            b_dx, b_dy = tile_gradients(
                b_x, b_y * y_scale,
                n_m_x[None, :], n_r_x[None, :], n_c_x[None, :], n_m_y[None, :], n_r_y[None, :], n_c_y[None, :],
            )  # fmt: skip
            p_x, s_xr, s_xc = p_u, s_ur, 1
            p_y, s_yr, s_yc = p_q, q.s_r, q.s_c
        else:
            b_floor = tl.where(mask_n, 0.0, -1e30)[None, :]
            b_x = chunked_product(
                p_u, s_ur, 1, o_m, mask_m, p_f, s_fr, s_fc, o_n, mask_n, width,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, False, CENTRE_R=not COMPACT,
            )  # fmt: skip
            b_y = chunked_product(
                p_q, q.s_r, q.s_c, o_m, mask_m, p_k, k.s_r, k.s_c, o_n, mask_n, D,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
            b_dx, b_dy = tile_gradients(
                b_x + b_floor, b_y * y_scale + b_floor,
                m_x[:, None], r_x[:, None], c_x[:, None], m_y[:, None], r_y[:, None], c_y[:, None],
            )  # fmt: skip
            p_x, s_xr, s_xc = p_f, s_fr, s_fc
            p_y, s_yr, s_yc = p_k, k.s_r, k.s_c
        if GRAD_X:
            b_o = tl.load(
                p_x + o_n[:, None] * s_xr + o_o[None, :] * s_xc, mask=mask_n[:, None] & mask_x[None, :], other=0.0
            )
            acc_x = tl.dot(b_dx, b_o, acc_x, input_precision=PRECISION)
        if GRAD_Y:
            b_o = tl.load(
                p_y + o_n[:, None] * s_yr + o_o[None, :] * s_yc, mask=mask_n[:, None] & mask_y[None, :], other=0.0
            )
            acc_y = tl.dot(b_dy, b_o.to(tl.float32), acc_y, input_precision=PRECISION)
    weight = row_weight(grad, s_gb, s_gh, i_b, i_h, n, ROW_MEAN)
    if GRAD_X:
        if COLUMNS:
            p_x, s_xr = open_factor(factors.df, spans, i_bh, start, is_text, n_tokens, D, COMPACT)
            acc_x *= weight * 0.6931471805599453
        else:
            p_x, s_xr = open_factor(factors.du, spans, i_bh, start, is_text, n_tokens, D, COMPACT)
            acc_x *= weight
        tl.store(p_x + o_m[:, None] * s_xr + o_o[None, :], acc_x, mask=mask_m[:, None] & mask_x[None, :])
    if GRAD_Y:
        o_own = (i_bh * n_tokens + start + o_m)[:, None] * D + o_o[None, :]
        mask_own = mask_m[:, None] & mask_y[None, :]
        acc_y *= weight * scale
        if ADD:
            acc_y += tl.load(own + o_own, mask=mask_own, other=0.0)
        tl.store(own + o_own, acc_y, mask=mask_own)
