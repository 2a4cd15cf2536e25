"""The CUDA kernels compile for every architecture without spills, by nvcc and, for the paper's cards, by NVRTC 12.9."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
TEMPLATES = ("cacr_forward_kernel", "cacr_backward_rows_kernel", "cacr_backward_blocks_kernel")
PLAIN = ("cacr_loss_kernel", "cacr_softmax_gradient_kernel", "cacr_fill_kernel")
TYPES = {"float": "f", "Half": "NS_4HalfE", "Bfloat16": "NS_8Bfloat16E"}
#: of cacr_row_softmax_kernel: used by the forward, by the backward
PASSES = {"true": "Lb1E", "false": "Lb0E"}
#: instances of the kernels of short spans: the longer side in units of 16 tokens, and the warps of a block
FUSED = ("cacr_fused_forward_kernel", "cacr_fused_backward_kernel")
FUSED_WARPS = {2: 4, 4: 8, 7: 12}
#: static shared memory a block may have on every architecture
SHARED_LIMIT = 48 << 10


def instances(types):
    """Template instances, as C++ writes them."""
    names = [f"{name}<{t}>" for name in TEMPLATES for t in types]
    return [*names, *(f"cacr_row_softmax_kernel<{p}>" for p in PASSES)]


def fused_instances():
    return [f"{name}<{t}, {sides}>" for name in FUSED for t in TYPES for sides in FUSED_WARPS]


def readable(mangled):
    name = re.search(r"cacr_\w+?_kernel", mangled)[0]
    if name in FUSED:
        code, sides = re.search(r"I(f|NS_\d\w+?E)Li(\d+)E", mangled).groups()
        return f"{name}<{next(t for t in TYPES if TYPES[t] == code)}, {sides}>"
    for text, code in (TYPES | PASSES).items():
        if f"{name}I{code}" in mangled:
            return f"{name}<{text}>"
    return name


def resources(ptxas_log):
    """{kernel: {"stack", "stores", "loads", "registers", "shared"}} of the output of ptxas -v."""
    found = {}
    for part in ptxas_log.split("Compiling entry function")[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = map(int, numbers.groups())
        found[readable(part)] = {
            "stack": stack,
            "stores": stores,
            "loads": loads,
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def check(log, types, record_property, fused=()):
    found = resources(log)
    record_property("resources", found)
    assert found.keys() == {*PLAIN, *instances(types), *fused}
    spilling = {name: use for name, use in found.items() if max(use["stack"], use["stores"], use["loads"]) > 0}
    assert not spilling
    for name in fused:
        # a scheduler has 512 registers for a lane of each of its warps, in units of 8
        warps = FUSED_WARPS[int(name[-2])]
        assert found[name]["registers"] <= 512 // -(-warps // 4) // 8 * 8
        assert found[name]["shared"] == 0
    assert max(use["shared"] for use in found.values()) <= SHARED_LIMIT


def test_the_log_of_a_spilling_kernel_is_recognised():
    log = (
        "ptxas info : Compiling entry function '_ZN4cacr19cacr_forward_kernelINS_4HalfEEEvNS_7ProblemEx' for 'sm_75'\n"
        "    8 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info : Used 127 registers, used 1 barriers, 8 bytes cumulative stack size, 16896 bytes smem, 856 bytes\n"
    )
    use = {"stack": 8, "stores": 8, "loads": 16, "registers": 127, "shared": 16896}
    assert resources(log) == {"cacr_forward_kernel<Half>": use}
    with pytest.raises(AssertionError):
        check(log, ("Half",), lambda *_: None)


def find_nvcc():
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
def test_nvcc(architecture, tmp_path, record_property):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc (looked at CUDACXX, PATH, /usr/local/cuda)")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    if f"sm_{architecture}" not in known.split():
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    log = ""
    for source in ("forward", "backward"):
        command = [
            nvcc,
            "-std=c++17",
            "-O3",
            "-cubin",
            f"-arch=sm_{architecture}",
            "-Xptxas",
            "-v",
            "-Werror",
            "all-warnings",
        ]
        command += [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}", str(CSRC / "cuda" / f"{source}.cu")]
        done = subprocess.run(
            [*command, "-o", str(tmp_path / f"{source}.cubin")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        log += done.stdout + done.stderr
    check(log, TYPES, record_property, fused_instances())


class Nvrtc:
    """The runtime compiler of CUDA 12.9 from its wheel: the last that knows Pascal and Volta; needs no headers."""

    def __init__(self):
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
        if spec is None:
            pytest.skip("nvidia-cuda-nvrtc-cu12 is not installed (pip install cacr-kernels[dev])")
        path = Path(next(iter(spec.submodule_search_locations))) / "lib" / "libnvrtc.so.12"
        self.library = ctypes.CDLL(str(path))

    def call(self, name, *arguments):
        return getattr(self.library, f"nvrtc{name}")(*arguments)

    def compile(self, source, options):
        """The log, with the output of ptxas, and the PTX; fails the test if the source does not compile."""
        program = ctypes.c_void_p()
        assert self.call("CreateProgram", ctypes.byref(program), source.encode(), b"cacr.cu", 0, None, None) == 0
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = self.call("CompileProgram", program, len(options), array)
        size = ctypes.c_size_t()
        self.call("GetProgramLogSize", program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.call("GetProgramLog", program, log)
        self.call("GetPTXSize", program, ctypes.byref(size))
        ptx = ctypes.create_string_buffer(size.value)
        self.call("GetPTX", program, ptx)
        self.call("DestroyProgram", ctypes.byref(program))
        assert status == 0, log.value.decode()
        return log.value.decode(), ptx.value.decode()


def source_of(names):
    lines = [f'#include "{name}.cuh"' for name in ("forward", "backward_blocks", "fill")]
    lines += ["namespace cacr {", *(f"template __global__ void {name}(Problem, i64);" for name in names), "}"]
    return "\n".join(lines)


INCLUDES = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [61, 70])
def test_nvrtc_12(architecture, record_property):
    types = ("float", "Half")  # bfloat16 is offered from sm_80
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", "--ptxas-options=-v"]
    log, _ = Nvrtc().compile(source_of(instances(types)), [*options, *INCLUDES])
    check(log, types, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "shape"), [(61, None), (70, None), (75, "m16n8k8"), (80, "m16n8k16")])
def test_only_float16_uses_tensor_cores_and_from_sm_75_on(architecture, shape):
    names = [name for name in instances(("float", "Half")) if not name.startswith("cacr_row_softmax")]
    options = [f"--gpu-architecture=compute_{architecture}", "--std=c++17"]
    _, ptx = Nvrtc().compile(source_of(names), [*options, *INCLUDES])
    entries = {readable(part): part for part in re.split(r"\.entry ", ptx)[1:] if "_kernel" in part.split("(")[0]}
    assert entries.keys() >= set(names)
    for name, text in entries.items():
        shapes = set(re.findall(r"mma\.sync\.aligned\.(\w+)\.", text))
        assert shapes == ({shape} if shape and "<Half>" in name else set()), name
