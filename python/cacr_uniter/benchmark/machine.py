"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def device_name(device: str) -> str:
    """Name of the processor that computes: the GPU's, or the CPU's with its number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


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
    """Short hash of the checkout that holds this file, with ``+`` when it has changes; empty outside a checkout."""
    folder = Path(__file__).resolve().parent
    run = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=20)
        state = subprocess.run(
            [*run, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if head.returncode else head.stdout.strip() + ("+" if state.stdout.strip() else "")


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
        "cuda": torch.version.cuda or "",
        "load": load,
    }
