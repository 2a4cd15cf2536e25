"""Which backend can run here, why one cannot, and which one a call gets. An explicit request never falls back."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

BACKENDS = ("triton", "cuda", "cpu", "reference")

#: largest head size of fused_cacr_qk on the backend triton
LARGEST_HEAD = 256
#: compute capabilities of Jetson modules, which do not run the machine code of other cards of their generation
_JETSON = ((5, 3), (6, 2), (7, 2), (8, 7))
#: oldest compute capability on which Triton uses tensor cores
_TRITON_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class BackendStatus:
    """``available``, the ``reason`` when it is not (one line), and ``details`` such as versions and architectures."""

    available: bool
    reason: str = ""
    details: str = ""


def backends() -> dict[str, BackendStatus]:
    """State of every backend on this machine: triton, cuda, cpu, reference. Never raises."""
    return {name: status() for name, status in _STATUS.items()}


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _reference_status() -> BackendStatus:
    return BackendStatus(True, details=f"PyTorch {torch.__version__}, any device and float dtype")


def _cpu_status() -> BackendStatus:
    from . import native

    return BackendStatus(*native.cpu_status())


def _triton_status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, "the package triton is not installed (pip install triton)")
    try:
        import triton
    except Exception as error:  # whatever a broken installation raises
        return BackendStatus(False, f"the package triton cannot be imported ({_first_line(error)})")
    version = f"Triton {triton.__version__}"
    if interpreting():
        return BackendStatus(True, details=f"{version}, interpreted on the CPU (TRITON_INTERPRET=1): for tests")
    capabilities, reason = _capabilities()
    if reason:
        return BackendStatus(False, reason, version)
    if max(capabilities) < _TRITON_CAPABILITY:
        best = ".".join(map(str, max(capabilities)))
        return BackendStatus(False, f"Triton needs compute capability 8.0, this GPU has {best}: use 'cuda'", version)
    return BackendStatus(True, details=version)


def _cuda_status() -> BackendStatus:
    from . import native

    status = BackendStatus(*native.cuda_status())
    if not status.available:
        return status
    capabilities, reason = _capabilities()
    if reason:
        return BackendStatus(False, reason, status.details)
    reasons = [_built_for_others(capability) for capability in capabilities]
    return status if "" in reasons else BackendStatus(False, reasons[0], status.details)


def _capabilities() -> tuple[list[tuple[int, int]], str]:
    """Those of all GPUs, or why there are none. Asking initialises CUDA, which a forked process may be unable to."""
    try:
        found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    except RuntimeError as error:
        return [], _first_line(error)
    return found, "" if found and torch.cuda.is_available() else "no CUDA GPU is visible to PyTorch"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


#: asked one by one: that of a GPU's backends initialises CUDA
_STATUS: dict[str, Callable[[], BackendStatus]] = {
    "triton": _triton_status,
    "cuda": _cuda_status,
    "cpu": _cpu_status,
    "reference": _reference_status,
}


def _holds_code_for(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a build for ``architectures``, in CMake's names ("75-real 80 90a-real"), runs on a GPU of ``capability``.

    Machine code (real, or no suffix) runs on the same major version from its minor version on, PTX (virtual, or no
    suffix) on everything as new; a name ending in "a" means that capability alone. Groups such as "all" are believed.
    Machine code for a Jetson serves it alone, and it takes no other.
    """
    for name in architectures.split():
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", name)
        if found is None:
            return True
        target, only, code = (int(found[1]), int(found[2])), found[3], found[4]
        jetson = capability in _JETSON or target in _JETSON
        same_major = capability[0] == target[0] and (capability == target if jetson else capability >= target)
        if only == "a":
            serves = capability == target
        elif only == "f" or code == "-real":
            serves = same_major
        else:
            serves = capability >= target
        if serves:
            return True
    return False


def _built_for_others(capability: tuple[int, int]) -> str:
    """The empty string if the native module holds code for a GPU of ``capability``, else what to do."""
    from . import native

    architectures = native.build_info()["cuda_architectures"]
    if _holds_code_for(capability, architectures):
        return ""
    return (
        f"built for {architectures}, this GPU has {capability[0]}.{capability[1]}: rebuild with CUDACXX=<an nvcc that "
        "targets it>, that of CUDA 12 before 7.5"
    )


@cache
def _why_not(
    backend: str, variant: str, device_type: str, device_index: int | None, dtype: torch.dtype, wide: bool
) -> str:
    """The empty string if ``backend`` can serve this input, else the reason it cannot."""
    if backend == "reference":
        return ""
    status = _STATUS[backend]()
    if not status.available:
        return status.reason
    if backend == "cpu":
        return "" if device_type == "cpu" else f"it runs on CPU tensors and the input is on {device_type}"
    if dtype == torch.float64:
        return "float64 is computed by the backends 'cpu' and 'reference' only"
    if backend == "triton" and wide:
        return f"q's head size must be at most {LARGEST_HEAD}"
    if backend == "triton" and interpreting():
        return "" if device_type == "cpu" else "TRITON_INTERPRET=1 runs on CPU tensors only"
    if device_type != "cuda":
        return f"it runs on CUDA tensors and the input is on {device_type}"
    capability = torch.cuda.get_device_capability(device_index)
    if backend == "triton" and capability < _TRITON_CAPABILITY:
        return f"Triton needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    if backend == "cuda" and variant == "qk":
        return "it computes fused_cacr only; fused_cacr_qk runs on 'triton', 'cpu' and 'reference'"
    if backend == "cuda" and (reason := _built_for_others(capability)):
        return reason
    return ""


def choose(
    backend: str, variant: str, device_type: str, device_index: int | None, dtype: torch.dtype, wide: bool = False
) -> str:
    """The backend that runs ``variant`` ("scores" or "qk"): the one asked for, or the fastest that can for "auto".

    ``wide``: heads of more than LARGEST_HEAD numbers.
    """
    if backend != "auto":
        reason = _why_not(backend, variant, device_type, device_index, dtype, wide)
        if reason:
            raise ValueError(f"backend={backend!r} cannot run this input: {reason}. See cacr_kernels.backends().")
        return backend
    if device_type == "cuda" and dtype == torch.float64:
        return "reference"
    candidates = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}.get(device_type, ())
    reasons = []
    for candidate in candidates:
        reason = _why_not(candidate, variant, device_type, device_index, dtype, wide)
        if not reason:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    _warn_reference(variant, device_type, "; ".join(reasons) or f"no kernel runs on {device_type}")
    return "reference"


# torch.compiler.assume_constant_result sets the same mark, but imports torch._dynamo: it doubles the time of the import
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _warn_reference(variant: str, device_type: str, reasons: str) -> None:
    name = "fused_cacr_qk" if variant == "qk" else "fused_cacr"
    warnings.warn(
        f"{name} on {device_type} runs the slow reference backend ({reasons}). Run `cacr doctor` for what to do, or "
        "ask for backend='reference' to silence this.",
        stacklevel=5,  # the caller of fused_cacr
    )
