"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cacr_kernels import backends

INSTRUCTION_SETS = {"sse2": "SSE2", "avx2": "AVX2", "avx512": "AVX-512", "neon": "NEON"}
"""Of the CPU kernels, as their documentation writes them."""

CPU_INFO = Path("/proc/cpuinfo")


def device_name(device: str) -> str:
    """Name of the processor that computes: the GPU's, or the CPU's with instruction set and number of threads.

    A hypervisor may give several generations of processors one name without a number: family and model follow.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if CPU_INFO.is_file():
        first = CPU_INFO.read_text(encoding="utf-8").split("\n\n", 1)[0]
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        name = fields.get("model name", name)
        if not re.search(r"\d", name) and {"cpu family", "model"} <= fields.keys():
            name += f" family {fields['cpu family']} model {fields['model']}"
    found = backends()["cpu"].details.split(",")[0]
    kernels = f" ({INSTRUCTION_SETS.get(found, found)})" if found else ""
    return f"{name}{kernels}, {torch.get_num_threads()} threads"


def half_dtype(device: str) -> str:
    """The 16-bit dtype that matters on a device: bfloat16, on a GPU without it (before 8.0) float16."""
    return "float16" if device == "cuda" and torch.cuda.get_device_capability() < (8, 0) else "bfloat16"


def slug(name: str) -> str:
    """A folder name: ``NVIDIA H200`` -> ``nvidia-h200``."""
    words = re.sub(r"\((R|TM|C)\)", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """Short hash of the checkout that holds this file; empty outside a checkout.

    With ``+`` when it has changes, those of results aside: every measurement makes some.
    """
    folder = Path(__file__).resolve().parent
    run = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=20)
        code = [":/", ":(top,exclude)benchmarks/results"]
        state = subprocess.run(
            [*run, "status", "--porcelain", "--untracked-files=no", "--", *code],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if head.returncode else head.stdout.strip() + ("+" if state.stdout.strip() else "")


@cache
def cuda_versions() -> str:
    """CUDA of torch, the driver's version and the compiler of the CUDA kernels, as far as they can be told."""
    if torch.version.cuda is None:
        return ""
    driver = Path("/sys/module/nvidia/version")
    compiler = re.match(r"nvcc [\d.]+", backends()["cuda"].details)
    found = [torch.version.cuda]
    if driver.is_file():
        found.append(f"driver {driver.read_text(encoding='utf-8').strip()}")
    if compiler is not None:
        found.append(compiler[0])
    return ", ".join(found)


def provenance(device: str) -> dict[str, str]:
    """The columns every result starts with."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "device": device_name(device),
        "cacr": package_version("cacr-kernels"),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda": cuda_versions(),
        "load": load,
    }
