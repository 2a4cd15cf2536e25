"""Host side of the scores kernels: what is launched, with which workspace. Called by cacr_kernels.ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import ROW_NUMBERS, Options, Spans, block_limits, new_gradients
from .backward import backward_cross_kernel, backward_own_kernel, backward_rows_kernel
from .common import Block, Scaling, SpanArgs
from .forward import forward_small_kernel


class Problem:
    """The arguments every kernel takes: four blocks, spans, scaling, and the number of problems B * H."""

    def __init__(self, inputs: list[Tensor], spans: Spans, options: Options) -> None:
        first = inputs[0]
        self.blocks = [Block(x, *x.stride()) for x in (inputs * 4 if len(inputs) == 1 else inputs)]
        limit_text, limit_vision, disjoint = block_limits(inputs)
        self.n_text, self.n_vision = spans.n_text, spans.n_vision
        self.spans = SpanArgs(
            spans.table,
            spans.text_start,
            spans.n_text,
            spans.vision_start,
            spans.n_vision,
            limit_text,
            limit_vision,
            int(disjoint),
        )
        self.scaling = Scaling(
            float(options.projection_scale),
            int(options.projection_mean),
            int(options.row_mean),
            int(options.text),
            int(options.vision),
        )
        self.n_heads = first.shape[1]
        self.count = first.shape[0] * first.shape[1]
        self.device = first.device
        self.flags = {
            "KIND": options.kind,
            "DOT": "ieee",
            "UNIT": all(block.s_c == 1 for block in self.blocks),
        }

    def tiles(self, rows: int) -> int:
        """Row tiles of both sides of all problems."""
        return self.count * (-(-self.n_text // rows) + -(-self.n_vision // rows))


def scores_forward(
    inputs: list[Tensor], spans: Spans, options: Options, needs_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """Loss [B, H] in float32, and [row numbers [B, H, 8, n_text + n_vision]] when a gradient is needed."""
    shape = inputs[0].shape[:2]
    problem = Problem(inputs, spans, options)
    loss = torch.empty(*shape, dtype=torch.float32, device=problem.device)
    rows = spans.n_text + spans.n_vision
    stats = torch.empty(*shape, ROW_NUMBERS, rows, dtype=torch.float32, device=problem.device)
    if problem.count:
        forward_small_kernel[(problem.count,)](
            *problem.blocks, problem.spans, problem.scaling, loss, stats, problem.n_heads, 1, **problem.flags,
            SAVE=needs_grad, BLOCK_I=32, BLOCK_J=32, BLOCK_K=32, BLOCK_B=128,
        )  # fmt: skip
    return loss, [stats] if needs_grad else []


def scores_backward(
    grad_loss: Tensor, inputs: list[Tensor], saved: list[Tensor], spans: Spans, options: Options
) -> list[Tensor]:
    """d sum(grad_loss loss) / d input: contiguous, in the inputs' dtype, exactly 0 outside the spans."""
    problem = Problem(inputs, spans, options)
    grads = new_gradients(inputs, spans)
    if not problem.count or not spans.n_text or not spans.n_vision:
        return grads
    (stats,) = saved
    tt, tv, vt, vv = grads * 4 if len(grads) == 1 else grads
    work = torch.empty(problem.count, 4, spans.n_text * spans.n_vision, dtype=torch.float32, device=problem.device)
    grad_x = options.stop_gradient != "projection"
    grad_y = options.stop_gradient != "target"
    common = (
        *problem.blocks, problem.spans, problem.scaling, grad_loss, *grad_loss.stride(), stats, work,
    )  # fmt: skip
    size = dict(BLOCK_K=32, BLOCK_B=128)
    backward_rows_kernel[(problem.tiles(32),)](
        *common, problem.n_heads, **problem.flags, GRAD_X=grad_x, BLOCK_I=32, BLOCK_J=32, **size
    )
    if grad_x:
        backward_cross_kernel[(problem.tiles(32),)](
            *common, tv, vt, problem.n_heads, **problem.flags, BLOCK_I=32, BLOCK_J=32, **size
        )
    backward_own_kernel[(problem.tiles(32),)](
        *common, tt, vv, problem.n_heads, **problem.flags, GRAD_X=grad_x, GRAD_Y=grad_y, BLOCK_I=32, **size
    )
    return grads
