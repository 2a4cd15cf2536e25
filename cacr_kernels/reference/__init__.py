"""The specification: plain loops (Algorithm 1), the closed form (Eq. 3-6) and the IAIS losses it is compared with.

With a side a (text or vision), the other side b, attention scores S cut into blocks, and sigma the row softmax:

    X_a = projection_scale * S_ab S_bb S_ab^T                      Y_a = S_aa
    L_a = sum_i KL(sigma X_i || sigma Y_i) + KL(sigma Y_i || sigma X_i) = sum_ij (p_ij - q_ij)(log p_ij - log q_ij)
    L   = L_text + L_vision

Everything here is ordinary differentiable PyTorch (the loop excepted) on any device and in any float dtype.
"""

from .closed_form import PROBABILITY_FLOOR, cacr_closed_form, qk_reference, scores_reference
from .iais import block_softmax, iais_loss
from .loop import cacr_loop

__all__ = [
    "PROBABILITY_FLOOR",
    "block_softmax",
    "cacr_closed_form",
    "cacr_loop",
    "iais_loss",
    "qk_reference",
    "scores_reference",
]
