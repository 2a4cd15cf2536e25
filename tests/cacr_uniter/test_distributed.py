"""Two processes (gloo) train like one on the same global batch, and only the first writes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cacr_uniter.errors import UserError
from cacr_uniter.training import checkpoint as checkpoints
from cacr_uniter.training.checks import check
from cacr_uniter.training.testing import small_config, small_run, synthetic_source

FIELDS: dict[str, Any] = {
    "model__dropout": 0.0,
    "batch__anchors": 4,
    "optim__steps": 4,
    "optim__eps": 1e-2,
    "run__checkpoint_every": 2,
    "run__validate_every": 4,
    "aux__sides": "alternate",
}

PROGRAM = """
import json, os, sys
from pathlib import Path
from cacr_uniter.training.testing import *
fields = json.loads(sys.argv[1])
result = small_run(small_config(**fields), validation=synthetic_source(seed=1))
path = Path(fields["out"]).parent / f"rank{os.environ['RANK']}.json"
path.write_text(json.dumps([result.step, result.finished, str(result.checkpoint_path), len(result.history)]))
"""

APART = """
import os, sys
from cacr_uniter.errors import UserError
from cacr_uniter.training.testing import *
fields = json.loads(sys.argv[1])
fields["out"] += os.environ["RANK"]
if os.environ["RANK"] == "1":
    fields |= fields.pop("second", {})
fields.pop("second", None)
try:
    small_run(small_config(**fields))
except UserError as error:
    Path(fields["out"] + ".error").write_text(str(error))
    os._exit(0)  # torch's own threads now and then abort a process that ends while the other one does
"""


pytestmark = pytest.mark.xdist_group("distributed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(out: Path, processes: int, program: str = PROGRAM, **fields: Any) -> None:
    """Runs the program on ``processes`` processes, as torchrun sets them up."""
    common = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    started = []
    for rank in range(processes):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        argument = json.dumps({"out": str(out)} | fields)
        started.append(subprocess.Popen([sys.executable, "-c", program, argument], env=environment))
    assert [process.wait(300) for process in started] == [0] * processes


def close(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in a:
            if name not in ("event", "memory", "pairs_per_second", "seconds"):
                assert a[name] == pytest.approx(b[name], rel=2e-5, abs=1e-7), (name, a["step"])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    launch(out, 2, **FIELDS)
    return out


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_train_like_one(tmp_path: Path, two: Path) -> None:
    one = small_run(small_config(tmp_path / "one", **FIELDS), validation=synthetic_source(seed=1))
    close(one.history, log(two))
    weights = [load_file(run / "checkpoints/step-00000004" / checkpoints.MODEL) for run in (one.out, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6)


def test_all_processes_return_the_result_and_the_first_one_writes(two: Path) -> None:
    reports = [json.loads((two.parent / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [report[:3] for report in reports] == [[4, True, str(two / "checkpoints/step-00000004")]] * 2
    assert [report[3] for report in reports] == [5, 0]


def test_a_run_of_two_processes_continues_on_one(tmp_path: Path, two: Path) -> None:
    shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    resumed = small_run(small_config(tmp_path / "run", **FIELDS), validation=synthetic_source(seed=1))
    close(resumed.history, log(two))


def test_nodes_that_do_not_share_the_folder_are_told(tmp_path: Path, two: Path) -> None:
    shutil.copytree(two, tmp_path / "run0")
    launch(tmp_path / "run", 2, APART, **FIELDS | {"run__validate_every": 0})
    messages = [(tmp_path / f"run{rank}.error").read_text() for rank in (0, 1)]
    assert all("process 0 starts at step 4 and process 1 at step 0: run.out" in message for message in messages)


def test_nodes_with_different_weights_are_told(tmp_path: Path) -> None:
    launch(tmp_path / "run", 2, APART, **FIELDS | {"run__validate_every": 0, "second": {"run__seed": 7}})
    messages = [(tmp_path / f"run{rank}.error").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("processes 0 and 1 start from different weights")


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    """By the command itself on two processes: the first prints the sentence, both end with 2."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, "-m", "cacr_uniter.cli", "train", "--optim.lr", "-1", "--run.out", str(tmp_path / "run")]
    started = [
        subprocess.Popen(
            words,
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    printed = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "cacr: optim.lr is -1.0: give a positive number\n" in printed[0]
    assert "cacr:" not in printed[1]
    assert not (tmp_path / "run").exists()


def test_anchors_must_divide_among_processes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch\.anchors is 2 for 3 processes"):
        check(small_config(tmp_path), 3)
