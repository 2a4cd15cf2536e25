"""What the host knows of one call: the kernels' common arguments, the launch table's plan, the workspace."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..problem import Options, Spans, block_limits
from .configs import BUCKETS, INTERPRETER, WIDTHS, Plan
from .kernel_args import BlockArg, Scaling, SpanArgs, Work, odd
from .products import project_kernel
from .table import scores_plan

#: numbers of a load where all spans begin and end at multiples of it
QUAD = 4


def tiles(n: int, block: int) -> int:
    return -(-n // block)


def in_quads(*numbers: int) -> bool:
    """Whether tiles can be read and written four numbers at a time."""
    return all(x % QUAD == 0 for x in numbers)


def addressable(x: Tensor) -> bool:
    """Whether offsets inside one tile of x (at most 128 by 128) fit in int32, as common.tile_offsets assumes."""
    return 128 * (x.stride(-2) + x.stride(-1)) < 2**31


class Problem:
    """The arguments every kernel takes, and the size of the problems: B * H of them, at most T by R."""

    def __init__(self, inputs: list[Tensor], spans: Spans, options: Options) -> None:
        first = inputs[0]
        near = [x if addressable(x) else x.contiguous() for x in inputs]
        self.n_text, self.n_vision = spans.n_text, spans.n_vision
        limit_text, limit_vision, disjoint = block_limits(inputs)
        bounds = (spans.text_start, spans.n_text, spans.vision_start, spans.n_vision, limit_text, limit_vision)
        unit = all(x.stride(-1) == 1 for x in near)
        strides = (s for x in near for s in x.stride()[:-1])
        step = QUAD if spans.table is None and unit and in_quads(*bounds, *strides) else 1
        self.blocks = [
            BlockArg(x, tl.constexpr(step), *odd(*(s // step for s in x.stride()[:-1]), x.stride(-1)))
            for x in (near * 4 if len(near) == 1 else near)
        ]
        self.spans = SpanArgs(spans.table, tl.constexpr(step), *odd(*(n // step for n in bounds), int(disjoint)))
        self.scaling = Scaling(
            float(options.projection_scale),
            *odd(int(options.projection_mean), int(options.row_mean), int(options.text), int(options.vision)),
        )
        self.n_heads = first.shape[1]
        self.count = first.shape[0] * first.shape[1]
        self.device = first.device
        self.plan: Plan = scores_plan(first.device, str(first.dtype).removeprefix("torch."), INTERPRETER)
        longest = max(self.n_text, self.n_vision)
        #: of the small path; None: spans are large
        self.bucket = next((bucket for bucket in BUCKETS if longest <= bucket), None)
        self.kind = options.kind
        takes_whole = self.plan.takes_whole(self.kind, self.bucket, self.n_text, self.n_vision)
        #: what whole.py does (see Plan)
        self.whole = self.plan.whole if takes_whole and options.stop_gradient != "projection" else None
        self.flags: dict[str, Any] = {"DOT": self.plan.dot, "UNIT": unit}

    @property
    def empty(self) -> bool:
        return self.count == 0 or self.n_text == 0 or self.n_vision == 0

    @property
    def widths(self) -> dict[str, int]:
        """Small path: how long the rows of tiles are along text and along vision. Whole: at least half the longer.

        Not 32 of whole sides: an H100 read beyond shared memory in the backward of such transposed tiles (Triton 3.6).
        """
        assert self.bucket is not None
        sizes = {"BLOCK_T": self.n_text, "BLOCK_R": self.n_vision}
        least = 64 if self.whole == "sides" else self.bucket // 2 if self.whole else 0
        return {name: next(width for width in WIDTHS if max(size, least) <= width) for name, size in sizes.items()}

    def length(self, text: bool) -> int:
        return self.n_text if text else self.n_vision

    def row_tiles(self, name: str) -> int:
        """Row tiles of both sides of one problem, for the kernel ``name``."""
        block = self.block(name, "I")
        return tiles(self.n_text, block) + tiles(self.n_vision, block)

    def quads(self, text: bool, along_text: bool) -> int:
        """Quads of a matrix in the workspace with a row for every token of a side: rows are padded to 16 bytes."""
        return self.length(text) * tiles(self.length(along_text), 4)

    def workspace(self, quads: int, **offsets: int) -> Work:
        """``quads`` of four float32 numbers a problem, and where U, V and G (by side) begin in them."""
        p = torch.empty(self.count * quads * 4, dtype=torch.float32, device=self.device)
        names = ("u_text", "u_vision", "v_text", "v_vision", "g_text", "g_vision")
        rows = (tiles(self.n_text, 4), tiles(self.n_vision, 4))
        return Work(p, *odd(quads, *rows, *(offsets.get(name, 0) for name in names)))

    def launch(self, kernel: Any, name: str, programs: int, *args: Any, **flags: Any) -> None:
        """Launch ``kernel`` as the table says for ``name``, on ``programs`` programs a problem."""
        entry = self.plan.kernels[name]
        kernel[(self.count * programs,)](
            *self.blocks, self.spans, *args, **self.flags, **flags, **entry.blocks, **entry.options(self.kind)
        )  # fmt: skip

    def block(self, name: str, axis: str) -> int:
        return self.plan.kernels[name].blocks[f"BLOCK_{axis}"]

    def project(self, work: Work, stats: Tensor, text: bool) -> None:
        """Large spans: U of one side into the workspace."""
        columns = tiles(self.length(not text), self.block("project", "C"))
        programs = tiles(self.length(text), self.block("project", "I")) * columns
        self.launch(
            project_kernel, "project", programs, stats, work, self.n_heads, int(text), columns, programs, KIND=self.kind
        )
