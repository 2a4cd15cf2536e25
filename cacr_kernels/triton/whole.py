"""Small spans where tensor cores take factors from shared memory: one program a side of a problem.

A program holds the whole of its side: F = S_ab and S_bb are read once, and X never leaves the registers.
    forward:   U = F S_bb, X = U F^T, the comparison with Y = S_aa
    backward:  X again;  G = scale dX, dY to the workspace;  V = G F to the workspace;  dF = V S_bb^T + G^T F S_bb
    rows:      X again;  G to the workspace, dY to the gradient of S_aa: where the halves of the factors of the
               rest (cross and own in small_backward.py) leave no registers for G
    own:       after backward: dS_aa = dY + F_b^T V_b (small_backward.py)
A tile of the tensor cores has as many rows as the longer side: where that is b, U, V, W = G^T F and dF are formed
transposed. Tiles: A >= n_a, B >= n_b. For kind "softmax" F = P_ab and dS = P (dP - rowsum(P dP)) in each block.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    dot,
    inside_tile,
    load_factor,
    load_grad_loss,
    load_spans,
    load_tile,
    open_g,
    open_gradient,
    open_side,
    open_v,
    row_tile,
    store_tile,
)
from .kernel_args import UNSPECIALIZED, SpanArgs, plain_blocks, plain_scaling, plain_spans, plain_work
from .rows import (
    compare_logits,
    load_rows,
    mask_logits,
    rows_gradient,
    side_scale,
    store_rows,
    target_gradient,
    target_logits,
)


@triton.jit
def whole_factors(side, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """(F [A, B], S_bb [B, B])."""
    b_f = load_factor(side.cross, 0, 0, A, B, KIND, UNIT, DOT)
    return b_f, load_factor(side.other, 0, 0, B, B, KIND, UNIT, DOT)


@triton.jit
def whole_logits(
    side, b_f, b_s, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """X [A, A] before its scale, up to a constant a row: U F^T with U = F S_bb, or with U^T = S_bb^T F^T."""
    if A < B:
        b_u = tl.trans(dot(tl.trans(b_s), tl.trans(b_f), tl.zeros([B, A], tl.float32), DOT))
        return projected(side, b_u, b_f, KIND, DOT, UNIT, A, A, B)
    else:
        return rows_logits(side, b_f, b_f, b_s, KIND, DOT, UNIT, A, A, B)


@triton.jit
def rows_logits(
    side, b_i, b_f, b_s, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    I: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The same for the rows [I, A] whose F is b_i, bit for bit."""
    b_u = dot(b_i, b_s, tl.zeros([I, B], tl.float32), DOT)
    return projected(side, b_u, b_f, KIND, DOT, UNIT, I, A, B)


@triton.jit
def projected(
    side, b_u, b_f, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    I: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """U F^T [I, A], but for float32 U (F - 1 f_0)^T: see products.load_centred."""
    if KIND != "softmax" and DOT != "split":
        b_f -= load_tile(side.cross, 0, 0, 1, B, UNIT, DOT)
    return dot(b_u, tl.trans(b_f), tl.zeros([I, A], tl.float32), DOT)


@triton.jit
def forward_side(
    side, spans, scaling, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr, SAVE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The sum of a side's losses; its row numbers are stored."""
    scale, weight, active = side_scale(scaling, side)
    o_i = tl.arange(0, A)
    b_loss = tl.zeros([A], tl.float32)
    m_x, l_x, m_y, l_y, e_p, e_q = b_loss, b_loss, b_loss, b_loss, b_loss, b_loss
    if (side.n_a > 0) & active:
        inside = inside_tile(side.own, 0, 0, A, A)
        b_y = target_logits(load_tile(side.own, 0, 0, A, A, UNIT, DOT), KIND)  # before the dots: see mask_logits
        b_f, b_s = whole_factors(side, KIND, DOT, UNIT, A, B)
        b_x, b_y = mask_logits(whole_logits(side, b_f, b_s, KIND, DOT, UNIT, A, B) * scale, b_y, inside)
        b_loss, m_x, l_x, m_y, l_y, e_p, e_q = compare_logits(b_x, b_y)
        b_loss = tl.where((o_i >= side.n_a) | (b_loss < 0.0), 0.0, b_loss) * weight
    if SAVE:
        store_rows(side, spans, o_i, active, m_x, l_x, m_y, l_y, e_p, e_q, KIND)
    return tl.sum(b_loss)


@triton.jit(do_not_specialize=["loss", "stats", "n_heads"])
def whole_forward_kernel(
    tt,  # BlockArg: S_tt [B, H, T, T]
    tv,  # BlockArg: S_tv [B, H, T, R]
    vt,  # BlockArg: S_vt [B, H, R, T]
    vv,  # BlockArg: S_vv [B, H, R, R]
    spans,  # SpanArgs
    scaling,  # Scaling
    loss,  # float32 [B * H, 2]: sums over the rows of text, of vision
    stats,  # float32 [B * H, 8, T + R]
    n_heads,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Loss and row numbers of one side of one problem."""
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    scaling = plain_scaling(scaling)
    i_problem = tl.program_id(0) // 2
    is_text = tl.program_id(0) % 2 == 0
    _, _, _, _, valid = load_spans(spans, (i_problem // n_heads).to(tl.int64))
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    if is_text:
        total = forward_side(side, spans, scaling, KIND, DOT, UNIT, SAVE, BLOCK_T, BLOCK_R)
    else:
        total = forward_side(side, spans, scaling, KIND, DOT, UNIT, SAVE, BLOCK_R, BLOCK_T)
    tl.store(loss + tl.program_id(0), tl.where(valid, total, float("nan")))


@triton.jit
def rows_side(
    side, i_tile, g, scale, m_g, m_y, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr, GRAD_Y: tl.constexpr,
    BLOCK_I: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """G to m_g, dY to m_y for the rows from i: as many as fit in registers with all that the gradients need."""
    I: tl.constexpr = min(BLOCK_I, A)
    i = i_tile if I < A else 0  # a constant where there is one tile: fewer registers
    inside = inside_tile(side.own, i, 0, I, A)
    b_t = load_tile(side.own, i, 0, I, A, UNIT, DOT)  # before the dots: see mask_logits
    b_f, b_s = whole_factors(side, KIND, DOT, UNIT, A, B)
    if I == A:
        b_x = whole_logits(side, b_f, b_s, KIND, DOT, UNIT, A, B)
    else:
        b_i = load_factor(side.cross, i, 0, I, B, KIND, UNIT, DOT)
        b_x = rows_logits(side, b_i, b_f, b_s, KIND, DOT, UNIT, I, A, B)
    b_dx, b_dy = rows_gradient(b_x * scale, target_logits(b_t, KIND), load_rows(side, i, I), inside)
    if GRAD_Y:
        store_tile(m_y, target_gradient(b_dy, b_t, KIND) * g, i, 0, I, A)
    store_tile(m_g, b_dx * (g * scale), i, 0, I, A)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def whole_rows_kernel(
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
    GRAD_Y: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """G and dY of one tile of rows of one side."""
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    scaling = plain_scaling(scaling)
    work = plain_work(work)
    i_problem, is_text, i = row_tile(spans, BLOCK_I)
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    scale, weight, active = side_scale(scaling, side)
    if (i < side.n_a) & active:
        g = load_grad_loss(grad_loss, s_g_b, s_g_h, i_problem, n_heads) * weight
        m_g = open_g(work, side, i_problem)
        grad = tl.where(is_text, grad_tt, grad_vv)
        m_y = open_gradient(grad, spans, i_problem, n_heads, is_text, is_text, side.n_a, side.n_a)
        if is_text:
            rows_side(side, i, g, scale, m_g, m_y, KIND, DOT, UNIT, GRAD_Y, BLOCK_I, BLOCK_T, BLOCK_R)
        else:
            rows_side(side, i, g, scale, m_g, m_y, KIND, DOT, UNIT, GRAD_Y, BLOCK_I, BLOCK_R, BLOCK_T)


@triton.jit
def backward_side(
    side, g, scale, m_y, m_v, m_s, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr, GRAD_Y: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """dY to m_y, V to m_v, dS_ab to m_s."""
    inside = inside_tile(side.own, 0, 0, A, A)
    b_t = load_tile(side.own, 0, 0, A, A, UNIT, DOT)  # before the dots: see mask_logits
    b_f, b_s = whole_factors(side, KIND, DOT, UNIT, A, B)
    b_x = whole_logits(side, b_f, b_s, KIND, DOT, UNIT, A, B) * scale
    b_g, b_dy = rows_gradient(b_x, target_logits(b_t, KIND), load_rows(side, 0, A), inside)
    if GRAD_Y:
        store_tile(m_y, target_gradient(b_dy, b_t, KIND) * g, 0, 0, A, A)
    b_g *= g * scale
    if A < B:
        b_v = dot(tl.trans(b_f), tl.trans(b_g), tl.zeros([B, A], tl.float32), DOT)  # V^T = F^T G^T
        b_w = dot(tl.trans(b_f), b_g, tl.zeros([B, A], tl.float32), DOT)  # W^T = F^T G
        b_df = dot(tl.trans(b_s), b_w, tl.zeros([B, A], tl.float32), DOT)  # dF^T = S_bb^T W^T + S_bb V^T
        b_df = tl.trans(dot(b_s, b_v, b_df, DOT))
        b_v = tl.trans(b_v)
    else:
        b_v = dot(b_g, b_f, tl.zeros([A, B], tl.float32), DOT)
        b_w = dot(tl.trans(b_g), b_f, tl.zeros([A, B], tl.float32), DOT)
        b_df = dot(b_w, b_s, tl.zeros([A, B], tl.float32), DOT)
        b_df = dot(b_v, tl.trans(b_s), b_df, DOT)
    store_tile(m_v, b_v, 0, 0, A, B)
    if KIND == "softmax":
        b_df = b_f * (b_df - tl.sum(b_f * b_df, 1)[:, None])
    store_tile(m_s, b_df, 0, 0, A, B)


# grad_*: stores of several numbers would take registers that the whole of a side leaves none of
@triton.jit(do_not_specialize=[*UNSPECIALIZED, "grad_tv", "grad_vt"])
def whole_backward_kernel(
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
    work,  # Work: dY in the place of G, V
    n_heads,
    grad_tv,  # contiguous, shape and dtype of the input
    grad_vt,  # contiguous, shape and dtype of the input
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    GRAD_Y: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dS_ab of one side of one problem, and what its own kernel needs."""
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    scaling = plain_scaling(scaling)
    work = plain_work(work)
    i_problem = tl.program_id(0) // 2
    is_text = tl.program_id(0) % 2 == 0
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    scale, weight, active = side_scale(scaling, side)
    if (side.n_a > 0) & active:
        g = load_grad_loss(grad_loss, s_g_b, s_g_h, i_problem, n_heads) * weight
        m_y = open_g(work, side, i_problem)
        m_v = open_v(work, side, i_problem)
        grad = tl.where(is_text, grad_tv, grad_vt)
        m_s = open_gradient(grad, spans, i_problem, n_heads, is_text, is_text == 0, side.n_a, side.n_b)
        if is_text:
            backward_side(side, g, scale, m_y, m_v, m_s, KIND, DOT, UNIT, GRAD_Y, BLOCK_T, BLOCK_R)
        else:
            backward_side(side, g, scale, m_y, m_v, m_s, KIND, DOT, UNIT, GRAD_Y, BLOCK_R, BLOCK_T)
