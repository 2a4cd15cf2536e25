"""The CPU kernels, on every instruction set this machine runs, against the reference in float64."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cacr_kernels import native
from cacr_kernels.problem import Options, Spans
from cacr_kernels.reference import cacr_loop
from cacr_kernels.reference.closed_form import scores_reference
from cacr_kernels.testing import PATTERNS, make_input, make_scores, relative_error

from .cpu_backend import FIXTURES, KINDS, NEEDS_CPU, SIZES, check, expected, joint, run

instruction_set, threads = FIXTURES
pytestmark = NEEDS_CPU


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", ["both", "text", "vision"])
def test_loss_is_that_of_the_loop(kind: str, sides: str) -> None:
    for n_text, n_vision in ((1, 3), (4, 2), (5, 7)):
        attn = make_input(kind, n_text, n_vision, batch=2, heads=1, dtype=torch.float64)
        options = Options(kind, sides, 0.5, row_mean=True)  # type: ignore[arg-type]
        loss, _ = native.cpu.scores_forward([attn], joint(n_text, n_vision), options, False)
        loop = cacr_loop(
            attn, n_text, kind=kind, sides=sides, projection_scale=0.5, row_reduction="mean", reduction="none"
        )
        torch.testing.assert_close(loss, loop, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_text", SIZES)
def test_sizes_in_float64(kind: str, n_text: int) -> None:
    for n_vision in SIZES:
        attn = make_input(kind, n_text, n_vision, heads=2, std=0.5, dtype=torch.float64)
        check([attn], joint(n_text, n_vision), Options(kind, projection_mean=True), 1e-13, 1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop_gradient", ["none", "target", "projection"])
def test_options(kind: str, stop_gradient: str) -> None:
    attn = make_input(kind, 9, 21, batch=2, heads=2, dtype=torch.float64)
    for sides, scale, mean, row_mean in itertools.product(("both", "text", "vision"), (-0.3, 1.0), (0, 1), (0, 1)):
        options = Options(kind, sides, scale, bool(mean), bool(row_mean), stop_gradient)  # type: ignore[arg-type]
        check([attn], joint(9, 21), options, 1e-13, 1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_at_most_twice_as_far_from_float64_as_plain_pytorch(kind: str, pattern: str) -> None:
    spans, options = joint(36, 36), Options(kind)  # type: ignore[arg-type]
    ours, plain = torch.zeros(2), torch.zeros(2)
    for seed in range(32):
        attn = make_input(kind, 36, 36, pattern=pattern, seed=seed)
        grad_loss = torch.ones(1, 1)
        want, (want_gradient,) = expected([attn], spans, options, grad_loss)
        loss, (gradient,) = run([attn], spans, options, grad_loss)
        leaf = attn.clone().requires_grad_()
        eager = scores_reference([leaf], spans, options)
        (eager_gradient,) = torch.autograd.grad(eager.sum(), leaf)
        ours += torch.tensor([relative_error(loss, want), relative_error(gradient, want_gradient)]) ** 2
        plain += torch.tensor([relative_error(eager, want), relative_error(eager_gradient, want_gradient)]) ** 2
    ours, plain = (ours / 32).sqrt(), (plain / 32).sqrt()
    assert (ours <= 2 * plain + 2 * torch.finfo(torch.float32).eps).all(), (ours, plain)


def test_a_common_offset_of_the_scores_keeps_its_digits() -> None:
    spans, options, grad_loss = joint(60, 100), Options(), torch.ones(1, 8)
    attn = make_scores(60, 100, heads=8, mean=-3.0)  # X: 1e5 without the constant that every row has
    want, (want_gradient,) = expected([attn], spans, options, grad_loss)
    loss, (gradient,) = run([attn], spans, options, grad_loss)
    errors = [relative_error(gradient[0, h], want_gradient[0, h]) for h in range(8)]
    assert torch.tensor(errors).square().mean().sqrt() <= 2.5e-5, errors
    assert ((loss / want - 1) ** 2).mean().sqrt() <= 7e-8


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_the_largest_logit_of_a_row_is_its_maximum_to_the_bit(scale: float) -> None:
    """A fused factor x - m_x leaves what m_x was rounded by: at logits of 1e9 and more exponentials of 0, and NaN."""
    options, grad_loss = Options(projection_scale=scale), torch.ones(1, 2)
    for std in (1.0, 1000.0):
        attn = make_scores(20, 36, heads=2, std=std, seed=1)
        want, (want_gradient,) = expected([attn], joint(20, 36), options, grad_loss)
        loss, (gradient,) = run([attn], joint(20, 36), options, grad_loss)
        assert relative_error(loss, want) <= 1e-5
        assert relative_error(gradient, want_gradient) <= 1e-4


def test_equal_distributions_give_exactly_zero() -> None:
    attn = make_scores(33, 33, heads=2, pattern="congruent")
    loss, (gradient,) = run([attn], joint(33, 33), Options(), torch.ones(1, 2))
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_bits_every_time_and_for_every_number_of_threads(dtype: torch.dtype) -> None:
    attn = make_scores(33, 29, batch=3, heads=3, dtype=dtype)
    grad_loss = torch.rand(3, 3)
    torch.set_num_threads(1)
    loss, (gradient,) = run([attn], joint(33, 29), Options(), grad_loss)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        again, (gradient_again,) = run([attn], joint(33, 29), Options(), grad_loss)
        assert torch.equal(loss, again)
        assert torch.equal(gradient, gradient_again)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    spans, options = Spans(1, 4, 6, 3), Options(kind, "both", 0.7, False, True)  # type: ignore[arg-type]

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, attn: Tensor) -> Tensor:
            ctx.save_for_backward(attn)
            return native.cpu.scores_forward([attn], spans, options, True)[0]

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> Tensor:
            return native.cpu.scores_backward(grad_loss, [ctx.saved_tensors[0]], [], spans, options)[0]

    attn = make_input(kind, 5, 5, batch=2, heads=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(Loss.apply, (attn,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_saved_gradients_and_recomputed_ones_agree(dtype: torch.dtype) -> None:
    attn = make_scores(7, 33, batch=2, heads=3, dtype=dtype)
    grad_loss = torch.tensor([[0.5], [-2.0]]).expand(2, 3)  # powers of two: scaling rounds nothing
    loss, saved = native.cpu.scores_forward([attn], joint(7, 33), Options(), True)
    assert len(saved) == (1 if dtype in (torch.float32, torch.float64) else 0)
    assert torch.equal(loss, native.cpu.scores_forward([attn], joint(7, 33), Options(), False)[0])
    (scaled,) = native.cpu.scores_backward(grad_loss, [attn], saved, joint(7, 33), Options())
    (recomputed,) = native.cpu.scores_backward(grad_loss, [attn], [], joint(7, 33), Options())
    assert torch.equal(scaled, recomputed)


PEAK = """
import sys, torch
from cacr_kernels import fused_cacr, native
from cacr_uniter.benchmark.timing import PeakMemory
native.cpu.instruction_set = sys.argv[1]
torch.set_num_threads(2)
attn = torch.full((32, 12, 160, 160), 0.1).requires_grad_()
fused_cacr(attn[:1, :2], 60, backend="cpu").backward()
attn.grad = None
with PeakMemory("cpu") as peak:
    fused_cacr(attn, 60, backend="cpu").backward()
print(peak.extra, attn.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
def test_a_training_step_holds_the_gradient_and_a_tile_a_thread(instruction_set: str) -> None:
    command = [sys.executable, "-c", PEAK, instruction_set]
    peak, gradient = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert gradient - (4 << 20) < peak < gradient + (4 << 20), f"{peak} bytes at the peak, gradient {gradient}"


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.cpu, "instruction_set", "abacus")
    with pytest.raises(ValueError, match="abacus"):
        native.cpu.scores_forward([torch.zeros(1, 1, 4, 4)], joint(2, 2), Options(), False)
