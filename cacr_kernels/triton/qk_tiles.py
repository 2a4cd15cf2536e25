"""Device helpers shared by the query/key kernels: spans, operands of exact dots, rows times a D x D matrix."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .common import leading, load_spans


@triton.jit
def open_rows(spans, i_b, is_text):
    """(first position, n_a, n_b, valid) of one side; both lengths are 0 if one is, or if the spans are invalid."""
    text_start, n_text, vision_start, n_vision, valid = load_spans(spans, i_b)
    empty = (n_text == 0) | (n_vision == 0)
    n_text = tl.where(empty, 0, n_text)
    n_vision = tl.where(empty, 0, n_vision)
    start = tl.where(is_text, text_start, vision_start)
    return start, tl.where(is_text, n_text, n_vision), tl.where(is_text, n_vision, n_text), valid


@triton.jit
def open_head(block, i_b, i_h, position):
    """Pointer to row ``position`` of one head of a Block [B, H, N, D]; all indices int64."""
    return block.p + i_b * block.s_b + i_h * block.s_h + position * block.s_r


@triton.jit
def load_tokens(
    p, s_r, s_c, i, n, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows i ... i + BLOCK_N - 1 of a matrix [n, D] at p, as [BLOCK_N, BLOCK_D]; zeros beyond D.

    Unless MASKED all of them are below n; otherwise those from n on are zeros.
    """
    o_n = tl.cast(i, tl.int64) + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o = o_n[:, None] * s_r + o_d[None, :] * s_c
    if MASKED:
        b = tl.load(p + o, mask=(o_n < n)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D != BLOCK_D:
        b = tl.load(p + o, mask=(o_d < D)[None, :], other=0.0)
    else:
        b = tl.load(p + o)
    return b


@triton.jit
def first_row(p, s_c, n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row 0 of a matrix [n, D] at p, as [BLOCK_D] with zeros beyond D; zeros if n is 0."""
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(p + o_d * s_c, mask=(o_d < D) & (n > 0), other=0.0)


@triton.jit
def operand(x, UPCAST: tl.constexpr):
    """A dot operand as loaded, or widened: the interpreter's arithmetic on bfloat16 is wrong."""
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def split_tf32(x):
    """float32 x = hi + lo, hi a tf32 number."""
    hi = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return hi, x - hi


@triton.jit
def rows_dot(b_l, b_r, acc, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """acc + L R^T [M, N] for L [M, K], R [N, K]; SWAPPED: the transpose of R L^T, equal to that one in every bit.

    Rows of X near one-hot amplify any difference between the X of the forward and of a backward that holds its tiles
    transposed. Products commute and every dot sums over K in the same order, so what is left is the order of the three
    tf32 products. "ieee" is the interpreter, whose matrix library sums R L^T and L R^T differently.
    """
    if PRECISION == "ieee":
        if SWAPPED:
            out = tl.trans(tl.dot(b_r, tl.trans(b_l), input_precision="ieee"))
        else:
            out = tl.dot(b_l, tl.trans(b_r), input_precision="ieee")
        if acc is not None:
            out = acc + out
    elif b_l.dtype == tl.float32:
        l_hi, l_lo = split_tf32(b_l)
        r_hi, r_lo = split_tf32(b_r)
        if SWAPPED:
            out = tl.dot(l_hi, tl.trans(r_lo), input_precision="tf32")
            out = tl.dot(l_lo, tl.trans(r_hi), out, input_precision="tf32")
        else:
            out = tl.dot(l_lo, tl.trans(r_hi), input_precision="tf32")
            out = tl.dot(l_hi, tl.trans(r_lo), out, input_precision="tf32")
        out = tl.dot(l_hi, tl.trans(r_hi), out, input_precision="tf32")
        if acc is not None:
            out = acc + out
    elif acc is not None:
        out = tl.dot(b_l, tl.trans(b_r), acc)
    else:
        out = tl.dot(b_l, tl.trans(b_r))
    return out


@triton.jit
def chunked_product(
    left,  # row 0 of L [rows, width]
    s_ln,
    s_ld,
    o_l,  # int64 [BLOCK_L] rows of L
    mask_l,
    right,  # row 0 of R [rows, width], of L's dtype
    s_rn,
    s_rd,
    o_r,  # int64 [BLOCK_R]
    mask_r,
    width,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    CENTRE_L: tl.constexpr = False,  # row 0 of L is taken off its rows
    CENTRE_R: tl.constexpr = False,
    SWAPPED: tl.constexpr = False,
):
    """L R^T [BLOCK_L, BLOCK_R] in chunks of BLOCK_K columns; SWAPPED as in :func:`rows_dot`."""
    acc = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    for f in tl.range(0, width, BLOCK_K):
        o_f = f + tl.arange(0, BLOCK_K)
        mask_f = o_f < width
        b_l = tl.load(
            left + o_l[:, None] * s_ln + o_f[None, :] * s_ld, mask=mask_l[:, None] & mask_f[None, :], other=0.0
        )
        b_r = tl.load(
            right + o_r[:, None] * s_rn + o_f[None, :] * s_rd, mask=mask_r[:, None] & mask_f[None, :], other=0.0
        )
        if CENTRE_L:
            b_l -= tl.load(left + o_f * s_ld, mask=mask_f, other=0.0)[None, :]
        if CENTRE_R:
            b_r -= tl.load(right + o_f * s_rd, mask=mask_f, other=0.0)[None, :]
        acc = rows_dot(operand(b_l, UPCAST), operand(b_r, UPCAST), acc, SWAPPED, PRECISION)
    return acc


@triton.jit
def narrow(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 x rounded to nearest even in DTYPE; the interpreter would cut the bits of bfloat16 off."""
    if UPCAST:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.uint32).to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def load_sum(p, o, s, count, mask, UNROLL: tl.constexpr):
    """The sum of ``count`` tiles p, p + s, ... in this order; loads of UNROLL of them do not wait for each other."""
    acc = tl.zeros(o.shape, tl.float32)
    for i in range(0, count, UNROLL):
        for j in tl.static_range(UNROLL):
            acc += tl.load(p + j * s + o, mask=mask & (i + j < count), other=0.0)
        p += UNROLL * s
    return acc


@triton.jit
def bfloat16_parts(x, EXACT: tl.constexpr):
    """float32 x = hi + mid + lo in bfloat16, all of its bits; unless EXACT without lo, up to 2^-17 of its size."""
    hi = leading(x)
    x -= hi
    mid = leading(x) if EXACT else x
    return hi.to(tl.bfloat16), mid.to(tl.bfloat16), (x - mid).to(tl.bfloat16)


@triton.jit
def wide_dot(b_x, b_a, acc, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + X A, one of them at least float32. "split": bfloat16 products of parts of float32 and float16 factors.

    A bfloat16 X makes two products; any other pair is split on both sides (float16 is the sum of two parts), three
    products. EXACT (A is float32): all bits of A count, one product more, two for a float16 X.
    """
    if PRECISION != "split":
        acc = tl.dot(b_x.to(tl.float32), b_a.to(tl.float32), acc, input_precision=PRECISION)
    else:
        a_hi, a_mid, a_lo = bfloat16_parts(b_a.to(tl.float32), EXACT)
        if b_x.dtype == tl.bfloat16:
            if EXACT:
                acc = tl.dot(b_x, a_lo, acc)
            acc = tl.dot(b_x, a_mid, acc)
            acc = tl.dot(b_x, a_hi, acc)
        else:
            x_hi, x_mid, _ = bfloat16_parts(b_x.to(tl.float32), False)
            if EXACT:
                acc = tl.dot(x_mid, a_mid, acc)
                acc = tl.dot(x_hi, a_lo, acc)
            acc = tl.dot(x_mid, a_hi, acc)
            acc = tl.dot(x_hi, a_mid, acc)
            acc = tl.dot(x_hi, a_hi, acc)
    return acc


@triton.jit
def rows_times_matrix(
    acc,  # [BLOCK_M, BLOCK_D] float32
    x,  # the first of BLOCK_M rows of X [rows, D], any float dtype
    s_xn,
    s_xd,
    mask_m,  # [BLOCK_M]
    matrix,  # A [D, D] float32
    wanted,  # False: A is not read and taken as 0
    TRANSPOSED: tl.constexpr,  # A^T in place of A
    EXACT: tl.constexpr,  # of wide_dot
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc + X A in float32."""
    o_e = tl.arange(0, BLOCK_D)
    o_x = tl.arange(0, BLOCK_M).to(tl.int64)[:, None] * s_xn
    for f in tl.range(0, D, BLOCK_F):
        o_f = f + tl.arange(0, BLOCK_F)
        mask_f = o_f < D
        b_x = tl.load(x + o_x + o_f[None, :] * s_xd, mask=mask_m[:, None] & mask_f[None, :], other=0.0)
        if TRANSPOSED:
            mask = (o_e < D)[:, None] & mask_f[None, :] & wanted
            b_a = tl.trans(tl.load(matrix + o_e[:, None] * D + o_f[None, :], mask=mask, other=0.0))
        else:
            mask = mask_f[:, None] & (o_e < D)[None, :] & wanted
            b_a = tl.load(matrix + o_f[:, None] * D + o_e[None, :], mask=mask, other=0.0)
        acc = wide_dot(operand(b_x, UPCAST), b_a, acc, EXACT, PRECISION)
    return acc
