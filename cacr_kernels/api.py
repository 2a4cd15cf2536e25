"""The public functions: validate, choose a backend, run, reduce."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import (
    as_number,
    as_problems,
    check_choice,
    check_float_tensor,
    parse_attention,
    parse_options,
    parse_reduction,
    parse_spans,
    reduce_loss,
)
from .backends import BACKENDS, LARGEST_HEAD, choose
from .ops import congruence
from .problem import Options, Spans
from .reference import qk_reference, scores_reference
from .reference.blocks import accumulation_dtype

#: devices that autocast knows; asked for here, since Dynamo of torch 2.11 cannot trace the question
_AUTOCAST = frozenset(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))


def fused_cacr(
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
    backend: str = "auto",
) -> Tensor:
    r"""CACR loss of **pre-softmax** attention scores (``outputs.attentions`` of most libraries are probabilities).

    With the scores S of one head cut into text (t) and vision (v) blocks and sigma the row softmax (paper Eq. 3-6)::

        L = mKL(sigma(S_tv S_vv S_tv^T), sigma(S_tt)) + mKL(sigma(S_vt S_tt S_vt^T), sigma(S_vv))
        mKL(P, Q) = sum over rows i of KL(P_i || Q_i) + KL(Q_i || P_i)

    Args:
        attn: scores [N, N], [B, N, N] or [B, H, N, N] in float16, bfloat16, float32 or float64, any strides. Rows are
            queries. Entries outside the two spans are ignored, NaN included.
        n_text: number of text tokens: an int, or an int tensor [B] on the device of ``attn`` for ragged batches.
        n_vision: number of image regions; None is the rest of the sequence (ints only).
        text_start, vision_start: first position of each span; ``vision_start=None`` is ``text_start + n_text``. Keep
            [CLS], [SEP] and padding outside the spans.
        max_n_text, max_n_vision: host upper bounds of span tensors (default N): they size the launch, so that no
            value is read back from the device.
        kind: what is multiplied and compared. "scores": S as printed in the paper. "softmax": the product uses each
            block's row softmax P_ab P_bb P_ab^T. "probs": ``attn`` holds probabilities normalised inside each block
            (see :func:`block_softmax`), compared with log max(attn_aa, 1e-12).
        sides: "both" (Eq. 6), "text" (Eq. 3) or "vision" (Eq. 5).
        projection_scale: factor of the projected matrix; "mean" is 1 / n_b^2 (Algorithm 1 read as a plain mean).
        stop_gradient: None, "target" (S_aa is a constant target) or "projection".
        row_reduction: "sum" over rows (Eq. 4) or "mean".
        reduction: over the leading dimensions: "mean", "sum" or "none".
        backend: "auto", "triton", "cuda", "cpu" or "reference". An explicit backend never falls back.

    Returns:
        float32 (float64 for float64 input): a scalar, or for "none" the leading shape of ``attn``. An example with an
        empty span contributes 0 and counts in the mean; an empty batch gives 0. On a GPU, span tensors that leave the
        sequence, exceed the bounds or overlap make that example (loss and gradient) NaN; on the CPU they raise, but in
        a compiled or exported graph.

    Gradients flow into ``attn`` once (a double backward raises RuntimeError, but for ``backend="reference"``); they are
    exactly 0 outside the spans. Softmax, KL and sums run in float32 (float64 for float64), results are bit for bit
    reproducible, and autocast changes nothing: the operator computes in the dtype it is given. -inf inside a span gives
    NaN; kind "softmax" takes it in S_tv and S_vt, unless it fills a row.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    inputs, spans, dims = parse_attention(attn, n_text, n_vision, text_start, vision_start, max_n_text, max_n_vision)
    options = parse_options(kind, sides, projection_scale, stop_gradient, row_reduction)
    return _run("scores", inputs, spans, options, reduction, backend, dims)


def fused_cacr_blocks(
    tt: Tensor,
    tv: Tensor,
    vt: Tensor,
    vv: Tensor,
    *,
    n_text: int | Tensor | None = None,
    n_vision: int | Tensor | None = None,
    kind: str = "scores",
    sides: str = "both",
    projection_scale: float | str = 1.0,
    stop_gradient: str | None = None,
    row_reduction: str = "sum",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """CACR loss of four score blocks from different modules (two-stream models such as LXMERT).

    Args:
        tt, tv, vt, vv: scores [..., T, T], [..., T, R], [..., R, T] and [..., R, R] with the same leading dimensions
            (none, [B] or [B, H]), dtype and device.
        n_text, n_vision: valid lengths, counted from the start of each block: ints or int tensors [B]; None is all.

    Other arguments, the formula and the return value are those of :func:`fused_cacr`.
    """
    blocks = {"tt": tt, "tv": tv, "vt": vt, "vv": vv}
    inputs = [as_problems(name, x, *("TR"[side == "v"] for side in name)) for name, x in blocks.items()]
    t, r = inputs[0].shape[-1], inputs[3].shape[-1]
    lead = tuple(tt.shape[:-2])
    for (name, x), shape in zip(blocks.items(), ((t, t), (t, r), (r, t), (r, r))):
        if tuple(x.shape) != (*lead, *shape):
            raise ValueError(f"{name} must have shape {(*lead, *shape)} (from tt and vv); got {tuple(x.shape)}")
        if x.dtype != tt.dtype or x.device != tt.device:
            raise ValueError(
                f"{name} must share dtype and device with tt ({tt.dtype}, {tt.device}); got {x.dtype}, {x.device}"
            )
    spans = parse_spans(
        t if n_text is None else n_text,
        r if n_vision is None else n_vision,
        0,
        0,
        None,
        None,
        batch=inputs[0].shape[0],
        device=tt.device,
        limit_text=t,
        limit_vision=r,
        joint=False,
    )
    options = parse_options(kind, sides, projection_scale, stop_gradient, row_reduction)
    return _run("scores", inputs, spans, options, reduction, backend, len(lead))


def fused_cacr_qk(
    q: Tensor,
    k: Tensor,
    n_text: int | Tensor,
    *,
    scale: float | None = None,
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
    backend: str = "auto",
) -> Tensor:
    """CACR loss of S = scale * q k^T without storing the N x N matrix: :func:`fused_cacr` for models that run SDPA.

    For kind "scores", X_a = scale^3 Q_a (K_b^T Q_b)(K_b^T K_b) Q_a^T and Y_a = scale Q_a K_a^T: memory O(N D) and work
    O(N^2 D) instead of O(N^2) and O(N^3). Kind "softmax" may keep the two T x R blocks: O(T R + N D). "probs" needs
    attention itself.

    Args:
        q: queries [B, H, N, D], float16, bfloat16, float32 or float64, any strides.
        k: keys [B, Hk, N, D] with H a multiple of Hk (head h uses key head h // (H / Hk)).
        scale: factor of the scores; None is 1 / sqrt(D).

    Other arguments, the return value and the errors are those of :func:`fused_cacr`; backends: "triton", "cpu",
    "reference". Gradients flow into q and k.
    """
    for name, x in (("q", q), ("k", k)):
        check_float_tensor(name, x, (4,), "[B, H, N, D]")
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k must share dtype and device with q ({q.dtype}, {q.device}); got {k.dtype}, {k.device}")
    batch, heads, n, d = q.shape
    if k.shape[0] != batch or k.shape[2] != n or k.shape[3] != d or k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(
            f"k must have shape [B, Hk, N, D] = [{batch}, Hk, {n}, {d}] with Hk dividing H = {heads}; "
            f"got {tuple(k.shape)}"
        )
    if kind == "probs":
        raise ValueError(
            "kind must be 'scores' or 'softmax' for fused_cacr_qk; 'probs' takes attention probabilities: use "
            "fused_cacr(block_softmax(...), kind='probs')"
        )
    if d < 1:
        raise ValueError(f"q must have shape [B, H, N, D] with D >= 1; got {tuple(q.shape)}")
    spans = parse_spans(
        n_text,
        n_vision,
        text_start,
        vision_start,
        max_n_text,
        max_n_vision,
        batch=batch,
        device=q.device,
        limit_text=n,
        limit_vision=n,
        joint=True,
    )
    options = parse_options(kind, sides, projection_scale, stop_gradient, row_reduction)
    factor = d**-0.5 if scale is None else as_number("scale", scale, "a number or None (1 / sqrt(D))")
    return _run("qk", [q, k], spans, options, reduction, backend, 2, factor)


def _run(
    variant: str,
    inputs: list[Tensor],
    spans: Spans,
    options: Options,
    reduction: str,
    backend: str,
    dims: int,
    scale: float = 1.0,
) -> Tensor:
    parse_reduction(reduction)
    check_choice("backend", backend, ("auto", *BACKENDS))
    x = inputs[0]
    wide = False
    if variant == "qk" and x.shape[-1] > LARGEST_HEAD:  # a branch: a comparison of traced sizes is no constant
        wide = True
    chosen = choose(backend, variant, x.device.type, x.device.index, x.dtype, wide)
    if chosen != "reference":
        if chosen == "cpu" and reduction == "mean" and not torch.compiler.is_compiling():
            options = replace(options, expected_grad=1 / max(x.shape[0] * x.shape[1], 1))
        loss = congruence(variant, inputs, spans, options, chosen, scale)
    else:
        with torch.autocast(x.device.type, enabled=False) if x.device.type in _AUTOCAST else nullcontext():
            if variant == "qk":
                loss = qk_reference(inputs, spans, options, scale)
            else:
                loss = scores_reference(inputs, spans, options, accumulation_dtype(x.dtype))
    return reduce_loss(loss, reduction, dims)


class CACRLoss(nn.Module):
    """:func:`fused_cacr` as a module: the options are fixed here, scores and spans come with each call.

    >>> loss = CACRLoss(kind="softmax")
    >>> loss(attn, n_text, n_vision=n_regions, text_start=1, vision_start=60)
    """

    def __init__(
        self,
        *,
        kind: str = "scores",
        sides: str = "both",
        projection_scale: float | str = 1.0,
        stop_gradient: str | None = None,
        row_reduction: str = "sum",
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        parse_options(kind, sides, projection_scale, stop_gradient, row_reduction)
        parse_reduction(reduction)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.options: dict[str, Any] = {
            "kind": kind,
            "sides": sides,
            "projection_scale": projection_scale,
            "stop_gradient": stop_gradient,
            "row_reduction": row_reduction,
            "reduction": reduction,
            "backend": backend,
        }

    def forward(
        self,
        attn: Tensor,
        n_text: int | Tensor,
        *,
        n_vision: int | Tensor | None = None,
        text_start: int | Tensor = 0,
        vision_start: int | Tensor | None = None,
        max_n_text: int | None = None,
        max_n_vision: int | None = None,
    ) -> Tensor:
        return fused_cacr(
            attn,
            n_text,
            n_vision=n_vision,
            text_start=text_start,
            vision_start=vision_start,
            max_n_text=max_n_text,
            max_n_vision=max_n_vision,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


__all__ = ["CACRLoss", "fused_cacr", "fused_cacr_blocks", "fused_cacr_qk"]
