"""Learning rate and weight of the auxiliary loss as functions of the step. Standard library only."""

from __future__ import annotations

import math
from typing import Literal

#: learning rates that the published recipe would make zero or negative
SMALLEST_LR = 1e-8


def learning_rate(
    step: int, lr: float, steps: int, warmup: int, decay: Literal["linear", "constant"] = "linear"
) -> float:
    """Learning rate of the optimizer step ``step``, counted from 1: lr s/w below w, then lr (T - s)/(T - w).

    Values <= 0 become 1e-8, as in the published recipe.
    """
    if step < warmup:
        value = lr * step / warmup
    elif decay == "constant":
        value = lr
    else:
        value = lr * max(0.0, (steps - step) / max(1, steps - warmup))
    return value if value > 0 else SMALLEST_LR


def auxiliary_weight(done: int, steps: int, schedule: Literal["exp", "linear", "log", "constant"]) -> float:
    """lambda(u) at u = done / steps, ``done`` optimizer steps being complete (from 0).

    exp: exp(5 (u - 1)); linear: u; log: 1 - exp(-5 u); constant: 1.
    """
    u = done / steps
    if schedule == "exp":
        return math.exp(5.0 * (u - 1.0))
    if schedule == "linear":
        return u
    if schedule == "log":
        return 1.0 - math.exp(-5.0 * u)
    return 1.0
