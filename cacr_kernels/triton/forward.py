"""Forward for small spans: one launch, one pass over the rows of both sides.

Per side a: U = S_ab S_bb [n_a, n_b], X = scale U S_ab^T [n_a, n_a] against Y = S_aa, row by row
(KL(p||q) + KL(q||p) = E_p[x - y] - E_q[x - y]). A row of U stays on chip, so n_b <= BLOCK_B.
"""

# mypy: allow-untyped-defs
# ruff: noqa: RUF059

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, load_spans, load_tile, open_side
from .rows import row_softmax, rows_finish, rows_start, rows_update, side_scale, store_rows, target_logits


@triton.jit(do_not_specialize=["tt", "tv", "vt", "vv", "spans", "loss", "stats", "n_heads", "n_parts", "scaling"])
def forward_small_kernel(
    tt,  # Block: S_tt [B, H, T, T]
    tv,  # Block: S_tv [B, H, T, R]
    vt,  # Block: S_vt [B, H, R, T]
    vv,  # Block: S_vv [B, H, R, R]
    spans,  # SpanArgs
    scaling,  # Scaling
    loss,  # float32 [B * H, n_parts]: sums over the row tiles part, part + n_parts, ...
    stats,  # float32 [B * H, 8, T + R]
    n_heads,
    n_parts,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    i_problem = tl.program_id(0) // n_parts
    i_part = tl.program_id(0) % n_parts
    n_text_tiles = tl.cdiv(spans.n_text, BLOCK_I)
    n_tiles = n_text_tiles + tl.cdiv(spans.n_vision, BLOCK_I)
    t_0, n_t, v_0, n_v, valid = load_spans(spans, (i_problem // n_heads).to(tl.int64))
    total = tl.where(valid, 0.0, float("nan"))
    for i_tile in range(tl.cdiv(n_tiles - i_part, n_parts)):
        i_tile = i_tile * n_parts + i_part
        is_text = i_tile < n_text_tiles
        side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
        n_a, n_b = side.n_a, side.n_b
        scale, weight, active = side_scale(scaling, side)
        o_i = tl.where(is_text, i_tile, i_tile - n_text_tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
        o_b = tl.arange(0, BLOCK_B)

        # U = S_ab S_bb: [I, B] = sum_K [I, K] [K, B]
        m_f = tl.zeros([BLOCK_I], tl.float32)
        l_f = tl.full([BLOCK_I], 1.0, tl.float32)
        if KIND == "softmax":
            b_f = load_tile(side.cross, o_i, o_b, UNIT, DOT)
            b_f, m_f, l_f = row_softmax(b_f, (o_b < n_b)[None, :])
        b_u = tl.zeros([BLOCK_I, BLOCK_B], tl.float32)
        for k in range(0, n_b, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            b_f = load_tile(side.cross, o_i, o_k, UNIT, DOT)
            b_s = load_tile(side.other, o_k, o_b, UNIT, DOT)
            if KIND == "softmax":
                inside = (o_k < n_b)[None, :]
                b_f = tl.where(inside, tl.exp(b_f.to(tl.float32) - m_f[:, None]) / l_f[:, None], 0.0)
                b_s, m_s, l_s = row_softmax(b_s, (o_b < n_b)[None, :])
                b_s = tl.where((o_k < n_b)[:, None], b_s, 0.0)
            b_u = dot(b_f, b_s, b_u, DOT)

        m_x, l_x, s_x, r_x, m_y, l_y, s_y, r_y = rows_start(BLOCK_I)
        for j in range(0, n_a, BLOCK_J):
            o_j = j + tl.arange(0, BLOCK_J)
            b_f = load_tile(side.cross, o_j, o_b, UNIT, DOT)
            if KIND == "softmax":
                b_f, m_s, l_s = row_softmax(b_f, (o_b < n_b)[None, :])
            b_s = load_tile(side.own, o_i, o_j, UNIT, DOT)
            # X = scale U F^T: [I, J] = [I, B] [B, J]
            b_x = dot(b_u, tl.trans(b_f), tl.zeros([BLOCK_I, BLOCK_J], tl.float32), DOT) * scale
            b_y = target_logits(b_s, KIND)
            m_x, l_x, s_x, r_x, m_y, l_y, s_y, r_y = rows_update(
                m_x, l_x, s_x, r_x, m_y, l_y, s_y, r_y, b_x, b_y, (o_j < n_a)[None, :], j == 0
            )
        b_loss, e_p, e_q = rows_finish(m_x, l_x, s_x, r_x, m_y, l_y, s_y, r_y)
        keep = (o_i < n_a) & active
        total += tl.sum(tl.where(keep, b_loss, 0.0)) * weight
        if SAVE:
            store_rows(side, spans, o_i, m_x, l_x, m_y, l_y, e_p, e_q, m_f, l_f)
    tl.store(loss + tl.program_id(0), total)
