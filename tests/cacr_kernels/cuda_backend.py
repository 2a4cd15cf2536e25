"""The CUDA kernels on a card and, from the same source, on emulated threads: what the tests of backend "cuda" share.

The emulation (csrc/cuda/host/emulation.h) runs the threads as fibers in a shuffled order: it proves indexing, barriers
and mathematics without a card, and says nothing of speed or of the device code.
"""

import ctypes
import fcntl
import functools
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

from cacr_kernels import backends, fused_cacr, native
from cacr_kernels.reference import cacr_closed_form
from cacr_kernels.testing import loss_and_gradients, relative_error

NAN = float("nan")
#: sides, projection_scale, projection_mean, row_mean, stop_gradient, expected_grad, scale, backend of the operators
OPTIONS = ("both", 1.0, False, False, "none", 1.0, 1.0, "cuda")
#: options of the loss, one test each
VARIANTS = pytest.mark.parametrize(
    "options",
    [
        {"sides": "text", "projection_scale": "mean"},
        {"sides": "vision", "row_reduction": "mean"},
        {"stop_gradient": "target"},
        {"stop_gradient": "projection", "reduction": "none"},
        {"sides": "text", "stop_gradient": "target", "projection_scale": -0.5},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
CSRC = Path(__file__).parents[2] / "csrc"
KINDS = ("scores", "softmax", "probs")


def build_emulation(compiler, directory):
    """The native module with the CUDA kernels emulated; its CPU kernels stay unresolved (lazy binding)."""
    import pybind11

    sources = ("bindings.cpp", "cpu/reserve.cpp", "cuda/host/emulation.cpp", "cuda/forward.cu", "cuda/backward.cu")
    read = [
        p
        for where in ("*.cpp", "cuda/**/*.*", "include/*", "cpu/*.h", "cpu/reserve.cpp")
        for p in sorted(CSRC.glob(where))
    ]
    names = ("CACR_COMPILER", "CACR_CUDA_COMPILER", "CACR_CUDA_ARCHITECTURES", "CACR_CUDA_REASON")
    # another namespace: Python already knows the types of the installed module
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Dcacr=cacr_emulated", "-DCACR_WITH_CUDA"]
    flags += [f'-D{name}="emulation"' for name in names]
    flags += [f"-I{path}" for path in (CSRC, CSRC / "include", CSRC / "cuda")]
    flags += [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    flags += os.environ.get("CXXFLAGS", "").split()  # for example -fsanitize=address,undefined
    text = b"".join(p.read_bytes() for p in read) + f"{flags} {sys.version}".encode()
    folder = directory / hashlib.sha256(text).hexdigest()[:16]
    library = folder / "_native.so"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            folder.mkdir(exist_ok=True)
            objects = [folder / f"{Path(source).stem}.o" for source in sources]
            for source, target in zip(sources, objects, strict=True):
                level = "-O1" if source.startswith("cuda") else "-O0"
                command = [compiler, *flags, level, "-x", "c++", "-c", str(CSRC / source), "-o", str(target)]
                subprocess.run(command, check=True)
            unfinished = folder / "unfinished"
            link = [compiler, *flags, "-shared", "-Wl,-z,lazy", *map(str, objects), "-o", str(unfinished)]
            subprocess.run(link, check=True)
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

    def tensor_cores(self, on):
        self.controls.cacr_emulation_tensor_cores(int(on))

    def fused(self, on):
        """Whether short spans have kernels of their own, as from sm_80: no card has 0 bytes of shared memory."""
        self.controls.cacr_emulation_shared_limit(227 << 10 if on else 0)

    def multiply_add(self, a, b, d):
        """One instruction of a warp: a [32, 4, 2] and b [32, 2, 2] of 16 bits, or a [32, 4] and b [32, 2] of float32 as
        tf32; d [32, 4] float32 in place."""
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, d)]
        factors = (torch.float16, torch.bfloat16, torch.float32).index(a.dtype)
        assert self.controls.cacr_emulation_multiply_add(*pointers, factors) == 0

    def load_matrices(self, rows, transposed):
        """One instruction of a warp: rows [32, 8] of 16 bits, one of each lane, to [32, 4, 2]."""
        words = torch.empty(32, 4, 2, dtype=rows.dtype)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (rows, words)]
        assert self.controls.cacr_emulation_load_matrices(*pointers, int(transposed)) == 0
        return words

    def launches(self):
        return self.controls.cacr_emulation_launches()

    def largest_y(self):
        return self.controls.cacr_emulation_largest_y()

    def barriers(self):
        return self.controls.cacr_emulation_barriers().decode().split()


@functools.cache
def load_emulation(compiler):
    directory = CSRC.parent / "build" / "cuda_emulation"
    directory.mkdir(parents=True, exist_ok=True)
    return Emulation(build_emulation(compiler, directory))


@pytest.fixture(scope="session")
def emulation():
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs a C++17 compiler on Linux to build the emulated CUDA kernels")
    return load_emulation(compiler)


@pytest.fixture
def emulated(emulation, monkeypatch):
    """backend="cuda" runs the emulated kernels on CPU tensors, two problems a chunk."""

    def run(problem, x, workspace_bytes, launch):
        workspace = torch.full((workspace_bytes(problem) // 4 * 2,), NAN)
        problem.set_workspace(workspace.data_ptr(), workspace.numel() * 4)
        launch(problem)

    monkeypatch.setattr(native, "_native", emulation.module)
    monkeypatch.setattr(native.cuda, "_run", run)
    monkeypatch.setattr(sys.modules[backends.__module__], "_why_not", lambda *_: "")
    emulation.configure(0)
    emulation.tensor_cores(True)
    emulation.fused(False)
    return emulation


@pytest.fixture(params=["emulated", pytest.param("card", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of the tensors that backend="cuda" takes; what it must write starts as NaN."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
    elif not backends()["cuda"].available:
        pytest.skip(f"cuda: {backends()['cuda'].reason}")
    monkeypatch.setattr(native, "_new_gradients", lambda inputs: [torch.full(x.shape, NAN).to(x) for x in inputs])
    return "cpu" if request.param == "emulated" else "cuda"


def from_sm_80():
    return torch.cuda.get_device_capability() >= (8, 0)


@pytest.fixture(params=["fused", "tiled"])
def short_spans(request, device):
    """The kernels that short spans get: emulated, those from sm_80 and those before. A card has its own."""
    if device == "cpu":
        request.getfixturevalue("emulation").fused(request.param == "fused")
    elif from_sm_80() != (request.param == "fused"):
        pytest.skip("cuda: the card has other kernels for short spans")
    return request.param


@pytest.fixture(params=["fused", "tensor cores", "multiply-adds"])
def products(request, device):
    """How the kernels multiply 16-bit scores: emulated, short spans as from sm_80, all as from sm_75, all as before.

    A card has its own way.
    """
    if device == "cpu":
        request.getfixturevalue("emulation").tensor_cores(request.param != "multiply-adds")
        request.getfixturevalue("emulation").fused(request.param == "fused")
    elif request.param == "fused":
        if not from_sm_80():
            pytest.skip("cuda: the card has no fused kernels")
    elif from_sm_80():
        pytest.skip("cuda: the card multiplies short spans in fused kernels")
    elif (torch.cuda.get_device_capability() >= (7, 5)) != (request.param == "tensor cores"):
        pytest.skip("cuda: the card multiplies float16 the other way")
    return request.param


@pytest.fixture
def emulated_order(request, device):
    """Changes the order of the emulated threads; a card has its own."""
    return request.getfixturevalue("emulation").configure if device == "cpu" else lambda seed: None


#: for the test files, under the names of the fixtures
FIXTURES = (emulation, emulated, device, short_spans, products, emulated_order)


def cuda(x, n_text, **options):
    return fused_cacr(x, n_text, backend="cuda", **options)


def agree(attn, n_text, tolerance, **options):
    """Loss and gradient against the closed form in float64 on the same values."""
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, n_text, **options), attn)
    expected, (expected_gradient,) = loss_and_gradients(lambda x: cacr_closed_form(x, n_text, **options), attn.double())
    assert loss.dtype == torch.float32
    assert gradient.dtype == attn.dtype
    assert relative_error(loss, expected) < tolerance
    assert relative_error(gradient, expected_gradient) < tolerance


def problem_of(table, kind, bounds, device):
    """Arguments of the operators after the tensors: the public functions refuse invalid spans that they can see."""
    return (torch.tensor(table, dtype=torch.int32, device=device), 0, bounds[0], 0, bounds[1], kind, *OPTIONS)


def forward_and_backward(inputs, problem):
    loss, saved = torch.ops.cacr_kernels.scores_forward(inputs, *problem, True)
    gradients = torch.ops.cacr_kernels.scores_backward(torch.ones_like(loss), inputs, saved, *problem)
    return loss, gradients
