"""Backward for small spans by recomputation, in three launches: rows (U, V), cross blocks, own blocks.

With G = scale dX:  V = G F,  dS_ab = V S_bb^T + G^T U,  dS_bb += F^T V,  dS_aa += dY  (F = S_ab, U = S_ab S_bb).
U and V [n_a, n_b] of both sides are kept in a float32 workspace [B * H, 4, T R]: U_text, U_vision, V_text, V_vision.
For kind "softmax" F = P_ab, U = P_ab P_bb, and dS = P (dP - rowsum(P dP)) in each block. All of n_b (own blocks: n_a)
stays on chip, so both are at most BLOCK_B.
"""

# mypy: allow-untyped-defs
# ruff: noqa: RUF059, SIM102

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    dot,
    load_factor,
    load_grad_loss,
    load_tile,
    open_gradient,
    open_side,
    open_workspace,
    store_tile,
)
from .rows import load_rows, rows_gradient, side_scale, target_gradient, target_logits

UNSPECIALIZED = ["tt", "tv", "vt", "vv", "spans", "scaling", "grad_loss", "s_g_b", "s_g_h", "stats", "work", "n_heads"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_rows_kernel(
    tt,  # Block: S_tt [B, H, T, T]
    tv,  # Block: S_tv [B, H, T, R]
    vt,  # Block: S_vt [B, H, R, T]
    vv,  # Block: S_vv [B, H, R, R]
    spans,  # SpanArgs
    scaling,  # Scaling
    grad_loss,  # [B, H]
    s_g_b,
    s_g_h,
    stats,  # float32 [B * H, 8, T + R]
    work,  # float32 [B * H, 4, T R]
    n_heads,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    GRAD_X: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """U_I = F_I S_bb and V_I = G_I F for one tile I of rows of one side."""
    n_text_tiles = tl.cdiv(spans.n_text, BLOCK_I)
    n_tiles = n_text_tiles + tl.cdiv(spans.n_vision, BLOCK_I)
    i_problem = tl.program_id(0) // n_tiles
    i_tile = tl.program_id(0) % n_tiles
    is_text = i_tile < n_text_tiles
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    scale, weight, active = side_scale(scaling, side)
    i_0 = tl.where(is_text, i_tile, i_tile - n_text_tiles) * BLOCK_I
    if (i_0 < side.n_a) & active:
        g = load_grad_loss(grad_loss, s_g_b, s_g_h, i_problem, n_heads) * weight
        slot = tl.where(is_text, 0, 1)
        o_i = i_0 + tl.arange(0, BLOCK_I)
        o_b = tl.arange(0, BLOCK_B)
        # U = F S_bb: [I, B] += [I, K] [K, B]
        b_u = tl.zeros([BLOCK_I, BLOCK_B], tl.float32)
        for k in range(0, side.n_b, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            b_f = load_factor(side.cross, o_i, o_k, KIND, UNIT, DOT)
            b_s = load_factor(side.other, o_k, o_b, KIND, UNIT, DOT)
            b_u = dot(b_f, b_s, b_u, DOT)
        store_tile(open_workspace(work, spans, side, i_problem, 4, slot), b_u, o_i, o_b)
        if GRAD_X:
            m_x, l_x, m_y, l_y, e_p, e_q = load_rows(side, o_i)
            b_v = tl.zeros([BLOCK_I, BLOCK_B], tl.float32)
            for j in range(0, side.n_a, BLOCK_J):
                o_j = j + tl.arange(0, BLOCK_J)
                b_f = load_factor(side.cross, o_j, o_b, KIND, UNIT, DOT)
                b_s = load_tile(side.own, o_i, o_j, UNIT, DOT)
                # X = scale U F^T: [I, J] = [I, B] [B, J];  V += G F: [I, B] += [I, J] [J, B]
                b_x = dot(b_u, tl.trans(b_f), tl.zeros([BLOCK_I, BLOCK_J], tl.float32), DOT) * scale
                inside = (o_i < side.n_a)[:, None] & (o_j < side.n_a)[None, :]
                b_dx, b_dy = rows_gradient(b_x, target_logits(b_s, KIND), m_x, l_x, m_y, l_y, e_p, e_q, inside)
                b_v = dot(b_dx * (scale * g), b_f, b_v, DOT)
            store_tile(open_workspace(work, spans, side, i_problem, 4, 2 + slot), b_v, o_i, o_b)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "grad_tv", "grad_vt"])
def backward_cross_kernel(
    tt,  # Block: S_tt [B, H, T, T]
    tv,  # Block: S_tv [B, H, T, R]
    vt,  # Block: S_vt [B, H, R, T]
    vv,  # Block: S_vv [B, H, R, R]
    spans,  # SpanArgs
    scaling,  # Scaling
    grad_loss,  # [B, H]
    s_g_b,
    s_g_h,
    stats,  # float32 [B * H, 8, T + R]
    work,  # float32 [B * H, 4, T R]
    grad_tv,  # contiguous, shape and dtype of the input
    grad_vt,  # contiguous, shape and dtype of the input
    n_heads,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """dF = V S_bb^T + G^T U for one tile J of rows of F (columns of G), and dS_ab from it."""
    n_text_tiles = tl.cdiv(spans.n_text, BLOCK_J)
    n_tiles = n_text_tiles + tl.cdiv(spans.n_vision, BLOCK_J)
    i_problem = tl.program_id(0) // n_tiles
    i_tile = tl.program_id(0) % n_tiles
    is_text = i_tile < n_text_tiles
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    scale, weight, active = side_scale(scaling, side)
    j_0 = tl.where(is_text, i_tile, i_tile - n_text_tiles) * BLOCK_J
    if (j_0 < side.n_a) & active:
        g = load_grad_loss(grad_loss, s_g_b, s_g_h, i_problem, n_heads) * weight
        slot = tl.where(is_text, 0, 1)
        m_u = open_workspace(work, spans, side, i_problem, 4, slot)
        m_v = open_workspace(work, spans, side, i_problem, 4, 2 + slot)
        o_j = j_0 + tl.arange(0, BLOCK_J)
        o_b = tl.arange(0, BLOCK_B)
        b_f = load_factor(side.cross, o_j, o_b, KIND, UNIT, DOT)
        b_df = tl.zeros([BLOCK_J, BLOCK_B], tl.float32)
        for i in range(0, side.n_a, BLOCK_I):
            o_i = i + tl.arange(0, BLOCK_I)
            m_x, l_x, m_y, l_y, e_p, e_q = load_rows(side, o_i)
            b_u = load_tile(m_u, o_i, o_b, True, DOT)
            b_s = load_tile(side.own, o_i, o_j, UNIT, DOT)
            # X = scale U F^T: [I, J] = [I, B] [B, J];  dF += G^T U: [J, B] += [J, I] [I, B]
            b_x = dot(b_u, tl.trans(b_f), tl.zeros([BLOCK_I, BLOCK_J], tl.float32), DOT) * scale
            inside = (o_i < side.n_a)[:, None] & (o_j < side.n_a)[None, :]
            b_dx, b_dy = rows_gradient(b_x, target_logits(b_s, KIND), m_x, l_x, m_y, l_y, e_p, e_q, inside)
            b_df = dot(tl.trans(b_dx * (scale * g)), b_u, b_df, DOT)
        for k in range(0, side.n_b, BLOCK_K):
            # dF += V S_bb^T: [J, B] += [J, K] [K, B]
            o_k = k + tl.arange(0, BLOCK_K)
            b_v = load_tile(m_v, o_j, o_k, True, DOT)
            b_s = load_factor(side.other, o_b, o_k, KIND, UNIT, DOT)
            b_df = dot(b_v, tl.trans(b_s), b_df, DOT)
        if KIND == "softmax":
            b_df = b_f * (b_df - tl.sum(b_f * b_df, 1)[:, None])
        grad = tl.where(is_text, grad_tv, grad_vt)
        m_g = open_gradient(grad, spans, i_problem, n_heads, is_text, is_text == 0, side.n_a, side.n_b)
        store_tile(m_g, b_df, o_j, o_b)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "grad_tt", "grad_vv"])
def backward_own_kernel(
    tt,  # Block: S_tt [B, H, T, T]
    tv,  # Block: S_tv [B, H, T, R]
    vt,  # Block: S_vt [B, H, R, T]
    vv,  # Block: S_vv [B, H, R, R]
    spans,  # SpanArgs
    scaling,  # Scaling
    grad_loss,  # [B, H]
    s_g_b,
    s_g_h,
    stats,  # float32 [B * H, 8, T + R]
    work,  # float32 [B * H, 4, T R]
    grad_tt,  # contiguous, shape and dtype of the input
    grad_vv,  # contiguous, shape and dtype of the input
    n_heads,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_Y: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """dS_aa = dY + dS'_aa for one tile I of rows: the target of side a, and the inner block of side b.

    dS'_aa = F_b^T V_b with F_b = S_ba [n_b, n_a] and V_b [n_b, n_a] of the other side. One rounding after the sum.
    """
    n_text_tiles = tl.cdiv(spans.n_text, BLOCK_I)
    n_tiles = n_text_tiles + tl.cdiv(spans.n_vision, BLOCK_I)
    i_problem = tl.program_id(0) // n_tiles
    i_tile = tl.program_id(0) % n_tiles
    is_text = i_tile < n_text_tiles
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    i_0 = tl.where(is_text, i_tile, i_tile - n_text_tiles) * BLOCK_I
    if i_0 < side.n_a:
        scale, weight, active = side_scale(scaling, side)
        slot = tl.where(is_text, 0, 1)
        o_i = i_0 + tl.arange(0, BLOCK_I)
        o_j = tl.arange(0, BLOCK_B)
        inside = (o_i < side.n_a)[:, None] & (o_j < side.n_a)[None, :]
        m_x, l_x, m_y, l_y, e_p, e_q = load_rows(side, o_i)
        b_s = load_tile(side.own, o_i, o_j, UNIT, DOT)
        b_ds = tl.zeros([BLOCK_I, BLOCK_B], tl.float32)
        if GRAD_X:
            back = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text == 0)
            back_scale, back_weight, back_active = side_scale(scaling, back)
            m_v = open_workspace(work, spans, back, i_problem, 4, 3 - slot)
            # dS'_aa = F_b^T V_b: [I, J] += [I, K] [K, J]
            for k in range(0, tl.where(back_active, back.n_a, 0), BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K)
                b_f = load_factor(back.cross, o_k, o_i, KIND, UNIT, DOT)
                b_v = load_tile(m_v, o_k, o_j, True, DOT)
                b_ds = dot(tl.trans(b_f), b_v, b_ds, DOT)
            if KIND == "softmax":
                b_q = tl.where(inside, tl.exp(b_s.to(tl.float32) - m_y[:, None]) / l_y[:, None], 0.0)
                b_ds = b_q * (b_ds - tl.sum(b_q * b_ds, 1)[:, None])
        if GRAD_Y:
            if active:
                g = load_grad_loss(grad_loss, s_g_b, s_g_h, i_problem, n_heads) * weight
                m_u = open_workspace(work, spans, side, i_problem, 4, slot)
                b_x = tl.zeros([BLOCK_I, BLOCK_B], tl.float32)
                for k in range(0, side.n_b, BLOCK_K):
                    # X = scale U F^T: [I, J] += [I, K] [K, J]
                    o_k = k + tl.arange(0, BLOCK_K)
                    b_u = load_tile(m_u, o_i, o_k, True, DOT)
                    b_f = load_factor(side.cross, o_j, o_k, KIND, UNIT, DOT)
                    b_x = dot(b_u, tl.trans(b_f), b_x, DOT)
                b_y = target_logits(b_s, KIND)
                b_dx, b_dy = rows_gradient(b_x * scale, b_y, m_x, l_x, m_y, l_y, e_p, e_q, inside)
                b_ds += target_gradient(b_dy * g, b_s, KIND)
        grad = tl.where(is_text, grad_tt, grad_vv)
        m_g = open_gradient(grad, spans, i_problem, n_heads, is_text, is_text, side.n_a, side.n_a)
        store_tile(m_g, b_ds, o_i, o_j)
