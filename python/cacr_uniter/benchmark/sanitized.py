"""Small calls of GPU backends, in every variant, kind and span form, for compute-sanitizer to watch.

`python -m cacr_uniter.benchmark.sanitized [--quick] [--processes N] BACKEND...` prints a line when its calls are done.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from cacr_kernels import fused_cacr, fused_cacr_qk
from cacr_kernels.testing import make_input

SIZES = ((7, 33), (130, 70))
"""Spans that one tile holds, and longer ones; neither is a multiple of anything."""
FUSED_SIZE = (60, 100)
"""Of the largest blocks of threads of the fused CUDA kernels."""

KINDS = ("scores", "softmax", "probs")


def dtypes_of(device: str) -> list[torch.dtype]:
    """float32 and float16; bfloat16 too, on a GPU from compute capability 8.0 on."""
    wide = device == "cpu" or torch.cuda.get_device_capability() >= (8, 0)
    return [torch.float32, torch.float16, *([torch.bfloat16] if wide else [])]


Case = tuple[str, str, int, int, str, torch.dtype]


def cases(device: str, names: Sequence[str], sizes: Sequence[tuple[int, int]] = SIZES) -> list[Case]:
    """(device, backend, T, R, kind, dtype): every kind in float32, and kind "scores" in the other dtypes."""
    found = []
    for name in names:
        for size in (*sizes, FUSED_SIZE) if name == "cuda" else sizes:
            for dtype in dtypes_of(device):
                kinds = KINDS if dtype == torch.float32 else KINDS[:1]
                found += [(device, name, *size, kind, dtype) for kind in kinds]
    return found


def call_everything(chosen: Sequence[Case], processes: int = 1) -> int:
    """Runs forward and backward of all of them; returns the number of calls.

    Several processes fill Triton's cache sooner: what takes the time is compiling.
    """
    if processes == 1:
        return sum(_call(*case) for case in chosen)
    with ProcessPoolExecutor(min(processes, len(chosen)), get_context("spawn")) as pool:
        return sum(pool.map(_call, *zip(*chosen)))


def _call(device: str, name: str, n_text: int, n_vision: int, kind: str, dtype: torch.dtype) -> int:
    """Equal and ragged spans of a batch, and q and k where the backend takes them; returns how many calls."""
    attn = make_input(kind, n_text, n_vision, batch=2, heads=2, dtype=dtype, device=device)
    attn.requires_grad_()
    lengths = torch.tensor([n_text, max(n_text - 1, 0)], device=device)
    fused_cacr(attn, n_text, kind=kind, backend=name).backward()
    ragged: dict[str, Any] = {"max_n_text": n_text, "n_vision": n_vision, "vision_start": n_text}
    fused_cacr(attn, lengths, kind=kind, backend=name, **ragged).backward()
    calls = 2
    if name != "cuda" and kind != "probs":
        q, k = (torch.randn(2, 2, n_text + n_vision, 64, device=device).to(dtype) for _ in range(2))
        q.requires_grad_()
        fused_cacr_qk(q, k, n_text, kind=kind, backend=name).backward()
        calls += 1
    if device == "cuda":
        torch.cuda.synchronize()  # a kernel that failed is named by its line
    print(f"{name}, {n_text} x {n_vision}, {kind}, {str(dtype).removeprefix('torch.')}: {calls} calls", flush=True)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backends", nargs="+", choices=("cuda", "triton"))
    parser.add_argument("--quick", action="store_true", help="one size, one kind, float32")
    parser.add_argument("--processes", type=int, default=1, help="that share the calls")
    args = parser.parse_args()
    # every tensor an allocation of its own: inside a cached segment nothing is out of bounds
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if not torch.cuda.is_available():
        raise SystemExit("no GPU")
    chosen = cases("cuda", args.backends)
    if args.quick:
        chosen = [next(case for case in chosen if case[1] == name) for name in args.backends]
    print(f"{call_everything(chosen, args.processes)} calls")


if __name__ == "__main__":
    main()
