"""Host side of the query/key variant for kind "scores": X_a = s c^3 Q_a (K_b^T Q_b)(K_b^T K_b) Q_a^T, memory O(N D)."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..problem import ROW_NUMBERS, Options, Spans
from .common import Block, SpanArgs
from .qk_backward import qk_columns_kernel, qk_rows_kernel
from .qk_finish import qk_finish_k_kernel, qk_finish_q_kernel
from .qk_forward import qk_forward_kernel, qk_loss_kernel
from .qk_launch import GRAM_CHUNK, block_d, launch
from .qk_products import qk_chain_kernel, qk_gram_kernel, qk_mix_kernel, qk_project_kernel


class QKProblem:
    """Everything the launches of one call share: sizes, spans, flags of the inputs' dtype."""

    def __init__(self, q: Tensor, k: Tensor, spans: Spans, options: Options, scale: float) -> None:
        self.q, self.k, self.spans, self.options, self.scale = q, k, spans, options, scale
        self.batch, self.heads, self.n, self.d = q.shape
        self.key_heads = k.shape[1]
        self.group = self.heads // max(self.key_heads, 1)
        self.block_d = block_d(self.d)
        self.arch = architecture(q.device)
        self.pair = q.dtype != torch.float32
        self.scaled = q.dtype == torch.float16
        self.upcast = self.arch == 0 and q.dtype == torch.bfloat16
        self.alpha = options.projection_scale * scale**3
        self.grad_x = options.stop_gradient != "projection"
        self.grad_y = options.stop_gradient != "target"
        # block b is inner to the other side: text (0) is needed for the vision side, vision (1) for the text side
        self.first_block = 0 if options.vision else 1
        self.n_blocks = options.text + options.vision
        self.span_args = SpanArgs(
            spans.table, spans.text_start, spans.n_text, spans.vision_start, spans.n_vision, self.n, self.n, 1
        )

    def launch(self, kernel: str) -> Any:
        return launch(kernel, self.arch, self.q.dtype, self.d)

    def tiles(self, block: int) -> tuple[int, int]:
        """Tiles of the text side, of both sides; a side not asked for has none."""
        text = triton.cdiv(self.spans.n_text, block) if self.options.text else 0
        return text, text + (triton.cdiv(self.spans.n_vision, block) if self.options.vision else 0)

    def float32(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)

    def saved(self, *shape: int) -> Tensor:
        """A result whose half for a side that is not asked for reads as zeros."""
        return self.float32(*shape) if self.n_blocks == 2 else self.float32(*shape).zero_()


def architecture(device: torch.device) -> int:
    """10 * major + minor of the compute capability; 0 off the GPU, where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def block(x: Tensor) -> Block:
    return Block(x, *x.stride())


def gram(problem: QKProblem, x: Tensor, y: Tensor, out: Tensor, first_block: int, square: bool) -> None:
    """out[:, :, b, 0] = X_b^T Y_b, and out[:, :, b, 1] = X_b^T X_b if ``square``. out [B, H, 2, 1 or more, D, D]."""
    p, tile = problem, problem.launch("gram")
    longest = max(p.spans.n_text, p.spans.n_vision)
    chunks = max(1, triton.cdiv(longest, GRAM_CHUNK))
    n_out = 2 if square else 1
    target = out if chunks == 1 else p.float32(chunks, p.batch, p.heads, 2, n_out, p.d, p.d)
    block_e = min(p.block_d, tile.m)
    tiles = triton.cdiv(p.d, block_e)
    qk_gram_kernel[(p.batch * p.heads, p.n_blocks * chunks, tiles * tiles)](
        block(x),
        block(y),
        target,
        target.stride(0) if chunks > 1 else 0,
        target.stride(-4),
        p.span_args,
        p.heads,
        p.heads // max(x.shape[1], 1),
        chunks,
        GRAM_CHUNK,
        first_block,
        D=p.d,
        BLOCK_E=block_e,
        BLOCK_F=block_e,
        BLOCK_N=tile.n,
        SQUARE=square,
        PRECISION=tile.precision,
        UPCAST=p.upcast,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if chunks > 1:
        blocks = slice(first_block, first_block + p.n_blocks)
        torch.sum(target[:, :, :, blocks], 0, out=out[:, :, blocks, :n_out])


def products_of(problem: QKProblem) -> Tensor:
    """Float32 [B, H, 2, 3, D, D]: C_b = K_b^T Q_b, W_b = K_b^T K_b, M = s c^3 C_b W_b of the blocks a side needs."""
    p, tile = problem, problem.launch("mix")
    products = p.saved(p.batch, p.heads, 2, 3, p.d, p.d)
    gram(p, p.k, p.q, products, p.first_block, True)
    qk_mix_kernel[(p.batch * p.heads, p.n_blocks, triton.cdiv(p.d, tile.m))](
        products,
        p.span_args,
        p.heads,
        p.first_block,
        p.alpha,
        MEAN=p.options.projection_mean,
        D=p.d,
        BLOCK_D=p.block_d,
        BLOCK_M=tile.m,
        BLOCK_F=min(tile.n, p.block_d),
        PRECISION=tile.precision,
        num_warps=tile.warps,
        num_stages=tile.stages,
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
        block(p.q),
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
        PRECISION=tile.precision,
        UPCAST=p.upcast,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return u_hi, u_lo, u_exp


def scores_qk_forward(
    q: Tensor, k: Tensor, spans: Spans, options: Options, needs_grad: bool, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Loss [B, H] and the saved [stats [B, H, 8, n_text + n_vision], products [B, H, 2, 3, D, D]], all float32."""
    p = QKProblem(q, k, spans, options, scale)
    tile = p.launch("forward")
    products = products_of(p)
    u_hi, u_lo, u_exp = project(p, products)
    stats = p.saved(p.batch, p.heads, ROW_NUMBERS, spans.n_text + spans.n_vision)
    loss = p.float32(p.batch, p.heads)
    tiles_text, tiles = p.tiles(tile.m)
    qk_forward_kernel[(p.batch * p.heads, tiles)](
        block(q),
        block(k),
        u_hi,
        u_lo,
        u_exp,
        stats,
        p.span_args,
        p.n,
        p.heads,
        p.group,
        tiles_text,
        scale * 1.4426950408889634,
        D=p.d,
        BLOCK_D=p.block_d,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        PAIR=p.pair,
        SCALED=p.scaled,
        PRECISION=tile.precision,
        UPCAST=p.upcast,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    reduce_rows(p, stats, loss)
    return loss, [stats, products] if needs_grad else []


def reduce_rows(problem: QKProblem, stats: Tensor, loss: Tensor) -> None:
    """loss [B, H] = sum over rows of E_p[d] - E_q[d]."""
    p = problem
    qk_loss_kernel[(p.batch * p.heads,)](
        stats,
        loss,
        p.span_args,
        p.heads,
        BLOCK=1024,
        TEXT=p.options.text,
        VISION=p.options.vision,
        ROW_MEAN=p.options.row_mean,
        num_warps=4,
    )


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
    for kernel, name, outputs in ((qk_columns_kernel, "columns", (dq, dk)), (qk_rows_kernel, "rows", (du, dq))):
        tile = p.launch(name)
        tiles_text, tiles = p.tiles(tile.n if name == "columns" else tile.m)
        kernel[(p.batch * p.heads, tiles)](
            block(q),
            block(k),
            u_hi,
            u_lo,
            u_exp,
            stats,
            grad_loss,
            *outputs,
            *grad_loss.stride(),
            p.span_args,
            p.n,
            p.heads,
            p.group,
            tiles_text,
            scale,
            D=p.d,
            BLOCK_D=p.block_d,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            GRAD_X=p.grad_x,
            GRAD_Y=p.grad_y,
            ROW_MEAN=options.row_mean,
            PAIR=p.pair,
            SCALED=p.scaled,
            PRECISION=tile.precision,
            UPCAST=p.upcast,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    del u_hi, u_lo, u_exp
    grad_cw = _chain(p, products, du) if du is not None else None
    return finish(p, products, du, dq, dk, grad_cw)


def _chain(problem: QKProblem, products: Tensor, du: Tensor) -> Tensor:
    """Float32 [B, H, 2, 2, D, D]: dC_b and dW_b + dW_b^T of the blocks that a side needs, from dU."""
    p, tile = problem, problem.launch("mix")
    grad_m = p.float32(p.batch, p.heads, 2, 1, p.d, p.d)
    # dM_a = Q_a^T dU_a is summed over side a's own tokens
    gram(p, p.q, du, grad_m, 0 if p.options.text else 1, False)
    grad_cw = p.float32(p.batch, p.heads, 2, 2, p.d, p.d)
    qk_chain_kernel[(p.batch * p.heads, p.n_blocks, triton.cdiv(p.d, tile.m))](
        products,
        grad_m,
        grad_cw,
        p.span_args,
        p.heads,
        p.first_block,
        p.alpha,
        MEAN=p.options.projection_mean,
        D=p.d,
        BLOCK_D=p.block_d,
        BLOCK_M=tile.m,
        BLOCK_F=min(tile.n, p.block_d),
        PRECISION=tile.precision,
        num_warps=tile.warps,
        num_stages=tile.stages,
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
        "PRECISION": tile.precision,
        "UPCAST": p.upcast,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    tiles = triton.cdiv(p.n, tile.m)
    qk_finish_q_kernel[(p.batch * p.heads, tiles)](
        block(p.k), du, dq, products, grad_cw, grad_q, p.span_args, p.n, p.heads, p.group, **flags
    )
    qk_finish_k_kernel[(p.batch * p.key_heads, tiles)](
        block(p.q),
        block(p.k),
        dk,
        grad_cw,
        grad_k,
        p.span_args,
        p.n,
        p.key_heads,
        p.group,
        GRAD_Y=p.grad_y,
        **flags,
    )
    return [grad_q, grad_k]
