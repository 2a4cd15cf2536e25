"""Host side shared by both kinds of the query/key variant: the problem and the launches that take any factors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Options, Spans
from .configs import compiler_options
from .host import QUAD, in_quads
from .kernel_args import BlockArg, SpanArgs, odd
from .qk_forward import qk_loss_kernel
from .qk_launch import Launch, block_d
from .qk_wide import Factors, qk_wide_forward_kernel, qk_wide_gradient_kernel
from .table import qk_plan

LOG2_E = 1.4426950408889634


class QKProblem:
    """Everything the launches of one call share: sizes, spans, flags of the inputs' dtype."""

    def __init__(self, q: Tensor, k: Tensor, spans: Spans, options: Options, scale: float) -> None:
        self.q, self.k = (x if rows_addressable(x) else x.contiguous() for x in (q, k))
        self.spans, self.options, self.scale = spans, options, scale
        self.batch, self.heads, self.n, self.d = q.shape
        self.key_heads = k.shape[1]
        self.group = self.heads // max(self.key_heads, 1)
        self.block_d = block_d(self.d)
        self.arch = architecture(q.device)
        self.pair = q.dtype != torch.float32
        self.scaled = q.dtype == torch.float16
        #: float32 rows of wide heads do not fit on chip: tiles contract in chunks
        self.wide = q.dtype == torch.float32 and self.block_d > 128
        self.upcast = self.arch == 0 and q.dtype == torch.bfloat16
        self.alpha = options.projection_scale * scale**3
        self.grad_x = options.stop_gradient != "projection"
        self.grad_y = options.stop_gradient != "target"
        # block b is inner to the other side: text (0) is needed for the vision side, vision (1) for the text side
        self.first_block = 0 if options.vision else 1
        self.n_blocks = options.text + options.vision
        bounds = (spans.text_start, spans.n_text, spans.vision_start, spans.n_vision)
        # kind "softmax" keeps matrices [n_a, n_b]
        step = QUAD if options.kind == "softmax" and spans.table is None and in_quads(*bounds, self.n) else 1
        limits = (self.n // step, self.n // step, 1)
        self.span_args = SpanArgs(spans.table, tl.constexpr(step), *odd(*(x // step for x in bounds), *limits))

    def launch(self, kernel: str) -> Launch:
        return qk_plan(kernel, self.q.device, self.arch, self.q.dtype, self.d)

    def dots(self, tile: Launch) -> str:
        """How products of a matrix of tokens and a float32 one are taken, 16-bit tokens in bfloat16: common.dot."""
        return "split" if self.pair and tile.precision != "ieee" else tile.precision

    def tiles(self, block: int) -> tuple[int, int]:
        """Tiles of the text side, of both sides; a side not asked for has none."""
        text = triton.cdiv(self.spans.n_text, block) if self.options.text else 0
        return text, text + (triton.cdiv(self.spans.n_vision, block) if self.options.vision else 0)

    def finish_tiles(self, block: int) -> tuple[int, int, int]:
        """Tiles of the rows of text, of both spans, and with those of all tokens, which fill what lies outside."""
        spans = self.spans
        text, vision, every = (triton.cdiv(n, block) for n in (spans.n_text, spans.n_vision, self.n))
        if spans.table is None and min(text, vision) > 0 and spans.n_text + spans.n_vision == self.n:
            every = 0  # nothing lies outside
        return text, text + vision, text + vision + every

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


def rows_addressable(x: Tensor) -> bool:
    """Whether offsets inside a row of x [B, H, N, D] fit in int32, as kernels compute them; all others are int64."""
    return x.shape[-1] * x.stride(-1) < 2**31


def tokens(x: Tensor) -> BlockArg:
    """x [B, H, N, D] for a kernel: how many numbers at a time can be read follows from the strides."""
    *strides, last = x.stride()
    step = 16 // x.element_size()
    while step > 1 and (last != 1 or any(stride % step for stride in strides)):
        step //= 2
    if step == 1 or all(stride % 16 == 0 for stride in strides):
        return BlockArg(x, tl.constexpr(1), *x.stride())
    s_b, s_h, s_r = odd(*(stride // step for stride in strides))
    return BlockArg(x, tl.constexpr(step), s_b, s_h, s_r, last)


def wide_forward(problem: QKProblem, factors: Factors, stats: Tensor, compact: bool) -> None:
    """Row numbers of X = U F^T from factors of any width."""
    p, tile = problem, problem.launch("wide")
    tiles_text, tiles = p.tiles(tile.m)
    qk_wide_forward_kernel[(p.batch * p.heads, tiles)](
        tokens(p.q),
        tokens(p.k),
        factors,
        stats,
        p.span_args,
        p.n,
        p.heads,
        p.group,
        tiles_text,
        p.scale * LOG2_E,
        COMPACT=compact,
        D=p.d,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        PRECISION=tile.precision,
        UPCAST=p.upcast,
        **tile.options,
    )


def wide_gradient(
    problem: QKProblem,
    factors: Factors,
    stats: Tensor,
    grad_loss: Tensor,
    own: Tensor | None,
    *,
    columns: bool,
    compact: bool,
) -> None:
    """Columns: df = dX^T U, own = c dY^T Q_a. Rows: du = dX F, own = c dY K_a, added to it unless compact."""
    p, tile = problem, problem.launch("wide")
    tiles_text, tiles = p.tiles(tile.m)
    width = max(p.spans.n_text, p.spans.n_vision, p.d) if compact else p.d
    qk_wide_gradient_kernel[(p.batch * p.heads, tiles, triton.cdiv(width, tile.o))](
        tokens(p.q),
        tokens(p.k),
        factors,
        stats,
        grad_loss,
        own,
        *grad_loss.stride(),
        p.span_args,
        p.n,
        p.heads,
        p.group,
        tiles_text,
        p.scale,
        COLUMNS=columns,
        COMPACT=compact,
        ADD=not columns and not compact and p.grad_x,
        D=p.d,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_O=tile.o,
        GRAD_X=p.grad_x,
        GRAD_Y=p.grad_y,
        ROW_MEAN=p.options.row_mean,
        PRECISION=tile.precision,
        UPCAST=p.upcast,
        **tile.options,
    )


def reduce_rows(problem: QKProblem, stats: Tensor, loss: Tensor) -> None:
    """loss [B, H] = sum over rows of KL(p||q) + KL(q||p)."""
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
        **compiler_options(4, 3),
    )
