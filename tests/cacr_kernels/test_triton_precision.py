"""Errors of the Triton scores kernels: equal and nearly equal rows, extreme logits, offsets, 16-bit inputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cacr_kernels import fused_cacr
from cacr_kernels.problem import Options, Spans
from cacr_kernels.reference import cacr_closed_form
from cacr_kernels.testing import make_input, relative_error, score_errors

from .triton_scores import DEVICE, FIXTURES, attention, check, expected, run

poisoned_memory, path, small_tiles, tensor_cores = FIXTURES


def test_equal_distributions_give_exactly_zero(path):
    attn = make_input("scores", 20, 20, pattern="congruent")
    loss, gradients, _ = run([attn], Spans(0, 20, 20, 20))
    assert (loss == 0).all()
    assert (gradients[0] == 0).all()


def test_extreme_logits(path):
    attn = attention("scores", 20, std=1.0)
    attn[..., :8, :8] *= 1e4
    check([attn], Spans(0, 8, 8, 12), gradient_budget=1e-5)


def measured(function, n_text, n_vision, **options):
    """Root mean square errors over four problems."""
    return score_errors(function, n_text, n_vision, count=4, device=DEVICE, **options)


def test_a_common_offset_costs_no_precision(path):
    """Without centring 2.3e-07 and 1.6e-05, as the eager closed form: X is then near -2.7e5."""
    errors = measured(partial(fused_cacr, backend="triton"), 60, 100, std=0.3, mean=-3.0)
    assert errors.loss <= (1e-7 if DEVICE == "cpu" else 1e-6)
    assert errors.gradient <= (1e-6 if DEVICE == "cpu" else 2e-5)


@pytest.mark.parametrize(
    ("n_text", "n_vision", "options"),
    [
        # E_p[d] and E_q[d] are nearly equal: with a reference far from both, the loss is 40 times worse
        (20, 36, {"pattern": "uniform"}),
        # rows nearly one-hot, maxima that move by 1e4 from tile to tile: E_p[d] must not be rounded at that size
        (8, 40, {"std": 10.0}),
    ],
    ids=["nearly uniform rows", "nearly one-hot rows"],
)
def test_at_most_twice_the_error_of_the_closed_form(path, small_tiles, n_text, n_vision, options):
    errors = measured(partial(fused_cacr, backend="triton"), n_text, n_vision, **options)
    eager = measured(cacr_closed_form, n_text, n_vision, **options)
    least = 2e-7 if DEVICE == "cpu" else 1e-6  # tensor cores truncate their sums
    assert errors.loss <= 2 * eager.loss + least
    assert errors.gradient <= 2 * eager.gradient + least


def test_near_congruent_rows(path):
    n = 16
    generator = torch.Generator().manual_seed(3)
    attn = torch.zeros(1, 1, 2 * n, 2 * n)
    attn[..., :n, n:] = torch.eye(n)
    attn[..., n:, n:] = torch.randn(n, n, generator=generator)
    attn[..., :n, :n] = attn[..., n:, n:] + 100 + 1e-2 * torch.randn(n, n, generator=generator)
    loss, _, _ = run([attn], Spans(0, n, n, n), Options(sides="text"))
    want, _ = expected([attn], Spans(0, n, n, n), Options(sides="text"), torch.ones(1, 1, device=DEVICE))
    assert (loss >= 0).all()
    assert relative_error(loss, want) <= 1e-4


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float16, "scores"),
        (torch.bfloat16, "scores"),
        (torch.bfloat16, "softmax"),
        (torch.float16, "probs"),
    ],
)
def test_half_precision_inputs(path, dtype, kind):
    attn = attention(kind, 40, dtype=dtype)
    check([attn], Spans(1, 6, 7, 33), Options(kind=kind), loss_budget=1e-5, gradient_budget=4e-3)


def test_large_float16_scores_do_not_overflow(path):
    attn = attention("scores", 24, std=40.0, dtype=torch.float16)
    loss, _, _ = run([attn], Spans(0, 8, 8, 16))
    want, _ = expected([attn], Spans(0, 8, 8, 16), Options(), torch.ones(1, 1, device=DEVICE))
    assert relative_error(loss, want) <= 1e-5
