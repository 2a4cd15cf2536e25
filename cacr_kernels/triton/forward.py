"""Forward of large spans: X = scale U F^T against Y = S_aa in one pass over each row, U = F S_bb in the workspace.

KL(p||q) + KL(q||p) = E_p[x - y] - E_q[x - y] per row i, with p = softmax(X_i), q = softmax(Y_i).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_spans, load_tile, open_side, open_u, row_tile
from .kernel_args import SpanArgs, plain_blocks, plain_scaling, plain_spans, plain_work
from .products import projected_tile
from .rows import LOW, rows_finish, rows_start, rows_update, side_scale, store_rows, target_logits


@triton.jit(do_not_specialize=["loss", "stats", "n_heads"])
def large_forward_kernel(
    tt,  # BlockArg: S_tt [B, H, T, T]
    tv,  # BlockArg: S_tv [B, H, T, R]
    vt,  # BlockArg: S_vt [B, H, R, T]
    vv,  # BlockArg: S_vv [B, H, R, R]
    spans,  # SpanArgs
    scaling,  # Scaling
    loss,  # float32 [B * H, tiles]: sums over the rows of a tile
    stats,  # float32 [B * H, 8, T + R]
    work,  # Work: U of both sides
    n_heads,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loss and row numbers of one tile of rows of one side."""
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    scaling = plain_scaling(scaling)
    work = plain_work(work)
    i_problem, is_text, i = row_tile(spans, BLOCK_I)
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    scale, weight, active = side_scale(scaling, side)
    _, _, _, _, valid = load_spans(spans, (i_problem // n_heads).to(tl.int64))
    o_i = i + tl.arange(0, BLOCK_I)
    total = tl.where(valid, 0.0, float("nan"))
    m_x, l_x, s_x, m_y, l_y, s_y, c = rows_start(BLOCK_I)
    e_p = tl.zeros([BLOCK_I], tl.float32)
    e_q = e_p
    if (i < side.n_a) & active:
        m_u = open_u(work, side, i_problem)
        for j in range(0, side.n_a, BLOCK_J):
            o_j = j + tl.arange(0, BLOCK_J)
            b_y = target_logits(load_tile(side.own, i, j, BLOCK_I, BLOCK_J, UNIT, DOT), KIND)
            b_x = projected_tile(side, m_u, i, j, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_K) * scale
            b_y = tl.where(b_x > LOW, b_y, LOW)  # ties y to the layout of x: see mask_logits
            m_x, l_x, s_x, m_y, l_y, s_y, c = rows_update(
                m_x, l_x, s_x, m_y, l_y, s_y, c, b_x, b_y, 1.0, (o_j < side.n_a)[None, :], False
            )
        b_loss, e_p, e_q = rows_finish(l_x, s_x, l_y, s_y, c)
        total += tl.sum(tl.where(o_i < side.n_a, b_loss, 0.0)) * weight
    if SAVE:
        store_rows(side, spans, o_i, active, m_x, l_x, m_y, l_y, e_p, e_q, KIND)
    tl.store(loss + tl.program_id(0), total)
