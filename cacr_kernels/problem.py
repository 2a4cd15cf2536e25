"""What a congruence problem is: where text and vision lie, and which variant of the loss is asked for.

Torch only: imported by every layer, imports nothing of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["scores", "softmax", "probs"]
Sides = Literal["both", "text", "vision"]
StopGradient = Literal["none", "target", "projection"]

#: numbers kept per attention row for the backward: m_x, l_x, m_y, l_y, E_p[d], E_q[d], cross row max, cross row sum
#: (Triton from q and k: 1 / l in place of each sum l, E_p[d] - E_q[d] in place of E_q[d])
ROW_NUMBERS = 8


@dataclass(frozen=True)
class Options:
    """The variant of the loss. X is multiplied by ``projection_scale`` and, if ``projection_mean``, by 1 / n_b^2.

    ``expected_grad`` is the grad_loss that the backward will most likely get: a backend that computes gradients in the
    forward multiplies them by it there. Any other grad_loss gives the right gradients too.
    """

    kind: Kind = "scores"
    sides: Sides = "both"
    projection_scale: float = 1.0
    projection_mean: bool = False
    row_mean: bool = False
    stop_gradient: StopGradient = "none"
    expected_grad: float = 1.0

    @property
    def text(self) -> bool:
        return self.sides != "vision"

    @property
    def vision(self) -> bool:
        return self.sides != "text"


@dataclass(frozen=True)
class Spans:
    """Where the text tokens and the image regions of each example lie along the sequence.

    Without ``table`` the four ints hold for every example. With it, ``table`` is int32 [B, 4] with the columns
    (text_start, n_text, vision_start, n_vision); ``n_text`` and ``n_vision`` are then host upper bounds, which size
    launches and workspaces, and the int starts are unused.
    """

    text_start: int
    n_text: int
    vision_start: int
    n_vision: int
    table: Tensor | None = None

    def invalid(self, limit_text: int, limit_vision: int, disjoint: bool) -> Tensor:
        """Bool [B]: examples of ``table`` whose spans leave the tensor, exceed the bounds or (``disjoint``) overlap."""
        assert self.table is not None
        text_start, n_text, vision_start, n_vision = self.table.to(torch.int64).unbind(-1)
        bad = (text_start < 0) | (n_text < 0) | (vision_start < 0) | (n_vision < 0)
        bad |= (n_text > self.n_text) | (n_vision > self.n_vision)
        bad |= (text_start + n_text > limit_text) | (vision_start + n_vision > limit_vision)
        if disjoint:
            overlap = (text_start < vision_start + n_vision) & (vision_start < text_start + n_text)
            bad |= overlap & (n_text > 0) & (n_vision > 0)
        return bad


def block_limits(inputs: list[Tensor]) -> tuple[int, int, bool]:
    """(largest end of a text span, of a vision span, whether the two must be disjoint)."""
    if len(inputs) == 4:
        return inputs[0].shape[-1], inputs[3].shape[-1], False
    return inputs[0].shape[-2], inputs[0].shape[-2], True


def saves_gradients(inputs: list[Tensor]) -> bool:
    """Whether the cpu backend's forward saves the gradients for the expected grad_loss, to be scaled in the backward.

    Not for 16-bit inputs (a gradient is rounded once), nor when query heads share a key head: grad_k sums over heads
    whose grad_loss may differ.
    """
    x = inputs[0]
    return x.dtype in (torch.float32, torch.float64) and all(y.shape[1] == x.shape[1] for y in inputs)
