"""The matching loss of groups of pairs, and the auxiliary loss on the attention of their matched pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cacr_kernels import block_softmax, fused_cacr, fused_cacr_qk
from cacr_kernels.reference import iais_loss
from cacr_uniter.data.batch import Batch, collate
from cacr_uniter.errors import UserError
from cacr_uniter.training.config import AuxConfig, Half, LossConfig


def matching_loss(scores: Tensor, config: LossConfig) -> Tensor:
    """Loss of each group, [G] float32.

    margin: mean_k max(0, margin + p_k - p_0) with p = sigmoid(score); softmax: -log softmax(scores)_0.

    Args:
        scores: raw rank scores [G, 1 + K], column 0 the matched pair.
    """
    scores = scores.float()
    if config.kind == "softmax":
        return scores.logsumexp(dim=1) - scores[:, 0]
    p = scores.sigmoid()
    return F.relu(config.margin + p[:, 1:] - p[:, :1]).mean(dim=1)


class AuxiliaryLoss:
    """Congruence (CACR) or alignment (IAIS) of the attention of matched pairs, by the public API of ``cacr_kernels``.

    Args:
        config: which loss, ``loss`` not ``none``.

    Attributes:
        fused_scores, fused_qk: the functions that compute CACR.
    """

    def __init__(self, config: AuxConfig) -> None:
        self.config = config
        self.fused_scores: Callable[..., Tensor] = fused_cacr
        self.fused_qk: Callable[..., Tensor] = fused_cacr_qk
        self.options: dict[str, Any] = {
            "kind": config.kind,
            "projection_scale": config.projection_scale,
            "stop_gradient": None if config.stop_gradient == "none" else config.stop_gradient,
            "row_reduction": config.row_reduction,
            "reduction": "mean",
            "backend": config.backend,
        }

    def try_out(self, heads: int, size: int, device: torch.device) -> None:
        """Runs on a pair of five columns, so that a backend that cannot run here is refused before a run begins.

        Args:
            heads, size: heads A and head size d of the model.

        Raises:
            UserError: says why the backend cannot run.
        """
        pair = collate([[1]], [(torch.zeros(2, 1), torch.zeros(2, 7))], cls=0, sep=0).batch().to(device)
        q = torch.zeros(1, heads, 5, size, device=device)
        try:
            self(q, q, pair, "image")
        except ValueError as error:
            raise UserError(f"aux.backend is {self.config.backend}: {error}") from error

    def __call__(self, q: Tensor, k: Tensor, batch: Batch, half: Half) -> Tensor:
        """Sum over the pairs of their loss, a float32 scalar. Scores and loss are float32.

        Args:
            q, k: queries and keys [B, A, S, d] of the pairs of ``batch``.
            half: of the groups the pairs come from; decides the side when ``sides`` is ``alternate``.
        """
        config = self.config
        spans: dict[str, Any] = batch.spans()
        if config.special_tokens:
            spans |= {"text_start": 0, "n_text": batch.n_text + 2, "max_n_text": batch.input_ids.shape[1]}
        sides: str = config.sides
        if sides == "alternate":
            sides = "vision" if half == "image" else "text"
        q, k = q.float(), k.float()
        scale = q.shape[-1] ** -0.5 if config.scaled else 1.0
        if config.heads == "sum-scores":
            q, k = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (q, k))
        if config.loss == "cacr" and config.source == "qk":
            return len(q) * self.fused_qk(q, k, scale=scale, sides=sides, **spans, **self.options)
        scores = scale * (q @ k.mT)
        if config.heads == "mean-scores":
            scores = scores.mean(dim=1, keepdim=True)
        if config.loss == "cacr":
            if config.heads == "mean":
                scores = block_softmax(scores, heads="mean", **spans)
            return len(q) * self.fused_scores(scores, sides=sides, **spans, **self.options)
        options: dict[str, Any] = {"mode": config.loss.removeprefix("iais-"), "heads": config.heads}
        return len(q) * iais_loss(scores, sides=sides, **spans, **options)
