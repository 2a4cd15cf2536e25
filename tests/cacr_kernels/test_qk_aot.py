"""The query/key kernels compile for every architecture without a GPU and stay within its limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from cacr_kernels.triton import qk_aot
from cacr_kernels.triton.aot import Report
from cacr_kernels.triton.qk_launch import block_d, launch

KERNELS = ("forward", "rows", "columns", "wide", "gram", "mix", "tokens")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=root)


@pytest.mark.slow
def test_every_kernel_is_within_the_limits():
    done = run("-m", "cacr_kernels.triton.qk_aot", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    names = {line.split(" sm_")[0].strip() for line in done.stdout.splitlines()[:-1]}
    assert names >= {"forward", "rows", "columns", "wide_forward", "wide_gradient columns", "gram square", "mixed"}


#: prints how many copies of 16 bytes at a time, and of fewer, the forward makes of a head size
COPIES = """
import re, sys
from cacr_kernels.triton import aot, qk_aot
for d in (64, 72):
    launched = qk_aot.launches(qk_aot.Case(86, "bfloat16", d, "scores"))["forward"]
    copied = re.findall(r"cp.async.c[ag].shared.global.* (0x[0-9a-f]+),", aot.compile_launch(*launched, 86).asm["ptx"])
    print(copied.count("0x10"), len(copied))
"""


@pytest.mark.slow
def test_heads_that_16_does_not_divide_are_copied_16_bytes_at_a_time():
    done = run("-c", COPIES)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        wide, every = map(int, line.split())
        assert wide == every > 0


def test_the_gate_finds_faults():
    case = qk_aot.Case(86, "bfloat16", 64, "scores")
    assert qk_aot.faults(case, "forward", Report(255, 64, 99 << 10, frozenset({"bf16"}))) == []
    assert "spills" in qk_aot.faults(case, "rows", Report(255, 65, 0, frozenset()))[0]
    assert "shared memory" in qk_aot.faults(case, "rows", Report(255, 0, (99 << 10) + 1, frozenset()))[0]
    assert "tf32" in qk_aot.faults(case, "forward", Report(255, 0, 0, frozenset({"tf32"})))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_that_form_x_form_it_alike(dtype):
    for d in (size for size in qk_aot.HEAD_SIZES if dtype != torch.float32 or size <= 128):
        forward, rows, columns = (launch(kernel, 90, dtype, d) for kernel in ("forward", "rows", "columns"))
        assert len({forward.m >= 64, rows.m >= 64, columns.n >= 64}) == 1


def test_the_launch_table_is_complete():
    for arch in (0, 80, 86, 87, 89, 90, 100, 103, 120):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for d in (1, 16, *qk_aot.HEAD_SIZES):
                for kernel in KERNELS:
                    if kernel in KERNELS[:3] and dtype == torch.float32 and block_d(d) > 128 and arch:
                        continue  # contracts in chunks: "wide"
                    assert launch(kernel, arch, dtype, d).precision in ("ieee", "tf32x3")
    assert launch("rows", 120, torch.bfloat16, 64) == launch("rows", 86, torch.bfloat16, 64)
