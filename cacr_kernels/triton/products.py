"""The tiles of the two products that every scores kernel shares: U = F S_bb and X, and softmax row numbers.

Every dot takes both factors from memory in chunks of BLOCK_K: whole rows of a factor do not fit in registers.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, exponential, load_factor, load_tile, open_side, open_u, row_tile, store_tile
from .kernel_args import SpanArgs, plain_blocks, plain_spans, plain_work


@triton.jit
def project_tile(
    side, i, c, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """U = F S_bb: [I, C] = sum of [I, K] [K, C] over n_b."""
    b_u = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    for k in range(0, side.n_b, BLOCK_K):
        b_f = load_factor(side.cross, i, k, BLOCK_I, BLOCK_K, KIND, UNIT, DOT)
        b_s = load_factor(side.other, k, c, BLOCK_K, BLOCK_C, KIND, UNIT, DOT)
        b_u = dot(b_f, b_s, b_u, DOT)
    return b_u


@triton.jit
def load_centred(
    m, r_0, c_0, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Tile of F - 1 f, with f the first row of F.

    U F^T changes by a constant a row, which changes nothing; an offset that scores share is taken out, whose rounding
    would grow with it. f = 0 for 16-bit factors, which go into their dots as they are ("split"), and for kind
    "softmax", whose X is at most 1.
    """
    b = load_factor(m, r_0, c_0, BLOCK_R, BLOCK_C, KIND, UNIT, DOT)
    if KIND != "softmax" and DOT != "split":
        b -= load_tile(m, 0, c_0, 1, BLOCK_C, UNIT, DOT)
    return b


@triton.jit
def projected_tile(
    side, m_u, i, j, KIND: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X before its scale, up to a constant a row: U (F - 1 f)^T, [I, J] = sum of [I, K] [K, J] over n_b."""
    b_x = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for k in range(0, side.n_b, BLOCK_K):
        b_u = load_tile(m_u, i, k, BLOCK_I, BLOCK_K, True, DOT)
        b_x = dot(b_u, tl.trans(load_centred(side.cross, j, k, BLOCK_J, BLOCK_K, KIND, UNIT, DOT)), b_x, DOT)
    return b_x


@triton.jit
def row_softmax_numbers(
    m, i, n_bound, UNIT: tl.constexpr, DOT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Write the maximum and the sum of exp of BLOCK_I rows of a Matrix to their place there, 0 from n_r to n_bound."""
    b_m = tl.full([BLOCK_I], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_I], tl.float32)
    o_i = i + tl.arange(0, BLOCK_I)
    for j in range(0, m.n_c, BLOCK_J):
        b_s = load_tile(m, i, j, BLOCK_I, BLOCK_J, UNIT, DOT).to(tl.float32)
        b_s = tl.where((j + tl.arange(0, BLOCK_J) < m.n_c)[None, :], b_s, float("-inf"))
        b_n = tl.maximum(b_m, tl.max(b_s, 1))
        b_l = b_l * exponential(b_m - b_n) + tl.sum(exponential(b_s - b_n[:, None]), 1)
        b_m = b_n
    tl.store(m.p_n + o_i, tl.where(o_i < m.n_r, b_m, 0.0), mask=o_i < n_bound)
    tl.store(m.p_n + m.s_n + o_i, tl.where(o_i < m.n_r, b_l, 0.0), mask=o_i < n_bound)


@triton.jit(do_not_specialize=["stats", "n_heads"])
def numbers_kernel(
    tt,  # BlockArg: S_tt [B, H, T, T]
    tv,  # BlockArg: S_tv [B, H, T, R]
    vt,  # BlockArg: S_vt [B, H, R, T]
    vv,  # BlockArg: S_vv [B, H, R, R]
    spans,  # SpanArgs
    stats,  # float32 [B * H, 8, T + R]
    n_heads,
    UNIT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Kind "softmax": maxima and sums of exp of one tile of rows, of its own and of its cross block."""
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    i_problem, is_text, i = row_tile(spans, BLOCK_I)
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    n_bound = tl.where(is_text, spans.n_text, spans.n_vision)
    row_softmax_numbers(side.own, i, n_bound, UNIT, DOT, BLOCK_I, BLOCK_J)
    row_softmax_numbers(side.cross, i, n_bound, UNIT, DOT, BLOCK_I, BLOCK_J)


@triton.jit(do_not_specialize=["stats", "n_heads", "is_text", "n_tiles_c", "n_tiles"])
def project_kernel(
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
    n_tiles,  # tiles of U
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Large spans: U = F S_bb [n_a, n_b] of one side, one tile a program."""
    tt, tv, vt, vv = plain_blocks(tt, tv, vt, vv)
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    work = plain_work(work)
    i_problem = tl.program_id(0) // n_tiles
    i_tile = tl.program_id(0) % n_tiles
    side = open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text)
    i = (i_tile // n_tiles_c) * BLOCK_I
    c = (i_tile % n_tiles_c) * BLOCK_C
    if (i < side.n_a) & (c < side.n_b):
        b_u = project_tile(side, i, c, KIND, DOT, UNIT, BLOCK_I, BLOCK_C, BLOCK_K)
        store_tile(open_u(work, side, i_problem), b_u, i, c, BLOCK_I, BLOCK_C)
