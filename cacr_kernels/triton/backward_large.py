"""Backward for large spans, one side at a time: G [n_a, n_a] is kept in the workspace, then two products a launch.

With G = scale dX:  V = G F,  dF = V S_bb^T + G^T U,  dS_ab = dF  (F = S_ab, U = F S_bb; softmax: F = P_ab,
U = P_ab P_bb, dS = P (dP - rowsum(P dP)) in each block, where rowsum_j(P_ab dF) = sum_k V[j, k] U[j, k] +
sum_i G[i, j] (U F^T)[i, j]).
large_own_kernel recomputes X for dY. Order and workspace: see scores.py.
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
    open_g,
    open_gradient,
    open_side,
    open_u,
    open_v,
    store_tile,
)
from .kernel_args import UNSPECIALIZED, SpanArgs, plain_blocks, plain_scaling, plain_spans, plain_work
from .products import projected_tile
from .rows import load_rows, rows_gradient, side_scale, target_gradient, target_logits


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "is_text", "n_tiles_j", "n_tiles"])
def large_g_kernel(
    tt,  # BlockArg: S_tt [B, H, T, T]
    tv,  # BlockArg: S_tv [B, H, T, R]
    vt,  # BlockArg: S_vt [B, H, R, T]
    vv,  # BlockArg: S_vv [B, H, R, R]
    spans,  # SpanArgs
    scaling,  # Scaling
    grad_loss,  # [B, H]
    s_g_b,
    s_g_h,
    stats,  # float32 [B * H, 8, T + R]
    work,  # Work
    n_heads,
    is_text,
    n_tiles_j,  # tiles along a row of G
    n_tiles,  # tiles of G
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """G = scale grad_loss dX of one side, one tile [I, J] a program."""
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    scaling = plain_scaling(scaling)
    work = plain_work(work)
    i_problem = tl.program_id(0) // n_tiles
    i_tile = tl.program_id(0) % n_tiles
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    scale, weight, active = side_scale(scaling, side)
    i = (i_tile // n_tiles_j) * BLOCK_I
    j = (i_tile % n_tiles_j) * BLOCK_J
    if (i < side.n_a) & (j < side.n_a):
        g = load_grad_loss(grad_loss, s_g_b, s_g_h, i_problem, n_heads) * weight * scale
        m_u = open_u(work, side, i_problem)
        rows = load_rows(side, i, BLOCK_I)
        b_y = target_logits(load_tile(side.own, i, j, BLOCK_I, BLOCK_J, UNIT, DOT), KIND)
        b_x = projected_tile(side, m_u, i, j, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_K) * scale
        inside = inside_tile(side.own, i, j, BLOCK_I, BLOCK_J)
        b_dx, b_dy = rows_gradient(b_x, b_y, rows, inside)
        store_tile(open_g(work, side, i_problem), b_dx * g, i, j, BLOCK_I, BLOCK_J)


@triton.jit(do_not_specialize=["stats", "n_heads", "is_text", "n_tiles_c", "n_tiles"])
def large_v_kernel(
    tt,  # BlockArg: S_tt [B, H, T, T]
    tv,  # BlockArg: S_tv [B, H, T, R]
    vt,  # BlockArg: S_vt [B, H, R, T]
    vv,  # BlockArg: S_vv [B, H, R, R]
    spans,  # SpanArgs
    stats,  # float32 [B * H, 8, T + R]
    work,  # Work
    n_heads,
    is_text,
    n_tiles_c,  # tiles along n_b
    n_tiles,  # tiles of V
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """V = G F [n_a, n_b] of one side, one tile [I, C] a program."""
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    work = plain_work(work)
    i_problem = tl.program_id(0) // n_tiles
    i_tile = tl.program_id(0) % n_tiles
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    i = (i_tile // n_tiles_c) * BLOCK_I
    c = (i_tile % n_tiles_c) * BLOCK_C
    if (i < side.n_a) & (c < side.n_b):
        m_g = open_g(work, side, i_problem)
        b_v = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
        for k in range(0, side.n_a, BLOCK_K):
            # V += G F: [I, C] += [I, K] [K, C]
            b_g = load_tile(m_g, i, k, BLOCK_I, BLOCK_K, True, DOT)
            b_v = dot(b_g, load_factor(side.cross, k, c, BLOCK_K, BLOCK_C, KIND, UNIT, DOT), b_v, DOT)
        store_tile(open_v(work, side, i_problem), b_v, i, c, BLOCK_I, BLOCK_C)


@triton.jit
def cross_tile(
    side, m_g, m_u, m_v, j, c, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dF = G^T U + V S_bb^T: [J, C] = sum of [J, K] [K, C] over n_a, then over n_b."""
    b_df = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
    for k in range(0, side.n_a, BLOCK_K):
        b_g = load_tile(m_g, k, j, BLOCK_K, BLOCK_J, True, DOT)
        b_df = dot(tl.trans(b_g), load_tile(m_u, k, c, BLOCK_K, BLOCK_C, True, DOT), b_df, DOT)
    for k in range(0, side.n_b, BLOCK_K):
        b_s = load_factor(side.other, c, k, BLOCK_C, BLOCK_K, KIND, UNIT, DOT)
        b_df = dot(load_tile(m_v, j, k, BLOCK_J, BLOCK_K, True, DOT), tl.trans(b_s), b_df, DOT)
    return b_df


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "is_text", "n_tiles_c", "n_tiles"])
def large_cross_kernel(
    tt,  # BlockArg: S_tt [B, H, T, T]
    tv,  # BlockArg: S_tv [B, H, T, R]
    vt,  # BlockArg: S_vt [B, H, R, T]
    vv,  # BlockArg: S_vv [B, H, R, R]
    spans,  # SpanArgs
    stats,  # float32 [B * H, 8, T + R]
    work,  # Work
    n_heads,
    grad_tv,  # contiguous, shape and dtype of the input
    grad_vt,  # contiguous, shape and dtype of the input
    is_text,
    n_tiles_c,  # programs along n_b: kind "softmax" 1, since it needs the sums of whole rows first
    n_tiles,  # programs of dF
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dS_ab of one side from dF, tiles [J, C]. Kind "softmax": P (dF - rowsum(P dF)), whole rows in one program."""
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    work = plain_work(work)
    i_problem = tl.program_id(0) // n_tiles
    i_tile = tl.program_id(0) % n_tiles
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    j = (i_tile // n_tiles_c) * BLOCK_J
    if j < side.n_a:
        m_g = open_g(work, side, i_problem)
        m_u = open_u(work, side, i_problem)
        m_v = open_v(work, side, i_problem)
        grad = tl.where(is_text != 0, grad_tv, grad_vt)
        m_d = open_gradient(grad, spans, i_problem, n_heads, is_text != 0, is_text == 0, side.n_a, side.n_b)
        if KIND == "softmax":
            b_sum = tl.zeros([BLOCK_J], tl.float32)
            for c in range(0, side.n_b, BLOCK_C):
                b_df = cross_tile(side, m_g, m_u, m_v, j, c, KIND, DOT, UNIT, BLOCK_J, BLOCK_C, BLOCK_K)
                b_sum += tl.sum(b_df * load_factor(side.cross, j, c, BLOCK_J, BLOCK_C, KIND, UNIT, DOT), 1)
            for c in range(0, side.n_b, BLOCK_C):
                b_df = cross_tile(side, m_g, m_u, m_v, j, c, KIND, DOT, UNIT, BLOCK_J, BLOCK_C, BLOCK_K)
                b_f = load_factor(side.cross, j, c, BLOCK_J, BLOCK_C, KIND, UNIT, DOT)
                store_tile(m_d, b_f * (b_df - b_sum[:, None]), j, c, BLOCK_J, BLOCK_C)
        else:
            c = (i_tile % n_tiles_c) * BLOCK_C
            b_df = cross_tile(side, m_g, m_u, m_v, j, c, KIND, DOT, UNIT, BLOCK_J, BLOCK_C, BLOCK_K)
            store_tile(m_d, b_df, j, c, BLOCK_J, BLOCK_C)


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


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "first", "n_tiles"])
def large_own_kernel(
    tt,  # BlockArg: S_tt [B, H, T, T]
    tv,  # BlockArg: S_tv [B, H, T, R]
    vt,  # BlockArg: S_vt [B, H, R, T]
    vv,  # BlockArg: S_vv [B, H, R, R]
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
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    scaling = plain_scaling(scaling)
    work = plain_work(work)
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
                    b_s = load_tile(side.own, i, j, BLOCK_I, BLOCK_J, UNIT, DOT)
                    b_x = projected_tile(side, m_u, i, j, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_K) * scale
                    inside = inside_tile(side.own, i, j, BLOCK_I, BLOCK_J)
                    b_dx, b_dy = rows_gradient(b_x, target_logits(b_s, KIND), rows, inside)
                    b_ds += target_gradient(b_dy * g, b_s, KIND)
            store_tile(m_g, b_ds, i, j, BLOCK_I, BLOCK_J)
