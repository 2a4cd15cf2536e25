"""The Triton scores kernels called as cacr_kernels.ops calls them, on every path: what their tests share.

Without a GPU they run under Triton's interpreter (conftest.py sets TRITON_INTERPRET before triton is imported), with
one, on it. All paths are exercised at small sizes: without buckets, all spans are large.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cacr_kernels.problem import Options
from cacr_kernels.reference.closed_form import scores_reference
from cacr_kernels.testing import make_input, relative_error

pytest.importorskip("triton")
from cacr_kernels.triton import host, scores_backward, scores_forward
from cacr_kernels.triton.configs import INTERPRETER, Launch

from .tensor_cores import tensor_cores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = ("small", "whole sides", "whole logits", "large")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What is allocated without a value is NaN: nothing may count on it, and every element of a result is written."""

    def poisoned(allocate):
        def poison(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return poison

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param == "large":
        monkeypatch.setattr(host, "BUCKETS", ())
    if request.param.startswith("whole"):
        if DEVICE == "cuda":
            pytest.skip("a GPU's own plan says which sides are held whole: this is 'small' once more")
        monkeypatch.setattr(host, "INTERPRETER", replace(host.INTERPRETER, whole=request.param.removeprefix("whole ")))
    if request.param == "whole logits" and DEVICE == "cpu":
        # its passes form X in tiles of different sizes, whose products numpy would sum in different orders
        request.getfixturevalue("tensor_cores")
    return request.param


def run(inputs, spans, options=None, grad_loss=None):
    """(loss [B, H], gradients) of the kernels; grad_loss defaults to distinct weights."""
    options = options or Options()
    inputs = [x.to(DEVICE) for x in inputs]
    loss, saved = scores_forward(inputs, spans, options, True)
    if grad_loss is None:
        grad_loss = torch.linspace(0.5, 2.0, max(loss.numel(), 1), device=DEVICE)[: loss.numel()].view(loss.shape)
    return loss, scores_backward(grad_loss, inputs, saved, spans, options), grad_loss


def expected(inputs, spans, options, grad_loss):
    leaves = [x.detach().to(DEVICE, torch.float64).requires_grad_() for x in inputs]
    loss = scores_reference(leaves, spans, options)
    gradients = torch.autograd.grad((loss * grad_loss).sum(), leaves, allow_unused=True)
    return loss.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]


def check(inputs, spans, options=None, loss_budget=1e-6, gradient_budget=5e-6):
    options = options or Options()
    loss, gradients, grad_loss = run(inputs, spans, options)
    want_loss, want_gradients = expected(inputs, spans, options, grad_loss)
    assert loss.dtype == torch.float32
    assert relative_error(loss, want_loss) <= loss_budget
    for x, gradient, want in zip(inputs, gradients, want_gradients):
        assert gradient.dtype == x.dtype
        assert gradient.shape == x.shape
        assert gradient.is_contiguous()
        assert relative_error(gradient, want) <= gradient_budget
    return loss, gradients


def attention(kind, n, *, batch=1, heads=1, std=0.5, seed=0, dtype=torch.float32):
    """[batch, heads, n, n]: scores, or probabilities for kind "probs"."""
    half = n // 2
    return make_input(kind, half, n - half, batch=batch, heads=heads, std=std, seed=seed, dtype=dtype)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles along every axis at sizes that the interpreter can afford."""
    kernels = {
        name: Launch(dict.fromkeys(entry.blocks, 32), entry.num_warps) for name, entry in INTERPRETER.kernels.items()
    }
    monkeypatch.setattr(host, "INTERPRETER", replace(host.INTERPRETER, kernels=kernels))


#: a test module binds them to their names, for pytest to find
FIXTURES = (poisoned_memory, path, small_tiles, tensor_cores)
