"""Block softmax and the intra-modal attention losses of IAIS, which CACR generalises."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..arguments import check_choice, parse_attention, parse_options, parse_reduction, reduce_loss
from ..problem import block_limits
from .blocks import accumulation_dtype, masked, over_size, positions, row_softmax, score_blocks, table_columns
from .closed_form import PROBABILITY_FLOOR, closed_form, poison_invalid


def block_softmax(
    attn: Tensor,
    n_text: int | Tensor,
    *,
    n_vision: int | Tensor | None = None,
    text_start: int | Tensor = 0,
    vision_start: int | Tensor | None = None,
    max_n_text: int | None = None,
    max_n_vision: int | None = None,
    heads: Literal["each", "mean"] = "each",
) -> Tensor:
    """Attention probabilities normalised inside each block: every row sums to 1 over the text and to 1 over the vision.

    This is what IAIS computes from the scores, and what ``kind="probs"`` expects.

    Args:
        attn: pre-softmax scores [N, N], [B, N, N] or [B, H, N, N].
        heads: "each" keeps the head dimension; "mean" averages the probabilities over it ([B, H, N, N] -> [B, N, N]).

    Returns:
        float32 (float64 for float64), the shape of ``attn`` (without H for "mean"); exactly 0 outside the two spans.
        Differentiable in ``attn``; entries outside the spans, NaN included, have no effect and no gradient.
    """
    check_choice("heads", heads, ("each", "mean"))
    inputs, spans, dims = parse_attention(attn, n_text, n_vision, text_start, vision_start, max_n_text, max_n_vision)
    x = inputs[0]
    if heads == "mean" and dims != 2:
        raise ValueError(f"heads='mean' needs attn [B, H, N, N]; got {tuple(attn.shape)}")
    position = positions(x, x.shape[-1])
    bad = None
    if spans.table is None:
        starts: list[Any] = [spans.text_start, spans.n_text, spans.vision_start, spans.n_vision]
    else:
        *columns, bad = table_columns(spans, block_limits(inputs))
        starts = [c[:, None] for c in columns]
    text = (position >= starts[0]) & (position < starts[0] + starts[1])
    vision = (position >= starts[2]) & (position < starts[2] + starts[3])
    rows = (text | vision)[:, None, :, None]
    scores = torch.where(rows & (text | vision)[:, None, None, :], x, torch.zeros((), dtype=x.dtype, device=x.device))
    dtype = accumulation_dtype(x.dtype)
    p = row_softmax(scores, text, dtype) + row_softmax(scores, vision, dtype)
    p = torch.where(rows, p, torch.zeros_like(p))
    if bad is not None:
        p = p + torch.where(bad, math.nan, 0.0).to(dtype)[:, None, None, None]
    if heads == "mean":
        return p.mean(1)
    return p.view(attn.shape)


def iais_loss(
    attn: Tensor,
    n_text: int | Tensor,
    *,
    n_vision: int | Tensor | None = None,
    text_start: int | Tensor = 0,
    vision_start: int | Tensor | None = None,
    max_n_text: int | None = None,
    max_n_vision: int | None = None,
    mode: Literal["singular", "distributed"] = "singular",
    sides: str = "both",
    heads: Literal["each", "mean"] = "mean",
    reduction: str = "mean",
) -> Tensor:
    """The intra-modal attention losses of IAIS (arXiv 2105.13868), which CACR generalises.

    With P the block softmax (averaged over heads for ``heads="mean"``), per side a and divided by n_a:

        singular:     a_i = argmax_j P_ab[i, j];  S[i, :] = softmax_j P_bb[a_i, a_j];  KL(S || P_aa) + KL(P_aa || S)
        distributed:  S = P_ab P_ba;  sum S (log S - log(P_aa + 1e-6)) + sum P_aa (log P_aa - log(S + 1e-6))

    Args:
        attn: pre-softmax scores [N, N], [B, N, N] or [B, H, N, N].

    Returns:
        A scalar for "mean" and "sum"; for "none" one value per problem [B, H] ([B, 1] for ``heads="mean"``).
        Gradients flow into every block used except through the argmax.
    """
    check_choice("mode", mode, ("singular", "distributed"))
    check_choice("heads", heads, ("each", "mean"))
    options = parse_options("probs", sides, 1.0, None, "mean")
    parse_reduction(reduction)
    inputs, spans, _ = parse_attention(attn, n_text, n_vision, text_start, vision_start, max_n_text, max_n_vision)
    blocks = score_blocks(inputs, spans)
    dtype = accumulation_dtype(attn.dtype)
    if blocks.tt.shape[-1] == 0 or blocks.vv.shape[-1] == 0:
        empty = closed_form(blocks, options, dtype)
        return reduce_loss(empty.mean(1, keepdim=True) if heads == "mean" else empty, reduction, 2)
    masks = {"t": blocks.text_mask, "v": blocks.vision_mask}
    probs = {}
    for name in ("tt", "tv", "vt", "vv"):
        p = row_softmax(getattr(blocks, name), masks[name[1]], dtype)
        probs[name] = p.mean(1, keepdim=True) if heads == "mean" else p
    total: Any = 0.0
    for text in ([True] if options.text else []) + ([False] if options.vision else []):
        a, b = ("t", "v") if text else ("v", "t")
        _, _, _, n_a, _, rows, _ = blocks.side(text)
        target = probs[a + a]
        if mode == "singular":
            best = probs[a + b].argmax(-1)  # [B, H, n_a]
            rows_of_b = probs[b + b].gather(-2, best[..., :, None].expand(*best.shape, probs[b + b].shape[-1]))
            picked = rows_of_b.gather(-1, best[..., None, :].expand(*best.shape, best.shape[-1]))
            log_s = torch.log_softmax(masked(picked, rows), dim=-1)
            log_t = target.clamp_min(PROBABILITY_FLOOR).log()
            terms = (log_s.exp() - target) * (log_s - log_t)
        else:
            s = probs[a + b] @ probs[b + a]
            terms = s * (s.clamp_min(PROBABILITY_FLOOR).log() - (target + 1e-6).log())
            terms = terms + target * (target.clamp_min(PROBABILITY_FLOOR).log() - (s + 1e-6).log())
        if rows is not None:
            terms = torch.where(rows[:, None, :, None] & rows[:, None, None, :], terms, torch.zeros_like(terms))
        total = total + over_size(terms.sum((-1, -2)), n_a)
    if isinstance(blocks.n_text, Tensor):
        total = torch.where((blocks.n_text > 0) & (blocks.n_vision > 0), total, torch.zeros_like(total))
    return reduce_loss(poison_invalid(total, inputs, blocks.bad), reduction, 2)
