"""Host side of the query/key variant for kind "scores": X_a = s c^3 Q_a (K_b^T Q_b)(K_b^T K_b) Q_a^T, memory O(N D)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..problem import ROW_NUMBERS, Options, Spans
from .qk_backward import qk_columns_kernel, qk_rows_kernel
from .qk_finish import qk_finish_k_kernel, qk_finish_q_kernel
from .qk_forward import qk_forward_kernel
from .qk_launch import gram_chunks
from .qk_problem import LOG2_E, QKProblem, reduce_rows, tokens, wide_forward, wide_gradient
from .qk_products import qk_chain_kernel, qk_gram_kernel, qk_mix_kernel, qk_project_kernel
from .qk_wide import Factors


def gram(
    problem: QKProblem, x: Tensor, y: Tensor, first_block: int, square: bool, out: Tensor | None = None
) -> tuple[Tensor, int]:
    """X_b^T Y_b (and X_b^T X_b if ``square``) of every chunk of tokens, and the number of chunks.

    Float32 [B, H, 2, chunks, D, D], with ``square`` [B, H, 2, 2 chunks, D, D]; kernels that read them add the chunks.
    ``out`` [B, H, 2, 2 or more, D, D] takes those of a single chunk.
    """
    p, tile = problem, problem.launch("gram")
    block_e = min(p.block_d, tile.m)
    tiles = triton.cdiv(p.d, block_e) ** 2
    longest = max(p.spans.n_text, p.spans.n_vision)
    chunks, chunk_tokens = gram_chunks(longest, tile.n, p.batch * p.heads * p.n_blocks * tiles)
    if out is None or chunks > 1:
        out = p.float32(p.batch, p.heads, 2, 2 * chunks if square else chunks, p.d, p.d)
    qk_gram_kernel[(p.batch * p.heads, p.n_blocks * chunks, tiles)](
        tokens(x),
        tokens(y),
        out,
        p.span_args,
        p.heads,
        p.heads // max(x.shape[1], 1),
        chunks,
        chunk_tokens,
        out.shape[3],
        first_block,
        D=p.d,
        BLOCK_E=block_e,
        BLOCK_N=tile.n,
        SQUARE=square,
        PRECISION=p.dots(tile),
        UPCAST=p.upcast,
        **tile.options,
    )
    return out, chunks


def products_of(problem: QKProblem) -> Tensor:
    """Float32 [B, H, 2, 3, D, D]: C_b = K_b^T Q_b, W_b = K_b^T K_b, M = s c^3 C_b W_b of the blocks a side needs."""
    p, tile = problem, problem.launch("mix")
    products = p.saved(p.batch, p.heads, 2, 3, p.d, p.d)
    sums, chunks = gram(p, p.k, p.q, p.first_block, True, products)
    qk_mix_kernel[(p.batch * p.heads, p.n_blocks, triton.cdiv(p.d, tile.m))](
        sums,
        products,
        p.span_args,
        p.heads,
        chunks,
        sums.shape[3],
        p.first_block,
        p.alpha,
        MEAN=p.options.projection_mean,
        D=p.d,
        BLOCK_D=p.block_d,
        BLOCK_M=tile.m,
        BLOCK_F=min(tile.n, p.block_d),
        PRECISION=tile.precision,
        **tile.options,
    )
    return products


def project(problem: QKProblem, products: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """U log2(e) [B, H, N, D] in q's dtype, its remainder (16-bit inputs) and its rows' powers of two (float16)."""
    p, tile = problem, problem.launch("tokens")
    u_hi = p.q.new_empty((p.batch, p.heads, p.n, p.d))
    u_lo = torch.empty_like(u_hi) if p.pair else None
    u_exp = p.float32(p.batch, p.heads, p.n) if p.scaled else None
    tiles_text, tiles = p.tiles(tile.m)
    qk_project_kernel[(p.batch * p.heads, tiles)](
        tokens(p.q),
        products,
        u_hi,
        u_lo,
        u_exp,
        p.span_args,
        p.n,
        p.heads,
        tiles_text,
        D=p.d,
        BLOCK_D=p.block_d,
        BLOCK_M=tile.m,
        BLOCK_F=min(tile.n, p.block_d),
        PAIR=p.pair,
        SCALED=p.scaled,
        PRECISION=p.dots(tile),
        UPCAST=p.upcast,
        **tile.options,
    )
    return u_hi, u_lo, u_exp


def scores_qk_forward(
    q: Tensor, k: Tensor, spans: Spans, options: Options, needs_grad: bool, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Loss [B, H] and the saved [stats [B, H, 8, n_text + n_vision], products [B, H, 2, 3, D, D]], all float32."""
    p = QKProblem(q, k, spans, options, scale)
    products = products_of(p)
    u_hi, u_lo, u_exp = project(p, products)
    stats = p.saved(p.batch, p.heads, ROW_NUMBERS, spans.n_text + spans.n_vision)
    loss = p.float32(p.batch, p.heads)
    if p.wide:
        wide_forward(p, Factors(u_hi, None, None, None), stats, False)
    else:
        tile = p.launch("forward")
        tiles_text, tiles = p.tiles(tile.m)
        qk_forward_kernel[(p.batch * p.heads, tiles)](
            tokens(p.q),
            tokens(p.k),
            u_hi,
            u_lo,
            u_exp,
            stats,
            p.span_args,
            p.n,
            p.heads,
            p.group,
            tiles_text,
            scale * LOG2_E,
            D=p.d,
            BLOCK_D=p.block_d,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            PAIR=p.pair,
            SCALED=p.scaled,
            PRECISION=tile.precision,
            UPCAST=p.upcast,
            PEEL=tile.peel,
            **tile.options,
        )
    reduce_rows(p, stats, loss)
    return loss, [stats, products] if needs_grad else []


def scores_qk_backward(
    grad_loss: Tensor, q: Tensor, k: Tensor, saved: list[Tensor], spans: Spans, options: Options, scale: float
) -> list[Tensor]:
    """d sum(grad_loss * loss) / d(q, k), in their dtypes."""
    p = QKProblem(q, k, spans, options, scale)
    stats, products = saved
    u_hi, u_lo, u_exp = project(p, products)
    dq = p.float32(p.batch, p.heads, p.n, p.d)
    dk = torch.empty_like(dq) if p.grad_y else None
    du = torch.empty_like(dq) if p.grad_x else None
    if p.wide:
        factors = Factors(u_hi, None, du, dq)
        wide_gradient(p, factors, stats, grad_loss, dk, columns=True, compact=False)
        wide_gradient(p, factors, stats, grad_loss, dq, columns=False, compact=False)
    else:
        _tile_gradients(p, (u_hi, u_lo, u_exp), stats, grad_loss, du, dq, dk)
    del u_hi, u_lo, u_exp
    grad_cw = _chain(p, products, du) if du is not None else None
    return finish(p, products, du, dq, dk, grad_cw)


def _tile_gradients(
    problem: QKProblem,
    u: tuple[Tensor, Tensor | None, Tensor | None],
    stats: Tensor,
    grad_loss: Tensor,
    du: Tensor | None,
    dq: Tensor,
    dk: Tensor | None,
) -> None:
    """du = dX Q_a, dq = dX^T U + c dY K_a, dk = c dY^T Q_a: the columns' kernel, then the rows', which adds to dq."""
    p = problem
    for kernel, name, outputs in ((qk_columns_kernel, "columns", (dq, dk)), (qk_rows_kernel, "rows", (du, dq))):
        tile = p.launch(name)
        tiles_text, tiles = p.tiles(tile.n if name == "columns" else tile.m)
        kernel[(p.batch * p.heads, tiles)](
            tokens(p.q),
            tokens(p.k),
            *u,
            stats,
            grad_loss,
            *outputs,
            *grad_loss.stride(),
            p.span_args,
            p.n,
            p.heads,
            p.group,
            tiles_text,
            p.scale,
            D=p.d,
            BLOCK_D=p.block_d,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            GRAD_X=p.grad_x,
            GRAD_Y=p.grad_y,
            ROW_MEAN=p.options.row_mean,
            PAIR=p.pair,
            SCALED=p.scaled,
            PRECISION=tile.precision,
            UPCAST=p.upcast,
            PEEL=tile.peel,
            **tile.options,
        )


def _chain(problem: QKProblem, products: Tensor, du: Tensor) -> Tensor:
    """Float32 [B, H, 2, 2, D, D]: dC_b and dW_b + dW_b^T of the blocks that a side needs, from dU."""
    p, tile = problem, problem.launch("mix")
    # dM_a = Q_a^T dU_a is summed over side a's own tokens
    sums, chunks = gram(p, p.q, du, 0 if p.options.text else 1, False)
    grad_cw = p.float32(p.batch, p.heads, 2, 2, p.d, p.d)
    qk_chain_kernel[(p.batch * p.heads, p.n_blocks, triton.cdiv(p.d, tile.m))](
        products,
        sums,
        grad_cw,
        p.span_args,
        p.heads,
        chunks,
        p.first_block,
        p.alpha,
        MEAN=p.options.projection_mean,
        D=p.d,
        BLOCK_D=p.block_d,
        BLOCK_M=tile.m,
        BLOCK_F=min(tile.n, p.block_d),
        PRECISION=p.dots(tile),
        **tile.options,
    )
    return grad_cw


def finish(
    problem: QKProblem, products: Tensor, du: Tensor | None, dq: Tensor, dk: Tensor | None, grad_cw: Tensor | None
) -> list[Tensor]:
    """Add the D x D terms and round: grad_q [B, H, N, D], grad_k [B, Hk, N, D]."""
    p, tile = problem, problem.launch("tokens")
    grad_q = p.q.new_empty(p.q.shape)
    grad_k = p.k.new_empty(p.k.shape)
    flags = {
        "D": p.d,
        "BLOCK_D": p.block_d,
        "BLOCK_M": tile.m,
        "BLOCK_F": min(tile.n, p.block_d),
        "TEXT": p.options.text,
        "VISION": p.options.vision,
        "GRAD_X": p.grad_x,
        "PRECISION": p.dots(tile),
        "UPCAST": p.upcast,
        **tile.options,
    }
    tiles_text, tiles, launched = p.finish_tiles(tile.m)
    qk_finish_q_kernel[(p.batch * p.heads, launched)](
        tokens(p.k),
        du,
        dq,
        products,
        grad_cw,
        grad_q,
        p.span_args,
        p.n,
        p.heads,
        p.group,
        tiles_text,
        tiles,
        **flags,
    )
    qk_finish_k_kernel[(p.batch * p.key_heads, launched)](
        tokens(p.q),
        tokens(p.k),
        dk,
        grad_cw,
        grad_k,
        p.span_args,
        p.n,
        p.key_heads,
        p.group,
        tiles_text,
        tiles,
        GRAD_Y=p.grad_y,
        **flags,
    )
    return [grad_q, grad_k]
