"""The launch table compiles for its architectures without a GPU and stays within their limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from cacr_kernels.triton import aot
from cacr_kernels.triton.configs import ARCHITECTURES, DTYPES, FORMS_X, INTERPRETER, TABLE, plan

ROOT = Path(__file__).parents[2]

#: prints how often each kernel would be compiled for batches of one size bucket
COMPILATIONS = """
from collections import defaultdict
from dataclasses import replace
import torch
from cacr_kernels.problem import Options, Spans
from cacr_kernels.triton import aot, host, qk_backward, qk_forward, scores_backward, scores_forward

found = defaultdict(set)
plans = [replace(host.INTERPRETER, whole=whole) for whole in (None, "sides", "logits")]
for start, t, r in ((0, 1, 1), (1, 1, 16), (1, 16, 47), (2, 48, 63), (16, 17, 1), (0, 32, 64), (4, 60, 100), (0, 8, 4)):
    for ragged in (False, True):
        n = start + t + r
        quads = not ragged and all(x % 4 == 0 for x in (start, t, r))
        for batch, heads in ((1, 1), (2, 16)):
            meta = dict(device="meta")
            table = torch.empty(batch, 4, dtype=torch.int32, **meta) if ragged else None
            spans, grad_loss = Spans(start, t, start + t, r, table), torch.empty(batch, heads, **meta)
            attn, q, k = (torch.empty(batch, heads, n, width, **meta) for width in (n, 64, 64))
            for kind in ("scores", "softmax"):
                options = Options(kind=kind)
                with aot.recording() as recorded:
                    for host.INTERPRETER in plans:
                        _, saved = scores_forward([attn], spans, options, True)
                        scores_backward(grad_loss, [attn], saved, spans, options)
                    _, saved = qk_forward([q, k], spans, options, True, 0.125)
                    qk_backward(grad_loss, [q, k], saved, spans, options, 0.125)
                for kernel, args, kwargs in recorded:
                    _, signature, constants, attributes = aot.as_launched(kernel, args, kwargs, 90)
                    flags = str(sorted((name, v) for name, v in kwargs.items() if v is not None))
                    launch = kernel.fn.__name__, kind, ragged, quads, flags
                    found[launch].add(str((signature, constants, attributes)))
for (name, *_), signatures in found.items():
    print(name, len(signatures))
"""
OLDEST = ROOT / ".cache" / "triton-3.6"


def compiled(program: str) -> str:
    """What a Python program prints whose kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def gate(*arguments: str, path: Path | None = None, module: str = "aot") -> subprocess.CompletedProcess[str]:
    """The gate as a command: the kernels of this process may be interpreted ones, which do not compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-m", f"cacr_kernels.triton.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def test_sizes_that_change_with_every_batch_compile_nothing_anew():
    """Among them 1 and multiples of 16, which Triton would specialise on."""
    counts = [line.split() for line in compiled(COMPILATIONS).splitlines()]
    assert {name for name, _ in counts} >= {
        "small_forward_kernel",
        "small_own_kernel",
        "whole_backward_kernel",
        "whole_rows_kernel",
        "qk_rows_kernel",
        "qk_mix_kernel",
    }
    assert [name for name, count in counts if int(count) > 1] == []


@pytest.mark.slow
def test_a_case_of_every_kernel_is_within_the_limits():
    done = gate("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"0 of {len(aot.QUICK)} outside the limits" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not OLDEST.exists(), reason="Triton 3.6.0 is not in .cache/triton-3.6; make test puts it there")
@pytest.mark.parametrize("module", ["aot", "qk_aot"])
def test_the_oldest_supported_triton_compiles_them_too(module):
    done = gate("--quick", path=OLDEST, module=module)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton 3.6.0" in done.stdout


def test_the_quick_subset_covers_everything():
    assert {case.kernel for case in aot.QUICK} == set(aot.KERNELS)
    assert {case.arch for case in aot.QUICK} == set(ARCHITECTURES)
    assert {case.dtype for case in aot.QUICK} == set(DTYPES)
    assert {case.kind for case in aot.QUICK} == set(aot.KINDS)


def test_the_table_is_complete():
    for arch in ARCHITECTURES:
        for dtype in DTYPES:
            assert set(TABLE[arch][dtype].kernels) == set(aot.KERNELS) == set(INTERPRETER.kernels)
    assert plan(87, "float32") is TABLE[86]["float32"]
    assert plan(103, "bfloat16") is TABLE[100]["bfloat16"]
    assert plan(110, "float32") is TABLE[100]["float32"]
    assert plan(120, "float32") is TABLE[89]["float32"]


def test_a_sum_of_the_wrong_register_is_found():
    """From the machine code that read out of bounds on an H100, and the same with the register set in between."""
    lower = "        /*70e0*/                   UIADD3 UR34, UP0, UR4, 0x40, URZ ;  /* 0x1 */\n"
    upper = "        /*70f0*/                   UIADD3.X UR35, UR4, -0x7fffffe0, URZ, UP0, !UPT ;\n"
    between = "        /*70e8*/                   UMOV UR4, URZ ;\n"
    good = "        /*70f0*/                   UIADD3.X UR35, UR5, -0x7fffffe0, URZ, UP0, !UPT ;\n"
    assert aot.stale_sums(lower + upper) == ("UIADD3.X UR35, UR4, -0x7fffffe0, URZ, UP0, !UPT",)
    assert aot.stale_sums(lower + between + upper) == aot.stale_sums(lower + good) == ()
    zero = "/*5d40*/ UIADD3 UR15, UP0, URZ, UR15, URZ ;\n"
    assert aot.stale_sums(zero + "/*5d80*/ UIADD3.X UR45, UR45, 0x40, URZ, UP0, !UPT ;\n") == ()
    assert len(aot.stale_sums(zero + "/*5d80*/ UIADD3.X UR45, UR15, 0x40, URZ, UP0, !UPT ;\n")) == 1
    minus_one = "/*2390*/ UIADD3 UR25, UP0, UR25, UR14, URZ ;\n/*23b0*/ UIADD3.X UR7, UR7, UR14, URZ, UP0, !UPT ;\n"
    assert aot.stale_sums(minus_one) == ()
    report = aot.Report(1, 0, 0, frozenset(), stale=aot.stale_sums(lower + upper))
    assert "wrong register" in report.faults(aot.Case("own_64", 90, "bfloat16", "scores"))[0]


def test_products_in_tensor_memory_are_a_fault():
    report = aot.Report(1, 0, 0, frozenset({"bf16", "tensor memory"}))
    assert "tensor memory" in report.faults(aot.Case("own_64", 100, "bfloat16", "scores"))[0]


def test_kernels_that_form_x_form_it_alike():
    for arch in ARCHITECTURES:
        for dtype in DTYPES:
            entries = plan(arch, dtype).kernels
            for path in ("_64", "_128", "large_"):
                blocks = [entries[name].blocks for name in FORMS_X if path in name]
                chunked = [block for block in blocks if "BLOCK_K" in block]
                assert len(chunked) == 3
                assert len({(block["BLOCK_K"], block.get("BLOCK_C")) for block in chunked}) == 1
                assert len({block["BLOCK_I"] >= 64 for block in blocks}) == 1


def test_the_gate_finds_faults():
    case = aot.Case("own_128", 86, "float32", "scores")
    assert aot.Report(255, 64, 99 << 10, frozenset()).faults(case) == []
    assert "spills" in aot.Report(255, 65, 0, frozenset()).faults(case)[0]
    assert "shared memory" in aot.Report(255, 0, (99 << 10) + 1, frozenset()).faults(case)[0]
    assert "tf32" in aot.Report(255, 0, 0, frozenset({"tf32"})).faults(case)[0]


def test_float32_never_uses_tf32_but_in_three_products():
    for arch in ARCHITECTURES:
        assert plan(arch, "float32").dot in ("ieee", "tf32x3")
        assert plan(arch, "float16").dot == plan(arch, "bfloat16").dot == "split"


#: prints the loads of 16-bit numbers of a kernel for spans of whole quads: four at a time, and one by one
LOADS = r"""
import re
from cacr_kernels.triton import aot

inspect, texts = aot.inspect, []
aot.inspect = lambda compiled: texts.append(compiled.asm["ptx"]) or inspect(compiled)
for kernel in ("cross_64", "own_64", "large_v"):
    aot.compile_case(aot.Case(kernel, 86, "bfloat16", "scores", spans="quads"))
    print(kernel, len(re.findall(r"ld\.global\.v2\.b32", texts[-1])), len(re.findall(r"ld\.global\.b16", texts[-1])))
"""


@pytest.mark.slow
def test_whole_quads_are_loaded_four_numbers_at_a_time():
    lines = compiled(LOADS).splitlines()
    assert len(lines) == 3
    for line in lines:
        _, quads, single = line.split()
        assert int(quads) > int(single) == 0


#: prints how often the fused differences of a kernel share a factor: that of all elements is projection_scale
FUSED = r"""
import re
from collections import Counter
from cacr_kernels.triton import aot

inspect, texts = aot.inspect, []
aot.inspect = lambda compiled: texts.append(compiled.asm["ptx"]) or inspect(compiled)
kernels = ("forward_64", "rows_64", "large_forward", "large_g", "large_own")
for kernel, spans in [(kernel, "ragged") for kernel in kernels] + [("forward_64", "quads"), ("large_own", "quads")]:
    aot.compile_case(aot.Case(kernel, 90, "bfloat16", "scores", spans=spans))
    negative = set(re.findall(r"neg\.f32 \s*(%\w+),", texts[-1]))
    products = re.findall(r"fma\.rn\.f32 \s*%\w+, (%\w+), (%\w+), (%\w+);", texts[-1])
    factors = Counter(factor for *pair, added in products if added in negative for factor in pair)
    print(kernel, max(factors.values(), default=0))
"""


@pytest.mark.slow
def test_the_scale_of_x_is_fused_with_no_difference():
    """x - max x is exact at the maximum only if x was rounded before, in the forward and in the backward alike."""
    lines = compiled(FUSED).splitlines()
    assert len(lines) == 7
    assert max(int(line.split()[1]) for line in lines) <= 2, lines
