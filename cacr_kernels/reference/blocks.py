"""Cutting attention into its four blocks, ragged spans and masks included: plain PyTorch, no synchronisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem import Spans, block_limits


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Blocks:
    """tt, tv, vt, vv [B, H, n_a, n_b] cut out of the inputs, and the masks of ragged batches (None: all full)."""

    def __init__(self, tt: Tensor, tv: Tensor, vt: Tensor, vv: Tensor, spans: Spans, bad: Tensor | None = None) -> None:
        self.tt, self.tv, self.vt, self.vv = tt, tv, vt, vv
        self.bad = bad
        self.n_text: int | Tensor = spans.n_text
        self.n_vision: int | Tensor = spans.n_vision
        self.text_mask = self.vision_mask = None
        if spans.table is not None:
            assert bad is not None
            _, n_text, _, n_vision = spans.table.to(torch.int64).masked_fill(bad[:, None], 0).unbind(-1)
            self.n_text, self.n_vision = n_text[:, None], n_vision[:, None]
            self.text_mask = positions(tt, spans.n_text) < n_text[:, None]
            self.vision_mask = positions(tt, spans.n_vision) < n_vision[:, None]

    def side(self, text: bool) -> tuple[Tensor, Tensor, Tensor, Any, Any, Tensor | None, Tensor | None]:
        """S_aa, S_ab, S_bb, n_a, n_b and the masks [B, n_a], [B, n_b]."""
        if text:
            return self.tt, self.tv, self.vv, self.n_text, self.n_vision, self.text_mask, self.vision_mask
        return self.vv, self.vt, self.tt, self.n_vision, self.n_text, self.vision_mask, self.text_mask


def positions(like: Tensor, n: int) -> Tensor:
    return torch.arange(n, device=like.device)[None, :]


#: where a ragged span lies along an axis: start [B], length [B], host upper bound of the length
Axis = tuple[Tensor, Tensor, int]


def gather(x: Tensor, *axes: Axis) -> Tensor:
    """x [B, H, *S] cut along the dimensions after H: element i of a span is start + i; exactly 0 beyond its length."""
    batch, heads = x.shape[:2]
    index: list[Tensor] = []
    keep: Tensor | None = None
    n = len(axes)
    for axis, (start, length, bound) in enumerate(axes):
        position = positions(x, bound)
        shape = [batch, 1, *(bound if d == axis else 1 for d in range(n))]
        where = (start[:, None] + position).clamp(0, max(x.shape[2 + axis] - 1, 0)).view(shape)
        index.append(where)
        inside = (position < length[:, None]).view(shape)
        keep = inside if keep is None else keep & inside
    assert keep is not None
    b = torch.arange(batch, device=x.device).view(-1, *[1] * (1 + n))
    h = torch.arange(heads, device=x.device).view(1, -1, *[1] * n)
    cut = x[(b, h, *index)]
    keep = keep.view(*keep.shape, *[1] * (cut.dim() - keep.dim()))
    return torch.where(keep, cut, torch.zeros((), dtype=x.dtype, device=x.device))


def table_columns(spans: Spans, limits: tuple[int, int, bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The table's columns with invalid examples emptied, and which those are [B]."""
    assert spans.table is not None
    bad = spans.invalid(*limits)
    return *spans.table.to(torch.int64).masked_fill(bad[:, None], 0).unbind(-1), bad  # type: ignore[return-value]


def score_blocks(inputs: list[Tensor], spans: Spans) -> Blocks:
    """The four blocks of [attn] or [tt, tv, vt, vv]."""
    tt, tv, vt, vv = inputs * 4 if len(inputs) == 1 else inputs
    if spans.table is None:
        t = slice(spans.text_start, spans.text_start + spans.n_text)
        v = slice(spans.vision_start, spans.vision_start + spans.n_vision)
        return Blocks(tt[..., t, t], tv[..., t, v], vt[..., v, t], vv[..., v, v], spans)
    t0, nt, v0, nv, bad = table_columns(spans, block_limits(inputs))
    rows_t, rows_v = (t0, nt, spans.n_text), (v0, nv, spans.n_vision)
    return Blocks(
        gather(tt, rows_t, rows_t), gather(tv, rows_t, rows_v), gather(vt, rows_v, rows_t), gather(vv, rows_v, rows_v),
        spans, bad,
    )  # fmt: skip


def qk_blocks(q: Tensor, k: Tensor, spans: Spans, scale: float) -> Blocks:
    """The blocks of S = scale * q k^T, formed from the spans' rows only. q [B, H, N, D], k [B, Hk, N, D]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1) if k.shape[1] != q.shape[1] else k
    bad = None
    if spans.table is None:
        t = slice(spans.text_start, spans.text_start + spans.n_text)
        v = slice(spans.vision_start, spans.vision_start + spans.n_vision)
        q_t, q_v, k_t, k_v = q[..., t, :], q[..., v, :], k[..., t, :], k[..., v, :]
    else:
        t0, nt, v0, nv, bad = table_columns(spans, block_limits([q]))
        q_t, k_t = (gather(x, (t0, nt, spans.n_text)) for x in (q, k))
        q_v, k_v = (gather(x, (v0, nv, spans.n_vision)) for x in (q, k))
    q_t, q_v = scale * q_t, scale * q_v
    return Blocks(q_t @ k_t.mT, q_t @ k_v.mT, q_v @ k_t.mT, q_v @ k_v.mT, spans, bad)


def masked(x: Tensor, columns: Tensor | None) -> Tensor:
    """Columns outside a ragged span get a finite floor, so that their probability is exactly 0."""
    return x if columns is None else x.masked_fill(~columns[:, None, None, :], torch.finfo(x.dtype).min / 4)


def row_softmax(x: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    p = torch.softmax(masked(x.to(dtype), columns), dim=-1)
    return p if columns is None else p.masked_fill(~columns[:, None, None, :], 0.0)


def over_size(x: Tensor, n: int | Tensor, power: int = 1) -> Tensor:
    """x [B, H, ...] / max(n, 1)^power, with one n for all examples or n [B, 1]."""
    if isinstance(n, Tensor):
        return x / n.clamp_min(1).view(-1, *[1] * (x.dim() - 1)) ** power
    return x / max(n, 1) ** power
