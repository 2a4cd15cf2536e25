"""``qk_forward`` and ``qk_backward`` of the Triton backend: S = scale q k^T is never stored."""

from __future__ import annotations

from torch import Tensor

from ..problem import Options, Spans
from .qk_scores import scores_qk_backward, scores_qk_forward
from .qk_softmax import softmax_qk_backward, softmax_qk_forward


def qk_forward(
    inputs: list[Tensor], spans: Spans, options: Options, needs_grad: bool, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Loss [B, H] in float32 from q [B, H, N, D] and k [B, Hk, N, D], and what the backward needs.

    Saved, float32: row numbers [B, H, 8, n_text + n_vision]; kind "scores": D x D products [B, H, 2, 3, D, D] too.
    """
    q, k = inputs
    forward = softmax_qk_forward if options.kind == "softmax" else scores_qk_forward
    return forward(q, k, spans, options, needs_grad, scale)


def qk_backward(
    grad_loss: Tensor, inputs: list[Tensor], saved: list[Tensor], spans: Spans, options: Options, scale: float
) -> list[Tensor]:
    """[grad_q [B, H, N, D], grad_k [B, Hk, N, D]] of sum(grad_loss * loss), contiguous, in the inputs' dtypes."""
    q, k = inputs
    backward = softmax_qk_backward if options.kind == "softmax" else scores_qk_backward
    return backward(grad_loss, q, k, saved, spans, options, scale)
