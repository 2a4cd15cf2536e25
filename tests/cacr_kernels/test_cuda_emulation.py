"""The CUDA kernels' source, compiled for the host: threads are fibers in a shuffled order (csrc/cuda/host/emulation.h).

Proves indexing, barriers and mathematics without a card; says nothing of speed or of the compiler's device code.
"""

import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from cacr_kernels import backends as backend_module
from cacr_kernels import fused_cacr, fused_cacr_blocks, native
from cacr_kernels.reference import cacr_closed_form, cacr_loop
from cacr_kernels.testing import loss_and_gradients, make_input, make_scores, relative_error

CSRC = Path(__file__).parents[2] / "csrc"
KINDS = ("scores", "softmax", "probs")


def compile_emulation(compiler, directory):
    """The native module with the CUDA kernels emulated; its CPU functions stay unresolved (lazy binding)."""
    import pybind11

    sources = ["bindings.cpp", "cuda/host/emulation.cpp", "cuda/forward.cu", "cuda/backward.cu"]
    headers = [p for p in sorted(CSRC.rglob("*")) if p.suffix in (".h", ".cuh", ".cu", ".cpp")]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in headers) + sys.version.encode()).hexdigest()[:16]
    library = directory / key / "_native.so"
    names = ("CACR_COMPILER", "CACR_CUDA_COMPILER", "CACR_CUDA_ARCHITECTURES", "CACR_CUDA_REASON")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-z,lazy"]
    # another namespace: Python already knows the types of the installed module
    command += ["-Dcacr=cacr_emulated", "-DCACR_WITH_CUDA", *(f'-D{name}="emulation"' for name in names)]
    command += [f"-I{path}" for path in (CSRC, CSRC / "include", CSRC / "cuda")]
    command += [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}", "-x", "c++"]
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            library.parent.mkdir(exist_ok=True)
            unfinished = library.with_suffix(".tmp")
            subprocess.run([*command, *(str(CSRC / s) for s in sources), "-o", str(unfinished)], check=True)
            unfinished.rename(library)
    return library


class Emulation:
    def __init__(self, library):
        self.controls = ctypes.CDLL(str(library), mode=os.RTLD_LAZY)
        self.controls.cacr_emulation_barriers.restype = ctypes.c_char_p
        flags = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)
        try:
            loader = importlib.machinery.ExtensionFileLoader("_native", str(library))
            self.module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_native", loader))
            loader.exec_module(self.module)
        finally:
            sys.setdlopenflags(flags)

    def configure(self, seed, skipped_barrier=""):
        self.controls.cacr_emulation_configure(ctypes.c_ulonglong(seed), skipped_barrier.encode())

    def barriers(self):
        return self.controls.cacr_emulation_barriers().decode().split()


@pytest.fixture(scope="session")
def emulation(pytestconfig):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs a C++17 compiler on Linux to build the emulated CUDA kernels")
    return Emulation(compile_emulation(compiler, pytestconfig.cache.mkdir("cuda_emulation")))


@pytest.fixture
def emulated(emulation, monkeypatch):
    """backend="cuda" runs the emulated kernels on CPU tensors, two problems a chunk, in a NaN-filled workspace."""

    def run(problem, x, workspace_bytes, launch):
        workspace = torch.full((workspace_bytes(problem) // 4 * 2,), float("nan"))
        problem.set_workspace(workspace.data_ptr(), workspace.numel() * 4)
        launch(problem)

    monkeypatch.setattr(native, "_native", emulation.module)
    monkeypatch.setattr(native.cuda, "_run", run, raising=True)
    monkeypatch.setattr(native, "_new_gradients", lambda inputs: [poison(x) for x in inputs])
    monkeypatch.setattr(sys.modules[backend_module.__module__], "_why_not", lambda *_: "")
    emulation.configure(0)
    return emulation


def poison(like):
    return torch.full(like.shape, float("nan"), dtype=like.dtype)


def cuda(x, n_text, **options):
    return fused_cacr(x, n_text, backend="cuda", **options)


def agree(attn, n_text, tolerance, **options):
    """Loss and gradient of the emulated kernels against the closed form in float64 on the same values."""
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, n_text, **options), attn)
    expected, (expected_gradient,) = loss_and_gradients(lambda x: cacr_closed_form(x, n_text, **options), attn.double())
    assert loss.dtype == torch.float32
    assert gradient.dtype == attn.dtype
    assert relative_error(loss, expected) < tolerance
    assert relative_error(gradient, expected_gradient) < max(tolerance, 2 * torch.finfo(attn.dtype).eps)
    return gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_text", "n_vision"), [(1, 1), (2, 7), (33, 1), (7, 63), (63, 33), (129, 2), (65, 129)])
def test_sizes(emulated, kind, n_text, n_vision):
    attn = make_input(kind, n_text, n_vision, std=0.5, seed=n_text)
    agree(attn, n_text, 2e-5, kind=kind)


@pytest.mark.parametrize(
    "options",
    [
        {"sides": "text"},
        {"sides": "vision", "row_reduction": "mean"},
        {"projection_scale": 0.25, "reduction": "sum"},
        {"projection_scale": "mean"},
        {"stop_gradient": "target"},
        {"stop_gradient": "projection", "reduction": "none"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
@pytest.mark.parametrize("kind", KINDS)
def test_options(emulated, kind, options):
    agree(make_input(kind, 6, 9, batch=2, heads=3, std=0.5, seed=3), 6, 2e-5, kind=kind, **options)
