"""The CPU kernels on every instruction set this machine runs: what the tests of backend "cpu" share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cacr_kernels import native
from cacr_kernels.problem import Options, Spans
from cacr_kernels.reference.closed_form import scores_reference
from cacr_kernels.testing import relative_error

STATUS = native.cpu_status()
NEEDS_CPU = pytest.mark.skipif(not STATUS[0], reason=STATUS[1])

INSTRUCTION_SETS = native.build_info().get("instruction_sets", [""])
SIZES = (1, 2, 7, 42, 63, 129)  # after whole vectors of 16: 1, 2, 7, 10, 15 and 1 columns
KINDS = ("scores", "softmax", "probs")


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native.cpu, "instruction_set", request.param)
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


#: for the test files, under the names of the fixtures
FIXTURES = (instruction_set, threads)


def run(inputs: list[Tensor], spans: Spans, options: Options, grad_loss: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss, saved = native.cpu.scores_forward(inputs, spans, options, True)
    return loss, native.cpu.scores_backward(grad_loss, inputs, saved, spans, options)


def expected(inputs: list[Tensor], spans: Spans, options: Options, grad_loss: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    loss = scores_reference(leaves, spans, options)
    # an option may leave an input (or all) without influence on the loss
    total = (loss * grad_loss.double()).sum() + sum((x * 0).nan_to_num().sum() for x in leaves)
    return loss.detach(), list(torch.autograd.grad(total, leaves))


def check(inputs: list[Tensor], spans: Spans, options: Options, loss_error: float, gradient_error: float) -> None:
    generator = torch.Generator().manual_seed(1)
    grad_loss = torch.rand(inputs[0].shape[:2], generator=generator, dtype=torch.float64) + 0.5
    loss, gradients = run(inputs, spans, options, grad_loss)
    want, want_gradients = expected(inputs, spans, options, grad_loss)
    assert loss.dtype == (torch.float64 if inputs[0].dtype == torch.float64 else torch.float32)
    assert (loss.double() - want).abs().max() <= loss_error * (want.abs().max() + 1), (loss, want)
    for x, gradient, want_gradient in zip(inputs, gradients, want_gradients):
        assert gradient.shape == x.shape
        assert gradient.dtype == x.dtype
        assert gradient.is_contiguous()
        assert (
            relative_error(gradient, want_gradient) <= gradient_error or (gradient - want_gradient).abs().max() <= 1e-13
        )


def joint(n_text: int, n_vision: int) -> Spans:
    return Spans(0, n_text, n_text, n_vision)
