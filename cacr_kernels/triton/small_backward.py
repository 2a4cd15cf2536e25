"""Small spans, backward of small.py: three launches, one program a tile of rows.

With G = scale dX and F = S_ab:
    rows:   X again;  G to the workspace, dY to the gradient of S_aa if that is float32
    cross:  W_C = G^T F[:, C], V_C = G F[:, C] (to the workspace),  dF = sum over C of W_C S_bb[C, :] + V_C S_bb[:, C]^T
            (G^T U = G^T F S_bb)
    own:    dS_aa = dY + F_b^T V_b, with F_b, V_b [n_b, n_a] of the other side (16-bit: X again, so that the sum is
            rounded once)
For kind "softmax" F = P_ab and dS = P (dP - rowsum(P dP)) in each block. Workspace: G and V, one float32 S.
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
    open_g,
    open_gradient,
    open_side,
    open_v,
    row_tile,
    store_tile,
)
from .kernel_args import UNSPECIALIZED, SpanArgs, plain_blocks, plain_scaling, plain_spans, plain_work
from .rows import side_scale
from .small import chunk, row_gradients


@triton.jit
def rows_tile(
    side, i, g, scale, m_s, work, i_problem, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    GRAD_X: tl.constexpr, GRAD_Y: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G_I to the workspace and dY_I to m_s, for whole rows [I, J] of X."""
    b_dx, b_dy = row_gradients(side, i, scale, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_C, BLOCK_K)
    if GRAD_Y:
        store_tile(m_s, b_dy * g, i, 0, BLOCK_I, BLOCK_J)
    if GRAD_X:
        store_tile(open_g(work, side, i_problem), b_dx * (g * scale), i, 0, BLOCK_I, BLOCK_J)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def small_rows_kernel(
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
    work,  # Work: G
    n_heads,
    grad_tt,  # contiguous, shape and dtype of the input
    grad_vv,  # contiguous, shape and dtype of the input
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_Y: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """G_I and dY_I for one tile I of rows of one side."""
    C_T: tl.constexpr = chunk(BLOCK_C, KIND, BLOCK_T, BLOCK_R)
    C_R: tl.constexpr = chunk(BLOCK_C, KIND, BLOCK_R, BLOCK_T)
    K: tl.constexpr = chunk(BLOCK_K, KIND)
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    scaling = plain_scaling(scaling)
    work = plain_work(work)
    i_problem, is_text, i = row_tile(spans, BLOCK_I)
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    scale, weight, active = side_scale(scaling, side)
    if (i < side.n_a) & active:
        g = load_grad_loss(grad_loss, s_g_b, s_g_h, i_problem, n_heads) * weight
        grad = tl.where(is_text, grad_tt, grad_vv)
        m_s = open_gradient(grad, spans, i_problem, n_heads, is_text, is_text, side.n_a, side.n_a)
        if is_text:
            rows_tile(
                side, i, g, scale, m_s, work, i_problem, KIND, DOT, UNIT, GRAD_X, GRAD_Y, BLOCK_I, BLOCK_T, C_T, K
            )
        else:
            rows_tile(
                side, i, g, scale, m_s, work, i_problem, KIND, DOT, UNIT, GRAD_X, GRAD_Y, BLOCK_I, BLOCK_R, C_R, K
            )


@triton.jit
def cross_tile(
    side, i, m_g, m_v, m_s, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """V_I to m_v and dS_ab to m_s for one tile I of rows of G and of F (columns of G), J >= n_b."""
    b_df = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for c in range(0, side.n_b, BLOCK_C):
        b_w = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
        b_v = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
        for k in range(0, side.n_a, BLOCK_K):
            # W += G^T F, V += G F: [I, C] += [I, K] [K, C]
            b_f = load_factor(side.cross, k, c, BLOCK_K, BLOCK_C, KIND, UNIT, DOT)
            b_w = dot(tl.trans(load_tile(m_g, k, i, BLOCK_K, BLOCK_I, True, DOT)), b_f, b_w, DOT)
            b_v = dot(load_tile(m_g, i, k, BLOCK_I, BLOCK_K, True, DOT), b_f, b_v, DOT)
        store_tile(m_v, b_v, i, c, BLOCK_I, BLOCK_C)
        # dF += W S_bb, dF += V S_bb^T: [I, J] += [I, C] [C, J]
        b_df = dot(b_w, load_factor(side.other, c, 0, BLOCK_C, BLOCK_J, KIND, UNIT, DOT), b_df, DOT)
        b_s = load_factor(side.other, 0, c, BLOCK_J, BLOCK_C, KIND, UNIT, DOT)
        b_df = dot(b_v, tl.trans(b_s), b_df, DOT)
    if KIND == "softmax":
        b_f = load_factor(side.cross, i, 0, BLOCK_I, BLOCK_J, KIND, UNIT, DOT)
        b_df = b_f * (b_df - tl.sum(b_f * b_df, 1)[:, None])
    store_tile(m_s, b_df, i, 0, BLOCK_I, BLOCK_J)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def small_cross_kernel(
    tt,  # BlockArg: S_tt [B, H, T, T]
    tv,  # BlockArg: S_tv [B, H, T, R]
    vt,  # BlockArg: S_vt [B, H, R, T]
    vv,  # BlockArg: S_vv [B, H, R, R]
    spans,  # SpanArgs
    scaling,  # Scaling
    stats,  # float32 [B * H, 8, T + R]
    work,  # Work: G, V
    n_heads,
    grad_tv,  # contiguous, shape and dtype of the input
    grad_vt,  # contiguous, shape and dtype of the input
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """V_I = G_I F; dF_I = (G^T F)_I S_bb + V_I S_bb^T for one tile I of rows, J >= n_b, and dS_ab from it."""
    C: tl.constexpr = chunk(BLOCK_C, KIND)
    K: tl.constexpr = chunk(BLOCK_K, KIND)
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    scaling = plain_scaling(scaling)
    work = plain_work(work)
    i_problem, is_text, i = row_tile(spans, BLOCK_I)
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    _, _, active = side_scale(scaling, side)
    if (i < side.n_a) & active:
        m_g = open_g(work, side, i_problem)
        m_v = open_v(work, side, i_problem)
        grad = tl.where(is_text, grad_tv, grad_vt)
        m_s = open_gradient(grad, spans, i_problem, n_heads, is_text, is_text == 0, side.n_a, side.n_b)
        if is_text:
            cross_tile(side, i, m_g, m_v, m_s, KIND, DOT, UNIT, BLOCK_I, BLOCK_R, C, K)
        else:
            cross_tile(side, i, m_g, m_v, m_s, KIND, DOT, UNIT, BLOCK_I, BLOCK_T, C, K)


@triton.jit
def own_tile(
    side, back, i, g, scale, active, back_active, m_v, m_y, m_s, KIND: tl.constexpr, DOT: tl.constexpr,
    UNIT: tl.constexpr, DY: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dS_aa to m_s for one tile I of rows, J >= n_a. A dY that is computed comes first: X takes most registers."""
    b_dy = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    if DY == "computed":
        if active:
            b_dx, b_dy = row_gradients(side, i, scale, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_C, BLOCK_K)
            b_dy *= g
    if back_active:
        b_ds = tl.zeros([BLOCK_I, BLOCK_J], tl.float32) if KIND == "softmax" else b_dy
        for k in range(0, back.n_a, BLOCK_K):
            # dS' += F_b^T V_b: [I, J] += [I, K] [K, J]
            b_f = load_factor(back.cross, k, i, BLOCK_K, BLOCK_I, KIND, UNIT, DOT)
            b_ds = dot(tl.trans(b_f), load_tile(m_v, k, 0, BLOCK_K, BLOCK_J, True, DOT), b_ds, DOT)
        if KIND == "softmax":
            b_p = load_factor(side.own, i, 0, BLOCK_I, BLOCK_J, KIND, UNIT, DOT)
            b_ds = b_dy + b_p * (b_ds - tl.sum(b_p * b_ds, 1)[:, None])
        b_dy = b_ds
    if DY == "workspace":
        if active:
            b_dy += load_tile(m_y, i, 0, BLOCK_I, BLOCK_J, True, DOT)
    elif DY == "gradient":
        b_dy += load_tile(m_s, i, 0, BLOCK_I, BLOCK_J, True, DOT)
    store_tile(m_s, b_dy, i, 0, BLOCK_I, BLOCK_J)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def small_own_kernel(
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
    work,  # Work: V, and what whole.py left in the place of G
    n_heads,
    grad_tt,  # contiguous, shape and dtype of the input
    grad_vv,  # contiguous, shape and dtype of the input
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    DY: tl.constexpr,  # "computed" anew; from the "workspace", in the place of G; in the "gradient" already, or 0
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dS_aa = dY + dS'_aa for one tile I of rows: the target of side a, and the inner block of side b."""
    C_T: tl.constexpr = chunk(BLOCK_C, KIND, BLOCK_T, BLOCK_R)
    C_R: tl.constexpr = chunk(BLOCK_C, KIND, BLOCK_R, BLOCK_T)
    K: tl.constexpr = chunk(BLOCK_K, KIND)
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    scaling = plain_scaling(scaling)
    work = plain_work(work)
    i_problem, is_text, i = row_tile(spans, BLOCK_I)
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    back = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text == 0)
    scale, weight, active = side_scale(scaling, side)
    _, _, back_active = side_scale(scaling, back)
    if i < side.n_a:
        grad = tl.where(is_text, grad_tt, grad_vv)
        m_s = open_gradient(grad, spans, i_problem, n_heads, is_text, is_text, side.n_a, side.n_a)
        m_v = open_v(work, back, i_problem)
        m_y = open_g(work, side, i_problem)
        g = load_grad_loss(grad_loss, s_g_b, s_g_h, i_problem, n_heads) * weight
        if is_text:
            own_tile(
                side, back, i, g, scale, active, back_active, m_v, m_y, m_s, KIND, DOT, UNIT, DY,
                BLOCK_I, BLOCK_T, C_T, K,
            )  # fmt: skip
        else:
            own_tile(
                side, back, i, g, scale, active, back_active, m_v, m_y, m_s, KIND, DOT, UNIT, DY,
                BLOCK_I, BLOCK_R, C_R, K,
            )  # fmt: skip
