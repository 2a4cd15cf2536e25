"""A run that is killed and started again gives the numbers of one that was not, bit for bit, and never loses its last
good checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cacr_uniter.data.testing import Payload
from cacr_uniter.errors import UserError
from cacr_uniter.training import checkpoint as checkpoints
from cacr_uniter.training.checks import differences
from cacr_uniter.training.step import Stepper
from cacr_uniter.training.testing import numbers, small_config, small_run

KILLED = -signal.SIGKILL


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cacr_uniter.training.testing"])


def child(*setup: str, **fields: Any) -> BaseProcess:
    """A process of its own that runs ``setup`` and then a small run; what it raises goes to ``<out>.error``."""
    lines = [
        "from cacr_uniter.errors import UserError",
        "from cacr_uniter.training.testing import *",
        *setup,
        f"try: small_run(small_config(**{fields!r}))",
        f"except UserError as error: Path({fields['out'] + '.error'!r}).write_text(str(error)); raise SystemExit(2)",
    ]
    process = FORKS.Process(target=exec, args=("\n".join(lines), {}))
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    """Its exit status."""
    process.join(120)
    return process.exitcode


def log(out: Path) -> list[dict[str, Any]]:
    return numbers([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])


def assert_same_end(one: Path, other: Path) -> None:
    assert log(one) == log(other)
    for name in (checkpoints.MODEL, checkpoints.OPTIMIZER):
        last = [load_file(checkpoints.newest(out / "checkpoints") / name) for out in (one, other)]  # type: ignore[operator]
        assert last[0].keys() == last[1].keys()
        assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one piece."""
    out = tmp_path_factory.mktemp("whole") / "run"
    small_run(small_config(out))
    return out


KILL_AT_STEP = """
import os, signal
from cacr_uniter.training.step import Stepper
begin = Stepper.begin
def killing(self, step):
    begin(self, step)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
Stepper.begin = killing
"""

KILL_IN_SAVE = """
import os, signal
from cacr_uniter.training import checkpoint
real, calls = checkpoint.{function}, [0]
def killing(*args, **kwargs):
    calls[0] += 1
    before = {before}
    if not before:
        value = real(*args, **kwargs)
    if calls[0] == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs) if before else value
checkpoint.{function} = killing
"""


@pytest.mark.parametrize("step", [0, 5])
def test_killed_between_checkpoints(whole: Path, tmp_path: Path, step: int) -> None:
    process = child(KILL_AT_STEP.format(step=step), out=str(tmp_path / "run"))
    assert ended(process) == KILLED
    assert len(log(tmp_path / "run")) == step
    small_run(small_config(tmp_path / "run"))
    assert_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("function", "call", "before", "complete"),
    [
        ("save_file", 5, False, 2),  # weights written
        ("save_file", 6, False, 2),  # optimizer written
        ("flush", 15, True, 2),  # among the flushes of the third checkpoint
        ("_remove", 1, True, 4),  # fourth checkpoint complete, the oldest not yet removed
    ],
)
def test_killed_while_a_checkpoint_is_written(
    whole: Path, tmp_path: Path, function: str, call: int, before: bool, complete: int
) -> None:
    out = tmp_path / "run"
    process = child(KILL_IN_SAVE.format(function=function, call=call, before=before), out=str(out))
    assert ended(process) == KILLED
    found = checkpoints.checkpoints(out / "checkpoints")
    assert [path.name for path in found] == [f"step-{2 * i:08d}" for i in range(1, complete + 1)]
    for path in found:
        checkpoints.load(path)
    small_run(small_config(out))
    assert_same_end(whole, out)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [f"step-{i:08d}" for i in (4, 6, 8)]


def test_killed_at_a_random_moment_again_and_again(whole: Path, tmp_path: Path) -> None:
    out, kills = tmp_path / "run", 0
    for attempt in range(3):
        process = child(out=str(out))
        while process.is_alive() and not log_length(out) > 2 * attempt:
            time.sleep(0.005)
        process.kill()
        kills += ended(process) == KILLED
    assert kills >= 2
    small_run(small_config(out))
    assert_same_end(whole, out)


def log_length(out: Path) -> int:
    path = out / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_terminated_politely_it_saves_and_says_so(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop = KILL_AT_STEP.format(step=2).replace("SIGKILL", "SIGTERM")
    process = child(stop, out=str(out))
    assert ended(process) == 0
    assert [path.name for path in checkpoints.checkpoints(out / "checkpoints")][-1] == "step-00000003"
    result = small_run(small_config(out))
    assert result.finished
    assert log(out) == log(whole)


def test_windows_of_the_log_survive_a_resume(tmp_path: Path) -> None:
    """A line averages over several steps; those before the kill must be in it."""
    config = {"run__log_every": 4, "run__checkpoint_every": 3}
    small_run(small_config(tmp_path / "a", **config))
    process = child(KILL_AT_STEP.format(step=7), out=str(tmp_path / "b"), **config)
    assert ended(process) == KILLED
    small_run(small_config(tmp_path / "b", **config))
    assert log(tmp_path / "a") == log(tmp_path / "b")


def test_a_run_that_goes_on_says_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_run(small_config(tmp_path, run__checkpoint_every=4), progress=True)
    assert "continues" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    small_run(small_config(tmp_path, run__checkpoint_every=4), progress=True)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"continues from {tmp_path}/checkpoints/step-00000004"
    assert told[1].startswith("step 5/8 ")


def test_a_finished_run_is_left_as_it_is(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = log(whole)
    result = small_run(small_config(whole), progress=True)
    assert result.finished
    assert (result.start, result.step) == (8, 8)
    assert capsys.readouterr().err == ""
    assert numbers(result.history) == before == log(whole)


def test_resume_refuses_other_settings_by_name(whole: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 -> 0\.5.*run\.overwrite"):
        small_run(small_config(whole, optim__lr=0.5))


def test_a_field_newer_than_the_checkpoint_had_its_default(whole: Path) -> None:
    saved = checkpoints.load(whole / "checkpoints" / "step-00000008").config
    del saved["aux"]["pairs"]
    assert differences(saved, small_config(whole)) == []
    assert differences(saved, small_config(whole, aux__pairs="all")) == ["aux.pairs: positives -> all"]


def test_resume_no_refuses_a_used_folder(whole: Path) -> None:
    with pytest.raises(UserError, match="holds a run already"):
        small_run(small_config(whole, run__resume="no"))


def test_a_finished_checkpoint_is_not_resumed_elsewhere(whole: Path, tmp_path: Path) -> None:
    last = whole / "checkpoints" / "step-00000008"
    with pytest.raises(UserError, match=rf"run\.resume {last} has done all 8 steps: nothing is left to do"):
        small_run(small_config(tmp_path / "new", run__resume=str(last)))
    assert not (tmp_path / "new").exists()


def test_the_same_command_goes_on_where_a_named_checkpoint_was_the_start(whole: Path, tmp_path: Path) -> None:
    middle = whole / "checkpoints" / "step-00000006"
    first = small_run(small_config(tmp_path, run__resume=str(middle)))
    assert [record["step"] for record in first.history] == [7, 8]
    again = small_run(small_config(tmp_path, run__resume=str(middle)))
    assert (again.finished, again.step) == (True, 8)
    assert [record["step"] for record in again.history if record["event"] == "train"] == [7, 8]
    last = [load_file(out / "checkpoints" / "step-00000008" / checkpoints.MODEL) for out in (whole, tmp_path)]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


def test_the_log_of_a_run_that_is_not_continued_is_dropped(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before a checkpoint, run once more from other weights, then from the middle of another run."""
    begin, killed = Stepper.begin, RuntimeError("killed")

    def dying(self: Stepper, step: int) -> None:
        if step == 7:
            raise killed
        begin(self, step)

    monkeypatch.setattr(Stepper, "begin", dying)
    sizes = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), "null")
    start = {f"model__{name}": value for name, value in sizes.items()} | {"run__checkpoint_every": 100}
    for step in (2, 4):
        shutil.copytree(whole / "checkpoints" / "step-00000006", tmp_path / f"start{step}", dirs_exist_ok=True)
        with pytest.raises(RuntimeError, match="killed"):
            small_run(small_config(tmp_path / "run", model__checkpoint=tmp_path / f"start{step}", **start))
        told = [record["report"] for record in log(tmp_path / "run") if record["event"] == "weights"]
        assert len(told) == 1
        assert f"start{step}" in told[0]
    monkeypatch.undo()
    middle = whole / "checkpoints" / "step-00000006"
    result = small_run(small_config(tmp_path / "run", run__resume=str(middle)))
    assert [record["step"] for record in result.history] == [7, 8]


def test_a_checkpoint_may_take_the_place_of_one_of_the_same_step(whole: Path, tmp_path: Path) -> None:
    found = checkpoints.load(whole / "checkpoints" / "step-00000008")
    for _ in range(2):
        path = checkpoints.save(tmp_path, found, keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    checkpoints.load(path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_at_once_do_not_share_a_folder(tmp_path: Path, overwrite: bool) -> None:
    """They would delete each other's half-written checkpoints. A killed run lets go of its folder."""
    refused: list[str] = []

    def second(model: Any, done: int) -> dict[str, float]:
        with pytest.raises(UserError) as caught:
            small_run(small_config(other, run__overwrite=overwrite))
        refused.append(str(caught.value))
        return {}

    other = tmp_path / "other"
    small_run(small_config(other, optim__steps=2, run__validate_every=2), evaluate=second)
    assert len(refused) == 1
    assert f"run.out {other} is in use by a run that is not over" in refused[0]
    assert [record["step"] for record in log(other) if record["event"] == "train"] == [1, 2]
    assert small_run(small_config(other, optim__steps=2, run__validate_every=2)).finished


def test_overwrite_starts_again(tmp_path: Path) -> None:
    small_run(small_config(tmp_path / "run", optim__steps=4))
    result = small_run(small_config(tmp_path / "run", optim__steps=2, run__overwrite=True))
    assert [record["step"] for record in result.history] == [1, 2]
    assert result.checkpoint_path.name == "step-00000002"


@pytest.mark.parametrize("name", [checkpoints.MODEL, checkpoints.OPTIMIZER, checkpoints.SIZES, checkpoints.STATE])
@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
def test_a_damaged_checkpoint_is_named_and_so_is_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    out = tmp_path / "run"
    small_run(small_config(out, optim__steps=4))
    bad, good = out / "checkpoints" / "step-00000004", out / "checkpoints" / "step-00000002"
    path = bad / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\x80" * path.stat().st_size)
    with pytest.raises(UserError) as caught:
        small_run(small_config(out, optim__steps=4))
    message = str(caught.value)
    assert str(bad) in message
    assert name in message or "damaged" in message
    checkpoints.load(good)


@pytest.mark.parametrize("name", [checkpoints.MODEL, checkpoints.OPTIMIZER])
def test_one_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    """Else it would train on, or diverge and be called the last good checkpoint."""
    small_run(small_config(tmp_path, optim__steps=2))
    path = tmp_path / "checkpoints" / "step-00000002" / name
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"damaged \({name} is not what was written\): .* with run.overwrite true"):
        small_run(small_config(tmp_path, optim__steps=2))
    state = path.parent / checkpoints.STATE
    values = json.loads(state.read_text())
    del values["crc32"]
    state.write_text(json.dumps(values))
    checkpoints.load(path.parent)  # as written by earlier versions


@pytest.mark.parametrize("field", ["bytes", "step", "config", "extra"])
def test_a_state_that_lacks_something_is_damage(tmp_path: Path, field: str) -> None:
    small_run(small_config(tmp_path, optim__steps=2))
    state = tmp_path / "checkpoints" / "step-00000002" / checkpoints.STATE
    values = json.loads(state.read_text())
    for changed in ({k: v for k, v in values.items() if k != field}, values | {field: None}):
        state.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"damaged \(state\.json is not as it was written"):
            small_run(small_config(tmp_path, optim__steps=2))


def test_a_pickle_in_place_of_weights_is_not_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small_run(small_config(out, optim__steps=2))
    path = out / "checkpoints" / "step-00000002" / checkpoints.MODEL
    torch.save({"model": Payload(tmp_path / "ran")}, path)
    state = path.parent / checkpoints.STATE
    values = json.loads(state.read_text())
    values["bytes"][checkpoints.MODEL] = path.stat().st_size
    del values["crc32"]
    state.write_text(json.dumps(values))
    with pytest.raises(UserError, match="damaged"):
        small_run(small_config(out, optim__steps=2))
    assert not (tmp_path / "ran").exists()


def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """The limit on file size makes the kernel refuse the write, as a full disk does."""
    out = tmp_path / "run"
    small_run(small_config(out, optim__steps=4, run__checkpoint_every=4))
    (out / "checkpoints" / "step-00000004").rename(out / "checkpoints" / "step-00000001")
    setup = (
        "import resource, signal",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
        "import cacr_uniter.training.checkpoint as c, cacr_uniter.training.trainer as t",
        "t.checkpoints.load = lambda path, load=c.load: __import__('dataclasses').replace(load(path), step=1)",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))",
    )
    process = child(*setup, out=str(out), optim__steps=4, run__checkpoint_every=4)
    assert ended(process) == 2
    message = Path(f"{out}.error").read_text()
    assert "step-00000004 could not be written (" in message
    assert f"the last good checkpoint is {out}/checkpoints/step-00000001" in message
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]
    checkpoints.load(out / "checkpoints" / "step-00000001")
