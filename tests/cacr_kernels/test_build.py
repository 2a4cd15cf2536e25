"""The native module builds from a clean copy of the sources, and says why when a part cannot be built."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")

missing = [name for name in ("cmake", "ninja", "pybind11") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing) or not (ROOT / "setup.py").exists(), reason=f"needs {', '.join(missing)}")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources in a folder with a space in its name."""
    copy = tmp_path / "source tree"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("cmake", "csrc", "cacr_kernels", "python"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    return copy


def environment(**variables: str) -> dict[str, str]:
    unwanted = ("CACR_NO_CUDA", "CACR_FORCE_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAARCHS", "CMAKE_ARGS")
    return {name: value for name, value in os.environ.items() if name not in unwanted} | variables


def run(tree: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment(**variables), capture_output=True, text=True
    )


def load_setup(tree: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cacr_setup", tree / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_wheel_and_source_archive(tree: Path, tmp_path: Path) -> None:
    packed = run(tree, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "sdist"))
    assert packed.returncode == 0, packed.stderr
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "from sdist", filter="data")
    (unpacked,) = (tmp_path / "from sdist").iterdir()
    # -O0: this test is about the build, and the optimiser takes most of its time
    built = run(
        unpacked,
        *("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(tmp_path / "wheel"), "."),
        CACR_NO_CUDA="1",
        CMAKE_ARGS="-DCMAKE_CXX_FLAGS_RELEASE=-O0",
    )
    assert built.returncode == 0, built.stdout + built.stderr
    # A weak function compiled with AVX-512 could replace the one that older machines run.
    objects = list(unpacked.rglob("isa.cpp.o"))
    assert objects
    for compiled in objects:
        symbols = subprocess.run(["nm", compiled], capture_output=True, text=True, check=True).stdout
        assert not [line for line in symbols.splitlines() if line.split()[-2] in ("W", "V", "u", "T")], compiled
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive_of_wheel:
        (module,) = [name for name in archive_of_wheel.namelist() if "_native" in name]
        archive_of_wheel.extract(module, tmp_path)
    loaded = run(
        tmp_path / "cacr_kernels", "-c", "import sys, _native; print(_native.build_info(), 'torch' in sys.modules)"
    )
    assert loaded.returncode == 0, loaded.stderr
    assert "CACR_NO_CUDA=1" in loaded.stdout
    assert loaded.stdout.strip().endswith("False")


def test_cuda_insisted_on_fails_with_the_reason(tree: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    result = run(tree, "setup.py", "build_ext", CACR_FORCE_CUDA="1", CUDACXX=str(broken))
    assert result.returncode != 0
    assert "CACR_FORCE_CUDA=1" in result.stderr
    assert "no working nvcc" in " ".join(result.stderr.split())


def test_contradictory_wishes_are_refused(tree: Path) -> None:
    result = run(tree, "setup.py", "build_ext", CACR_FORCE_CUDA="1", CACR_NO_CUDA="1")
    assert result.returncode != 0
    assert "contradict" in result.stderr


def test_where_nvcc_is_searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setup = load_setup(ROOT)
    places = {}
    for name in ("cudacxx", "home", "path", "onpath"):
        places[name] = tmp_path / name / "bin" / "nvcc"
        places[name].parent.mkdir(parents=True)
        places[name].write_text("#!/bin/sh\n")
        places[name].chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(places["cudacxx"]))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("PATH", str(places["onpath"].parent))
    for name, variable in (("cudacxx", "CUDACXX"), ("home", "CUDA_HOME"), ("path", "CUDA_PATH"), ("onpath", "PATH")):
        assert setup.find_nvcc() == places[name]
        monkeypatch.delenv(variable)


def test_an_nvcc_that_is_not_there_is_an_error(tree: Path, tmp_path: Path) -> None:
    result = run(tree, "setup.py", "build_ext", CUDACXX=str(tmp_path / "nvcc"))
    assert result.returncode != 0
    assert f"CUDACXX={tmp_path / 'nvcc'} is no executable" in result.stderr


def test_a_module_in_use_is_replaced_and_not_overwritten(tmp_path: Path) -> None:
    new, target = tmp_path / "new", tmp_path / "module.so"
    new.write_bytes(b"new")
    target.write_bytes(b"old")
    with target.open("rb") as in_use:
        load_setup(ROOT).replace(new, target)
        assert in_use.read() == b"old"
    assert target.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["module.so", "new"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "arguments", "chosen"),
    [
        ({"CUDAARCHS": "86-real"}, (), "86-real"),
        ({}, ("-DCMAKE_CUDA_ARCHITECTURES=80;90-virtual",), "80;90-virtual"),
        ({"CUDAARCHS": ""}, (), r"(\d+-real;){3,}\d+-virtual"),
    ],
    ids=["environment", "argument", "empty"],
)
def test_the_architectures_asked_for_are_those_of_the_build(
    tmp_path: Path, variables: dict[str, str], arguments: tuple[str, ...], chosen: str
) -> None:
    """What the configuration records, of the real nvcc; without a wish every generation and PTX, not CMake's one."""
    import pybind11

    setup = load_setup(ROOT)
    nvcc = setup.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, nvidia pip wheels)")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")  # no GPU is visible
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = [setup.tool("cmake"), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", *arguments]
    command += [f"-DCMAKE_MAKE_PROGRAM={setup.tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    variables = environment(CUDACXX=str(nvcc), PATH=path, **variables)
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    recorded = re.search(r"CACR CUDA kernels: nvcc [\d.]+ (\S+)", result.stdout)
    assert recorded is not None
    assert re.fullmatch(chosen, recorded[1])


ARCHITECTURES = """
cmake_minimum_required(VERSION 3.24)
include("${SOURCE}/cmake/cuda_architectures.cmake")
cacr_cuda_architectures("${NVCC}" chosen)
message(STATUS "chosen=${chosen}")
"""


@pytest.mark.parametrize(
    ("targets", "visible", "chosen"),
    [
        ("75 80 86 87 90 100 120", "", "75-real;80-real;86-real;90-real;100-real;120-real;120-virtual"),
        ("50 61 70 75 80 86 90", "", "61-real;70-real;75-real;80-real;86-real;90-real;90-virtual"),
        ("75 80 86 90", "9.0", "90"),
        ("75 80 86 90", "7.5\\n9.0\\n9.0", "75;90"),
        ("75 80", "6.1", "75-real;80-real;80-virtual"),
    ],
)
def test_architectures_are_the_visible_gpu_or_every_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str, visible: str, chosen: str
) -> None:
    tools = {
        "nvcc": "\n".join(f"echo compute_{target}" for target in targets.split()),
        "nvidia-smi": f"printf '{visible}\\n'" if visible else "exit 9",
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "script.cmake"
    script.write_text(ARCHITECTURES)
    cmake = load_setup(ROOT).tool("cmake")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    result = subprocess.run(
        [cmake, f"-DSOURCE={ROOT}", f"-DNVCC={tmp_path / 'nvcc'}", "-P", str(script)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"chosen={chosen}\n" in result.stdout
