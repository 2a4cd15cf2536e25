"""What the attention of a model does: words attend to words, regions to regions, and each through the other.

The congruence of a side is the loss that CACR trains (paper Eq. 3-6): how far its own attention softmax(S_aa) is from
softmax(S_ab S_bb S_ab^T), the attention of the other side seen through the cross attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacr_kernels import fused_cacr_qk
from cacr_uniter.data.dataset import RetrievalDataset
from cacr_uniter.errors import UserError
from cacr_uniter.evaluation.scoring import Pair
from cacr_uniter.model import UniterForRetrieval
from cacr_uniter.training.attention import LayerAttention

Kind = Literal["scores", "softmax"]
SIDES = ("text", "vision")


class Maps(NamedTuple):
    """Attention of one side: ``own`` softmax(S_aa) and ``projected`` softmax(X_a), both [n_a, n_a]."""

    own: NDArray[np.float32]
    projected: NDArray[np.float32]


@torch.inference_mode()
def congruence(
    model: UniterForRetrieval,
    dataset: RetrievalDataset,
    pairs: Sequence[Pair],
    kind: Kind = "softmax",
    projection_scale: float = 1.0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float64]:
    """KL(p||q) + KL(q||p) in nats, mean over the rows of a side: [pairs, layers, heads, 2], text and vision last.

    Raises:
        UserError: a number is not finite, as the weights of a training that diverged give.
    """
    device = next(model.parameters()).device
    count = len(model.uniter.encoder.layer)
    attention = LayerAttention(model, list(range(count)))
    found = np.empty((len(pairs), count, model.config.num_attention_heads, len(SIDES)))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(pairs), batch_size):
            batch = dataset.batch(pairs[start : start + batch_size]).to(device)
            with attention.watch():
                last_input = model(batch).last_input
            every = torch.arange(len(batch), device=device)
            for layer, (q, k) in enumerate(attention.queries_and_keys(last_input, every)):
                for number, side in enumerate(SIDES):
                    options: dict[str, Any] = {"kind": kind, "sides": side, "row_reduction": "mean", **batch.spans()}
                    options["projection_scale"] = projection_scale
                    loss = fused_cacr_qk(q, k, reduction="none", **options)
                    found[start : start + len(batch), layer, :, number] = loss.cpu().numpy()
            progress(start + len(batch), len(pairs))
    finally:
        attention.forget()
        model.train(training)
    if not np.isfinite(found).all():
        raise UserError("the model's attention is not finite: its training diverged, take an earlier checkpoint")
    return found


@torch.inference_mode()
def maps(
    model: UniterForRetrieval,
    dataset: RetrievalDataset,
    pair: Pair,
    layer: int = -1,
    head: int | None = None,
    kind: Kind = "softmax",
    projection_scale: float = 1.0,
) -> dict[str, Maps]:
    """Both attentions of both sides of one pair, of one head or the mean over heads.

    Raises:
        UserError: there is no such layer or head.
    """
    heads, layers = model.config.num_attention_heads, len(model.uniter.encoder.layer)
    if not -layers <= layer < layers:
        raise UserError(f"--layer is {layer}: give 0 to {layers - 1}, or -1 to -{layers} from the end")
    if head is not None and not 0 <= head < heads:
        raise UserError(f"--head is {head}: give 0 to {heads - 1}, or none for the mean over heads")
    attention = LayerAttention(model, [layer])
    training = model.training
    model.eval()
    try:
        batch = dataset.batch([pair]).to(next(model.parameters()).device)
        with attention.watch():
            last_input = model(batch).last_input
        ((q, k),) = attention.queries_and_keys(last_input, torch.zeros(1, dtype=torch.int64, device=last_input.device))
    finally:
        attention.forget()
        model.train(training)
    scores = (q @ k.mT / q.shape[-1] ** 0.5)[0]
    spans = batch.spans()
    ends = {"text": (1, int(batch.n_text[0])), "vision": (int(spans["vision_start"]), int(batch.n_regions[0]))}
    columns = {side: slice(first, first + length) for side, (first, length) in ends.items()}
    found = {}
    for a, b in (SIDES, SIDES[::-1]):
        cross, inner = scores[:, columns[a], columns[b]], scores[:, columns[b], columns[b]]
        if kind == "softmax":
            cross, inner = cross.softmax(-1), inner.softmax(-1)
        own = scores[:, columns[a], columns[a]].softmax(-1)
        found[a] = Maps(
            _of_head(own, head), _of_head((projection_scale * (cross @ inner @ cross.mT)).softmax(-1), head)
        )
    return found


def _of_head(attention: Tensor, head: int | None) -> NDArray[np.float32]:
    """[n, n] of [heads, n, n]."""
    chosen = attention.mean(0) if head is None else attention[head]
    return np.asarray(chosen.float().cpu().numpy())


def words_of(dataset: RetrievalDataset, caption_id: str) -> list[str]:
    """The word pieces of a caption as its record spells them, else their numbers."""
    caption = dataset.text_db.caption(caption_id)
    spelled = caption.record.get("toked_caption")
    if isinstance(spelled, list) and len(spelled) == len(caption.input_ids):
        return [str(piece) for piece in spelled]
    return [str(number) for number in caption.input_ids]
