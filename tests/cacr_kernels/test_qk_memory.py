"""Memory of fused_cacr_qk on backend "triton": O(N D), proved without a GPU by counting host allocations.

The host functions run on meta tensors with every kernel launch stubbed, inside a dispatch mode that adds up all storage
ever allocated (freed memory is not subtracted: an upper bound of the peak). A mode around the registered operator would
see nothing of this.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cacr_kernels.problem import Options, Spans

pytest.importorskip("triton")
from cacr_kernels.triton import qk_backward, qk_forward, qk_problem, qk_scores, qk_softmax

HEADS, N, D = 16, 16_384, 64
KERNELS = {
    (module, name)
    for module in (qk_scores, qk_problem, qk_softmax)
    for name in vars(module)
    if name.endswith("_kernel")
}
#: of kind "scores", for wide float32 heads only
WIDE = {"qk_wide_forward_kernel", "qk_wide_gradient_kernel"}


def kernels_of(module) -> set[str]:
    return {name for owner, name in KERNELS if owner is module}


class Allocations(TorchDispatchMode):
    """Bytes of every storage created inside, and the elements of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.largest = 0

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.storages[storage._cdata] = storage
                self.largest = max(self.largest, x.numel())
        return result


class Stub:
    def __init__(self, name: str, launched: set[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.add(self.name)


def allocate(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, arch: int, *, kind: str = "scores", n_text: int = N // 2
) -> tuple[Allocations, int, set[str]]:
    """Forward and backward at N = 16,384: allocations, bytes of q, the kernels that would have run."""
    launched: set[str] = set()
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Stub(name, launched))
    monkeypatch.setattr(qk_problem, "architecture", lambda device: arch)
    q = torch.empty(1, HEADS, N, D, dtype=dtype, device="meta")
    k = torch.empty_like(q)
    grad_loss = torch.empty(1, HEADS, device="meta")
    problem = (Spans(0, n_text, n_text, N - n_text), Options(kind=kind))
    with Allocations() as allocations:
        _, saved = qk_forward([q, k], *problem, True, 0.125)
        qk_backward(grad_loss, [q, k], saved, *problem, 0.125)
    return allocations, q.nbytes, launched


def assert_linear(allocations: Allocations, q_bytes: int) -> None:
    assert allocations.total < 16 * q_bytes
    assert allocations.largest < N * N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", [0, 80, 90])
def test_memory_is_linear_in_the_sequence(monkeypatch, dtype, arch):
    allocations, q_bytes, launched = allocate(monkeypatch, dtype, arch)
    assert launched == (kernels_of(qk_scores) | kernels_of(qk_problem)) - WIDE
    assert allocations.total > 4 * q_bytes  # U, dU, dQ, dK and the results were seen
    assert_linear(allocations, q_bytes)


@pytest.mark.parametrize("place", ["project", "finish"])
def test_a_planted_square_workspace_is_found(monkeypatch, place):
    honest = getattr(qk_scores, place)

    def planted(problem, *rest):
        problem.q.new_empty((1, 1, problem.n, problem.n), dtype=torch.uint8)
        return honest(problem, *rest)

    monkeypatch.setattr(qk_scores, place, planted)
    allocations, q_bytes, _ = allocate(monkeypatch, torch.bfloat16, 90)
    with pytest.raises(AssertionError):
        assert_linear(allocations, q_bytes)


@pytest.mark.parametrize("n_text", [64, N // 16])
def test_memory_of_softmax_is_that_of_the_cross_blocks(monkeypatch, n_text):
    allocations, q_bytes, launched = allocate(monkeypatch, torch.bfloat16, 90, kind="softmax", n_text=n_text)
    assert launched == kernels_of(qk_softmax) | kernels_of(qk_problem)
    cross_bytes = 2 * 4 * HEADS * n_text * (N - n_text)
    assert allocations.total < 16 * q_bytes + 8 * cross_bytes
    assert allocations.largest <= max(2 * HEADS * n_text * (N - n_text), HEADS * N * D)
