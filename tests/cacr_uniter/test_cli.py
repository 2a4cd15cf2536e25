"""The `cacr` command: help everywhere, nothing imported early, one sentence and exit status 2 for expected problems."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from cacr_uniter import cli
from cacr_uniter.arguments import DefaultsInHelp
from cacr_uniter.commands import doctor, eval_winoground
from cacr_uniter.errors import UserError

FOUR = "\n".join(f'{{"label": "0_c{c}_i{i}", "score": {int(c == i)}}}' for c in (0, 1) for i in (0, 1))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_importing_the_command_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "rich", "PIL", "lmdb")
    code = f"import sys, cacr_uniter.cli; print([m for m in {heavy} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize(("processes", "farewell"), [("1", "farewell"), ("2", "")])
def test_one_of_several_processes_leaves_without_farewell(processes: str, farewell: str) -> None:
    code = "import atexit; atexit.register(print, 'farewell'); from cacr_uniter import cli; cli.run()"
    environment = os.environ | {"WORLD_SIZE": processes, "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", code, "dcotor"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'dcotor' is no command" in done.stderr
    assert done.stdout.strip() == farewell


def test_no_installed_module_needs_pytest() -> None:
    modules = "cacr_uniter.data.testing, cacr_uniter.data.importers.testing, cacr_uniter.training.testing"
    code = f"import sys; sys.modules['pytest'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["help"]):
        status, out, _ = run(capsys, *argv)
        assert status == 0
        for name in cli.COMMANDS:
            assert f"cacr {name}" in out


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*name.split(), "--help"])
    assert exit_.value.code == 0
    assert f"cacr {name}" in capsys.readouterr().out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "-V") == run(capsys, "--version") == (0, f"cacr-kernels {version('cacr-kernels')}\n", "")


def test_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "data")
    assert status == 0
    assert "cacr data scenes" in out
    assert "doctor" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dance"], "'dance' is no command; there are: doctor"),
        (["data", "dance"], "'data dance' is no command; there are: data scenes"),
        (["data", "scenes", "--out", "x", "--n-train", "3"], "--n-train is 3"),
        (["eval", "winoground"], "give either --scores FILE or --checkpoint"),
        (["eval", "winoground", "--scores", "absent.jsonl"], "absent.jsonl: cannot be read"),
        (["eval", "winoground", "--checkpoint", "absent"], "--checkpoint needs --data"),
        (["eval", "winoground", "--checkpoint", "absent", "--data", "nowhere"], "nowhere"),
        (["eval", "retrieval", "--checkpoint", "absent", "--out", "x"], "give --data DIR"),
        (["data", "check", "nowhere"], "nowhere"),
        (["data", "import", "karpathy-json", "nowhere.json", "--out", "x"], "--vocab"),
        (["train", "--preset", "absent"], "no preset 'absent'"),
        (["study", "--variants", "magic"], "--variants"),
        (["study", "--scenes", "nowhere"], "nowhere does not exist"),
    ],
)
def test_expected_problems_are_one_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert message in err
    assert err.startswith("cacr")
    assert err.strip().count("\n") == 0
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_its_own_exits_with_two() -> None:
    command = [sys.executable, "-m", "cacr_uniter.cli", "eval", "winoground", "--scores", "absent.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        ("lmdb", "the package lmdb is not installed; run: pip install 'cacr-kernels[train]'"),
        ("PIL.Image", "the package pillow is not installed; run: pip install 'cacr-kernels[train]'"),
        ("pyarrow.parquet", "the package pyarrow is not installed; run: pip install"),
    ],
)
def test_a_missing_package_is_named_with_its_cure(
    module: str, advice: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(argv: list[str]) -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(doctor, "main", lacking)
    status, _, err = run(capsys, "doctor")
    assert status == 2
    assert advice in err


def test_a_module_that_no_extra_brings_is_a_bug_and_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'cacr_uniter.absent'", name="cacr_uniter.absent")

    monkeypatch.setattr(doctor, "main", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


def test_every_package_of_the_extra_is_known() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = {line.split(">")[0].split("[")[0] for line in project["optional-dependencies"]["train"]}
    assert set(cli.EXTRA_PACKAGES.values()) == wanted


def test_interruption_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", interrupted)
    status, _, err = run(capsys, "doctor")
    assert (status, err) == (130, "interrupted\n")


def test_traceback_is_shown_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(argv: list[str]) -> int:
        raise UserError("wrong")

    monkeypatch.setattr(doctor, "main", wrong)
    with pytest.raises(UserError, match="wrong"):
        cli.main(["--traceback", "doctor"])


def test_doctor_names_every_backend_and_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    from cacr_kernels import backends

    status, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert set(found["backends"]) == set(backends())
    for state in found["backends"].values():
        assert state["available"] or state["reason"]
    assert found["versions"]["torch"]
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert all(name in out for name in backends())


def test_doctor_tells_what_to_do() -> None:
    down = {name: {"available": False, "reason": "x", "details": ""} for name in ("triton", "cuda", "cpu")}
    advice = doctor._advice(down, [{"name": "GPU"}], ["lmdb"], "12.9")
    assert any("cacr-kernels[train]" in line for line in advice)
    assert {doctor.ADVICE[name] for name in down} <= set(advice)
    up = {name: {"available": True, "reason": "", "details": ""} for name in down}
    assert doctor._advice(up, [{"name": "GPU"}], [], "12.9") == []
    assert "CPU build" in doctor._advice(up, [], [], None)[0]


def test_doctor_lists_a_gpu_that_cuda_cannot_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(index: int) -> None:
        raise RuntimeError("CUDA driver initialization failed\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "GPU 0, unusable: CUDA driver initialization failed" in out


def test_eval_winoground_of_a_score_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "scores.jsonl").write_text(FOUR)
    status, out, _ = run(capsys, "eval", "winoground", "--scores", str(tmp_path / "scores.jsonl"), "--json")
    assert status == 0
    assert json.loads(out)["group"]["score"] == 100.0
    status, out, _ = run(capsys, "eval", "winoground", "--scores", str(tmp_path / "scores.jsonl"))
    assert status == 0
    assert "chance" in out
    assert "16.67" in out


def test_scores_and_examples_must_belong_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scores, examples = tmp_path / "scores.jsonl", tmp_path / "examples.json"
    scores.write_text(FOUR)
    row = {"caption_0": "a", "caption_1": "b"}
    for ids, message in (([1], "lacks example '1' of"), ([0, 1], "lacks example '1' of")):
        examples.write_text(json.dumps([{"id": n, **row} for n in ids]))
        status, _, err = run(capsys, "eval", "winoground", "--scores", str(scores), "--examples", str(examples))
        assert status == 2
        assert message in err
    scores.write_text(FOUR + "\n" + FOUR.replace('"0_', '"1_'))
    examples.write_text(json.dumps([{"id": 0, **row}]))
    status, _, err = run(capsys, "eval", "winoground", "--scores", str(scores), "--examples", str(examples))
    assert status == 2
    assert f"score file {scores} has 1 examples more than {examples}: the two must belong together" in err
    examples.write_text(json.dumps([{"id": 0, **row}, {"id": 1, **row}, {"id": 2, **row}]))
    status, _, err = run(capsys, "eval", "winoground", "--scores", str(scores), "--examples", str(examples))
    assert status == 2
    assert f"score file {scores} lacks example '2' of {examples}: the two must belong together" in err


def test_tables_show_the_breakdowns_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    from cacr_uniter.evaluation.winoground import summary

    groups = {"split": {"seen": [0, 1]}, "tag": {"above": [2]}}
    report = summary(np.random.default_rng(0).normal(size=(8, 2, 2)), groups)
    eval_winoground.show(report, ("split",))
    out = capsys.readouterr().out
    assert "by split" in out
    assert "by tag" not in out


def test_tables_fit_eighty_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from cacr_uniter.evaluation.winoground import summary

    monkeypatch.setenv("COLUMNS", "80")
    scores = np.random.default_rng(0).normal(size=(400, 2, 2)) + 1.4 * np.eye(2)
    eval_winoground.show(summary(scores, {"secondary_tag (contains)": {"Morpheme-Level": list(range(200))}}))
    out = capsys.readouterr().out
    assert "Morpheme-Level │ 200 │" in out
    assert "…" not in out


def test_help_says_a_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(formatter_class=DefaultsInHelp)
    parser.add_argument("--plain", default=3, help="a number")
    parser.add_argument("--told", default=None, help="a number (default: the best one)")
    parser.add_argument("--flag", action="store_true", help="a switch")
    parser.print_help()
    said = [line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert said == ["a number (default: 3)", "a number (default: the best one)", "a switch"]
