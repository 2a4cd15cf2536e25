"""Kernel times for pytest-benchmark: `pytest tests/cacr_kernels/test_benchmark.py --benchmark-enable`.

Disabled by default (each call then runs once and is checked); `cacr bench` measures with more care.
"""

import pytest
import torch

from cacr_kernels import fused_cacr, fused_cacr_qk
from cacr_kernels.reference import cacr_closed_form
from cacr_kernels.testing import make_scores, relative_error

T, R = 20, 36


def value_and_gradient(function, *tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    loss = function(*leaves)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def test_nothing_is_timed_unless_asked_for(pytestconfig):
    assert "--benchmark-disable" in pytestconfig.getini("addopts")


@pytest.mark.parametrize("kind", ["scores", "softmax"])
def test_forward_and_backward(benchmark, backend, device, kind):
    attn = make_scores(T, R, batch=1, heads=2, std=0.5, device=device)
    loss, (gradient,) = benchmark(
        value_and_gradient, lambda x: fused_cacr(x, T, kind=kind, backend=backend), attn
    )  # fmt: skip
    want, (want_gradient,) = value_and_gradient(lambda x: cacr_closed_form(x, T, kind=kind), attn.double())
    assert relative_error(loss, want) < 1e-5
    assert relative_error(gradient, want_gradient) < 1e-4


def test_from_queries_and_keys(benchmark, backend, device):
    if backend == "cuda":
        pytest.skip("cuda: computes fused_cacr only")
    generator = torch.Generator().manual_seed(0)
    q, k = (0.7 * torch.randn(1, 2, T + R, 32, generator=generator).to(device) for _ in range(2))
    loss, gradients = benchmark(value_and_gradient, lambda q, k: fused_cacr_qk(q, k, T, backend=backend), q, k)
    want, want_gradients = value_and_gradient(
        lambda q, k: cacr_closed_form(q @ k.mT * 32**-0.5, T), q.double(), k.double()
    )
    assert relative_error(loss, want) < 1e-5
    for gradient, expected in zip(gradients, want_gradients):
        assert relative_error(gradient, expected) < 1e-4
