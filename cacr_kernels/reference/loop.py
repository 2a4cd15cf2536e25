"""Algorithm 1 in plain Python loops: what the closed form and every kernel are checked against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import parse_attention, parse_options, parse_reduction, reduce_loss
from ..problem import Options
from .closed_form import PROBABILITY_FLOOR


def cacr_loop(
    attn: Tensor,
    n_text: int | Tensor,
    *,
    n_vision: int | Tensor | None = None,
    text_start: int | Tensor = 0,
    vision_start: int | Tensor | None = None,
    kind: str = "scores",
    sides: str = "both",
    projection_scale: float | str = 1.0,
    row_reduction: str = "sum",
    reduction: str = "mean",
) -> Tensor:
    """Algorithm 1 as it is meant, in plain Python loops over float64 numbers: slow, obvious, without gradient.

    For every pair (i, j) of one modality it sums S_ab[i, k] S_bb[k, p] S_ab[j, p] over all pairs (k, p) of the other,
    then compares the rows with those of S_aa by the symmetric KL (Eq. 3-6). Arguments as in
    :func:`cacr_kernels.fused_cacr`; returns float64.
    """
    inputs, spans, dims = parse_attention(attn, n_text, n_vision, text_start, vision_start)
    options = parse_options(kind, sides, projection_scale, None, row_reduction)
    parse_reduction(reduction)
    batch, heads = inputs[0].shape[:2]
    losses = torch.zeros(batch, heads, dtype=torch.float64)
    for b in range(batch):
        if spans.table is None:
            t0, nt, v0, nv = spans.text_start, spans.n_text, spans.vision_start, spans.n_vision
        else:
            t0, nt, v0, nv = spans.table[b].tolist()
        if nt == 0 or nv == 0:
            continue
        for h in range(heads):
            s = inputs[0][b, h].detach().to("cpu", torch.float64).tolist()
            text, vision = range(t0, t0 + nt), range(v0, v0 + nv)
            pairs = [(text, vision)] if options.text else []
            pairs += [(vision, text)] if options.vision else []
            losses[b, h] = sum(_loop_side(s, own, other, options) for own, other in pairs)
    return reduce_loss(losses, reduction, dims)


def _loop_log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    log_total = math.log(sum(math.exp(value - top) for value in row))
    return [value - top - log_total for value in row]


def _loop_side(s: list[list[float]], own: range, other: range, options: Options) -> float:
    def block(rows: range, columns: range) -> list[list[float]]:
        values = [[s[i][j] for j in columns] for i in rows]
        if options.kind == "softmax":
            return [[math.exp(value) for value in _loop_log_softmax(row)] for row in values]
        return values

    s_ab, s_bb = block(own, other), block(other, other)
    scale = options.projection_scale / (len(other) ** 2 if options.projection_mean else 1)
    loss = 0.0
    for i in range(len(own)):
        projected = []
        for j in range(len(own)):
            total = 0.0
            for k in range(len(other)):
                for p in range(len(other)):
                    total += s_ab[i][k] * s_bb[k][p] * s_ab[j][p]
            projected.append(scale * total)
        target = [s[own[i]][j] for j in own]
        if options.kind == "probs":
            target = [math.log(max(value, PROBABILITY_FLOOR)) for value in target]
        for log_p, log_q in zip(_loop_log_softmax(projected), _loop_log_softmax(target)):
            loss += math.exp(log_p) * (log_p - log_q) + math.exp(log_q) * (log_q - log_p)
    return loss / len(own) if options.row_mean else loss
