"""``qk_forward`` and ``qk_backward`` of the Triton backend: S = scale q k^T is never stored."""

from __future__ import annotations

from torch import Tensor

from ..problem import Options, Spans
from .qk_scores import scores_qk_backward, scores_qk_forward


def qk_forward(
    inputs: list[Tensor], spans: Spans, options: Options, needs_grad: bool, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Loss [B, H] in float32 from q [B, H, N, D] and k [B, Hk, N, D], and what the backward needs.

    Saved for kind "scores": row numbers [B, H, 8, n_text + n_vision], D x D products [B, H, 2, 3, D, D] (float32).
    """
    q, k = inputs
    return scores_qk_forward(q, k, spans, options, needs_grad, scale)


def qk_backward(
    grad_loss: Tensor, inputs: list[Tensor], saved: list[Tensor], spans: Spans, options: Options, scale: float
) -> list[Tensor]:
    """[grad_q [B, H, N, D], grad_k [B, Hk, N, D]] of sum(grad_loss * loss), contiguous, in the inputs' dtypes."""
    q, k = inputs
    return scores_qk_backward(grad_loss, q, k, saved, spans, options, scale)
