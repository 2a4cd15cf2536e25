"""The q/k variant on the CPU, on every instruction set this machine runs, against the reference in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cacr_kernels import native
from cacr_kernels.problem import Options, Spans
from cacr_kernels.reference.closed_form import qk_reference
from cacr_kernels.testing import relative_error

from .cpu_backend import FIXTURES, INSTRUCTION_SETS, NEEDS_CPU

instruction_set, threads = FIXTURES
pytestmark = NEEDS_CPU

KINDS = ("scores", "softmax")
#: largest relative error of loss and gradients against float64
BUDGETS = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-6, 5e-5), torch.bfloat16: (1e-5, 4e-3)}


def make_qk(
    n: int, dim: int, *, batch: int = 2, heads: int = 2, key_heads: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n + dim)
    shapes = ((batch, heads, n, dim), (batch, key_heads, n, dim))
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(dtype) for shape in shapes]


def run(
    inputs: list[Tensor], spans: Spans, options: Options, grad_loss: Tensor, scale: float
) -> tuple[Tensor, list[Tensor]]:
    loss, saved = native.cpu.qk_forward(inputs, spans, options, True, scale)
    return loss, native.cpu.qk_backward(grad_loss, inputs, saved, spans, options, scale)


def expected(
    inputs: list[Tensor], spans: Spans, options: Options, grad_loss: Tensor, scale: float
) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    loss = qk_reference(leaves, spans, options, scale)
    return loss.detach(), list(torch.autograd.grad((loss * grad_loss.double()).sum(), leaves))


def check(inputs: list[Tensor], spans: Spans, options: Options, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    grad_loss = torch.rand(inputs[0].shape[:2], generator=generator, dtype=torch.float64) + 0.5
    loss, gradients = run(inputs, spans, options, grad_loss, scale)
    want, want_gradients = expected(inputs, spans, options, grad_loss, scale)
    loss_budget, gradient_budget = BUDGETS[inputs[0].dtype]
    assert relative_error(loss, want) <= loss_budget
    for x, gradient, want_gradient in zip(inputs, gradients, want_gradients):
        assert gradient.shape == x.shape
        assert gradient.dtype == x.dtype
        assert relative_error(gradient, want_gradient) <= gradient_budget


@pytest.mark.parametrize("dtype", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 8, 33, 64, 96])
def test_sizes(kind: str, dim: int, dtype: torch.dtype) -> None:
    for n_text, n_vision in ((1, 2), (7, 33), (63, 50), (129, 17)):
        spans = Spans(n_vision + 1, n_text, 1, n_vision)  # vision first, a position before and after
        inputs = make_qk(n_text + n_vision + 2, dim, dtype=dtype)
        check(inputs, spans, Options(kind, projection_mean=True), 0.5 * dim**-0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop_gradient", ["none", "target", "projection"])
@pytest.mark.parametrize("sides", ["both", "text", "vision"])
def test_options(kind: str, stop_gradient: str, sides: str) -> None:
    for scale, mean in ((-0.3, False), (1.0, True)):
        options = Options(kind, sides, scale, mean, mean, stop_gradient)  # type: ignore[arg-type]
        check(make_qk(30, 16), Spans(0, 9, 9, 21), options, -0.4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_query_heads_share_key_heads(kind: str, key_heads: int) -> None:
    inputs = make_qk(24, 16, heads=4, key_heads=key_heads)
    check(inputs, Spans(0, 9, 9, 15), Options(kind), 0.25)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_spans_read_nothing_outside_and_invalid_ones_give_nan(kind: str) -> None:
    rows = [(1, 5, 9, 7), (12, 6, 2, 9), (3, 0, 4, 5), (4, 5, 8, 3)]  # the last two: empty, overlapping
    spans = Spans(0, 9, 0, 13, torch.tensor(rows, dtype=torch.int32))
    clean = make_qk(22, 16, batch=4)
    inside = torch.zeros(4, 1, 22, 1, dtype=torch.bool)
    for mask, (text_start, n_text, vision_start, n_vision) in zip(inside[:2, 0, :, 0], rows):
        mask[text_start : text_start + n_text] = True
        mask[vision_start : vision_start + n_vision] = True
    inputs = [x.masked_fill(~inside, float("nan")) for x in clean]
    options, grad_loss = Options(kind), torch.full((4, 2), 0.7, dtype=torch.float64)  # type: ignore[arg-type]
    loss, gradients = run(inputs, spans, options, grad_loss, 0.25)
    two = Spans(0, 9, 0, 13, spans.table[:2])  # type: ignore[index]
    want, want_gradients = expected([x[:2] for x in clean], two, options, grad_loss[:2], 0.25)
    torch.testing.assert_close(loss[:2], want, rtol=1e-12, atol=1e-12)
    assert (loss[2] == 0).all()
    assert loss[3].isnan().all()
    for gradient, want_gradient in zip(gradients, want_gradients):
        torch.testing.assert_close(gradient[:2], want_gradient, rtol=1e-10, atol=1e-13)
        assert (gradient[:3].masked_select(~inside[:3].expand_as(gradient[:3])) == 0).all()
        assert gradient[3].isnan().all()


@pytest.mark.parametrize("dtype", BUDGETS)
def test_strides_threads_and_repetition_change_no_bit(dtype: torch.dtype) -> None:
    inputs = make_qk(40, 24, heads=4, key_heads=2, dtype=dtype)
    strided = [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in inputs]
    strided[1] = inputs[1].mT.contiguous().mT
    spans, options, grad_loss = Spans(0, 17, 17, 23), Options("softmax"), torch.tensor(0.3).expand(2, 4)
    torch.set_num_threads(1)
    loss, gradients = run(inputs, spans, options, grad_loss, 0.2)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        again, gradients_again = run(strided, spans, options, grad_loss.contiguous(), 0.2)
        assert torch.equal(loss, again)
        assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key_heads", [1, 2])
def test_gradcheck(kind: str, key_heads: int) -> None:
    spans, options = Spans(1, 4, 6, 3), Options(kind, "both", 0.7, False, True)  # type: ignore[arg-type]

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
            loss, saved = native.cpu.qk_forward([q, k], spans, options, True, 0.6)
            ctx.save_for_backward(q, k, *saved)
            return loss

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, ...]:
            q, k, *saved = ctx.saved_tensors
            return tuple(native.cpu.qk_backward(grad_loss, [q, k], saved, spans, options, 0.6))

    inputs = [x.requires_grad_() for x in make_qk(10, 3, batch=1, key_heads=key_heads)]
    assert torch.autograd.gradcheck(Loss.apply, inputs)


def test_a_common_offset_of_queries_and_keys_keeps_its_digits() -> None:
    inputs = [(x * 0.2 + 1).float() for x in make_qk(160, 64)]
    options = Options(projection_mean=True)
    grad_loss = torch.ones(2, 2)
    loss, gradients = run(inputs, Spans(0, 60, 60, 100), options, grad_loss, 0.125)
    want, want_gradients = expected(inputs, Spans(0, 60, 60, 100), options, grad_loss, 0.125)
    assert relative_error(loss, want) <= 1e-7
    assert max(map(relative_error, gradients, want_gradients)) <= 1e-6


def test_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match="probs"):
        native.cpu.qk_forward(make_qk(8, 4), Spans(0, 3, 3, 5), Options("probs"), False, 1.0)


PEAK = """
import sys, torch
from cacr_kernels import native
from cacr_kernels.problem import Options, Spans
from cacr_uniter.benchmark.timing import PeakMemory
torch.set_num_threads(1)
def step(n):
    q, k = torch.randn(2, 1, 1, n, 64).mul_(0.1)
    spans = Spans(0, n // 4, n // 4, n - n // 4)
    loss, saved = native.cpu.qk_forward([q, k], spans, Options("scores", projection_mean=True), True, 0.125)
    native.cpu.qk_backward(torch.ones(1, 1), [q, k], saved, spans, Options("scores", projection_mean=True), 0.125)
step(64)
with PeakMemory("cpu") as peak:
    step(int(sys.argv[1]))
print(peak.extra)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
def test_memory_is_linear_in_the_length(instruction_set: str) -> None:
    if instruction_set != INSTRUCTION_SETS[-1]:
        pytest.skip("memory does not depend on the instruction set")
    n = 4096
    peak = int(subprocess.run([sys.executable, "-c", PEAK, str(n)], capture_output=True, text=True, check=True).stdout)
    matrix = n * n * 4
    assert n * 64 * 4 < peak < matrix // 2, f"{peak} bytes at the peak; one N x N matrix has {matrix}"
    assert peak < 30 * (n * 64 * 4), "more than thirty times the size of q"
