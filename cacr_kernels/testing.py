"""Inputs that bite and error budgets, shared by the tests and the benchmarks.

A budget is stated in float64 terms: the root mean square, over seeded problems, of the relative error
``|actual - expected| / |expected|`` of the loss and of the gradient, where ``expected`` is the closed form in float64
on the same (already rounded) inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reference import block_softmax, cacr_closed_form

PATTERNS = ("normal", "shifted", "outlier", "one_hot", "uniform", "congruent")


def device_of(backend: str) -> str:
    """The device whose tensors ``backend`` takes on this machine."""
    return "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"


def make_scores(
    n_text: int,
    n_vision: int,
    *,
    batch: int = 1,
    heads: int = 1,
    std: float = 1.0,
    mean: float = 0.0,
    pattern: str = "normal",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Scores [batch, heads, n_text + n_vision, n_text + n_vision], text first.

    Patterns: "normal"; "shifted" (mean -3 on top); "outlier" (one row and one column 8 deviations away); "one_hot" (one
    large entry a row); "uniform" (rows nearly constant); "congruent" (T = R, S_tv = Pi and S_vt = Pi^T a permutation,
    S_vv = Pi^T S_tt Pi, all multiples of 1/8: X equals Y exactly, so loss and gradient are exactly 0).
    """
    generator = torch.Generator().manual_seed(seed)
    n = n_text + n_vision
    scores = torch.randn(batch, heads, n, n, generator=generator, dtype=torch.float64) * std + mean
    if pattern == "shifted":
        scores -= 3.0
    elif pattern == "outlier":
        scores[..., n_text // 2, :] += 8 * std
        scores[..., :, n_text + n_vision // 2] -= 8 * std
    elif pattern == "one_hot":
        hot = torch.randint(n, (batch, heads, n, 1), generator=generator)
        scores.scatter_add_(-1, hot, torch.full(hot.shape, 12.0, dtype=torch.float64))
    elif pattern == "uniform":
        scores *= 1e-3
    elif pattern == "congruent":
        if n_text != n_vision:
            raise ValueError(f"pattern 'congruent' needs n_text == n_vision; got {n_text} and {n_vision}")
        tt = torch.randint(-16, 17, (batch, heads, n_text, n_text), generator=generator).double() / 8
        pi = torch.eye(n_text, dtype=torch.float64)[torch.randperm(n_text, generator=generator)].expand_as(tt)
        scores = torch.cat([torch.cat([tt, pi], -1), torch.cat([pi.mT, pi.mT @ tt @ pi], -1)], -2)
    elif pattern != "normal":
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}; got {pattern!r}")
    return scores.to(dtype).to(device)


def make_input(kind: str, n_text: int, n_vision: int, **options: Any) -> Tensor:
    """:func:`make_scores`, turned into block-wise probabilities for ``kind="probs"``."""
    scores = make_scores(n_text, n_vision, **options)
    return block_softmax(scores, n_text).to(scores.dtype) if kind == "probs" else scores


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| (Frobenius, float64); NaN never passes, 0 / 0 is 0."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if torch.equal(actual, expected):
        return 0.0
    return float((actual - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Errors:
    """Root mean square relative errors over several problems."""

    loss: float
    gradient: float


def loss_and_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``function(*tensors)`` summed and its gradients, on detached copies that keep dtype and strides."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    loss = function(*leaves)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    return loss.detach(), list(gradients)


def errors(
    function: Callable[..., Tensor], expected: Callable[..., Tensor], problems: Iterator[tuple[Tensor, ...]]
) -> Errors:
    """Root mean square error of ``function`` against ``expected`` evaluated in float64 on the same values."""
    loss_terms, gradient_terms = [], []
    for tensors in problems:
        loss, gradients = loss_and_gradients(function, *tensors)
        want, want_gradients = loss_and_gradients(expected, *(x.double() for x in tensors))
        loss_terms.append(relative_error(loss, want))
        flat = torch.cat([g.double().flatten() for g in gradients])
        want_flat = torch.cat([g.flatten() for g in want_gradients])
        gradient_terms.append(relative_error(flat, want_flat))
    return Errors(_rms(loss_terms), _rms(gradient_terms))


def score_errors(
    function: Callable[..., Tensor],
    n_text: int,
    n_vision: int,
    *,
    count: int = 32,
    kind: str = "scores",
    problem: dict[str, Any] | None = None,
    **options: Any,
) -> Errors:
    """Errors of ``function(attn, n_text, kind=..., **problem)`` over ``count`` seeded problems."""
    arguments = {"kind": kind, "reduction": "sum", **(problem or {})}
    problems = ((make_input(kind, n_text, n_vision, seed=seed, **options),) for seed in range(count))
    return errors(
        lambda attn: function(attn, n_text, **arguments),
        lambda attn: cacr_closed_form(attn, n_text, **arguments),
        problems,
    )


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
