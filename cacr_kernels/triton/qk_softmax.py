"""Host side of the query/key variant for kind "softmax": X_a = s P_ab P_bb P_ab^T, memory O(T R + N D)."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..problem import ROW_NUMBERS, Options, Spans
from .qk_finish import qk_finish_k_kernel, qk_finish_q_kernel
from .qk_problem import LOG2_E, QKProblem, reduce_rows, tokens, wide_forward, wide_gradient
from .qk_softmax_backward import (
    qk_cross_gradient_kernel,
    qk_cross_scores_kernel,
    qk_inner_gradient_kernel,
    qk_inner_sums_kernel,
)
from .qk_softmax_forward import qk_mixed_kernel, qk_numbers_kernel, qk_probabilities_kernel
from .qk_wide import Factors


class _Softmax(QKProblem):
    """The launches' common arguments, and matrices [n_a, n_b] of both sides in the compact layout."""

    def __init__(self, q: Tensor, k: Tensor, spans: Spans, options: Options, scale: float) -> None:
        super().__init__(q, k, spans, options, scale)
        self.tile = self.launch("wide")
        tile = self.tile
        self.meta: dict[str, Any] = {
            "D": self.d,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "PRECISION": tile.precision,
            "UPCAST": self.upcast,
            **tile.options,
        }

    def compact(self) -> Tensor:
        return self.float32(self.batch, self.heads, 2 * self.spans.n_text * self.spans.n_vision)

    def inner_tiles(self) -> tuple[int, int]:
        """Tiles of text as the inner block (of the vision side), and of both blocks."""
        text = triton.cdiv(self.spans.n_text, self.tile.m) if self.options.vision else 0
        return text, text + (triton.cdiv(self.spans.n_vision, self.tile.m) if self.options.text else 0)

    def columns(self) -> int:
        """Column tiles of the wider of the two matrices [n_a, n_b]."""
        return triton.cdiv(max(self.spans.n_text, self.spans.n_vision), self.tile.n)

    def grid(self, tiles: int, columns: int = 1) -> tuple[int, int, int]:
        return self.batch * self.heads, tiles, columns

    def numbers(self, stats: Tensor) -> None:
        """Numbers 2, 3, 6, 7 of all rows: the row softmax of S_aa and of S_ab."""
        text = triton.cdiv(self.spans.n_text, self.tile.m)
        tiles = text + triton.cdiv(self.spans.n_vision, self.tile.m)
        qk_numbers_kernel[self.grid(tiles, 2)](
            tokens(self.q),
            tokens(self.k),
            stats,
            self.span_args,
            self.heads,
            self.group,
            text,
            self.scale * LOG2_E,
            **self.meta,
        )

    def factors(self, stats: Tensor) -> tuple[Tensor, Tensor]:
        """(U log2(e), P_ab)."""
        p, u = self.compact(), self.compact()
        text, tiles = self.tiles(self.tile.m)
        qk_probabilities_kernel[self.grid(tiles, self.columns())](
            tokens(self.q),
            tokens(self.k),
            stats,
            p,
            self.span_args,
            self.heads,
            self.group,
            text,
            self.scale * LOG2_E,
            **self.meta,
        )
        self.mix(stats, p, u, self.options.projection_scale * LOG2_E, False)
        return u, p

    def mix(self, stats: Tensor, x: Tensor, out: Tensor, factor: float, transposed: bool) -> None:
        """out = factor x P_bb, or factor x P_bb^T."""
        text, tiles = self.tiles(self.tile.m)
        qk_mixed_kernel[self.grid(tiles, self.columns())](
            tokens(self.q),
            tokens(self.k),
            stats,
            x,
            out,
            self.span_args,
            self.heads,
            self.group,
            text,
            self.scale * LOG2_E,
            factor,
            MEAN=self.options.projection_mean,
            TRANSPOSED=transposed,
            **self.meta,
        )


def softmax_qk_forward(
    q: Tensor, k: Tensor, spans: Spans, options: Options, needs_grad: bool, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Loss [B, H] and the saved [stats [B, H, 8, n_text + n_vision]], float32."""
    p = _Softmax(q, k, spans, options, scale)
    stats = p.saved(p.batch, p.heads, ROW_NUMBERS, spans.n_text + spans.n_vision)
    loss = p.float32(p.batch, p.heads)
    p.numbers(stats)
    u, cross = p.factors(stats)
    wide_forward(p, Factors(u, cross, None, None), stats, True)
    reduce_rows(p, stats, loss)
    return loss, [stats] if needs_grad else []


def softmax_qk_backward(
    grad_loss: Tensor, q: Tensor, k: Tensor, saved: list[Tensor], spans: Spans, options: Options, scale: float
) -> list[Tensor]:
    """d sum(grad_loss * loss) / d(q, k), in their dtypes."""
    p = _Softmax(q, k, spans, options, scale)
    (stats,) = saved
    u, cross = p.factors(stats)
    dq = p.float32(p.batch, p.heads, p.n, p.d).zero_()
    dk = torch.zeros_like(dq)
    v, z = (p.compact(), p.compact()) if p.grad_x else (None, None)
    factors = Factors(u, cross, v, z)
    wide_gradient(p, factors, stats, grad_loss, dk, columns=True, compact=True)
    wide_gradient(p, factors, stats, grad_loss, dq, columns=False, compact=True)
    if v is not None and z is not None:
        w = u
        p.mix(stats, v, w, options.projection_scale, True)
        _through_softmax(p, stats, cross, v, w, z, dq, dk)
    return _round(p, dq, dk)


def _through_softmax(
    p: _Softmax, stats: Tensor, cross: Tensor, v: Tensor, w: Tensor, z: Tensor, dq: Tensor, dk: Tensor
) -> None:
    """Add the gradients of S_ab and of S_bb as inner block to dq and dk; z is overwritten by dS_ab."""
    text, tiles = p.tiles(p.tile.m)
    inner_text, inner_tiles = p.inner_tiles()
    sizes = {name: p.meta[name] for name in ("BLOCK_M", "BLOCK_N", *p.tile.options)}
    sums = p.float32(p.batch, p.heads, p.spans.n_text + p.spans.n_vision)
    qk_inner_sums_kernel[p.grid(inner_tiles)](cross, w, sums, p.span_args, p.heads, inner_text, **sizes)
    qk_cross_scores_kernel[p.grid(tiles)](cross, w, z, p.span_args, p.heads, text, **sizes)
    outputs = triton.cdiv(p.d, p.tile.o)
    for columns, x, out in ((False, p.k, dq), (True, p.q, dk)):
        first, count = (inner_text, inner_tiles) if columns else (text, tiles)
        qk_cross_gradient_kernel[p.grid(count, outputs)](
            tokens(x),
            z,
            out,
            p.span_args,
            p.n,
            p.heads,
            p.heads // max(x.shape[1], 1),
            first,
            p.scale,
            COLUMNS=columns,
            D=p.d,
            BLOCK_O=p.tile.o,
            PRECISION=p.tile.precision,
            **sizes,
        )
        qk_inner_gradient_kernel[p.grid(inner_tiles, outputs)](
            tokens(p.q),
            tokens(p.k),
            stats,
            cross,
            v,
            sums,
            out,
            p.span_args,
            p.n,
            p.heads,
            p.group,
            inner_text,
            p.scale,
            p.options.projection_scale,
            MEAN=p.options.projection_mean,
            COLUMNS=columns,
            BLOCK_O=p.tile.o,
            **p.meta,
        )


def _round(p: _Softmax, dq: Tensor, dk: Tensor) -> list[Tensor]:
    """Sum dk over the heads of a group and round both gradients; 0 outside the spans."""
    tile = p.launch("tokens")
    grad_q, grad_k = p.q.new_empty(p.q.shape), p.k.new_empty(p.k.shape)
    flags = {
        "D": p.d,
        "BLOCK_D": p.block_d,
        "BLOCK_M": tile.m,
        "BLOCK_F": min(tile.n, p.block_d),
        "TEXT": True,
        "VISION": True,
        "GRAD_X": False,
        "PRECISION": tile.precision,
        "UPCAST": p.upcast,
        **tile.options,
    }
    *tiles, launched = p.finish_tiles(tile.m)
    qk_finish_q_kernel[(p.batch * p.heads, launched)](
        tokens(p.k), None, dq, None, None, grad_q, p.span_args, p.n, p.heads, p.group, *tiles, **flags
    )
    qk_finish_k_kernel[(p.batch * p.key_heads, launched)](
        tokens(p.q), tokens(p.k), dk, None, grad_k, p.span_args, p.n, p.key_heads, p.group, *tiles, GRAD_Y=True, **flags
    )
    return [grad_q, grad_k]
