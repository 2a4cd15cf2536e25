"""Small calls of GPU backends, in every variant, kind and span form: what compute-sanitizer watches.

`python -m cacr_uniter.benchmark.calls [--one] [--processes N] BACKEND...` prints a line for every call. In several
processes Triton's cache fills sooner: what takes the time is compiling.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cacr_kernels import fused_cacr, fused_cacr_qk
from cacr_kernels.testing import make_input
from cacr_uniter.benchmark.pool import Row, run_side_by_side
from cacr_uniter.benchmark.shapes import DTYPES

SIZES = ((60, 100), (7, 33), (130, 70))
"""UNITER's (the largest blocks of threads of the fused CUDA kernels, whole quads for Triton), and two that are no
multiples of anything: spans that one tile holds, and longer ones."""

KINDS = ("scores", "softmax", "probs")
FORMS = ("equal", "ragged", "qk", "qk ragged")

BUDGET = 300.0
"""Seconds after which several processes are stopped."""


@dataclass(frozen=True)
class Case:
    """One call, forward and backward: of scores with equal or ragged spans, or from q and k."""

    device: str
    backend: str
    n_text: int
    n_vision: int
    kind: str
    dtype: str
    form: str

    def __str__(self) -> str:
        return f"{self.backend}, {self.n_text} x {self.n_vision}, {self.kind}, {self.dtype}, {self.form}"


def dtypes_of(device: str) -> list[str]:
    """float32 and float16; bfloat16 too, on a GPU from compute capability 8.0 on."""
    wide = device == "cpu" or torch.cuda.get_device_capability() >= (8, 0)
    return ["float32", "float16", *(["bfloat16"] if wide else [])]


def cases(device: str, names: Sequence[str], sizes: Sequence[tuple[int, int]] = SIZES) -> list[Case]:
    """Every kind in float32, and kind "scores" in the other dtypes; the backends take turns."""
    found = []
    for n_text, n_vision in sizes:
        for dtype in dtypes_of(device):
            for kind in KINDS if dtype == "float32" else KINDS[:1]:
                for form in FORMS:
                    from_scores = not form.startswith("qk")
                    takes = [name for name in names if from_scores or (name != "cuda" and kind != "probs")]
                    found += [Case(device, name, n_text, n_vision, kind, dtype, form) for name in takes]
    return found


def call(case: Case) -> None:
    """Forward and backward of two examples of two heads."""
    n_text, n_vision, dtype = case.n_text, case.n_vision, DTYPES[case.dtype]
    lengths: int | torch.Tensor = n_text
    spans: dict[str, Any] = {"kind": case.kind, "backend": case.backend}
    if case.form.endswith("ragged"):
        lengths = torch.tensor([n_text, max(n_text - 1, 0)], device=case.device)
        spans |= {"max_n_text": n_text, "n_vision": n_vision, "vision_start": n_text}
    if case.form.startswith("qk"):
        q, k = (torch.randn(2, 2, n_text + n_vision, 64, device=case.device).to(dtype) for _ in range(2))
        fused_cacr_qk(q.requires_grad_(), k, lengths, **spans).backward()
    else:
        attn = make_input(case.kind, n_text, n_vision, batch=2, heads=2, dtype=dtype, device=case.device)
        fused_cacr(attn.requires_grad_(), lengths, **spans).backward()
    if case.device == "cuda":
        torch.cuda.synchronize()  # a kernel that failed is named by its line


def row_of(case: Case) -> Row:
    """A call as a task of ``worker``; an error is a row."""
    try:
        call(case)
    except Exception as error:
        return {"status": "error", "note": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"status": "ok"}


def call_everything(chosen: Sequence[Case], processes: int = 1, seconds: float = BUDGET) -> int:
    """Runs all of them and prints a line for each; returns the number of those that failed.

    In this process a call that fails raises, and nothing is late.
    """
    if processes == 1:
        for case in chosen:
            call(case)
            print(f"{case}: ok", flush=True)
        return 0
    tasks: list[tuple[str, dict[str, Any]]] = [("call", asdict(case)) for case in chosen]
    failed = 0
    for case, rows in zip(chosen, run_side_by_side(tasks, chosen[0].device, processes, seconds)):
        row = rows[-1]
        failed += row["status"] not in ("ok", "skipped")
        print(f"{case}: {row['status']} {row.get('note', '')}".rstrip(), flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backends", nargs="+", choices=("cuda", "triton"))
    parser.add_argument("--one", action="store_true", help="only the first call of each backend")
    parser.add_argument("--processes", type=int, default=1, help="that share the calls")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of several processes")
    args = parser.parse_args()
    # every tensor an allocation of its own: inside a cached segment nothing is out of bounds
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if not torch.cuda.is_available():
        raise SystemExit("no GPU")
    chosen = cases("cuda", args.backends)
    if args.one:
        chosen = [next(case for case in chosen if case.backend == name) for name in args.backends]
    failed = call_everything(chosen, args.processes, args.budget)
    print(f"{failed} of {len(chosen)} calls failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
