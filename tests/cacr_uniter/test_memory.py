"""Full memory, of a GPU or of the machine: told in one sentence wherever it happens, with what to do about it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacr_uniter import cli
from cacr_uniter.commands import doctor, eval_retrieval, train
from cacr_uniter.data import codec
from cacr_uniter.errors import UserError, is_out_of_memory
from cacr_uniter.training.build import build_accelerator, limit_memory
from cacr_uniter.training.step import Stepper
from cacr_uniter.training.testing import small_config, small_run


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    backward = Stepper.backward

    def fail(self: Stepper, portion: Any) -> torch.Tensor:
        if portion.step == 3:
            raise error
        return backward(self, portion)

    monkeypatch.setattr(Stepper, "backward", fail)
    with pytest.raises(UserError, match=r"out of memory on cpu: .*step-00000002; go on .* lower batch\.pairs"):
        small_run(small_config(tmp_path))
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def test_a_resumed_run_may_take_smaller_portions(tmp_path: Path) -> None:
    small_run(small_config(tmp_path, optim__steps=8, run__checkpoint_every=4))
    last = tmp_path / "checkpoints" / "step-00000008"
    last.rename(tmp_path / "away")
    resumed = small_run(small_config(tmp_path, batch__pairs_per_forward=4, batch__score_chunk=3))
    assert resumed.finished


@pytest.mark.parametrize(
    ("command", "module", "advice"),
    [
        (["train"], train, "cacr train --plan"),
        (["eval", "retrieval"], eval_retrieval, "lower --batch-size"),
        (["doctor"], doctor, "close other programs"),
    ],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), MemoryError()]
)
def test_full_memory_anywhere_is_one_sentence_and_status_2(
    command: list[str],
    module: Any,
    advice: str,
    error: Exception,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(module, "main", full)
    assert cli.main(command) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("cacr: out of memory: ")
    assert advice in printed
    assert printed.count("\n") == 1
    with pytest.raises(UserError):
        cli.main(["--traceback", *command])


def test_other_runtime_errors_are_bugs_and_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(doctor, "main", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor"])
    assert not is_out_of_memory(RuntimeError("triton: out of resource: shared memory"))


def test_full_memory_is_not_called_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def decompress(self, data: bytes, max_length: int) -> bytes:
            raise MemoryError

    def full(*args: Any, **options: Any) -> None:
        raise MemoryError

    record = codec.pack_npz({"features": torch.ones(2, 3).numpy()})
    with monkeypatch.context() as patch:
        patch.setattr(codec.lz4.frame, "LZ4FrameDecompressor", Full)
        patch.setattr(codec.npy, "read_array", full)
        with pytest.raises(MemoryError):
            codec.unpack_text(b"anything")
        with pytest.raises(MemoryError):
            codec.unpack_npz(record)


def test_an_array_larger_than_its_file_is_damage(tmp_path: Path) -> None:
    import io
    import zipfile

    header = io.BytesIO()
    codec.npy.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 10)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("features.npy", header.getvalue() + bytes(64))
    with pytest.raises(ValueError, match=r"damaged npz archive \(an array of \[1099511627776, 1024\] float32"):
        codec.unpack_npz(tmp_path / "x.npz")


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_the_memory_limit_names_the_gpu_by_number(monkeypatch: pytest.MonkeyPatch, device: str, index: int) -> None:
    """accelerate's device of a single process has no number, torch's cap wants one."""
    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *arguments: found.extend(arguments))
    limit_memory(torch.device(device), 25)
    assert found == [0.25, index]


def test_a_run_on_a_gpu_may_follow_one_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_accelerator(small_config(tmp_path).run).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert build_accelerator(small_config(tmp_path, run__device="cuda").run).device.type == "cuda"
    monkeypatch.undo()
    assert build_accelerator(small_config(tmp_path).run).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_memory_limit_caps_the_allocator(tmp_path: Path) -> None:
    build_accelerator(small_config(tmp_path, run__device="cuda", run__memory_limit="1GB").run)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1_100_000_000, dtype=torch.uint8, device="cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_memory_limit_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.memory_limit caps a GPU"):
        build_accelerator(small_config(tmp_path, run__memory_limit="11GB").run)
