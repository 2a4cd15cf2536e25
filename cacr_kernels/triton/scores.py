"""Host side of the scores kernels: what is launched, with which workspace. Called by cacr_kernels.ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem import ROW_NUMBERS, Options, Spans
from .backward_large import large_cross_kernel, large_g_kernel, large_own_kernel, large_v_kernel
from .fill import fill_kernel
from .forward import large_forward_kernel
from .host import Problem, tiles
from .kernel_args import Work
from .products import numbers_kernel
from .small import small_forward_kernel
from .small_backward import small_cross_kernel, small_own_kernel, small_rows_kernel
from .whole import whole_backward_kernel, whole_forward_kernel, whole_rows_kernel


def scores_forward(
    inputs: list[Tensor], spans: Spans, options: Options, needs_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """Loss [B, H] in float32, and [row numbers [B, H, 8, n_text + n_vision]] when a gradient is needed.

    Small spans: one launch (small.py or whole.py). Large ones: U of each side, then the comparison. Kind "softmax":
    row numbers first.
    """
    problem = Problem(inputs, spans, options)
    shape = inputs[0].shape[:2]
    softmax = options.kind == "softmax"
    stats = torch.empty(
        *shape, ROW_NUMBERS, spans.n_text + spans.n_vision if softmax or needs_grad else 0,
        dtype=torch.float32, device=problem.device,
    )  # fmt: skip
    if softmax and not problem.empty:
        problem.launch(numbers_kernel, "numbers", problem.row_tiles("numbers"), stats, problem.n_heads)
    name = "large_forward" if problem.bucket is None else f"forward_{problem.bucket}"
    programs = 2 if problem.whole else max(problem.row_tiles(name), 1)
    loss = torch.empty(*shape, programs, dtype=torch.float32, device=problem.device)
    flags = {"KIND": options.kind, "SAVE": needs_grad}
    if problem.count and problem.bucket is not None:
        kernel = whole_forward_kernel if problem.whole else small_forward_kernel
        name = f"whole_{name}" if problem.whole else name
        problem.launch(
            kernel, name, programs, problem.scaling, loss, stats, problem.n_heads,
            **problem.widths, **flags,
        )  # fmt: skip
    elif problem.count:
        u_text, u_vision = problem.quads(True, False), problem.quads(False, True)
        work = problem.workspace(u_text + u_vision, u_vision=u_text)
        for text in (True, False):
            if (options.text if text else options.vision) and not problem.empty:
                problem.project(work, stats, text)
        problem.launch(
            large_forward_kernel, name, programs, problem.scaling, loss, stats, work, problem.n_heads, **flags
        )
    return loss.sum(-1), [stats] if needs_grad else []


class Backward:
    """One call of scores_backward: the arguments that its launches share, and the launches."""

    def __init__(
        self, grad_loss: Tensor, stats: Tensor, problem: Problem, options: Options, grads: list[Tensor]
    ) -> None:
        self.problem = problem
        self.stats = stats
        self.tt, self.tv, self.vt, self.vv = grads * 4 if len(grads) == 1 else grads
        self.shared = (problem.scaling, grad_loss, *grad_loss.stride(), stats)
        self.grad_x = options.stop_gradient != "projection"
        self.grad_y = options.stop_gradient != "target"
        self.active = {True: options.text, False: options.vision}

    def small(self) -> None:
        """Workspace G (whole.py: dY), V of both sides: T^2 + R^2 + 2 T R = (T + R)^2, one float32 S.

        But for its rows, which are padded to 16 bytes.
        """
        problem = self.problem
        quads = problem.quads
        g_vision = quads(True, True)
        v_text = g_vision + quads(False, False)
        v_vision = v_text + quads(True, False)
        size = v_vision + quads(False, True)
        work = problem.workspace(size if self.grad_x else 0, g_vision=g_vision, v_text=v_text, v_vision=v_vision)
        flags = {"KIND": problem.kind, **problem.widths}
        own, cross = (self.tt, self.vv), (self.tv, self.vt)

        def launch(kernel: Any, name: str, *args: Any, **more: Any) -> None:
            name = f"{name}_{problem.bucket}"
            programs = 2 if kernel is whole_backward_kernel else problem.row_tiles(name)
            problem.launch(kernel, name, programs, *args, **flags, **more)

        if problem.whole == "sides":
            launch(
                whole_backward_kernel, "whole_backward", *self.shared, work, problem.n_heads, *cross, GRAD_Y=self.grad_y
            )
            source = "workspace" if self.grad_y else "gradient"
            launch(small_own_kernel, "own", *self.shared, work, problem.n_heads, *own, DY=source)
            return
        # a dY left in a 16-bit gradient would be rounded twice
        early = self.grad_y and (not self.grad_x or self.tt.dtype == torch.float32)
        if problem.whole == "logits":
            launch(whole_rows_kernel, "whole_rows", *self.shared, work, problem.n_heads, *own, GRAD_Y=early)
        else:
            rows = {"GRAD_X": self.grad_x, "GRAD_Y": early}
            launch(small_rows_kernel, "rows", *self.shared, work, problem.n_heads, *own, **rows)
        if self.grad_x:
            launch(small_cross_kernel, "cross", problem.scaling, self.stats, work, problem.n_heads, *cross)
            source = "computed" if self.grad_y and not early else "gradient"
            launch(small_own_kernel, "own", *self.shared, work, problem.n_heads, *own, DY=source)

    def large(self) -> None:
        """The longer side goes first, so that its G can make room for the shorter side's U.

        Workspace: U of the first side | V of the side at work | G of the first side, then U of the second |
        G of the second: 2 T R + max^2 + min^2 = (T + R)^2 with max and min of T and R, one float32 S (rows padded to
        16 bytes). The second side's own block (which needs the first side's V) comes before its V overwrites that one.
        """
        problem = self.problem
        quads = problem.quads
        u_text, u_vision = quads(True, False), quads(False, True)
        first = problem.n_text >= problem.n_vision
        if not self.grad_x:
            work = problem.workspace(u_text + u_vision, u_vision=u_text)
            for text in (True, False):
                if self.active[text]:
                    problem.project(work, self.stats, text)
            self.own(work, True, False)
            return
        v = u_text if first else u_vision
        g = v + max(u_text, u_vision)
        places = {"u_text": 0, "u_vision": g, "v_text": v, "v_vision": v}
        places |= {"g_text": g, "g_vision": g + quads(first, first)}
        if not first:
            for name in ("u", "g"):
                one, other = f"{name}_text", f"{name}_vision"
                places[one], places[other] = places[other], places[one]
        work = problem.workspace(g + quads(True, True) + quads(False, False), **places)
        if self.active[first]:
            self.cross(work, first)
        if self.active[not first]:
            problem.project(work, self.stats, not first)
            self.g(work, not first)
        self.own(work, not first)
        if self.active[not first]:
            self.v(work, not first)
            self.df(work, not first)
        self.own(work, first)

    def own(self, work: Work, *sides: bool) -> None:
        """dS_aa of the sides given, in one launch."""
        problem = self.problem
        block = problem.block("large_own", "I")
        n_text = tiles(problem.n_text, block)
        first = 0 if sides[0] else n_text
        programs = sum(n_text if text else tiles(problem.n_vision, block) for text in sides)
        problem.launch(
            large_own_kernel, "large_own", programs, *self.shared, work, problem.n_heads, self.tt, self.vv,
            first, programs, KIND=problem.kind, GRAD_X=self.grad_x, GRAD_Y=self.grad_y,
        )  # fmt: skip

    def cross(self, work: Work, text: bool) -> None:
        """U, G and V of one side into the workspace, and its dS_ab."""
        self.problem.project(work, self.stats, text)
        self.g(work, text)
        self.v(work, text)
        self.df(work, text)

    def g(self, work: Work, text: bool) -> None:
        problem = self.problem
        columns = tiles(problem.length(text), problem.block("large_g", "J"))
        programs = tiles(problem.length(text), problem.block("large_g", "I")) * columns
        problem.launch(
            large_g_kernel, "large_g", programs, *self.shared, work, problem.n_heads, int(text), columns, programs,
            KIND=problem.kind,
        )  # fmt: skip

    def v(self, work: Work, text: bool) -> None:
        problem = self.problem
        columns = tiles(problem.length(not text), problem.block("large_v", "C"))
        programs = tiles(problem.length(text), problem.block("large_v", "I")) * columns
        problem.launch(
            large_v_kernel, "large_v", programs, self.stats, work, problem.n_heads, int(text), columns, programs,
            KIND=problem.kind,
        )  # fmt: skip

    def df(self, work: Work, text: bool) -> None:
        problem = self.problem
        columns = tiles(problem.length(not text), problem.block("large_cross", "C"))
        columns = 1 if problem.kind == "softmax" else columns
        programs = tiles(problem.length(text), problem.block("large_cross", "J")) * columns
        problem.launch(
            large_cross_kernel, "large_cross", programs, self.stats, work, problem.n_heads, self.tv, self.vt, int(text),
            columns, programs, KIND=problem.kind,
        )  # fmt: skip


def new_gradients(problem: Problem, inputs: list[Tensor], spans: Spans, options: Options) -> list[Tensor]:
    """Contiguous gradients to write the blocks into: 0 outside the spans, NaN over the whole of an invalid example."""
    if spans.table is not None:
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        entry = problem.plan.kernels["fill"]
        for grad in grads:
            n_r, n_c = grad.shape[2:]
            programs = problem.count * tiles(n_r, entry.blocks["BLOCK_I"]) if n_c else 0
            if programs:
                fill_kernel[(programs,)](
                    grad, problem.spans, problem.n_heads, n_r, n_c, **entry.blocks, **entry.options(problem.kind)
                )
        return grads
    sizes = (spans.n_text + spans.n_vision,) if len(inputs) == 1 else (spans.n_text, spans.n_vision)
    covered = {x.shape[-1] for x in inputs} == set(sizes) and not problem.empty
    # every element is written where both sides have all of their gradients
    if covered and options.sides == "both" and options.stop_gradient == "none":
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]


def scores_backward(
    grad_loss: Tensor, inputs: list[Tensor], saved: list[Tensor], spans: Spans, options: Options
) -> list[Tensor]:
    """d sum(grad_loss loss) / d input: contiguous, in the inputs' dtype, exactly 0 outside the spans.

    Small spans: three launches (small_backward.py) or two (whole.py), or one for stop_gradient "projection". Large
    ones: at most ten, side after side. One more fills what may lie outside the spans.
    """
    problem = Problem(inputs, spans, options)
    grads = new_gradients(problem, inputs, spans, options)
    if not problem.empty:
        backward = Backward(grad_loss, saved[0], problem, options, grads)
        backward.large() if problem.bucket is None else backward.small()
    return grads
