"""Builds cacr_kernels._native with CMake and Ninja. Needs neither torch nor a GPU.

Environment:
    CACR_NO_CUDA=1      build the CPU kernels only
    CACR_FORCE_CUDA=1   fail, with the reason, unless the CUDA kernels are built
    CUDACXX, CUDA_HOME, CUDA_PATH    where nvcc is; then PATH, /usr/local/cuda and NVIDIA's pip wheels are searched
    CUDAARCHS, CMAKE_CUDA_ARCHITECTURES    what to compile for (default: the visible GPU, otherwise every generation)
    CMAKE_ARGS          further arguments for cmake
    CMAKE_BUILD_PARALLEL_LEVEL    compiler processes at a time
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def nvcc_candidates() -> Iterator[Path]:
    """Where nvcc may be when CUDACXX does not say, in order of preference."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home, "bin", "nvcc")
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield Path("/usr/local/cuda/bin/nvcc")
    for folder in dict.fromkeys([*sys.path, sysconfig.get_path("purelib")]):
        yield from sorted(Path(folder or ".", "nvidia").glob("*/bin/nvcc"))


def find_nvcc() -> Path | None:
    """The nvcc that CUDACXX names, or the first one found; another than the one asked for may lack the user's GPU."""
    if compiler := os.environ.get("CUDACXX"):
        if found := shutil.which(compiler):
            return Path(found)
        raise SystemExit(f"CUDACXX={compiler} is no executable: give the path of nvcc, or unset it to search")
    return next((path for path in nvcc_candidates() if path.is_file() and os.access(path, os.X_OK)), None)


def tool(name: str) -> str:
    """Path of a build tool: the one beside this interpreter (build isolation, virtual environments) before PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is missing: install it with `pip install {name}`, or build with build isolation")
    return path


def replace(source: Path, target: Path) -> None:
    """Puts a copy at ``target`` in one step: processes that have the old module mapped keep it."""
    copy = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, copy)
    os.replace(copy, target)


class CMakeExtension(Extension):
    """An extension whose sources only CMakeLists.txt knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Runs cmake and ninja; the module lands where setuptools wants it (in the tree for editable installs)."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            raise SystemExit(
                "the build needs pybind11: pip install pybind11, or leave out --no-build-isolation"
            ) from None
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        force, hide = is_set("CACR_FORCE_CUDA"), is_set("CACR_NO_CUDA")
        if force and hide:
            raise SystemExit("CACR_FORCE_CUDA=1 and CACR_NO_CUDA=1 contradict each other: unset one of them")
        arguments = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'out'}",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCACR_FORCE_CUDA={'ON' if force else 'OFF'}",
            f"-DCACR_NO_CUDA={'ON' if hide else 'OFF'}",
        ]
        environment = dict(os.environ)
        nvcc = None if hide else find_nvcc()
        if nvcc is not None:
            environment["CUDACXX"] = str(nvcc)  # unlike CMAKE_CUDA_COMPILER, this is tried before it is believed
        if architectures := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
            arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # A cached configuration may name tools of a build environment that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = tool("cmake")
        try:
            subprocess.run(
                [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *arguments], check=True, env=environment
            )
            subprocess.run([cmake, "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"building cacr_kernels._native failed (exit code {error.returncode}); see above"
            ) from error
        built = list((build / "out").glob("_native*"))
        if len(built) != 1:
            raise SystemExit(f"expected one module in {build / 'out'}, found {[path.name for path in built]}")
        target.parent.mkdir(parents=True, exist_ok=True)
        replace(built[0], target)


if __name__ == "__main__":
    setup(ext_modules=[CMakeExtension("cacr_kernels._native")], cmdclass={"build_ext": CMakeBuild})
