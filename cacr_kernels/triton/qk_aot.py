"""Ahead-of-time gate of the query/key kernels: every launch of a forward and a backward, compiled without a GPU.

``python -m cacr_kernels.triton.qk_aot`` runs the host functions on meta tensors with launches recorded, compiles what
they would have started with the specialisation that the launcher would choose, and exits with 1 if a kernel spills more
than 64 bytes a thread, exceeds its architecture's shared memory, or rounds the logits of 16-bit inputs to tf32.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton

from ..problem import Options, Spans
from . import qk_problem
from .aot import Recorded, Report, compile_launch, inspect, recording
from .configs import ARCHITECTURES, MEASURED, Key, Launch, family
from .qk_host import qk_backward, qk_forward
from .qk_launch import bucket
from .table import read, trying

HEAD_SIZES = (32, 40, 64, 72, 80, 96, 128, 256)
DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("scores", "softmax")
#: constexpr flags under which one forward and backward starts a kernel twice
_VARIANTS = ("SQUARE", "COLUMNS")


@dataclass(frozen=True)
class Case:
    """One configuration of the host functions. ``ragged``: spans come from a table; else they are whole quads."""

    arch: int
    dtype: str
    d: int
    kind: str
    ragged: bool = True
    #: of a file; none of them: the built-in table
    entries: tuple[tuple[Key, Launch], ...] = ()

    @property
    def measured(self) -> bool:
        """Whether a GPU chose an entry of this case."""
        size = ("qk", self.dtype, bucket(self.d))
        builtin = MEASURED.get(family(self.arch), {})
        return bool(self.entries) or any((key.variant, key.dtype, key.head_size) == size for key in builtin)


#: cases that start every kernel, on the chip with the least shared memory; equal spans; strides that 16 does not divide
QUICK = [
    Case(86, "float32", 64, "scores"),
    Case(86, "float16", 64, "softmax"),
    Case(90, "bfloat16", 64, "scores", ragged=False),
    Case(86, "bfloat16", 72, "scores"),
]


def launches(case: Case) -> dict[str, Recorded]:
    """Every launch of one forward and backward by name: kernel, arguments, constexpr and options."""
    q = torch.empty(2, 4, 256, case.d, dtype=getattr(torch, case.dtype), device="meta")
    k = torch.empty(2, 2, 256, case.d, dtype=q.dtype, device="meta")
    table = torch.empty(2, 4, dtype=torch.int32, device="meta") if case.ragged else None
    problem = (Spans(0, 128, 0, 128, table), Options(kind=case.kind))  # type: ignore[arg-type]
    with (
        trying(dict(case.entries)) if case.entries else nullcontext(),
        mock.patch.object(qk_problem, "architecture", return_value=case.arch),
        recording() as recorded,
    ):
        _, saved = qk_forward([q, k], *problem, True, 0.125)
        qk_backward(torch.empty(2, 4, device="meta"), [q, k], saved, *problem, 0.125)
    found = {}
    for kernel, args, kwargs in recorded:
        name = kernel.fn.__name__.removesuffix("_kernel").removeprefix("qk_")
        variant = "".join(f" {flag.lower()}" for flag in _VARIANTS if kwargs.get(flag))
        found[name + variant] = kernel, args, kwargs
    return found


def faults(case: Case, name: str, report: Report) -> list[str]:
    """What is wrong with a compiled launch, in words; empty when it is within the limits."""
    found = report.excesses(case.arch, case.measured)
    if name == "forward" and case.dtype != "float32" and "tf32" in report.dots:
        found.append("rounds to tf32")
    return found


def check(case: Case) -> list[tuple[str, bool]]:
    """One line for every launch of ``case``, and whether it is within the limits."""
    lines = []
    for name, (kernel, args, kwargs) in launches(case).items():
        report = inspect(compile_launch(kernel, args, kwargs, case.arch))
        found = faults(case, name, report)
        line = (
            f"{name:22s} sm_{case.arch:<4d} {case.dtype:9s} D {case.d:<4d}{case.kind:8s} "
            f"{'ragged' if case.ragged else 'quads ':6s} {report.registers:4d} "
            f"registers {report.spill:6d} B spilled {report.shared:7d} B shared  {', '.join(found)}"
        )
        lines.append((line.rstrip(), not found))
    return lines


def cases(architectures: list[int], dtypes: list[str], sizes: list[int], kinds: list[str]) -> Iterator[Case]:
    for arch in architectures:
        for dtype in dtypes:
            for d in sizes:
                for kind in kinds:
                    yield Case(arch, dtype, d, kind)
                    if kind == "softmax":  # reads matrices along tokens
                        yield Case(arch, dtype, d, kind, ragged=False)


def table_cases(file: Path, kinds: list[str]) -> Iterator[Case]:
    """Forward and backward with the query/key entries of a launch table, for every GPU, dtype and head size in it."""
    found: dict[tuple[str, int, str, int], dict[Key, Launch]] = {}
    for entry in read(file):
        if entry.key.variant == "qk":
            named = (entry.gpu, entry.arch, entry.key.dtype, entry.key.head_size)
            found.setdefault(named, {})[entry.key] = entry.launch
    for (_, arch, dtype, d), entries in found.items():
        for kind in kinds:
            yield Case(arch, dtype, d, kind, entries=tuple(entries.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cacr_kernels.triton.qk_aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--head-size", type=int, nargs="*", default=list(HEAD_SIZES))
    parser.add_argument("--kind", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--quick", action="store_true", help="a few cases that start every kernel")
    parser.add_argument("--table", type=Path, metavar="FILE", help="entries of a launch table, not the built-in ones")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET must be unset: interpreted kernels are not compiled")
    if options.table:
        todo = list(table_cases(options.table, options.kind))
    else:
        todo = QUICK if options.quick else list(cases(options.arch, options.dtype, options.head_size, options.kind))
    faulty = total = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for lines in pool.map(check, todo):
            for line, good in lines:
                print(line, flush=True)
                total += 1
                faulty += not good
    print(f"triton {triton.__version__}: {faulty} of {total} kernels outside the limits")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
