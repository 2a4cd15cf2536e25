"""Small spans: every program holds whole rows of X, so nothing is recomputed inside a pass. One program a tile of rows.

U_C = F S_bb[:, C], X += U_C F[:, C]^T over chunks C of n_b, with F = S_ab (kind "softmax": P_ab, for which the numbers
of all rows come first, by numbers_kernel), then Y = S_aa beside it.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, inside_tile, load_factor, load_spans, load_tile, open_side, row_tile
from .kernel_args import SpanArgs, plain_blocks, plain_scaling, plain_spans
from .products import load_centred
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


@triton.constexpr_function
def chunk(size, kind, width=0, other=0):
    """A chunk of columns or of a sum. Kind "softmax": at most 16, since its factors are formed from more registers.

    32 at least where rows have half the width of the other side's, or less: they leave registers for it.
    """
    size = min(size, 16) if kind == "softmax" else size
    return max(size, 32) if width < other else size


@triton.jit
def projected_rows(
    side, i, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X before its scale, up to a constant a row (products.load_centred): whole rows [I, J] with J >= n_a."""
    b_x = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for c in range(0, side.n_b, BLOCK_C):
        b_u = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
        for k in range(0, side.n_b, BLOCK_K):
            # U += F S_bb: [I, C] += [I, K] [K, C]
            b_f = load_factor(side.cross, i, k, BLOCK_I, BLOCK_K, KIND, UNIT, DOT)
            b_u = dot(b_f, load_factor(side.other, k, c, BLOCK_K, BLOCK_C, KIND, UNIT, DOT), b_u, DOT)
        # X += U F^T: [I, J] += [I, C] [C, J]
        b_x = dot(b_u, tl.trans(load_centred(side.cross, 0, c, BLOCK_J, BLOCK_C, KIND, UNIT, DOT)), b_x, DOT)
    return b_x


@triton.jit
def row_gradients(
    side, i, scale, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dL/dX and the target's share of dL/dS_aa, whole rows [I, J] of X computed anew, for a row weight of 1."""
    inside = inside_tile(side.own, i, 0, BLOCK_I, BLOCK_J)
    b_s = load_tile(side.own, i, 0, BLOCK_I, BLOCK_J, UNIT, DOT)  # before the dots: see mask_logits
    b_x = projected_rows(side, i, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_C, BLOCK_K) * scale
    b_dx, b_dy = rows_gradient(b_x, target_logits(b_s, KIND), load_rows(side, i, BLOCK_I), inside)
    return b_dx, target_gradient(b_dy, b_s, KIND)


@triton.jit
def compare_rows(
    side, i, scale, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(losses, m_x, l_x, m_y, l_y, E_p[d], E_q[d]) of the rows from i, from whole rows [I, J] of X and Y."""
    inside = inside_tile(side.own, i, 0, BLOCK_I, BLOCK_J)
    b_y = target_logits(load_tile(side.own, i, 0, BLOCK_I, BLOCK_J, UNIT, DOT), KIND)
    b_x = projected_rows(side, i, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_C, BLOCK_K) * scale
    b_x, b_y = mask_logits(b_x, b_y, inside)
    return compare_logits(b_x, b_y)


@triton.jit(do_not_specialize=["loss", "stats", "n_heads"])
def small_forward_kernel(
    tt,  # BlockArg: S_tt [B, H, T, T]
    tv,  # BlockArg: S_tv [B, H, T, R]
    vt,  # BlockArg: S_vt [B, H, R, T]
    vv,  # BlockArg: S_vv [B, H, R, R]
    spans,  # SpanArgs
    scaling,  # Scaling
    loss,  # float32 [B * H, tiles]: sums over the rows of a tile
    stats,  # float32 [B * H, 8, T + R]
    n_heads,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loss and row numbers: E_p[d - E_q[d]] - E_q[d - E_q[d]] a row, d = (x - m_x) - (y - m_y)."""
    C_T: tl.constexpr = chunk(BLOCK_C, KIND, BLOCK_T, BLOCK_R)
    C_R: tl.constexpr = chunk(BLOCK_C, KIND, BLOCK_R, BLOCK_T)
    K: tl.constexpr = chunk(BLOCK_K, KIND)
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    scaling = plain_scaling(scaling)
    i_problem, is_text, i = row_tile(spans, BLOCK_I)
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    scale, weight, active = side_scale(scaling, side)
    _, _, _, _, valid = load_spans(spans, (i_problem // n_heads).to(tl.int64))
    o_i = i + tl.arange(0, BLOCK_I)
    total = tl.where(valid, 0.0, float("nan"))
    b_loss = tl.zeros([BLOCK_I], tl.float32)
    m_x, l_x, m_y, l_y, e_p, e_q = b_loss, b_loss, b_loss, b_loss, b_loss, b_loss
    if (i < side.n_a) & active:
        if is_text:
            b_loss, m_x, l_x, m_y, l_y, e_p, e_q = compare_rows(
                side, i, scale, KIND, DOT, UNIT, BLOCK_I, BLOCK_T, C_T, K
            )
        else:
            b_loss, m_x, l_x, m_y, l_y, e_p, e_q = compare_rows(
                side, i, scale, KIND, DOT, UNIT, BLOCK_I, BLOCK_R, C_R, K
            )
        total += tl.sum(tl.where((o_i >= side.n_a) | (b_loss < 0.0), 0.0, b_loss)) * weight
    if SAVE:
        store_rows(side, spans, o_i, active, m_x, l_x, m_y, l_y, e_p, e_q, KIND)
    tl.store(loss + tl.program_id(0), total)
