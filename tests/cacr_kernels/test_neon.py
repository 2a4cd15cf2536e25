"""The CPU kernels as an ARM machine runs them: cross-compiled with the flags of CMakeLists.txt, run under QEMU."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from cacr_kernels import fused_cacr, fused_cacr_qk
from cacr_kernels.testing import make_input, relative_error

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
KINDS = ("scores", "softmax", "probs")

pytestmark = pytest.mark.skipif(
    not (COMPILER and EMULATOR and (ROOT / "csrc").exists()), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64"
)


def options() -> list[str]:
    """Definitions and flags of the NEON instruction set in CMakeLists.txt."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    found = re.search(r"add_instruction_set\((neon) (\w+) (\d+) (\d+) (\d+)\)", text)
    assert found is not None
    names = ("CACR_ISA", "CACR_TABLE", "CACR_VECTOR_BYTES", "CACR_REGISTERS", "CACR_TILE_ROWS")
    return [f"-D{name}={value}" for name, value in zip(names, found.groups())]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("neon") / "kernels"
    command = [str(COMPILER), "-std=c++17", "-O2", "-static", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-psabi", *options(), f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    sources = [str(ROOT / "csrc" / "cpu" / "isa.cpp"), str(Path(__file__).with_name("neon_main.cpp"))]
    done = subprocess.run([*command, *sources, "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def run(program: Path, variant: int, kind: str, inputs: list[torch.Tensor], n_text: int) -> list[torch.Tensor]:
    """[loss [H], gradient, ...] of float32 inputs [1, H, N, N] or [1, H, N, D]."""
    heads, n, dim = inputs[0].shape[1:]
    header = struct.pack("<6i", variant, KINDS.index(kind), heads, n, n_text, dim)
    data = header + b"".join(x.numpy().tobytes() for x in inputs)
    done = subprocess.run([str(EMULATOR), str(program)], input=data, capture_output=True, check=True)
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
def test_scores(program: Path, kind: str, n_text: int) -> None:
    attn = make_input(kind, n_text, 33, dtype=torch.float32)
    found = run(program, 0, kind, [attn], n_text)
    check(found, lambda x: fused_cacr(x, n_text, kind=kind, reduction="none", backend="reference"), [attn])


@pytest.mark.parametrize("kind", ["scores", "softmax"])
def test_queries_and_keys(program: Path, kind: str) -> None:
    torch.manual_seed(0)
    q, k = (0.5 * torch.randn(1, 2, 40, 16) for _ in "qk")
    found = run(program, 1, kind, [q, k], 15)

    def function(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return fused_cacr_qk(q, k, 15, scale=1.0, kind=kind, reduction="none", backend="reference")

    check(found, function, [q, k])
