"""The closed form of CACR (Eq. 3-6), the specification every backend is held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import parse_attention, parse_options, parse_reduction, reduce_loss
from ..problem import Options, Spans
from .blocks import Blocks, accumulation_dtype, masked, over_size, qk_blocks, row_softmax, score_blocks

#: probabilities are floored here before their logarithm (kind "probs", IAIS)
PROBABILITY_FLOOR = 1e-12


def closed_form(blocks: Blocks, options: Options, dtype: torch.dtype) -> Tensor:
    """Eq. 3-6 on blocks [B, H, n_a, n_b]: loss [B, H]. Products in the blocks' dtype, softmax and KL in ``dtype``."""
    if blocks.tt.shape[-1] == 0 or blocks.vv.shape[-1] == 0:
        empty = [x[..., :0, :0].sum((-1, -2), dtype=dtype) for x in (blocks.tt, blocks.tv, blocks.vt, blocks.vv)]
        return empty[0] + empty[1] + empty[2] + empty[3]
    total: Tensor | None = None
    for text in ([True] if options.text else []) + ([False] if options.vision else []):
        loss = _side_loss(blocks, text, options, dtype)
        total = loss if total is None else total + loss
    assert total is not None
    if isinstance(blocks.n_text, Tensor):
        total = torch.where((blocks.n_text > 0) & (blocks.n_vision > 0), total, torch.zeros_like(total))
    return total


def _side_loss(blocks: Blocks, text: bool, options: Options, dtype: torch.dtype) -> Tensor:
    s_aa, s_ab, s_bb, n_a, n_b, rows, inner = blocks.side(text)
    outer, middle = s_ab, s_bb
    if options.kind == "softmax":
        outer = row_softmax(s_ab, inner, dtype).to(s_ab.dtype)
        middle = row_softmax(s_bb, inner, dtype).to(s_bb.dtype)
    x = (outer @ middle @ outer.mT).to(dtype) * options.projection_scale
    if options.projection_mean:
        x = over_size(x, n_b, power=2)
    y = s_aa.to(dtype)
    if options.kind == "probs":
        y = torch.log(y.clamp_min(PROBABILITY_FLOOR))
    if options.stop_gradient == "target":
        y = y.detach()
    elif options.stop_gradient == "projection":
        x = x.detach()
    log_p = torch.log_softmax(masked(x, rows), dim=-1)
    log_q = torch.log_softmax(masked(y, rows), dim=-1)
    terms = (log_p.exp() - log_q.exp()) * (log_p - log_q)
    if rows is not None:
        terms = torch.where(rows[:, None, :, None] & rows[:, None, None, :], terms, torch.zeros_like(terms))
    loss = terms.sum((-1, -2))
    loss = loss + (loss - loss)  # infinite where a logit is -inf: NaN, as the row sums E_p[d] - E_q[d] give
    return over_size(loss, n_a) if options.row_mean else loss


def poison_invalid(loss: Tensor, inputs: list[Tensor], bad: Tensor | None) -> Tensor:
    """Loss [B, H] and every gradient entry of an invalid example (bad [B]) become NaN, the others are untouched."""
    if bad is None:
        return loss
    factor = torch.where(bad, math.nan, 1.0).to(loss.dtype)[:, None]
    for x in inputs:
        kept = torch.where(bad[:, None, None, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        loss = loss + kept.sum((-1, -2), dtype=loss.dtype).mean(1, keepdim=True) * factor
    return loss


def scores_reference(inputs: list[Tensor], spans: Spans, options: Options, dtype: torch.dtype | None = None) -> Tensor:
    """Loss [B, H] of [attn] or four blocks; products in ``dtype`` (default: the inputs')."""
    out = accumulation_dtype(inputs[0].dtype)
    blocks = score_blocks(inputs if dtype is None else [x.to(dtype) for x in inputs], spans)
    return poison_invalid(closed_form(blocks, options, out), inputs, blocks.bad)


def qk_reference(inputs: list[Tensor], spans: Spans, options: Options, scale: float) -> Tensor:
    """Loss [B, H] from [q, k], computed in float32 (float64 for float64 inputs)."""
    out = accumulation_dtype(inputs[0].dtype)
    blocks = qk_blocks(inputs[0].to(out), inputs[1].to(out), spans, scale)
    return poison_invalid(closed_form(blocks, options, out), inputs, blocks.bad)


def cacr_closed_form(
    attn: Tensor,
    n_text: int | Tensor,
    *,
    n_vision: int | Tensor | None = None,
    text_start: int | Tensor = 0,
    vision_start: int | Tensor | None = None,
    max_n_text: int | None = None,
    max_n_vision: int | None = None,
    kind: str = "scores",
    sides: str = "both",
    projection_scale: float | str = 1.0,
    stop_gradient: str | None = None,
    row_reduction: str = "sum",
    reduction: str = "mean",
) -> Tensor:
    """CACR (Eq. 3-6) in plain differentiable PyTorch; arguments as in :func:`cacr_kernels.fused_cacr`.

    Matrix products run in the dtype of ``attn``, softmax and KL in float32 (float64 for float64), as under autocast.
    This is the eager baseline; ``torch.compile`` of it is the other one.
    """
    inputs, spans, dims = parse_attention(attn, n_text, n_vision, text_start, vision_start, max_n_text, max_n_vision)
    options = parse_options(kind, sides, projection_scale, stop_gradient, row_reduction)
    parse_reduction(reduction)
    return reduce_loss(scores_reference(inputs, spans, options), reduction, dims)
