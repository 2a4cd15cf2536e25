"""`cacr bench gpu-report`: what a GPU says about this package, in minutes, each result written as soon as it exists.

Stages: doctor, compile (what the others call, several processes at once), then in order of worth goals, tests,
sanitizer, training, numerics, kernels, and summary. Each has a share of the time; one that is late is stopped, what it
has written stays, and the report says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cacr_uniter.benchmark.ahead import workers
from cacr_uniter.benchmark.results import REPORT
from cacr_uniter.errors import UserError
from cacr_uniter.files import write_json

BUDGET = 520.0
"""Seconds of the whole report: under nine minutes."""

SECONDS = "{seconds}"
"""In a command: most of the seconds it has, so that it ends by itself and says what it left out."""

KERNEL_TESTS = "(triton or cuda or card or gpu) and not (emulated or test_build or cuda_compile or aot or launch_table)"
"""Tests of cacr_kernels that a GPU runs, by name."""

GPU_BACKENDS = ("cuda", "triton")


@dataclass(frozen=True)
class Command:
    """Words of a command, and its weight when the commands of a stage share the time."""

    words: Sequence[str]
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """Commands of a stage, given the folder of the results, its share of the budget and the least seconds it needs.

    ``together``: the commands run at the same time, each for all of the stage's time.
    """

    share: float
    commands: Callable[[Path], list[Command]]
    least: float = 5.0
    together: bool = False


def _cacr(*words: str) -> list[str]:
    return [sys.executable, "-m", "cacr_uniter.cli", *words]


def _calls(*words: str) -> list[str]:
    return [sys.executable, "-m", "cacr_uniter.benchmark.calls", *words]


def _available() -> list[str]:
    """Our backends that this GPU can run.

    Raises:
        UserError: none can.
    """
    from cacr_kernels import backends

    found = [name for name in GPU_BACKENDS if backends()[name].available]
    if not found:
        raise UserError("neither triton nor cuda can run here: see `cacr doctor`")
    return found


def _doctor(out: Path) -> list[Command]:
    build = [sys.executable, "-c", "import cacr_kernels.native as n; print(n.build_info())"]
    return [Command(_cacr("doctor")), Command(build)]


def _compile(out: Path) -> list[Command]:
    """What the goals, the training cost and the sanitizer call, in this order of worth.

    Each kernel runs here for the first time: a line says which calls fail.
    """
    names = _available()
    commands = [Command([*words, "--compile-only"], weight) for words, weight in _goal_words()]
    calls = Command(_calls(*names, "--processes", str(workers()), "--budget", SECONDS), 2.0)
    return [commands[1], commands[0], calls] if "triton" in names else [commands[1], Command(_calls("--one", *names))]


def _goal_words() -> list[tuple[list[str], float]]:
    """Commands of the goals of docs/performance.md and their weights, the one of q and k first."""
    from cacr_uniter.benchmark.machine import half_dtype

    half = half_dtype("cuda")
    usual = ["--preset", "full", "--kinds", "scores", "--budget", SECONDS]
    long = ["--shapes", "square-4096", "--variants", "qk", "--dtypes", half, "--contenders", "triton", "sdpa", "eager"]
    uniter = ["--shapes", "uniter-100-b128", "uniter-36-b128", "--variants", "scores", "--dtypes", half, "float32"]
    peers = ["--contenders", "triton", "cuda", "eager", "compiled", "compiled-max"]
    return [
        (_cacr("bench", *usual, *long, "--seconds", "0.4"), 1.0),
        (_cacr("bench", *usual, *uniter, *peers, "--seconds", "0.2"), 3.0),
    ]


def _goals(out: Path) -> list[Command]:
    return [Command([*words, "--out", str(out)], weight) for words, weight in _goal_words()]


def _tests(out: Path) -> list[Command]:
    if not Path("tests/cacr_kernels").is_dir():
        raise UserError("the stage tests needs the repository: run it there, or choose other stages with --stages")
    shared = []
    if importlib.util.find_spec("xdist") is not None:
        shared = ["-n", str(workers()), "--dist", "loadgroup"]
    usual = [sys.executable, "-m", "pytest", "-v", "--maxfail=20"]
    return [
        Command([*usual, *shared, "tests/cacr_kernels", "-k", KERNEL_TESTS, "-m", "gpu or not slow"], 4.0),
        # files that need an optional package which is missing here keep the others from nothing
        Command([*usual, "--continue-on-collection-errors", "tests/cacr_uniter", "-m", "gpu"]),
    ]


def sanitizer() -> Path | None:
    """compute-sanitizer from the path or the CUDA toolkit; None if there is none."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [
        shutil.which("compute-sanitizer"),
        *(Path(folder) / "bin/compute-sanitizer" for folder in folders if folder),
    ]
    return next((Path(tool) for tool in found if tool is not None and Path(tool).is_file()), None)


def _sanitizer(out: Path) -> list[Command]:
    """Memcheck and racecheck of every backend; Triton's kernels are compiled before, not under a tool."""
    tool = sanitizer()
    if tool is None:
        return []
    options = ["--report-api-errors", "no", "--error-exitcode", "1"]
    kinds = ("memcheck", "racecheck")
    return [Command([str(tool), "--tool", kind, *options, *_calls(name)]) for kind in kinds for name in _available()]


def _training(out: Path) -> list[Command]:
    usual = ["--memory-limit", "11GB", "--seconds", "0.5", "--budget", SECONDS, "--out", str(out)]
    search = ["--variants", "mixed", "--groups", "2", "--auxiliary", "none", "qk"]
    return [
        Command(_cacr("bench", "training", "--quick", "--no-search", *usual), 3.0),
        Command(_cacr("bench", "training", *search, *usual)),
    ]


def _numerics(out: Path) -> list[Command]:
    return [Command(_cacr("bench", "numerics", "--print", "--quick", "--backends", *_available()))]


def _kernels(out: Path) -> list[Command]:
    options = ["--preset", "full", "--missing", "--seconds", "0.2", "--budget", SECONDS, "--out", str(out)]
    return [Command(_cacr("bench", *options))]


def _summary(out: Path) -> list[Command]:
    return [Command(_cacr("bench", "plot", "--out", str(out)))]


STAGES = {
    "doctor": Stage(0.02, _doctor, 25.0),
    "compile": Stage(0.16, _compile, 25.0),
    "goals": Stage(0.25, _goals),
    "tests": Stage(0.19, _tests),
    "sanitizer": Stage(0.11, _sanitizer, together=True),
    "training": Stage(0.12, _training),
    "numerics": Stage(0.04, _numerics),
    "kernels": Stage(0.08, _kernels),
    "summary": Stage(0.03, _summary),
}


def run_stage(commands: Sequence[Command], log: Path, seconds: float, together: bool = False) -> dict[str, object]:
    """Runs commands into a log, one after another, each for at most its part of the time that is left.

    What one leaves is shared by the next; one that is late is stopped with all that it started. ``together``: all at
    once, and the log has them one after another when the stage ends.
    """
    if not commands:
        return {"outcome": "left out: its tool is not installed"}
    start = time.monotonic()
    faults = []
    with log.open("wb") as file:
        if together:
            faults = _run(commands, file, seconds)
        else:
            for number, command in enumerate(commands):
                left = seconds - (time.monotonic() - start)
                limit = max(left * command.weight / sum(other.weight for other in commands[number:]), 1.0)
                faults += _run([command], file, limit)
    spent = round(time.monotonic() - start, 1)
    return {"outcome": "; ".join(sorted(faults)) or "ok", "log": log.name, "seconds": spent}


def _run(commands: Sequence[Command], log: IO[bytes], limit: float) -> list[str]:
    """Runs commands at the same time for at most ``limit`` seconds. Returns what went wrong.

    Output goes to the log: that of a single command at once, that of several when they have ended.
    A late command is interrupted for the last part of its time: pytest then tells what has failed.
    """
    farewell = _farewell(limit)
    deadline = time.monotonic() + limit
    faults = []
    with ExitStack() as opened:
        started: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        try:
            for command in commands:
                words = [f"{0.85 * (limit - farewell):.0f}" if word == SECONDS else word for word in command.words]
                output: IO[bytes] = log if len(commands) == 1 else opened.enter_context(tempfile.TemporaryFile())
                output.write(f"$ {' '.join(words)}\n".encode())
                output.flush()
                process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
                started.append((process, output))
            late = _ended_late([process for process, _ in started], deadline - farewell)
            for process in late:
                process.send_signal(signal.SIGINT)
            _ended_late(late, deadline)
            faults = [
                f"stopped after {limit:.0f} s" if process in late else f"failed with exit status {process.returncode}"
                for process, _ in started
                if process in late or process.returncode
            ]
        finally:  # also what the command left behind, and when the report itself is interrupted
            for process, output in started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver cannot be killed
                    process.wait(10)
                if output is not log:
                    output.seek(0)
                    shutil.copyfileobj(output, log)
    return faults


def _farewell(limit: float) -> float:
    """Seconds before the limit at which a late command is interrupted."""
    return min(8.0, limit / 4)


def _ended_late(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> list[subprocess.Popen[bytes]]:
    """Those that have not ended at the deadline."""
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0.0))
    return [process for process in processes if process.poll() is None]


def counts_of_tests(log: str) -> str:
    """``812 passed, 30 skipped`` of each pytest in a log: its last line, or its single tests where that is missing."""
    return "; ".join(_counts(run) for run in re.split(r"^\$ ", log, flags=re.MULTILINE) if run)


def _counts(run: str) -> str:
    last = re.findall(r"^=+ (\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", run, re.MULTILINE)
    if last:
        return str(last[-1])
    lines = [line.split() for line in run.splitlines() if "::" in line]
    words = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    counts = {word.lower(): sum(word in line for line in lines) for word in words}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "none finished"


def report(stages: Sequence[str], out: Path, budget: float, say: Callable[[str], None]) -> dict[str, dict[str, object]]:
    """Runs stages in order into ``out``; time that one leaves is shared by the next. Writes ``report.json`` after each.

    A stage that fails, or cannot begin here, is an outcome: the others run.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    outcomes: dict[str, dict[str, object]] = {}
    for number, name in enumerate(stages):
        remaining = sum(STAGES[other].share for other in stages[number:])
        seconds = max((end - time.monotonic()) * STAGES[name].share / remaining, STAGES[name].least)
        say(f"{name}: up to {seconds:.0f} s")
        try:
            log = out / f"report-{name}.log"
            outcomes[name] = run_stage(STAGES[name].commands(out), log, seconds, STAGES[name].together)
            if name == "tests":
                outcomes[name]["tests"] = counts_of_tests(log.read_text(encoding="utf-8", errors="replace"))
        except (UserError, OSError) as error:
            outcomes[name] = {"outcome": f"failed: {error}"}
        say(f"{name}: {outcomes[name]['outcome']}")
        write_json(out / REPORT, outcomes, indent=1)
    return outcomes


def main(argv: list[str], parser: argparse.ArgumentParser) -> int:
    """The command; ``parser`` has ``--out``. Returns 1 if a stage failed."""
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of the whole report")
    parser.epilog = "stages: " + ", ".join(STAGES)
    args = parser.parse_args(argv)

    import torch

    from cacr_uniter.commands.bench import results_folder

    if not torch.cuda.is_available():
        raise UserError("gpu-report needs an NVIDIA GPU that torch can see; on this machine run `cacr bench` instead")
    out = results_folder(args.out, "cuda")
    outcomes = report(args.stages, out, args.budget, lambda line: print(line, flush=True))
    summary = out / "README.md"
    if summary.is_file():
        print(summary.read_text(encoding="utf-8"))
    print(json.dumps(outcomes, indent=1))
    return int(any(str(outcome["outcome"]).startswith("failed") for outcome in outcomes.values()))
