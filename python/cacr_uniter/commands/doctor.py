"""`cacr doctor`: what is installed, what can run, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

from cacr_uniter.arguments import Parser
from cacr_uniter.cli import EXTRA, EXTRA_PACKAGES

ADVICE = {
    "triton": "Triton kernels need an NVIDIA GPU of compute capability 8.0 or newer and the package triton",
    "cuda": "install the CUDA toolkit (nvcc), then build again: CACR_FORCE_CUDA=1 pip install -e .",
    "cpu": "build the native module: pip install -e . (needs a C++17 compiler such as g++)",
}


def main(argv: list[str]) -> int:
    parser = Parser(prog="cacr doctor", description="Versions, GPUs, backends, and what to do.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    found = examine()
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _print(found)
    return 0


def examine() -> dict[str, Any]:
    """The machine as plain values: versions, gpus, backends, launch table, advice."""
    import torch

    import cacr_kernels

    gpus = []
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
        except RuntimeError as error:  # the driver counts GPUs that CUDA cannot start
            reason = (str(error).splitlines() or ["CUDA cannot start"])[0]
            gpus.append({"name": f"GPU {index}, unusable: {reason}", "capability": "unknown", "memory": 0})
            continue
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "capability": capability, "memory": properties.total_memory})
    states = {
        name: {"available": state.available, "reason": state.reason, "details": state.details}
        for name, state in cacr_kernels.backends().items()
    }
    packages = ("cacr-kernels", "torch", "triton", "numpy", *sorted(set(EXTRA_PACKAGES.values())))
    versions = {name: _version(name) for name in packages}
    launch_table, fault = _launch_table([str(gpu["name"]) for gpu in gpus])
    missing = [name for name in sorted(set(EXTRA_PACKAGES.values())) if versions[name] is None]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "executable": sys.executable,
        "versions": versions,
        "torch_cuda": torch.version.cuda,
        "gpus": gpus,
        "backends": states,
        "launch_table": launch_table,
        "advice": [*_advice(states, gpus, missing, torch.version.cuda), *([fault] if fault else [])],
    }


def _launch_table(gpus: list[str]) -> tuple[str, str]:
    """Which launch table the Triton kernels use, and what is wrong with it."""
    try:
        from cacr_kernels.triton import table

        return table.in_use(gpus), ""
    except ImportError as error:
        return f"none ({error})", ""
    except ValueError as error:
        return "unusable", str(error)


def _advice(states: dict[str, Any], gpus: list[Any], missing: list[str], torch_cuda: str | None) -> list[str]:
    advice = []
    if missing:
        advice.append(
            f"for training and evaluation: pip install 'cacr-kernels[{EXTRA}]' (missing: {', '.join(missing)})"
        )
    if not states["cpu"]["available"]:
        advice.append(ADVICE["cpu"])
    if not gpus:
        advice.append(
            "this PyTorch is a CPU build: on a machine with a GPU install a CUDA build"
            if torch_cuda is None
            else "no GPU is visible to PyTorch: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
        )
    else:
        advice += [ADVICE[name] for name in ("triton", "cuda") if not states[name]["available"]]
    return advice


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(found: dict[str, Any]) -> None:
    print(f"Python {found['python']} on {found['system']}: {found['executable']}")
    for name, version in found["versions"].items():
        print(f"  {name:<14}{version or 'not installed'}")
    print("GPUs:")
    for gpu in found["gpus"]:
        print(f"  {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory'] / 2**30:.1f} GiB")
    if not found["gpus"]:
        print("  none")
    print("backends:")
    for name, state in found["backends"].items():
        print(f"  {name:<14}{'ready' if state['available'] else 'not available: ' + state['reason']}")
        if state["details"]:
            print(f"  {'':<14}{state['details']}")
    print(f"launch table of the Triton kernels: {found['launch_table']}")
    print("what to do:" if found["advice"] else "nothing to do")
    for line in found["advice"]:
        print(f"  - {line}")
