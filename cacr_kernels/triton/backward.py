"""Backward by recomputation for small spans, three launches: rows (U, V), cross blocks, own blocks.

With G = scale dX:  V = G F,  dF = V S_bb^T + G^T U,  dS_ab = dF,  dS_bb += F^T V,  dS_aa += dY  (F = S_ab, U = F S_bb).
U and V [n_a, n_b] of both sides lie in a float32 workspace, G is recomputed wherever it is needed.
For kind "softmax" F = P_ab, U = P_ab P_bb, and dS = P (dP - rowsum(P dP)) in each block, where
rowsum_j(P_ab dF) = sum_k V[j, k] U[j, k] + sum_i G[i, j] (U F^T)[i, j].
The kernel of the own blocks also serves large spans.
"""

# mypy: allow-untyped-defs
# ruff: noqa: RUF059, SIM102

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    dot,
    inside_tile,
    load_factor,
    load_grad_loss,
    load_tile,
    open_gradient,
    open_side,
    open_u,
    open_v,
    store_tile,
)
from .products import project_rows, projected_tile
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
    work,  # Work
    n_heads,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    GRAD_X: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """U_I = F_I S_bb and V_I = G_I F for one tile I of rows of one side. G is recomputed for each BLOCK_C of n_b."""
    n_text_tiles = tl.cdiv(spans.n_text, BLOCK_I)
    n_tiles = n_text_tiles + tl.cdiv(spans.n_vision, BLOCK_I)
    i_problem = tl.program_id(0) // n_tiles
    i_tile = tl.program_id(0) % n_tiles
    is_text = i_tile < n_text_tiles
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    scale, weight, active = side_scale(scaling, side)
    i = tl.where(is_text, i_tile, i_tile - n_text_tiles) * BLOCK_I
    if (i < side.n_a) & active:
        m_u = open_u(work, side, i_problem)
        project_rows(side, m_u, i, KIND, DOT, UNIT, BLOCK_I, BLOCK_C, BLOCK_K)
        if GRAD_X:
            m_v = open_v(work, side, i_problem)
            g = load_grad_loss(grad_loss, s_g_b, s_g_h, i_problem, n_heads) * weight * scale
            rows = load_rows(side, i, BLOCK_I)
            for c in range(0, side.n_b, BLOCK_C):
                b_v = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
                for j in range(0, side.n_a, BLOCK_J):
                    b_x = projected_tile(side, m_u, i, j, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_K) * scale
                    b_y = target_logits(load_tile(side.own, i, j, BLOCK_I, BLOCK_J, UNIT, DOT), KIND)
                    inside = inside_tile(side.own, i, j, BLOCK_I, BLOCK_J)
                    b_dx, b_dy = rows_gradient(b_x, b_y, rows, inside)
                    # V += G F: [I, C] += [I, J] [J, C]
                    b_v = dot(b_dx * g, load_factor(side.cross, j, c, BLOCK_J, BLOCK_C, KIND, UNIT, DOT), b_v, DOT)
                store_tile(m_v, b_v, i, c, BLOCK_I, BLOCK_C)


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
    work,  # Work
    n_heads,
    grad_tv,  # contiguous, shape and dtype of the input
    grad_vt,  # contiguous, shape and dtype of the input
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dF_J = V_J S_bb^T + (G^T U)_J for one tile J of rows of F (columns of G), and dS_ab from it."""
    n_text_tiles = tl.cdiv(spans.n_text, BLOCK_J)
    n_tiles = n_text_tiles + tl.cdiv(spans.n_vision, BLOCK_J)
    i_problem = tl.program_id(0) // n_tiles
    i_tile = tl.program_id(0) % n_tiles
    is_text = i_tile < n_text_tiles
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    scale, weight, active = side_scale(scaling, side)
    j = tl.where(is_text, i_tile, i_tile - n_text_tiles) * BLOCK_J
    if (j < side.n_a) & active:
        g = load_grad_loss(grad_loss, s_g_b, s_g_h, i_problem, n_heads) * weight * scale
        m_u = open_u(work, side, i_problem)
        m_v = open_v(work, side, i_problem)
        grad = tl.where(is_text, grad_tv, grad_vt)
        m_g = open_gradient(grad, spans, i_problem, n_heads, is_text, is_text == 0, side.n_a, side.n_b)
        for c in range(0, side.n_b, BLOCK_C):
            b_df = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
            b_sum = tl.zeros([BLOCK_J], tl.float32)
            for i in range(0, side.n_a, BLOCK_I):
                rows = load_rows(side, i, BLOCK_I)
                b_x = projected_tile(side, m_u, i, j, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_K)
                b_y = target_logits(load_tile(side.own, i, j, BLOCK_I, BLOCK_J, UNIT, DOT), KIND)
                inside = inside_tile(side.own, i, j, BLOCK_I, BLOCK_J)
                b_dx, b_dy = rows_gradient(b_x * scale, b_y, rows, inside)
                b_g = b_dx * g
                if KIND == "softmax":
                    b_sum += tl.sum(b_g * b_x, 0)
                # dF += G^T U: [J, C] += [J, I] [I, C]
                b_df = dot(tl.trans(b_g), load_tile(m_u, i, c, BLOCK_I, BLOCK_C, True, DOT), b_df, DOT)
            for k in range(0, side.n_b, BLOCK_K):
                # dF += V S_bb^T: [J, C] += [J, K] [K, C]
                b_v = load_tile(m_v, j, k, BLOCK_J, BLOCK_K, True, DOT)
                b_df = dot(b_v, tl.trans(load_factor(side.other, c, k, BLOCK_C, BLOCK_K, KIND, UNIT, DOT)), b_df, DOT)
                if KIND == "softmax":
                    b_sum += tl.sum(b_v * load_tile(m_u, j, k, BLOCK_J, BLOCK_K, True, DOT), 1)
            if KIND == "softmax":
                b_df = load_factor(side.cross, j, c, BLOCK_J, BLOCK_C, KIND, UNIT, DOT) * (b_df - b_sum[:, None])
            store_tile(m_g, b_df, j, c, BLOCK_J, BLOCK_C)


@triton.jit
def inner_tile(
    back, m_v, i, j, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """F_b^T V_b: [I, J] = sum of [I, K] [K, J] over n_b, the gradient of S_aa as inner block of side b (``back``)."""
    b_ds = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for k in range(0, back.n_a, BLOCK_K):
        b_f = load_factor(back.cross, k, i, BLOCK_K, BLOCK_I, KIND, UNIT, DOT)
        b_ds = dot(tl.trans(b_f), load_tile(m_v, k, j, BLOCK_K, BLOCK_J, True, DOT), b_ds, DOT)
    return b_ds


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "grad_tt", "grad_vv", "first", "n_tiles"])
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
    work,  # Work
    n_heads,
    grad_tt,  # contiguous, shape and dtype of the input
    grad_vv,  # contiguous, shape and dtype of the input
    first,  # this launch does the row tiles first ... first + n_tiles - 1 of a problem, text before vision
    n_tiles,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_Y: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dS_aa = dY + dS'_aa for one tile I of rows: the target of side a, and the inner block of side b.

    dS'_aa = F_b^T V_b, with F_b = S_ba [n_b, n_a] and V_b [n_b, n_a] of the other side. One rounding after the sum.
    """
    n_text_tiles = tl.cdiv(spans.n_text, BLOCK_I)
    i_problem = tl.program_id(0) // n_tiles
    i_tile = first + tl.program_id(0) % n_tiles
    is_text = i_tile < n_text_tiles
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    back = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text == 0)
    scale, weight, active = side_scale(scaling, side)
    back_scale, back_weight, back_active = side_scale(scaling, back)
    i = tl.where(is_text, i_tile, i_tile - n_text_tiles) * BLOCK_I
    if i < side.n_a:
        g = load_grad_loss(grad_loss, s_g_b, s_g_h, i_problem, n_heads) * weight
        rows = load_rows(side, i, BLOCK_I)
        m_u = open_u(work, side, i_problem)
        m_v = open_v(work, back, i_problem)
        grad = tl.where(is_text, grad_tt, grad_vv)
        m_g = open_gradient(grad, spans, i_problem, n_heads, is_text, is_text, side.n_a, side.n_a)
        b_sum = tl.zeros([BLOCK_I], tl.float32)
        if GRAD_X and KIND == "softmax":
            if back_active:
                for j in range(0, side.n_a, BLOCK_J):
                    b_ds = inner_tile(back, m_v, i, j, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_K)
                    b_sum += tl.sum(b_ds * load_factor(side.own, i, j, BLOCK_I, BLOCK_J, KIND, UNIT, DOT), 1)
        for j in range(0, side.n_a, BLOCK_J):
            b_ds = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
            if GRAD_X:
                if back_active:
                    b_ds = inner_tile(back, m_v, i, j, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_K)
                    if KIND == "softmax":
                        b_ds = load_factor(side.own, i, j, BLOCK_I, BLOCK_J, KIND, UNIT, DOT) * (b_ds - b_sum[:, None])
            if GRAD_Y:
                if active:
                    b_x = projected_tile(side, m_u, i, j, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_K) * scale
                    b_s = load_tile(side.own, i, j, BLOCK_I, BLOCK_J, UNIT, DOT)
                    inside = inside_tile(side.own, i, j, BLOCK_I, BLOCK_J)
                    b_dx, b_dy = rows_gradient(b_x, target_logits(b_s, KIND), rows, inside)
                    b_ds += target_gradient(b_dy * g, b_s, KIND)
            store_tile(m_g, b_ds, i, j, BLOCK_I, BLOCK_J)
