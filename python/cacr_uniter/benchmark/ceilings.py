"""The machine's ceilings, measured before anything else: copy bandwidth, products, exponentials."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cacr_kernels import native
from cacr_uniter.benchmark.timing import l2_bytes, timer_for

UNITS = {"copy": "B/s", "exp": "1/s"}
"""Units; products are in flop/s."""

_CPU_SIZES = {"copy": 1 << 26, "matmul": 1024, "exp": 1 << 14}
_CUDA_SIZES = {"copy": 1 << 28, "matmul": 8192, "exp": 1 << 22}


def measure_ceilings(device: str, seconds: float = 0.5, scale: float = 1.0, clock: str = "wall") -> dict[str, float]:
    """Best rates per second of this machine (the 20th percentile of the times).

    copy: bytes read plus written by a copy that no cache holds. matmul X: library product of two square matrices in
    precision X (tf32: a GPU's float32 with ten mantissa bits; a float32 product of full precision costs three of
    them). multiply-add float32: a CPU's, from registers and the L1 cache; a library's product may be far slower.
    exp: ``torch.exp`` of float32 numbers that fit in a cache, or the CPU kernels' own where it is faster; on a GPU that
    Triton can serve exp2 of registers, which is what its exp unit can do.

    Args:
        seconds: spent on each.
        scale: of the sizes, for tests.
        clock: of a CPU, see ``timing``.
    """
    sizes = {
        name: max(int(size * scale), 64) for name, size in (_CUDA_SIZES if device == "cuda" else _CPU_SIZES).items()
    }

    def rate(amount: float, run: Callable[[], object]) -> float:
        return amount / (timer_for(device, clock)(lambda: run, seconds, False).p20_ms / 1e3)

    found = {"copy": rate(*_copy(torch.randn(sizes["copy"], device=device)))}
    n = sizes["matmul"]
    dtypes = [("float32", torch.float32)]
    if device == "cpu" or torch.cuda.get_device_capability() >= (8, 0):  # before, without tensor cores
        dtypes.append(("bfloat16", torch.bfloat16))
    if device == "cuda":  # a CPU without float16 units takes a minute for one product
        dtypes.append(("float16", torch.float16))
    for name, dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[f"matmul {name}"] = rate(2.0 * n**3, _product(a, b, out))
        if name == "float32" and device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            found["matmul tf32"] = rate(2.0 * n**3, _product(a, b, out))
            torch.backends.cuda.matmul.allow_tf32 = before
    found["exp"] = _exp_rate(device, sizes["exp"], rate)
    own = native.cpu_rates(2 * seconds) if device == "cpu" else None
    if own is not None:
        found["multiply-add float32"] = 2.0 * own[0]
        found["exp"] = max(found["exp"], own[1])
    return found


def _copy(source: Tensor) -> tuple[float, Callable[[], object]]:
    target = torch.empty_like(source)
    return 2.0 * source.nbytes, lambda: target.copy_(source)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], object]:
    return lambda: torch.mm(a, b, out=out)


def _exp_rate(device: str, n: int, rate: Callable[[float, Callable[[], object]], float]) -> float:
    registers = _exp2_rounds(n) if device == "cuda" else None
    if registers is not None:
        return rate(*registers)
    if device == "cuda":
        cached = (l2_bytes() or 1 << 21) // 2
        numbers = torch.rand(min(n, cached // 4), device=device)  # written in place
        out = numbers
    else:
        numbers = torch.rand(n * torch.get_num_threads(), device=device)
        out = torch.empty_like(numbers)
    rounds = 64
    return rate(float(len(numbers)) * rounds, lambda: [torch.exp(numbers, out=out) for _ in range(rounds)])


def _exp2_rounds(n: int) -> tuple[float, Callable[[], object]] | None:
    """Exponentials of a call of the exp unit's kernel, and the call; None where Triton cannot run it."""
    if torch.cuda.get_device_capability() < (7, 0):
        return None
    try:
        from cacr_uniter.benchmark.exp_unit import ROUNDS, exp2_rounds

        numbers = torch.rand(n, device="cuda")
        exp2_rounds(numbers)
    except Exception:  # Triton promises nothing before 8.0 and may be missing
        return None
    return float(n) * ROUNDS, lambda: exp2_rounds(numbers)
