"""Building blocks shared by the kernels: spans, matrices and their masked tiles, dots of stated precision.

Triton only, no torch. Letters as in docs/paper.md: a is the side whose rows are compared, b the other one;
U = S_ab S_bb, F = S_ab, X = scale U F^T, Y = S_aa.
"""

# mypy: allow-untyped-defs
# ruff: noqa: RUF059

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_args import Matrix, Side

#: log2(e)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_spans(spans, i_b):
    """(text_start, n_text, vision_start, n_vision, valid) of example i_b; an invalid one gets lengths 0."""
    if spans.table is None:
        return (
            spans.text_start.to(tl.int64),
            spans.n_text.to(tl.int32),
            spans.vision_start.to(tl.int64),
            spans.n_vision.to(tl.int32),
            spans.n_text >= 0,
        )
    else:
        t_0 = tl.load(spans.table + i_b * 4).to(tl.int64)
        n_t = tl.load(spans.table + i_b * 4 + 1).to(tl.int64)
        v_0 = tl.load(spans.table + i_b * 4 + 2).to(tl.int64)
        n_v = tl.load(spans.table + i_b * 4 + 3).to(tl.int64)
        valid = (t_0 >= 0) & (n_t >= 0) & (n_t <= spans.n_text) & (t_0 + n_t <= spans.limit_text)
        valid = valid & (v_0 >= 0) & (n_v >= 0) & (n_v <= spans.n_vision) & (v_0 + n_v <= spans.limit_vision)
        overlap = (t_0 < v_0 + n_v) & (v_0 < t_0 + n_t) & (n_t > 0) & (n_v > 0)
        valid = valid & ((spans.disjoint == 0) | (overlap == 0))
        n_t = tl.where(valid, n_t, 0).to(tl.int32)
        n_v = tl.where(valid, n_v, 0).to(tl.int32)
        return tl.where(valid, t_0, 0), n_t, tl.where(valid, v_0, 0), n_v, valid


@triton.jit
def locate(block, i_b, i_h, row, column):
    """(pointer to element [row, column] of the problem (i_b, i_h), row stride, column stride), all in int64."""
    p = block.p + i_b * block.s_b.to(tl.int64) + i_h * block.s_h.to(tl.int64)
    s_r = block.s_r.to(tl.int64)
    s_c = block.s_c.to(tl.int64)
    return p + row * s_r + column * s_c, s_r, s_c


@triton.jit
def open_side(tt, tv, vt, vv, spans, stats, i_problem, n_heads, is_text):
    """The Side of a problem. Both lengths are 0 when one of the spans is empty or the example is invalid.

    stats: float32 [B * H, 8, T + R], the rows of text first (numbers: see rows.py).
    """
    i_b = (i_problem // n_heads).to(tl.int64)
    i_h = (i_problem % n_heads).to(tl.int64)
    is_text = is_text != 0
    t_0, n_a, v_0, n_b, valid = load_spans(spans, i_b)
    empty = (n_a == 0) | (n_b == 0)
    n_a = tl.where(empty, 0, n_a)
    n_b = tl.where(empty, 0, n_b)
    s_n = (spans.n_text + spans.n_vision).to(tl.int64)
    p_n = stats + i_problem.to(tl.int64) * 8 * s_n
    o_n = p_n + spans.n_text
    p_aa, r_aa, c_aa = locate(tt, i_b, i_h, t_0, t_0)
    p_ab, r_ab, c_ab = locate(tv, i_b, i_h, t_0, v_0)
    p_bb, r_bb, c_bb = locate(vv, i_b, i_h, v_0, v_0)
    if not is_text:
        p_aa, r_aa, c_aa, p_bb, r_bb, c_bb = p_bb, r_bb, c_bb, p_aa, r_aa, c_aa
        p_ab, r_ab, c_ab = locate(vt, i_b, i_h, v_0, t_0)
        n_a, n_b = n_b, n_a
        p_n, o_n = o_n, p_n
    own = Matrix(p_aa, r_aa, c_aa, n_a, n_a, p_n + 2 * s_n, s_n)
    cross = Matrix(p_ab, r_ab, c_ab, n_a, n_b, p_n + 6 * s_n, s_n)
    other = Matrix(p_bb, r_bb, c_bb, n_b, n_b, o_n + 2 * s_n, s_n)
    return Side(own, cross, other, n_a, n_b, p_n, s_n, is_text)


@triton.jit
def row_tile(spans, BLOCK_I: tl.constexpr):
    """(problem, is_text, first row) of a program: the tiles of a problem's text rows, then of its vision rows."""
    n_text_tiles = tl.cdiv(spans.n_text, BLOCK_I)
    n_tiles = tl.maximum(n_text_tiles + tl.cdiv(spans.n_vision, BLOCK_I), 1)
    i_tile = tl.program_id(0) % n_tiles
    is_text = i_tile < n_text_tiles
    return tl.program_id(0) // n_tiles, is_text, tl.where(is_text, i_tile, i_tile - n_text_tiles) * BLOCK_I


@triton.jit
def open_work(work, side, along_text, n_c, offset_text, offset_vision, i_problem):
    """A float32 matrix [n_a, n_c] of a side in the workspace, at the offset of its side; along_text: its rows are.

    Its columns end at a multiple of four: those beyond n_c are written with the others, and meet masked factors.
    """
    o = i_problem.to(tl.int64) * work.s_problem.to(tl.int64)
    o += tl.where(side.is_text, offset_text, offset_vision).to(tl.int64)
    s_r = tl.where(along_text, work.n_text, work.n_vision).to(tl.int64)
    p = work.p + o * 4
    return Matrix(p, s_r * 4, 1, side.n_a, (n_c + 3) // 4 * 4, p, 0)


@triton.jit
def open_u(work, side, i_problem):
    return open_work(work, side, side.is_text == 0, side.n_b, work.u_text, work.u_vision, i_problem)


@triton.jit
def open_v(work, side, i_problem):
    return open_work(work, side, side.is_text == 0, side.n_b, work.v_text, work.v_vision, i_problem)


@triton.jit
def open_g(work, side, i_problem):
    return open_work(work, side, side.is_text, side.n_a, work.g_text, work.g_vision, i_problem)


@triton.jit
def open_gradient(grad, spans, i_problem, n_heads, row_text, column_text, n_r, n_c):
    """The block [n_r, n_c] of a contiguous gradient. row_text, column_text: its rows, its columns are text."""
    t_0, n_t, v_0, n_v, valid = load_spans(spans, (i_problem // n_heads).to(tl.int64))
    s_r = tl.where(column_text, spans.limit_text, spans.limit_vision).to(tl.int64)
    p = grad + i_problem.to(tl.int64) * tl.where(row_text, spans.limit_text, spans.limit_vision) * s_r
    p += tl.where(row_text, t_0, v_0) * s_r + tl.where(column_text, t_0, v_0)
    return Matrix(p, s_r, 1, n_r, n_c, p, 0)


@triton.jit
def load_grad_loss(grad_loss, s_b, s_h, i_problem, n_heads):
    """grad_loss[b, h] of a problem, in float32."""
    i_b = (i_problem // n_heads).to(tl.int64)
    i_h = (i_problem % n_heads).to(tl.int64)
    return tl.load(grad_loss + i_b * s_b.to(tl.int64) + i_h * s_h.to(tl.int64)).to(tl.float32)


@triton.jit
def inside_tile(m, r_0, c_0, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mask [BLOCK_R, BLOCK_C] of the elements of a tile that belong to the Matrix."""
    return (tl.arange(0, BLOCK_R) < m.n_r - r_0)[:, None] & (tl.arange(0, BLOCK_C) < m.n_c - c_0)[None, :]


@triton.jit
def tile_offsets(m, r_0, c_0, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr):
    """(pointers, mask) of the tile [BLOCK_R, BLOCK_C] of a Matrix that begins at [r_0, c_0]. UNIT: contiguous columns.

    The origin is a scalar in int64; offsets inside a tile fit in int32 (see host.Problem), which halves the registers
    that they take.
    """
    o_r = tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    p = m.p + tl.cast(r_0, tl.int64) * m.s_r
    if UNIT:
        p += c_0
        o = o_r[:, None] * m.s_r.to(tl.int32) + o_c[None, :]
    else:
        p += tl.cast(c_0, tl.int64) * m.s_c
        o = o_r[:, None] * m.s_r.to(tl.int32) + o_c[None, :] * m.s_c.to(tl.int32)
    return p + o, inside_tile(m, r_0, c_0, BLOCK_R, BLOCK_C)


@triton.jit
def load_tile(
    m, r_0, c_0, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """Tile [BLOCK_R, BLOCK_C] of a Matrix from [r_0, c_0], 0 outside.

    The values keep their dtype only where the dots take it ("split"): elsewhere they are widened at once, since the
    interpreter's arithmetic on bfloat16 is wrong.
    """
    p, mask = tile_offsets(m, r_0, c_0, BLOCK_R, BLOCK_C, UNIT)
    b = tl.load(p, mask=mask, other=0.0)
    if DOT != "split":
        b = b.to(tl.float32)
    return b


@triton.jit
def load_factor(
    m, r_0, c_0, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Tile of a block inside the product: S, or for kind "softmax" exp(S - max) / sum with its rows' numbers."""
    b = load_tile(m, r_0, c_0, BLOCK_R, BLOCK_C, UNIT, DOT)
    if KIND == "softmax":
        o_r = r_0 + tl.arange(0, BLOCK_R)
        b_m = tl.load(m.p_n + o_r, mask=o_r < m.n_r, other=0.0)
        b_l = tl.load(m.p_n + m.s_n + o_r, mask=o_r < m.n_r, other=1.0)
        b = exponential(b.to(tl.float32) - b_m[:, None]) / b_l[:, None]
        b = tl.where(inside_tile(m, r_0, c_0, BLOCK_R, BLOCK_C), b, 0.0)
    return b


@triton.jit
def store_tile(m, b, r_0, c_0, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write tile b [BLOCK_R, BLOCK_C] to a Matrix with contiguous columns, rounding it to the matrix's dtype."""
    p, mask = tile_offsets(m, r_0, c_0, BLOCK_R, BLOCK_C, True)
    tl.store(p, b.to(m.p.dtype.element_ty), mask=mask)


@triton.jit
def exponential(x):
    """e^x in float32, 0 below 2^-126: tl.exp keeps such numbers and takes three more instructions for it."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def leading(x):
    """float32 x rounded to the bits of a bfloat16, in float32 still: by integers, as single conversions are slow."""
    bits = (x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def split(b):
    """float32 b = hi + lo up to 2^-17 of its size, both bfloat16."""
    hi = leading(b)
    return hi.to(tl.bfloat16), (b - hi).to(tl.bfloat16)


@triton.jit
def dot(b_l, b_r, acc, DOT: tl.constexpr):
    """acc + b_l b_r in float32, for l [M, K], r [K, N].

    DOT "ieee": float32 multiply-adds. "tf32x3": three tf32 products of float32 factors.
    "split": bfloat16 tensor cores. Two factors of one 16-bit dtype are multiplied as they are; a bfloat16 factor
    meets a float32 one split into hi + lo (two products); any other pair is split on both sides (three products,
    2^-17 a factor), which is exact for float16 values and cannot overflow as float16 would.
    """
    if DOT == "ieee":
        acc = tl.dot(b_l.to(tl.float32), b_r.to(tl.float32), acc, input_precision="ieee")
    elif DOT == "tf32x3":
        acc = tl.dot(b_l.to(tl.float32), b_r.to(tl.float32), acc, input_precision="tf32x3")
    elif (b_l.dtype == b_r.dtype) and (b_l.dtype != tl.float32):
        acc = tl.dot(b_l, b_r, acc)
    elif b_r.dtype == tl.bfloat16:
        l_hi, l_lo = split(b_l)
        acc = tl.dot(l_lo, b_r, acc)
        acc = tl.dot(l_hi, b_r, acc)
    elif b_l.dtype == tl.bfloat16:
        r_hi, r_lo = split(b_r)
        acc = tl.dot(b_l, r_lo, acc)
        acc = tl.dot(b_l, r_hi, acc)
    else:
        l_hi, l_lo = split(b_l.to(tl.float32))
        r_hi, r_lo = split(b_r.to(tl.float32))
        acc = tl.dot(l_lo, r_hi, acc)
        acc = tl.dot(l_hi, r_lo, acc)
        acc = tl.dot(l_hi, r_hi, acc)
    return acc
