"""`cacr bench gpu-report`: its commands, their time, what it says of stages that are late or fail."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cacr_uniter import cli
from cacr_uniter.benchmark import ahead, gpu_report, machine
from cacr_uniter.benchmark.gpu_report import SECONDS, STAGES, Command, Stage, counts_of_tests, report, run_stage
from cacr_uniter.errors import UserError


def python(program):
    return [sys.executable, "-c", program]


def test_a_late_stage_is_stopped_with_what_it_started(tmp_path):
    child = "import subprocess, sys; print('pid', subprocess.Popen(['sleep', '60']).pid, flush=True); sys.exit()"
    waits = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert run_stage([Command(python(waits))], tmp_path / "slow.log", 5.0)["outcome"] == "stopped after 5 s"
    started = int(re.search(r"^pid (\d+)$", (tmp_path / "slow.log").read_text(), re.MULTILINE).group(1))
    for _ in range(100):
        state = Path(f"/proc/{started}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process of the stage is still there")


def test_a_late_command_is_asked_first_and_says_what_it_has(tmp_path):
    asked = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('3 failed', flush=True)"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    outcome = run_stage([Command(python(asked)), Command(python(deaf))], tmp_path / "log", 8.0)
    assert "3 failed" in (tmp_path / "log").read_text()
    assert outcome["outcome"].count("stopped after") == 2
    assert outcome["seconds"] < 10


def test_an_interrupted_report_leaves_no_process(tmp_path, monkeypatch):
    begun = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            begun.append(self)
            if len(begun) == 1:
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(gpu_report.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage([Command(python("import time; time.sleep(60)"))], tmp_path / "log", 60.0)
    assert begun[0].poll() == -signal.SIGKILL


def test_the_report_survives_stages_that_fail(tmp_path, monkeypatch):
    def not_here(*_):
        raise UserError("needs the repository")

    stages = {
        "exits": lambda *_: [Command(python("exit(3)")), Command(python("print('the next command runs')"))],
        "refuses": not_here,
        "nowhere": lambda *_: [Command(["/nowhere/tool"])],
        "absent": lambda *_: [],
        "fine": lambda *_: [Command(python("print('done')"))],
    }
    monkeypatch.setattr(gpu_report, "STAGES", {name: Stage(0.2, commands) for name, commands in stages.items()})
    report(list(stages), tmp_path, 60.0, lambda _: None)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["exits"]["outcome"] == "failed with exit status 3"
    assert "the next command runs" in (tmp_path / "report-exits.log").read_text()
    assert found["refuses"]["outcome"] == "failed: needs the repository"
    assert found["nowhere"]["outcome"].startswith("failed: ")
    assert found["absent"]["outcome"] == "left out: its tool is not installed"
    assert found["fine"]["outcome"] == "ok"


def test_the_stages_share_the_time():
    assert sum(stage.share for stage in STAGES.values()) == pytest.approx(1.0)


def test_a_report_without_a_gpu_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert cli.main(["bench", "gpu-report"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("cores", "gpu", "processes"), [(4, 0, 4), (192, 0, 8), (192, 1, 192)])
def test_make_test_has_few_processes_where_a_gpu_answers(tmp_path, cores, gpu, processes):
    for name, script in (("nproc", f"echo {cores}"), ("nvidia-smi", f"exit {gpu}")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    words = ["make", "--dry-run", "test", "STAMP=/dev/null", "OLD_TRITON=/dev/null"]
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    made = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]).stdout
    assert f"-n {processes} " in made


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A GPU of compute capability 7.5 with compute-sanitizer in CUDA_HOME; Triton cannot run, cuda can."""
    tool = tmp_path / "cuda/bin/compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_report, "_available", lambda: ["cuda"])
    monkeypatch.setattr(machine, "half_dtype", lambda device: "float16")
    return tool


def words(stage):
    return [" ".join(command.words) for command in STAGES[stage].commands(Path("out"))]


def test_goals_come_after_what_they_compile_and_what_is_left_goes_to_the_kernels(card, monkeypatch):
    assert list(STAGES)[:4] == ["doctor", "compile", "goals", "tests"]
    assert list(STAGES)[-2:] == ["kernels", "summary"]
    assert max(STAGES.values(), key=lambda stage: stage.share) is STAGES["goals"]
    long, uniter = words("goals")
    assert "--shapes square-4096 --variants qk --dtypes float16" in long
    assert "--contenders triton sdpa eager" in long
    assert "--dtypes float16 float32 --contenders triton cuda eager compiled compiled-max" in uniter
    assert words("numerics")[0].endswith("numerics --print --quick --backends cuda")
    assert words("kernels")[0].count("--missing") == 1
    uniter_first, one = words("compile")
    assert uniter.replace(" --out out", "") + " --compile-only" == uniter_first
    assert one.endswith("calls --one cuda")
    monkeypatch.setattr(gpu_report, "_available", lambda: ["cuda", "triton"])
    *first, calls = words("compile")
    assert [command.split()[-1] for command in first] == ["--compile-only"] * 2
    assert calls.endswith(f"calls cuda triton --processes {gpu_report.workers()} --budget {SECONDS}")


def test_every_command_is_understood(card, monkeypatch):
    """The options exist: a stage must not fail on a GPU for a word that nobody knows."""
    from cacr_uniter.benchmark import numerics, run, training_run

    class Understood(Exception):
        pass

    def stop(*_, **__):
        raise Understood

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(run, "run_benchmark", stop)
    monkeypatch.setattr(training_run, "run_settings", stop)
    monkeypatch.setattr(numerics, "backends", stop)
    monkeypatch.setattr(ahead, "compile_ahead", stop)
    for stage in ("goals", "training", "kernels", "numerics"):
        for command in STAGES[stage].commands(Path("out")):
            start = command.words.index("bench")
            with pytest.raises(Understood):
                cli.main([word.replace(SECONDS, "9") for word in command.words[start:]])
            if stage == "goals":
                with pytest.raises(Understood):
                    cli.main([word.replace(SECONDS, "9") for word in [*command.words[start:], "--compile-only"]])


def test_tests_run_in_few_processes_and_only_those_of_a_gpu(monkeypatch):
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 192)
    monkeypatch.chdir(Path(__file__).parents[2])
    kernels, training = words("tests")
    assert " -v " in kernels
    assert " -n 8 " in kernels
    assert training.endswith("tests/cacr_uniter -m gpu")
    collect = [sys.executable, "-m", "pytest", "tests/cacr_kernels/test_ops.py", "-k", gpu_report.KERNEL_TESTS]
    found = subprocess.run([*collect, "--collect-only", "-q"], capture_output=True, text=True, check=True).stdout
    assert "test_cuda_graph_capture[triton]" in found
    assert "test_cuda_graph_capture[cuda]" in found
    assert "[cpu]" not in found.replace("test_cuda_graph_capture[cpu]", "")


def test_the_sanitizer_is_found_and_watches_all_backends_at_once(card, monkeypatch):
    commands = words("sanitizer")
    assert [command.split()[:3] for command in commands] == [
        [str(card), "--tool", t] for t in ("memcheck", "racecheck")
    ]
    assert all("--report-api-errors no" in command and command.endswith("calls cuda") for command in commands)
    assert STAGES["sanitizer"].together
    monkeypatch.setattr(gpu_report, "_available", lambda: ["cuda", "triton"])
    watched = [(command.split()[2], command.split()[-1]) for command in words("sanitizer")]
    assert watched == [(tool, name) for tool in ("memcheck", "racecheck") for name in ("cuda", "triton")]
    card.unlink()
    monkeypatch.delenv("CUDA_PATH", raising=False)
    if not Path("/usr/local/cuda/bin/compute-sanitizer").is_file():
        assert words("sanitizer") == []


def test_commands_of_a_stage_may_run_together_and_each_has_all_of_its_time(tmp_path):
    waits = "import sys, time; print('begins', sys.argv[1], flush=True); time.sleep(2)"
    fails = "print('fails'); exit(3)"
    sleeps = "import time; time.sleep(60)"
    commands = [Command([*python(waits), SECONDS]), Command(python(fails)), Command(python(sleeps))]
    outcome = run_stage(commands, tmp_path / "log", 8.0, together=True)
    assert outcome["outcome"] == "failed with exit status 3; stopped after 8 s"
    assert outcome["seconds"] < 12
    log = (tmp_path / "log").read_text()
    assert re.findall(r"^(?:begins|fails).*$", log, re.MULTILINE) == ["begins 5", "fails"]
    assert log.count("$ ") == 3


def test_commands_share_the_time_by_weight_and_a_late_one_does_not_keep_the_next(tmp_path):
    say = "import sys, time; print('has', sys.argv[1], flush=True); time.sleep(float(sys.argv[2]))"
    late, short = ([sys.executable, "-c", say, SECONDS, seconds] for seconds in ("60", "0"))
    outcome = run_stage([Command(late), Command(short, 3.0)], tmp_path / "log", 20.0)
    assert outcome["outcome"] == "stopped after 5 s"
    first, second = re.findall(r"^has (\d+)$", (tmp_path / "log").read_text(), re.MULTILINE)
    assert int(first) == 3  # of 5, without those after which it is asked to stop
    assert int(second) in (9, 10)  # asked to stop, the late one may end before its time is up


@pytest.mark.parametrize(
    ("log", "counts"),
    [
        ("a::b PASSED\n=== 2 failed, 7 passed, 1 skipped in 9.00s ===\n", "2 failed, 7 passed, 1 skipped"),
        ("=== 7 passed in 75.12s (0:01:15) ===\n", "7 passed"),
        ("[gw0] [ 1%] PASSED t.py::a\n[gw1] [ 2%] FAILED t.py::b\nt.py::c PASSED [3%]\n", "2 passed, 1 failed"),
        ("Traceback\n", "none finished"),
        ("$ pytest a\n=== 7 passed in 1.00s ===\n$ pytest b\nt.py::c PASSED [3%]\n", "7 passed; 1 passed"),
    ],
)
def test_tests_are_counted_also_where_they_were_stopped(log, counts):
    assert counts_of_tests(log) == counts


def test_the_report_has_the_counts_of_its_tests(tmp_path, monkeypatch):
    prints = python("print('=== 7 passed in 1.00s ===')")
    monkeypatch.setattr(gpu_report, "STAGES", {"tests": Stage(1.0, lambda _: [Command(prints)])})
    assert report(["tests"], tmp_path, 30.0, lambda _: None)["tests"]["tests"] == "7 passed"
