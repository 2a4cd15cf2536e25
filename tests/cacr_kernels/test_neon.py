"""CPU kernels that this machine does not choose by itself, built with the definitions of CMakeLists.txt.

neon: as an ARM machine runs them, cross-compiled and run under QEMU. avx512: its tiles and half vectors, made of AVX2.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from cacr_kernels import fused_cacr, fused_cacr_qk, native
from cacr_kernels.testing import make_input, relative_error

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("scores", "softmax", "probs")


def tools(name: str) -> tuple[list[str], list[str]]:
    """(compiler and flags, what runs the program), or a skip."""
    if name == "neon":
        compiler = shutil.which("aarch64-linux-gnu-g++")
        emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        if not (compiler and emulator):
            pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
        return [compiler, "-static"], [emulator]
    compiler = shutil.which("g++")
    if not (compiler and "avx2" in native.build_info().get("instruction_sets", [])):
        pytest.skip("needs g++ and a processor with AVX2")
    return [compiler, "-mavx2", "-mfma"], []


def definitions(name: str) -> list[str]:
    """Those of an instruction set in CMakeLists.txt; the table is the one that neon_main.cpp runs."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    found = re.search(rf"add_instruction_set\({name} \w+ (\d+) (\d+)", text)
    assert found is not None
    return [
        f"-DCACR_ISA={name}",
        "-DCACR_TABLE=kBaseKernels",
        f"-DCACR_VECTOR_BYTES={found[1]}",
        f"-DCACR_REGISTERS={found[2]}",
    ]


@pytest.fixture(scope="module", params=["neon", "avx512"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs neon_main.cpp with the kernels."""
    if not (ROOT / "csrc").exists():
        pytest.skip("needs the C++ sources")
    compiler, runner = tools(request.param)
    out = tmp_path_factory.mktemp(request.param) / "kernels"
    command = [*compiler, "-std=c++17", "-O2", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    command += [*definitions(request.param), f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    sources = [str(ROOT / "csrc" / "cpu" / "isa.cpp"), str(Path(__file__).with_name("neon_main.cpp"))]
    done = subprocess.run([*command, *sources, "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [*runner, str(out)]


def run(program: list[str], variant: int, kind: str, inputs: list[torch.Tensor], n_text: int) -> list[torch.Tensor]:
    """[loss [H], gradient, ...] of float32 inputs [1, H, N, N] or [1, H, N, D]."""
    heads, n, dim = inputs[0].shape[1:]
    header = struct.pack("<6i", variant, KINDS.index(kind), heads, n, n_text, dim)
    data = header + b"".join(x.numpy().tobytes() for x in inputs)
    done = subprocess.run(program, input=data, capture_output=True, check=True)
    values = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    sizes = [heads, *(x.numel() for x in inputs)]
    assert values.numel() == sum(sizes)
    loss, *gradients = values.split(sizes)
    return [loss, *(g.view(x.shape) for g, x in zip(gradients, inputs))]


def check(found: list[torch.Tensor], function, inputs: list[torch.Tensor]) -> None:
    wide = [x.double().requires_grad_() for x in inputs]
    loss = function(*wide)
    want = torch.autograd.grad(loss.sum(), wide)
    assert relative_error(found[0], loss.detach().flatten()) <= 1e-6
    for gradient, wanted in zip(found[1:], want):
        assert relative_error(gradient, wanted) <= 5e-6


@pytest.mark.parametrize("n_text", [7, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_scores(program: list[str], kind: str, n_text: int) -> None:
    attn = make_input(kind, n_text, 33, dtype=torch.float32)
    found = run(program, 0, kind, [attn], n_text)
    check(found, lambda x: fused_cacr(x, n_text, kind=kind, reduction="none", backend="reference"), [attn])


@pytest.mark.parametrize("kind", ["scores", "softmax"])
def test_queries_and_keys(program: list[str], kind: str) -> None:
    torch.manual_seed(0)
    q, k = (0.5 * torch.randn(1, 2, 40, 16) for _ in "qk")
    found = run(program, 1, kind, [q, k], 17)

    def function(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return fused_cacr_qk(q, k, 17, scale=1.0, kind=kind, reduction="none", backend="reference")

    check(found, function, [q, k])
