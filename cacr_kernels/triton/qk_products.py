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

from .kernel_args import SpanArgs, plain_spans
from .qk_tiles import narrow, open_head, open_rows, operand, rows_times_matrix
from .rows import LOG2_E


@triton.jit(do_not_specialize=["s_chunk", "heads", "group", "chunks", "chunk_tokens", "first_block"])
def qk_gram_kernel(
    x,  # Block [B, Hx, N, D]
    y,  # Block [B, H, N, D]
    out,  # float32 [chunks, B, H, 2, s_out / D^2, D, D]
    s_chunk,
    s_out,  # elements between the two blocks of one head
    spans,  # SpanArgs
    heads,
    group,
    chunks,
    chunk_tokens,
    first_block,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SQUARE: tl.constexpr,  # also X^T X, stored behind X^T Y
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """X^T Y (and X^T X) over one chunk of one span's tokens, for one [BLOCK_E, BLOCK_F] tile of the result."""
    spans = SpanArgs(spans.table, *plain_spans(spans))
    i_bh = tl.program_id(0).to(tl.int64)
    i_block = first_block + tl.program_id(1) // chunks
    i_chunk = tl.program_id(1) % chunks
    tiles_f = tl.cdiv(D, BLOCK_F)
    o_e = (tl.program_id(2) // tiles_f) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_f = (tl.program_id(2) % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
    i_b = i_bh // heads
    i_h = i_bh % heads
    start, n, _, _ = open_rows(spans, i_b, i_block == 0)
    p_x = open_head(x, i_b, i_h // group, start)
    p_y = open_head(y, i_b, i_h, start)
    mask_e = o_e < D
    mask_f = o_f < D
    acc = tl.zeros([BLOCK_E, BLOCK_F], tl.float32)
    acc_square = tl.zeros([BLOCK_E, BLOCK_F], tl.float32)
    first = i_chunk * chunk_tokens
    for i_n in range(first, tl.minimum(first + chunk_tokens, n), BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        mask_n = o_n < n
        b_x = tl.load(
            p_x + o_e[:, None] * x.s_c + o_n[None, :] * x.s_r, mask=mask_e[:, None] & mask_n[None, :], other=0.0
        )
        b_y = tl.load(
            p_y + o_n[:, None] * y.s_r + o_f[None, :] * y.s_c, mask=mask_n[:, None] & mask_f[None, :], other=0.0
        )
        b_x = operand(b_x, UPCAST)
        b_y = operand(b_y, UPCAST)
        if SQUARE:
            b_z = tl.load(
                p_x + o_n[:, None] * x.s_r + o_f[None, :] * x.s_c, mask=mask_n[:, None] & mask_f[None, :], other=0.0
            )
            acc_square = tl.dot(b_x, operand(b_z, UPCAST), acc_square, input_precision=PRECISION)
        acc = tl.dot(b_x.to(b_y.dtype), b_y, acc, input_precision=PRECISION)
    out += i_chunk * s_chunk + (i_bh * 2 + i_block) * s_out
    o_out = o_e[:, None] * D + o_f[None, :]
    mask_out = mask_e[:, None] & mask_f[None, :]
    tl.store(out + o_out, acc, mask=mask_out)
    if SQUARE:
        tl.store(out + D * D + o_out, acc_square, mask=mask_out)


@triton.jit(do_not_specialize=["heads", "first_block"])
def qk_mix_kernel(
    products,  # float32 [B, H, 2, 3, D, D]: C_b, W_b and, written here, M_a = alpha C_b W_b
    spans,  # SpanArgs
    heads,
    first_block,
    alpha,  # projection_scale c^3
    MEAN: tl.constexpr,  # also divide by n_b^2
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M = alpha C W for BLOCK_M rows of one head and block."""
    spans = SpanArgs(spans.table, *plain_spans(spans))
    i_bh = tl.program_id(0).to(tl.int64)
    i_block = first_block + tl.program_id(1)
    o_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_D)
    _, n, _, _ = open_rows(spans, i_bh // heads, i_block == 0)
    products += (i_bh * 2 + i_block) * (3 * D * D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = rows_times_matrix(acc, products, D, 1, o_m, o_m < D, products + D * D, D, 1, D, BLOCK_D, BLOCK_F, PRECISION)
    acc *= projection_factor(alpha, n, MEAN)
    tl.store(products + 2 * D * D + o_m[:, None] * D + o_e[None, :], acc, mask=(o_m < D)[:, None] & (o_e < D)[None, :])


@triton.jit
def projection_factor(alpha, n_inner, MEAN: tl.constexpr):
    """alpha, or alpha / n_b^2 for the mean projection."""
    if MEAN:
        count = tl.maximum(n_inner, 1).to(tl.float32)
        alpha = alpha / (count * count)
    return alpha


@triton.jit(do_not_specialize=["n_tokens", "heads", "tiles_text"])
def qk_project_kernel(
    q,  # Block [B, H, N, D]
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
    spans = SpanArgs(spans.table, *plain_spans(spans))
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_b = i_bh // heads
    is_text = i_tile < tiles_text
    start, n, _, _ = open_rows(spans, i_b, is_text)
    first = tl.where(is_text, i_tile, i_tile - tiles_text) * BLOCK_M
    if first >= n:
        return
    o_m = first + tl.arange(0, BLOCK_M)
    mask_m = o_m < n
    o_m = start + o_m
    o_e = tl.arange(0, BLOCK_D)
    inner = tl.where(is_text, 1, 0)
    p_q = open_head(q, i_b, i_bh % heads, 0)
    matrix = products + ((i_bh * 2 + inner) * 3 + 2) * (D * D)
    b_u = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_u = rows_times_matrix(b_u, p_q, q.s_r, q.s_c, o_m, mask_m, matrix, D, 1, D, BLOCK_D, BLOCK_F, PRECISION)
    b_u *= LOG2_E
    o_row = i_bh * n_tokens + o_m
    if SCALED:
        # the largest element of a row becomes 2^14 to 2^15, far from float16's overflow and from its subnormals
        largest = tl.max(tl.abs(b_u), axis=1)
        power = tl.minimum(tl.floor(tl.log2(tl.maximum(largest, 1e-30))) - 14, 100.0)
        tl.store(u_exp + o_row, tl.exp2(power), mask=mask_m)
        b_u *= tl.exp2(-power)[:, None]
    o_u = o_row[:, None] * D + o_e[None, :]
    mask_u = mask_m[:, None] & (o_e < D)[None, :]
    b_hi = narrow(b_u, u_hi.dtype.element_ty, UPCAST)
    tl.store(u_hi + o_u, b_hi, mask=mask_u)
    if PAIR:
        tl.store(u_lo + o_u, narrow(b_u - b_hi.to(tl.float32), u_lo.dtype.element_ty, UPCAST), mask=mask_u)


@triton.jit(do_not_specialize=["heads", "first_block"])
def qk_chain_kernel(
    products,  # float32 [B, H, 2, 3, D, D]: C, W, M
    grad_m,  # float32 [B, H, 2, D, D]: dM_a, stored with side a
    grad_cw,  # float32 [B, H, 2, 2, D, D]: written, dC_b and dW_b + dW_b^T
    spans,  # SpanArgs
    heads,
    first_block,
    alpha,
    MEAN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dC_b = alpha dM_a W_b^T and dW_b + dW_b^T = alpha (C_b^T dM_a + dM_a^T C_b), for BLOCK_M rows of one block."""
    spans = SpanArgs(spans.table, *plain_spans(spans))
    i_bh = tl.program_id(0).to(tl.int64)
    i_block = first_block + tl.program_id(1)
    o_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = o_m < D
    o_e = tl.arange(0, BLOCK_D)
    _, n, _, _ = open_rows(spans, i_bh // heads, i_block == 0)
    factor = projection_factor(alpha, n, MEAN)
    c = products + (i_bh * 2 + i_block) * (3 * D * D)
    w = c + D * D
    dm = grad_m + (i_bh * 2 + 1 - i_block) * (D * D)
    out = grad_cw + (i_bh * 2 + i_block) * (2 * D * D) + o_m[:, None] * D + o_e[None, :]
    mask = mask_m[:, None] & (o_e < D)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = rows_times_matrix(acc, dm, D, 1, o_m, mask_m, w, 1, D, D, BLOCK_D, BLOCK_F, PRECISION)
    tl.store(out, acc * factor, mask=mask)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = rows_times_matrix(acc, c, 1, D, o_m, mask_m, dm, D, 1, D, BLOCK_D, BLOCK_F, PRECISION)
    acc = rows_times_matrix(acc, dm, 1, D, o_m, mask_m, c, D, 1, D, BLOCK_D, BLOCK_F, PRECISION)
    tl.store(out + D * D, acc * factor, mask=mask)
