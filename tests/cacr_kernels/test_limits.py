"""The ends of the contract: a hundred thousand problems, 4096 tokens a span, tensors whose offsets exceed 32 bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cacr_kernels import fused_cacr, fused_cacr_qk
from cacr_kernels.reference import cacr_closed_form
from cacr_kernels.testing import loss_and_gradients, make_scores, relative_error

#: a GPU's memory holds one of these tests at a time
pytestmark = pytest.mark.xdist_group("large") if torch.cuda.is_available() else []


@pytest.fixture(autouse=True)
def returned_memory():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def kernel(backend):
    if backend == "reference":
        pytest.skip("the reference is what the others are compared with")
    return backend


@pytest.fixture
def compiled(kernel, device):
    if kernel in ("triton", "cuda") and device == "cpu":
        pytest.skip(f"{kernel}: so many programs take minutes without a GPU")
    return kernel


@pytest.fixture
def on_gpu(compiled, device):
    if device == "cpu":
        pytest.skip(f"{compiled}: 1.6 trillion multiply-adds take minutes on a CPU")
    return compiled


def check(backend: str, attn: Tensor, n_text: int, **options) -> None:
    loss, (gradient,) = loss_and_gradients(lambda x: fused_cacr(x, n_text, backend=backend, **options), attn)
    expected, (want,) = loss_and_gradients(lambda x: cacr_closed_form(x, n_text, **options), attn.double())
    # 16 bits: X sums thousands of products in one accumulator of the tensor cores, which truncate
    assert relative_error(loss, expected) <= (2e-6 if attn.dtype == torch.float32 else 1e-4)
    assert relative_error(gradient, want) <= (1e-4 if attn.dtype == torch.float32 else 4e-3)


def test_a_hundred_thousand_problems(compiled, device):
    """More than the 65,535 that the second axis of a CUDA grid takes."""
    check(compiled, make_scores(3, 2, batch=2000, heads=50, device=device), 3, reduction="sum")


@pytest.mark.parametrize(("n_text", "n_vision"), [(4096, 3), (3, 4096)])
def test_longest_spans(compiled, device, n_text, n_vision):
    check(compiled, make_scores(n_text, n_vision, std=0.3, device=device), n_text)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_longest_sequence(on_gpu, device, dtype):
    """8192 tokens: X deviates by 1, as the scores do."""
    attn = make_scores(4096, 4096, dtype=dtype, device=device)
    check(on_gpu, attn, 4096, projection_scale=1 / 4096)


@pytest.mark.gpu
def test_longest_sequence_from_queries_and_keys(on_gpu, device):
    if on_gpu == "cuda":
        pytest.skip("the CUDA backend computes fused_cacr only")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 8192, 64, generator=generator).to(device) for _ in "qk")
    options = {"projection_scale": 1 / 4096, "backend": on_gpu}
    loss, gradients = loss_and_gradients(lambda a, b: fused_cacr_qk(a, b, 4096, **options), q, k)
    expected, want = loss_and_gradients(
        lambda a, b: cacr_closed_form(a @ b.mT / 8, 4096, projection_scale=1 / 4096), q.double(), k.double()
    )
    assert relative_error(loss, expected) <= 2e-6
    assert max(map(relative_error, gradients, want)) <= 1e-4


def apart(x: Tensor, *strides: int) -> Tensor:
    """x [A, B] as a view of storage with these strides. On the CPU, memory that nobody touches costs nothing."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, strides)) + 1
    return torch.empty(size, dtype=x.dtype, device=x.device).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("strides", [(1 << 29, 7), (7, 1 << 29)], ids=["rows", "columns"])
def test_offsets_of_scores_beyond_32_bits(kernel, device, strides):
    attn = make_scores(2, 3, dtype=torch.float16, seed=3, device=device)
    far = apart(attn[0, 0], *strides)[None, None]
    results = [loss_and_gradients(lambda x: fused_cacr(x, 2, backend=kernel), x) for x in (far, attn)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][0], results[1][1][0])


@pytest.mark.parametrize("kind", ["scores", "softmax"])
@pytest.mark.parametrize("strides", [(1 << 29, 3), (3, 1 << 26)], ids=["rows", "columns"])
def test_offsets_of_queries_and_keys_beyond_32_bits(kernel, device, strides, kind):
    if kernel == "cuda":
        pytest.skip("the CUDA backend computes fused_cacr only")
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 1, 5, 33, generator=generator).to(device, torch.float16) for _ in "qk")
    far = [apart(x[0, 0], *strides)[None, None] for x in (q, k)]
    results = [
        loss_and_gradients(lambda a, b: fused_cacr_qk(a, b, 2, kind=kind, backend=kernel), *pair)
        for pair in (far, (q, k))
    ]
    assert math.isfinite(results[1][0])
    assert torch.equal(results[0][0], results[1][0])
    for gradient, want in zip(results[0][1], results[1][1]):
        assert torch.equal(gradient, want)
