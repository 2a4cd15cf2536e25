"""The scalar formulas that the CPU and CUDA kernels share, in C++ against long double."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parents[1] / "csrc" / "include"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on PATH")


def build_and_run(source: Path, program: Path) -> subprocess.CompletedProcess[str]:
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", f"-I{INCLUDE}"]
    subprocess.run([str(COMPILER), *flags, str(source), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True)


def test_formulas_agree_with_long_double(tmp_path: Path) -> None:
    result = build_and_run(HERE / "test_formulas.cpp", tmp_path / "formulas")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("const T d = (u - v) - s.centre;", "const T d = u - v;"),
        ("g.dy = -q * (d - r.mean_q) - (p - q);", "g.dy = -q * (d - r.mean_p) - (p - q);"),
        ("s.dot_x = fused(s.low_x, step, fused(s.sum_x, step, s.dot_x)) * cx;", "s.dot_x = s.dot_x * cx;"),
        ("const bool near = cx > T(0.5);", "const bool near = false;"),
        ("const bool near = cx > T(0.5);", "const bool near = true;"),
        ("u = apart(factor, ordered(factor, product), s.max_x);", "x = factor * product, u = x - factor * s.max_x;"),
        ("return factor < T(0) ? -product : product;", "return factor < T(-9) ? -product : product;"),
        ("low += term - (total - sum);", "low = T(0);"),
        ("s.centre += step;", "s.centre = s.centre;"),
    ],
)
def test_a_planted_error_is_found(tmp_path: Path, right: str, wrong: str) -> None:
    header = (INCLUDE / "formulas.h").read_text()
    assert right in header
    (tmp_path / "formulas.h").write_text(header.replace(right, wrong))
    shutil.copy(INCLUDE / "problem.h", tmp_path)
    source = tmp_path / "formulas.cpp"  # "formulas.h" is searched beside the source first
    shutil.copy(HERE / "test_formulas.cpp", source)
    assert build_and_run(source, tmp_path / "formulas").returncode == 1
