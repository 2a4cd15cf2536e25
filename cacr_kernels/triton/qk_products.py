"""The D x D side of the query/key variant (kind "scores"): Gram matrices, their products and U = Q_a M.

With C_b = K_b^T Q_b, W_b = K_b^T K_b over the tokens of one span b, M_a = s c^3 C_b W_b (s: projection scale, c:
attention scale) and U_a = Q_a M_a, the projected attention of the other side a is X_a = U_a Q_a^T. Backward, from dU_a
and dM_a = Q_a^T dU_a: dC_b = s c^3 dM_a W_b^T, dW_b = s c^3 C_b^T dM_a, dQ_a += dU_a M_a^T, dQ_b += K_b dC_b,
dK_b += Q_b dC_b^T + K_b (dW_b + dW_b^T).
Block 0 is text, block 1 vision; M of side a is stored with block b, whose tokens it is made of.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2_E
from .kernel_args import SpanArgs, plain_spans, plain_tokens
from .qk_tiles import load_sum, narrow, open_head, open_rows, operand, rows_times_matrix, wide_dot


@triton.jit
def gram_dot(b_x, b_y, acc, PRECISION: tl.constexpr):
    """acc + X^T Y; two 16-bit factors are multiplied as they are."""
    if (b_x.dtype == b_y.dtype) and (b_x.dtype != tl.float32):
        acc = tl.dot(tl.trans(b_x), b_y, acc)
    else:
        acc = wide_dot(tl.trans(b_x), b_y, acc, False, PRECISION)
    return acc


@triton.jit(do_not_specialize=["heads", "group", "chunks", "chunk_tokens", "matrices", "first_block"])
def qk_gram_kernel(
    x,  # BlockArg [B, Hx, N, D]
    y,  # BlockArg [B, H, N, D], of x's dtype or float32
    out,  # float32 [B, H, 2, matrices, D, D]: written, those of chunk after chunk
    spans,  # SpanArgs
    heads,
    group,
    chunks,
    chunk_tokens,
    matrices,
    first_block,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SQUARE: tl.constexpr,  # also X^T X, stored behind X^T Y
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """X^T Y (and X^T X) over one chunk of one span's tokens, for one [BLOCK_E, BLOCK_E] tile of the result."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    x = plain_tokens(x)
    y = plain_tokens(y)
    i_bh = tl.program_id(0).to(tl.int64)
    i_block = first_block + tl.program_id(1) // chunks
    i_chunk = tl.program_id(1) % chunks
    TILES: tl.constexpr = (D + BLOCK_E - 1) // BLOCK_E
    o_e = (tl.program_id(2) // TILES) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_f = (tl.program_id(2) % TILES) * BLOCK_E + tl.arange(0, BLOCK_E)
    i_b = i_bh // heads
    i_h = i_bh % heads
    start, n, _, _ = open_rows(spans, i_b, i_block == 0)
    first = i_chunk * chunk_tokens
    p_x = open_head(x, i_b, i_h // group, start)
    p_y = open_head(y, i_b, i_h, start)
    acc = tl.zeros([BLOCK_E, BLOCK_E], tl.float32)
    acc_square = tl.zeros([BLOCK_E, BLOCK_E], tl.float32)
    for i_n in range(first, tl.minimum(first + chunk_tokens, n), BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        mask_n = (o_n < n)[:, None]
        o_x = o_n[:, None] * x.s_r
        b_x = tl.load(p_x + o_x + o_e[None, :] * x.s_c, mask=mask_n & (o_e < D)[None, :], other=0.0)
        b_y = tl.load(p_y + o_n[:, None] * y.s_r + o_f[None, :] * y.s_c, mask=mask_n & (o_f < D)[None, :], other=0.0)
        b_x = operand(b_x, UPCAST)
        b_y = operand(b_y, UPCAST)
        if SQUARE:
            if TILES == 1:
                b_z = b_x
            else:
                b_z = tl.load(p_x + o_x + o_f[None, :] * x.s_c, mask=mask_n & (o_f < D)[None, :], other=0.0)
                b_z = operand(b_z, UPCAST)
            acc_square = gram_dot(b_x, b_z, acc_square, PRECISION)
        acc = gram_dot(b_x, b_y, acc, PRECISION)
    out += ((i_bh * 2 + i_block) * matrices + i_chunk * (2 if SQUARE else 1)) * (D * D)
    o_out = o_e[:, None] * D + o_f[None, :]
    mask_out = (o_e < D)[:, None] & (o_f < D)[None, :]
    tl.store(out + o_out, acc, mask=mask_out)
    if SQUARE:
        tl.store(out + D * D + o_out, acc_square, mask=mask_out)


@triton.jit(do_not_specialize=["heads", "chunks", "matrices", "first_block"])
def qk_mix_kernel(
    sums,  # float32 [B, H, 2, matrices, D, D]: C_b and W_b of every chunk of tokens; of one, products itself
    products,  # float32 [B, H, 2, 3, D, D]: written, C_b, W_b and M_a = alpha C_b W_b
    spans,  # SpanArgs
    heads,
    chunks,
    matrices,
    first_block,
    alpha,  # projection_scale c^3
    MEAN: tl.constexpr,  # also divide by n_b^2
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C, W and M = alpha C W for BLOCK_M rows of one head and block."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    i_bh = tl.program_id(0).to(tl.int64)
    i_block = first_block + tl.program_id(1)
    o_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_D)
    mask_m = (o_m < D)[:, None]
    mask_e = (o_e < D)[None, :]
    _, n, _, _ = open_rows(spans, i_bh // heads, i_block == 0)
    sums += (i_bh * 2 + i_block) * matrices * (D * D)
    products += (i_bh * 2 + i_block) * (3 * D * D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for f in tl.range(0, D, BLOCK_F):
        o_f = f + tl.arange(0, BLOCK_F)
        mask_c = mask_m & (o_f < D)[None, :]
        mask_w = mask_e & (o_f < D)[:, None]
        o_c = o_m[:, None] * D + o_f[None, :]
        o_w = o_f[:, None] * D + o_e[None, :]
        b_c = load_sum(sums, o_c, 2 * D * D, chunks, mask_c, 8)
        b_w = load_sum(sums + D * D, o_w, 2 * D * D, chunks, mask_w, 8)
        tl.store(products + o_c, b_c, mask=mask_c & (chunks > 1))
        tl.store(products + D * D + o_w, b_w, mask=mask_w & (chunks > 1) & (tl.program_id(2) == 0))
        acc = wide_dot(b_c, b_w, acc, False, PRECISION)
    acc *= projection_factor(alpha, n, MEAN)
    tl.store(products + 2 * D * D + o_m[:, None] * D + o_e[None, :], acc, mask=mask_m & mask_e)


@triton.jit
def projection_factor(alpha, n_inner, MEAN: tl.constexpr):
    """alpha, or alpha / n_b^2 for the mean projection."""
    if MEAN:
        count = tl.maximum(n_inner, 1).to(tl.float32)
        alpha = alpha / (count * count)
    return alpha


@triton.jit(do_not_specialize=["n_tokens", "heads", "tiles_text"])
def qk_project_kernel(
    q,  # BlockArg [B, H, N, D]
    products,  # float32 [B, H, 2, 3, D, D]
    u_hi,  # [B, H, N, D] in q's dtype: U log2(e), rounded, by absolute position
    u_lo,  # the same: the remainder (PAIR)
    u_exp,  # float32 [B, H, N]: the power of two of each row (SCALED)
    spans,  # SpanArgs
    n_tokens,
    heads,
    tiles_text,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PAIR: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """log2(e) U = log2(e) Q_a M_a for BLOCK_M rows of one side, in q's dtype: a hi + lo pair if that has 16 bits."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    q = plain_tokens(q)
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    is_text = i_tile < tiles_text
    start, n, _, _ = open_rows(spans, i_b, is_text)
    first = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M
    if first >= n:
        return
    o_m = tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_D)
    mask_m = first + o_m < n
    inner = tl.where(is_text, 1, 0)
    p_q = open_head(q, i_b, i_bh % heads, start + first)
    matrix = products + ((i_bh * 2 + inner) * 3 + 2) * (D * D)
    b_u = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_u = rows_times_matrix(
        b_u, p_q, q.s_r, q.s_c, mask_m, matrix, True, False, True, D, BLOCK_M, BLOCK_D, BLOCK_F, PRECISION, UPCAST
    )
    b_u *= LOG2_E
    row = i_bh * n_tokens + start + first
    if SCALED:
        # the largest element of a row becomes 2^14 to 2^15, far from float16's overflow and from its subnormals
        largest = tl.max(tl.abs(b_u), axis=1)
        power = tl.minimum(tl.floor(tl.log2(tl.maximum(largest, 1e-30))) - 14, 100.0)
        tl.store(u_exp + row + o_m, tl.exp2(power), mask=mask_m)
        b_u *= tl.exp2(-power)[:, None]
    u_hi += row * D
    o_u = o_m[:, None] * D + o_e[None, :]
    mask_u = mask_m[:, None] & (o_e < D)[None, :]
    b_hi = narrow(b_u, u_hi.dtype.element_ty, UPCAST)
    tl.store(u_hi + o_u, b_hi, mask=mask_u)
    if PAIR:
        u_lo += row * D
        tl.store(u_lo + o_u, narrow(b_u - b_hi.to(tl.float32), u_lo.dtype.element_ty, UPCAST), mask=mask_u)


@triton.jit(do_not_specialize=["heads", "chunks", "first_block"])
def qk_chain_kernel(
    products,  # float32 [B, H, 2, 3, D, D]: C, W, M
    sums,  # float32 [B, H, 2, chunks, D, D]: dM_a of every chunk of tokens, with side a
    grad_cw,  # float32 [B, H, 2, 2, D, D]: written, dC_b and dW_b + dW_b^T
    spans,  # SpanArgs
    heads,
    chunks,
    first_block,
    alpha,
    MEAN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dC_b = alpha dM_a W_b and dW_b + dW_b^T = alpha (C_b^T dM_a + dM_a^T C_b), for BLOCK_M rows of one block."""
    spans = SpanArgs(spans.table, spans.step, *plain_spans(spans))
    i_bh = tl.program_id(0).to(tl.int64)
    i_block = first_block + tl.program_id(1)
    o_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_D)
    mask_m = o_m < D
    mask_e = (o_e < D)[None, :]
    _, n, _, _ = open_rows(spans, i_bh // heads, i_block == 0)
    products += (i_bh * 2 + i_block) * (3 * D * D)
    sums += (i_bh * 2 + 1 - i_block) * chunks * (D * D)
    acc_c = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_w = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for f in tl.range(0, D, BLOCK_F):
        o_f = f + tl.arange(0, BLOCK_F)
        mask_f = o_f < D
        mask_fe = mask_f[:, None] & mask_e
        mask_fm = mask_f[:, None] & mask_m[None, :]
        o_fe = o_f[:, None] * D + o_e[None, :]
        o_fm = o_f[:, None] * D + o_m[None, :]
        mask_mf = mask_m[:, None] & mask_f[None, :]
        b_dm = load_sum(sums, o_m[:, None] * D + o_f[None, :], D * D, chunks, mask_mf, 8)
        b_w = tl.load(products + D * D + o_fe, mask=mask_fe, other=0.0)
        acc_c = wide_dot(b_dm, b_w, acc_c, False, PRECISION)  # W is its transpose
        b_dm = load_sum(sums, o_fe, D * D, chunks, mask_fe, 8)
        b_c = tl.load(products + o_fm, mask=mask_fm, other=0.0)
        acc_w = wide_dot(tl.trans(b_c), b_dm, acc_w, False, PRECISION)
        b_dm = load_sum(sums, o_fm, D * D, chunks, mask_fm, 8)
        b_c = tl.load(products + o_fe, mask=mask_fe, other=0.0)
        acc_w = wide_dot(tl.trans(b_dm), b_c, acc_w, False, PRECISION)
    factor = projection_factor(alpha, n, MEAN)
    out = grad_cw + (i_bh * 2 + i_block) * (2 * D * D) + o_m[:, None] * D + o_e[None, :]
    mask = mask_m[:, None] & mask_e
    tl.store(out, acc_c * factor, mask=mask)
    tl.store(out + D * D, acc_w * factor, mask=mask)
