"""Memory of large CPU gradients: used again once they are gone, never before, and never more of it than was in use."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from cacr_kernels import fused_cacr, fused_cacr_qk, native
from cacr_kernels.testing import make_scores

STATUS = native.cpu_status()
pytestmark = pytest.mark.skipif(not STATUS[0], reason=STATUS[1])

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    """Nothing kept before, the default limit after."""
    native.keep_memory("0")
    native.keep_memory("64")
    yield
    native.keep_memory("0")
    native.keep_memory(os.environ.get("CACR_CPU_KEEP_MB", ""))


def scores(tokens: int = 160, batch: int = 2) -> torch.Tensor:
    return make_scores(60, tokens - 60, batch=batch, heads=12).requires_grad_()


def gradient(x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(fused_cacr(x, 60, backend="cpu"), x)[0]


def kept() -> int:
    return native._native.memory_kept()


def test_freed_memory_is_used_again() -> None:
    x = scores()
    first = gradient(x)
    address, want, size = first.data_ptr(), first.clone(), first.numel() * 4
    assert size > MEGABYTE
    assert kept() == 0
    del first
    assert kept() == size
    again = gradient(x)
    assert again.data_ptr() == address
    assert kept() == 0
    assert torch.equal(again, want)


def test_memory_in_use_is_left_alone() -> None:
    x = scores()
    first = gradient(x)
    address, view, array, want = first.data_ptr(), first[1, 3], first.numpy(), first.clone()
    second = gradient(x)
    del first
    third = gradient(scores())  # what is left are a view and an array of the first one
    assert len({address, second.data_ptr(), third.data_ptr()}) == 3
    second.zero_()
    third.zero_()
    assert torch.equal(torch.from_numpy(array), want)
    assert torch.equal(view, want[1, 3])


def test_accumulated_gradients() -> None:
    x = scores()
    want = gradient(x).clone()
    for _ in range(3):
        fused_cacr(x, 60, backend="cpu").backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 3 * want)


def test_a_block_serves_what_is_at_least_half_of_it() -> None:
    large = gradient(scores(200))
    address, size = large.data_ptr(), large.numel() * 4
    del large
    smaller = gradient(scores(160))
    assert smaller.data_ptr() == address
    assert smaller.numel() * 4 < size
    assert smaller.untyped_storage().nbytes() == smaller.numel() * 4
    del smaller
    assert kept() == size
    half = gradient(scores(200, batch=1))
    assert half.data_ptr() == address
    del half
    little = gradient(scores(160, batch=1))  # less than half: everything kept is freed first
    assert kept() == 0
    del little


def test_what_does_not_fit_is_freed_before_more_is_taken() -> None:
    a, b = gradient(scores()), gradient(scores())
    size = a.numel() * 4
    del a, b
    assert kept() == 2 * size
    larger = gradient(scores(200))
    assert kept() == 0
    del larger


def test_no_more_is_kept_than_the_limit() -> None:
    native.keep_memory("3")
    a, b = gradient(scores()), gradient(scores())
    size = a.numel() * 4
    assert size < 3 * MEGABYTE < 2 * size
    del a, b
    assert kept() == size
    native.keep_memory("2")
    assert kept() == 0


def test_queries_and_keys() -> None:
    q, k = torch.randn(2, 2, 12, 256, 64).unbind()
    q.requires_grad_()
    k.requires_grad_()
    grads = torch.autograd.grad(fused_cacr_qk(q, k, 100, backend="cpu"), (q, k))
    addresses, size = {g.data_ptr() for g in grads}, sum(g.numel() * 4 for g in grads)
    del grads
    gc.collect()
    assert kept() == size > MEGABYTE
    grads = torch.autograd.grad(fused_cacr_qk(q, k, 100, backend="cpu"), (q, k))
    assert {g.data_ptr() for g in grads} == addresses


@pytest.mark.parametrize("value", ["-1", "1.5", "all"])
def test_a_limit_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"CACR_CPU_KEEP_MB must be a whole number of megabytes.*{value}"):
        native.keep_memory(value)


def test_the_environment_switches_it_off() -> None:
    program = (
        "import torch; from cacr_kernels import fused_cacr, native\n"
        "x = torch.randn(2, 12, 160, 160, requires_grad=True)\n"
        "fused_cacr(x, 60, backend='cpu').backward(); x.grad = None\n"
        "print(native._native.memory_kept())"
    )
    for value, want in (("0", 0), ("", 2 * 12 * 160 * 160 * 4)):
        environment = {**os.environ, "CACR_CPU_KEEP_MB": value}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert int(done.stdout) == want


def test_a_setting_that_is_no_number_is_the_reason_why_the_backend_cannot_run() -> None:
    program = "import cacr_kernels; print(cacr_kernels.backends()['cpu'].reason)"
    environment = {**os.environ, "CACR_CPU_KEEP_MB": "1GB"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "CACR_CPU_KEEP_MB must be a whole number of megabytes" in done.stdout


def test_large_gradients_are_no_views() -> None:
    x = torch.randn(1, 2, 400, 400, requires_grad=True)
    (gradient,) = torch.autograd.grad(fused_cacr(x, 100, backend="cpu"), x)
    assert not gradient._is_view()
    gradient.mul_(torch.ones((), requires_grad=True))
