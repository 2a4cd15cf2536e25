"""Which backend a GPU gets, by its compute capability and what the native module was built for; no GPU is needed."""

import importlib
import sys

import pytest
import torch

from cacr_kernels import fused_cacr, native

#: the package has a function of this name
module = importlib.import_module("cacr_kernels.backends")
GENERATIONS = "75-real 80-real 86-real 90-real 100-real 120-real 120-virtual"


@pytest.fixture
def gpus(monkeypatch):
    """Visible GPUs of these capabilities, and a native module with CUDA code for these architectures."""

    def stub(*capabilities, architectures=GENERATIONS):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capabilities[index or 0])
        monkeypatch.setattr(native, "cuda_status", lambda: (True, "", architectures))
        monkeypatch.setattr(native, "cpu_status", lambda: (True, "", ""))
        monkeypatch.setattr(native, "build_info", lambda: {"cuda_architectures": architectures})
        monkeypatch.setitem(sys.modules, "triton", importlib.import_module("types").SimpleNamespace(__version__="0"))
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        for cached in (module._why_not, module._warn_reference):
            cached.cache_clear()

    yield stub
    monkeypatch.undo()
    for cached in (module._why_not, module._warn_reference):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("architectures", "served", "not_served"),
    [
        (
            GENERATIONS,
            [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 0), (12, 1), (13, 0)],
            [(6, 1), (7, 0), (8, 7), (11, 0)],
        ),
        ("61-real 70-real 75-real", [(6, 1), (7, 0), (7, 5)], [(5, 2), (6, 0), (6, 2), (7, 2), (8, 0)]),
        ("87-real", [(8, 7)], [(8, 0), (8, 9), (7, 2)]),
        ("80-virtual", [(8, 0), (8, 7), (9, 0)], [(7, 5)]),
        ("86", [(8, 6), (8, 9), (9, 0)], [(8, 0), (7, 5)]),
        ("90a-real", [(9, 0)], [(8, 9), (10, 0)]),
        ("90a-virtual", [(9, 0)], [(10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("all-major", [(6, 1), (9, 0)], []),
    ],
)
def test_which_gpus_a_build_serves(architectures, served, not_served):
    assert [c for c in served if not module._holds_code_for(c, architectures)] == []
    assert [c for c in not_served if module._holds_code_for(c, architectures)] == []


def test_a_gpu_that_the_build_leaves_out_is_told_so(gpus):
    gpus((6, 1))
    state = module.backends()["cuda"]
    assert not state.available
    assert state.reason.startswith(f"built for {GENERATIONS}, this GPU has 6.1: rebuild")
    with pytest.raises(ValueError, match=r"this GPU has 6\.1: rebuild .*CUDACXX="):
        module.choose("cuda", "scores", "cuda", 0, torch.float32)
    with pytest.warns(UserWarning, match=r"cuda: built for .*6\.1"):
        assert module.choose("auto", "scores", "cuda", 0, torch.float32) == "reference"


def test_each_gpu_is_judged_by_itself(gpus):
    gpus((6, 1), (7, 5))
    assert module.backends()["cuda"].available
    assert module.choose("auto", "scores", "cuda", 1, torch.float16) == "cuda"
    with pytest.raises(ValueError, match=r"this GPU has 6\.1"):
        module.choose("cuda", "scores", "cuda", 0, torch.float16)


@pytest.mark.parametrize(
    ("capability", "variant", "dtype", "chosen"),
    [
        ((7, 5), "scores", torch.float32, "cuda"),
        ((7, 5), "scores", torch.bfloat16, "cuda"),
        ((7, 5), "qk", torch.float32, "reference"),
        ((8, 0), "scores", torch.bfloat16, "triton"),
        ((8, 6), "qk", torch.float32, "triton"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*slow reference backend")
def test_what_auto_takes(gpus, capability, variant, dtype, chosen):
    gpus(capability)
    assert module.choose("auto", variant, "cuda", 0, dtype) == chosen


def refuse(*_, **__):
    raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.\nUse another start method")


def test_tensors_on_a_cpu_leave_cuda_alone(gpus, monkeypatch):
    gpus((8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    monkeypatch.setattr(native, "cuda_status", refuse)
    monkeypatch.setattr(module, "_triton_status", refuse)
    for backend in ("auto", "cpu"):
        assert module.choose(backend, "scores", "cpu", None, torch.float32) == "cpu"


def test_a_process_that_cannot_start_cuda_is_told_so(gpus, monkeypatch):
    gpus((8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    states = module.backends()
    assert {name for name, state in states.items() if state.available} == {"cpu", "reference"}
    assert {states[name].reason for name in ("triton", "cuda")} == {"Cannot re-initialize CUDA in forked subprocess."}


def test_a_triton_that_cannot_be_imported_is_one_missing_backend(gpus, monkeypatch):
    gpus((8, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    states = module.backends()
    assert states["triton"].reason.startswith("the package triton cannot be imported (")
    assert module.choose("auto", "scores", "cuda", 0, torch.float32) == "cuda"


def test_the_warning_of_the_slow_backend_names_the_caller():
    module._warn_reference.cache_clear()
    with pytest.warns(UserWarning, match="slow reference backend") as found:
        fused_cacr(torch.empty(1, 1, 5, 5, device="meta"), 2)
    assert found[0].filename == __file__
