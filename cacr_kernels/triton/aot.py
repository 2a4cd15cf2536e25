"""Ahead-of-time gate: compile every entry of the launch table without a GPU and read what the compiler made of it.

``python -m cacr_kernels.triton.aot`` prints registers, shared memory and spills of every configuration, and exits with
1 if one spills more than 64 bytes a thread, exceeds its architecture's shared memory, or rounds to tf32. An entry that
a GPU chose (configs.MEASURED, or those of a file: ``--table FILE``) may spill: its measurement justifies it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ..problem import Options, Spans
from .backward_large import large_cross_kernel, large_g_kernel, large_own_kernel, large_v_kernel
from .configs import ARCHITECTURES, BUCKETS, DTYPES, MEASURED, SHARED_LIMIT, Key, Launch, family, plan
from .fill import fill_kernel
from .forward import large_forward_kernel
from .host import Problem
from .products import numbers_kernel, project_kernel
from .small import small_forward_kernel
from .small_backward import small_cross_kernel, small_own_kernel, small_rows_kernel
from .table import read
from .whole import whole_backward_kernel, whole_forward_kernel, whole_rows_kernel

SPILL_LIMIT = 64
KINDS = ("scores", "softmax", "probs")
BLOCKS = ("tt", "tv", "vt", "vv")

KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "numbers": (numbers_kernel, {}),
    "fill": (fill_kernel, {}),
    "project": (project_kernel, {}),
    "large_forward": (large_forward_kernel, {"SAVE": True}),
    "large_g": (large_g_kernel, {}),
    "large_v": (large_v_kernel, {}),
    "large_cross": (large_cross_kernel, {}),
    "large_own": (large_own_kernel, {"GRAD_X": True, "GRAD_Y": True}),
}
for bucket in BUCKETS:
    widths = {"BLOCK_T": bucket, "BLOCK_R": bucket}
    KERNELS |= {
        f"forward_{bucket}": (small_forward_kernel, {"SAVE": True, **widths}),
        f"rows_{bucket}": (small_rows_kernel, {"GRAD_X": True, "GRAD_Y": True, **widths}),
        f"cross_{bucket}": (small_cross_kernel, widths),
        f"own_{bucket}": (small_own_kernel, {"DY": "computed", **widths}),
        f"whole_forward_{bucket}": (whole_forward_kernel, {"SAVE": True, **widths}),
        f"whole_backward_{bucket}": (whole_backward_kernel, {"GRAD_Y": True, **widths}),
        f"whole_rows_{bucket}": (whole_rows_kernel, {"GRAD_Y": True, **widths}),
    }


@dataclass(frozen=True)
class Case:
    """One kernel as one entry of the launch table starts it: the built-in one, or ``entry`` of a file.

    ``spans``: from a table ("ragged"), "equal" ones, or equal ones which begin and end at whole "quads".
    """

    kernel: str
    arch: int
    dtype: str
    kind: str
    unit: bool = True
    spans: str = "ragged"
    narrow: bool = False
    entry: Launch | None = None

    @property
    def launch(self) -> Launch:
        return self.entry or plan(self.arch, self.dtype).kernels[self.kernel]

    @property
    def measured(self) -> bool:
        key = Key("scores", self.kernel, self.dtype)
        return self.entry is not None or key in MEASURED.get(family(self.arch), {})

    def __str__(self) -> str:
        layout = "" if self.unit else " strided"
        layout += {"ragged": "", "equal": " equal spans", "quads": " whole quads"}[self.spans]
        layout += " narrow" if self.narrow else ""
        return f"{self.kernel:18s} sm_{self.arch:<4d} {self.dtype:9s} {self.kind}{layout}"


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case: registers and stack bytes a thread, shared memory, operands of its products.

    ``instructions``: of the machine code, each loop counted once. ``stale``: see :func:`stale_sums`.
    """

    registers: int
    spill: int
    shared: int
    dots: frozenset[str]
    instructions: int = 0
    stale: tuple[str, ...] = ()

    def excesses(self, arch: int, measured: bool) -> list[str]:
        """Resources beyond the limits of sm_``arch``; an entry that a GPU ``measured`` may spill."""
        found = []
        if self.spill > SPILL_LIMIT and not measured:
            found.append(f"spills {self.spill} B a thread, at most {SPILL_LIMIT} allowed")
        limit = SHARED_LIMIT[family(arch)]
        if self.shared > limit:
            found.append(f"needs {self.shared} B of shared memory, sm_{arch} has {limit}")
        found += [f"ptxas added the wrong register: {instruction}" for instruction in self.stale]
        if "tensor memory" in self.dots:
            found.append("multiplies in tensor memory: see configs.SPLIT_REGISTERS")
        return found

    def faults(self, case: Case) -> list[str]:
        found = self.excesses(case.arch, case.measured)
        if "tf32" in self.dots and plan(case.arch, case.dtype).dot != "tf32x3":
            found.append("rounds to tf32")
        return found


Recorded = tuple[Any, tuple[Any, ...], dict[str, Any]]


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Kernels are not launched inside: the list receives (kernel, arguments, constexpr ones and options)."""
    found: list[Recorded] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield found


def as_launched(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arch: int) -> tuple[Any, ...]:
    """(options, signature, constants, attributes) with which the launcher would compile for these arguments."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bound, specialization, rest = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    return kernel._pack_args(backend, kwargs, bound, specialization, rest)


def compile_launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arch: int) -> Any:
    """The kernel compiled for sm_``arch`` as it would be at its launch with these arguments."""
    options, signature, constants, attributes = as_launched(kernel, args, kwargs, arch)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options.__dict__)


def argument(problem: Problem, dtype: str, name: str) -> Any:
    """A kernel argument by its name, as the host passes it."""
    if name in BLOCKS:
        return problem.blocks[BLOCKS.index(name)]
    if name == "work":
        return problem.workspace(1)
    if name in ("spans", "scaling"):
        return getattr(problem, name)
    if name in ("loss", "stats", "grad_loss") or name.startswith("grad_"):
        kind = getattr(torch, dtype) if name.startswith("grad_") and name != "grad_loss" else torch.float32
        return torch.empty(1, dtype=kind, device="meta")
    return 7


def stale_sums(machine_code: str) -> tuple[str, ...]:
    """Upper halves of 64-bit sums of uniform registers whose addend is the register of the lower half.

    ptxas 12.8 made such descriptors of shared memory for Hopper's products, which an H100 then read out of bounds.
    """
    found = []
    carry = addend = None
    for name, operands in re.findall(r"\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+) (.*?) ;", machine_code):
        target, *rest = operands.split(", ")
        if name == "UIADD3.X" and carry in rest and addend in rest:
            found.append(f"{name} {operands}")
        if name == "UIADD3" and rest[0].startswith("UP"):
            # the first one: a number that is added may have the same halves, as 0 or -1 has
            carry, addend = rest[0], next((register for register in rest[1:] if re.fullmatch(r"UR\d+", register)), None)
        elif target == addend:  # it holds another number from here on
            carry = addend = None
    return tuple(found)


def inspect(compiled: Any) -> Report:
    """Resource usage from the cubin, and the operand types of the tensor-core instructions in the PTX."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(tool), "--dump-resource-usage", "--dump-sass", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    products = re.findall(r"^\s*(?:@\S+\s+)?((?:wgmma\.mma|mma\.|tcgen05\.mma)\S*)", compiled.asm["ptx"], re.MULTILINE)
    dots = frozenset(kind for line in products for kind in ("tf32", "bf16", "f16") if f".{kind}" in line)
    dots |= {"tensor memory" for line in products if line.startswith("tcgen05")}
    instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s", text, re.MULTILINE))
    spill = usage["STACK"] + usage["LOCAL"]
    return Report(usage["REG"], spill, compiled.metadata.shared, dots, instructions, stale_sums(text))


def compile_case(case: Case) -> Report:
    kernel, flags = KERNELS[case.kernel]
    attn = torch.empty(2, 3, 160, 160, dtype=getattr(torch, case.dtype), device="meta")
    table = torch.empty(2, 4, dtype=torch.int32, device="meta") if case.spans == "ragged" else None
    n_text = 60 if case.spans == "quads" else 59
    spans = Spans(0, n_text, n_text, 100, table)
    problem = Problem([attn if case.unit else attn.mT], spans, Options(kind=case.kind))  # type: ignore[arg-type]
    entry = case.launch
    if case.kernel.startswith("own"):  # float32: dY is in the gradient already (see scores.Backward.small)
        flags = flags | {"DY": "gradient" if case.dtype == "float32" else "computed"}
    if case.narrow:
        flags = flags | {"BLOCK_T": flags["BLOCK_R"] // 2}
    constants = {"KIND": case.kind, "DOT": plan(case.arch, case.dtype).dot, "UNIT": case.unit, **flags, **entry.blocks}
    named = {name: value for name, value in constants.items() if name in kernel.arg_names}
    args = tuple(argument(problem, case.dtype, name) for name in kernel.arg_names if name not in named)
    return inspect(compile_launch(kernel, args, {**named, **entry.options(case.kind)}, case.arch))


def is_launched(case: Case) -> bool:
    """False for a kernel of whole.py where the plan gives its work to another."""
    if not case.kernel.startswith("whole"):
        return True
    found, size = plan(case.arch, case.dtype), int(case.kernel.rpartition("_")[2])
    other = {"sides": "whole_rows", "logits": "whole_backward"}.get(found.whole or "", "whole")
    if found.whole == "sides" and case.narrow and size == 64:  # sides have at least 64 columns: host.Problem.widths
        return False
    taken = found.takes_whole(case.kind, size, size // 2 if case.narrow else size, size)
    return taken and not case.kernel.startswith(other)


def cases(architectures: list[int], dtypes: list[str], kernels: list[str], kinds: list[str]) -> Iterator[Case]:
    """The matrix: ragged spans and whole quads for every kind; strided columns and other equal spans once.

    The small path also ``narrow``: text half as long as vision, with code of its own for either side. ``numbers``
    exists for kind "softmax" only.
    """
    for arch in architectures:
        for dtype in dtypes:
            for kernel in kernels:
                found = []
                for narrow in (False, True) if kernel[-1].isdigit() else (False,):
                    for kind in {"numbers": ["softmax"], "fill": ["scores"]}.get(kernel, kinds):
                        for spans in ("ragged", "quads"):
                            found.append(Case(kernel, arch, dtype, kind, spans=spans, narrow=narrow))
                if "scores" in kinds and kernel not in ("numbers", "fill"):
                    narrow = kernel.startswith("whole")
                    found.append(Case(kernel, arch, dtype, "scores", unit=False, narrow=narrow))
                    found.append(Case(kernel, arch, dtype, "scores", spans="equal", narrow=narrow))
                yield from filter(is_launched, found)


def table_cases(file: Path, kinds: list[str]) -> Iterator[Case]:
    """The entries of the scores kernels in a launch table."""
    for entry in read(file):
        if entry.key.variant == "scores":
            for kind in ["softmax"] if entry.key.kernel == "numbers" else kinds:
                yield Case(entry.key.kernel, entry.arch, entry.key.dtype, kind, entry=entry.launch)


#: one case of every kernel that covers every architecture, dtype and kind
QUICK = (
    Case("forward_128", 86, "float32", "scores"),
    Case("forward_64", 90, "bfloat16", "softmax"),
    Case("rows_128", 80, "float32", "probs"),
    Case("rows_128", 90, "bfloat16", "scores", spans="equal"),
    Case("rows_64", 100, "float16", "scores"),
    Case("cross_128", 90, "float32", "scores"),
    Case("cross_64", 86, "bfloat16", "softmax"),
    Case("own_128", 89, "float16", "softmax"),
    Case("own_128", 90, "bfloat16", "scores", narrow=True),
    Case("whole_forward_128", 90, "float16", "scores", narrow=True),
    Case("whole_backward_128", 90, "bfloat16", "scores", spans="quads", narrow=True),
    Case("whole_forward_64", 90, "bfloat16", "probs"),
    Case("whole_backward_64", 90, "float16", "softmax"),
    Case("whole_rows_128", 90, "float32", "scores", narrow=True),
    Case("whole_rows_64", 90, "float32", "probs"),
    Case("own_64", 80, "float32", "scores"),
    Case("numbers", 100, "bfloat16", "softmax"),
    Case("fill", 80, "float32", "scores"),
    Case("project", 90, "bfloat16", "scores", unit=False),
    Case("large_forward", 100, "float16", "probs", spans="quads"),
    Case("large_g", 90, "float32", "scores"),
    Case("large_v", 100, "float32", "scores"),
    Case("large_cross", 86, "bfloat16", "scores"),
    Case("large_own", 90, "float32", "scores"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cacr_kernels.triton.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--kernel", nargs="*", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--kind", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--quick", action="store_true", help="only a representative subset")
    parser.add_argument("--table", type=Path, metavar="FILE", help="entries of a launch table, not the built-in ones")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET must be unset: interpreted kernels are not compiled")
    if options.table:
        todo = list(table_cases(options.table, options.kind))
    else:
        todo = list(QUICK) if options.quick else list(cases(options.arch, options.dtype, options.kernel, options.kind))
    print(f"triton {triton.__version__}, {len(todo)} configurations")
    faulty = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for case, report in zip(todo, pool.map(compile_case, todo)):
            faults = report.faults(case)
            faulty += bool(faults)
            line = (
                f"{case!s:58s} {report.registers:4d} registers {report.spill:6d} B spilled {report.shared:7d} B shared "
                f"{report.instructions:6d} instructions"
            )
            print(line, *faults, sep="  " if not faults else "  FAULT: ", flush=True)
    print(f"{faulty} of {len(todo)} outside the limits")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
