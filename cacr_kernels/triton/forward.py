"""Forward: U = F S_bb, then X = scale U F^T against Y = S_aa in one pass over each row.

KL(p||q) + KL(q||p) = E_p[x - y] - E_q[x - y] per row i, with p = softmax(X_i), q = softmax(Y_i).
"""

# mypy: allow-untyped-defs
# ruff: noqa: RUF059

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_spans, load_tile, open_side, open_u
from .products import project_rows, projected_tile, tile_softmax_numbers
from .rows import rows_finish, rows_start, rows_update, side_scale, store_rows, target_logits


@triton.jit(
    do_not_specialize=["tt", "tv", "vt", "vv", "spans", "scaling", "loss", "stats", "work", "n_heads", "n_parts"]
)
def forward_kernel(
    tt,  # Block: S_tt [B, H, T, T]
    tv,  # Block: S_tv [B, H, T, R]
    vt,  # Block: S_vt [B, H, R, T]
    vv,  # Block: S_vv [B, H, R, R]
    spans,  # SpanArgs
    scaling,  # Scaling
    loss,  # float32 [B * H, n_parts]: sum over the row tiles part, part + n_parts, ... of both sides
    stats,  # float32 [B * H, 8, T + R]
    work,  # Work: U of both sides
    n_heads,
    n_parts,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    FUSED: tl.constexpr,  # small spans: this kernel also computes U and, for kind "softmax", the rows' softmax numbers
    SAVE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_problem = tl.program_id(0) // n_parts
    i_part = tl.program_id(0) % n_parts
    n_text_tiles = tl.cdiv(spans.n_text, BLOCK_I)
    n_tiles = n_text_tiles + tl.cdiv(spans.n_vision, BLOCK_I)
    if FUSED and KIND == "softmax":
        # every part needs the numbers of all rows and writes the same bits
        for i_tile in range(n_tiles):
            tile_softmax_numbers(
                tt, tv, vt, vv, spans, stats, i_problem, n_heads, i_tile, n_text_tiles, UNIT, DOT, BLOCK_I, BLOCK_J
            )
        tl.debug_barrier()
    t_0, n_t, v_0, n_v, valid = load_spans(spans, (i_problem // n_heads).to(tl.int64))
    total = tl.where(valid, 0.0, float("nan"))
    for i_round in range(tl.cdiv(n_tiles - i_part, n_parts)):
        i_tile = i_round * n_parts + i_part
        is_text = i_tile < n_text_tiles
        side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
        scale, weight, active = side_scale(scaling, side)
        i = tl.where(is_text, i_tile, i_tile - n_text_tiles) * BLOCK_I
        o_i = i + tl.arange(0, BLOCK_I)
        m_x, l_x, s_x, m_y, l_y, s_y, c = rows_start(BLOCK_I)
        if (i < side.n_a) & active:
            m_u = open_u(work, side, i_problem)
            if FUSED:
                project_rows(side, m_u, i, KIND, DOT, UNIT, BLOCK_I, BLOCK_C, BLOCK_K)
            for j in range(0, side.n_a, BLOCK_J):
                o_j = j + tl.arange(0, BLOCK_J)
                b_x = projected_tile(side, m_u, i, j, KIND, DOT, UNIT, BLOCK_I, BLOCK_J, BLOCK_K) * scale
                b_y = target_logits(load_tile(side.own, i, j, BLOCK_I, BLOCK_J, UNIT, DOT), KIND)
                m_x, l_x, s_x, m_y, l_y, s_y, c = rows_update(
                    m_x, l_x, s_x, m_y, l_y, s_y, c, b_x, b_y, (o_j < side.n_a)[None, :], False
                )
            b_loss, e_p, e_q = rows_finish(l_x, s_x, l_y, s_y, c)
            total += tl.sum(tl.where(o_i < side.n_a, b_loss, 0.0)) * weight
        else:
            e_p = tl.zeros([BLOCK_I], tl.float32)
            e_q = tl.zeros([BLOCK_I], tl.float32)
        if SAVE:
            store_rows(side, spans, o_i, active, m_x, l_x, m_y, l_y, e_p, e_q, KIND)
    tl.store(loss + tl.program_id(0), total)
