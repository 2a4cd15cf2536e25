"""`cacr bench gpu-report`: what a GPU says about this package, in minutes, each result written as soon as it exists.

Stages: doctor, tests, sanitizer, goals, kernels, training, numerics, summary. Each has a share of the time; one that
is late is stopped, what it has written stays, and the report says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cacr_uniter.errors import UserError

BUDGET = 520.0
"""Seconds of the whole report: under nine minutes."""

GOAL_SHAPES = ("uniter-100-b128", "uniter-36-b128", "square-4096")


@dataclass(frozen=True)
class Stage:
    """Commands of a stage, and its share of the budget."""

    share: float
    commands: Callable[[Path, float], list[list[str]]]


def _cacr(*words: str) -> list[str]:
    return [sys.executable, "-m", "cacr_uniter.cli", *words]


def _doctor(out: Path, seconds: float) -> list[list[str]]:
    return [_cacr("doctor"), [sys.executable, "-c", "import cacr_kernels.native as n; print(n.build_info())"]]


def _tests(out: Path, seconds: float) -> list[list[str]]:
    tests = Path("tests/cacr_kernels")
    if not tests.is_dir():
        raise UserError("the stage tests needs the repository: run it there, or choose other stages with --stages")
    return [[sys.executable, "-m", "pytest", str(tests), "-q", "--maxfail=20", "-m", "gpu or not slow"]]


def _sanitizer(out: Path, seconds: float) -> list[list[str]]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        return []
    script = [sys.executable, "-m", "cacr_uniter.benchmark.sanitized"]
    return [[tool, "--tool", name, "--error-exitcode", "1", *script] for name in ("memcheck", "racecheck")]


def _goals(out: Path, seconds: float) -> list[list[str]]:
    options = ["--preset", "full", "--shapes", *GOAL_SHAPES, "--kinds", "scores", "--seconds", "0.4"]
    return [_cacr("bench", *options, "--budget", f"{0.8 * seconds:.0f}", "--out", str(out))]


def _kernels(out: Path, seconds: float) -> list[list[str]]:
    return [
        _cacr("bench", "--preset", "full", "--seconds", "0.2", "--budget", f"{0.8 * seconds:.0f}", "--out", str(out))
    ]


def _training(out: Path, seconds: float) -> list[list[str]]:
    options = ["--memory-limit", "11GB", "--seconds", "0.5", "--budget", f"{0.85 * seconds:.0f}", "--out", str(out)]
    return [_cacr("bench", "training", *options)]


def _numerics(out: Path, seconds: float) -> list[list[str]]:
    return [_cacr("bench", "numerics", "--print")]


def _summary(out: Path, seconds: float) -> list[list[str]]:
    return [_cacr("bench", "plot", "--out", str(out))]


STAGES = {
    "doctor": Stage(0.04, _doctor),
    "tests": Stage(0.22, _tests),
    "sanitizer": Stage(0.12, _sanitizer),
    "goals": Stage(0.20, _goals),
    "training": Stage(0.16, _training),
    "kernels": Stage(0.16, _kernels),
    "numerics": Stage(0.06, _numerics),
    "summary": Stage(0.04, _summary),
}


def run_stage(commands: Sequence[Sequence[str]], log: Path, seconds: float) -> dict[str, object]:
    """Runs commands one after another into a log; stops them together when the time is over."""
    start = time.monotonic()
    outcome: dict[str, object] = {"outcome": "ok", "log": log.name}
    if not commands:
        return {"outcome": "left out: its tool is not installed"}
    with log.open("w", encoding="utf-8") as file:
        for command in commands:
            file.write("$ " + " ".join(command) + "\n")
            file.flush()
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(max(seconds - (time.monotonic() - start), 1.0))
            except subprocess.TimeoutExpired:
                outcome["outcome"] = f"stopped after {seconds:.0f} s"
                break
            finally:  # also what the command left behind, and when the report itself is interrupted
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if code:
                outcome["outcome"] = f"failed with exit status {code}"
    outcome["seconds"] = round(time.monotonic() - start, 1)
    return outcome


def report(stages: Sequence[str], out: Path, budget: float, say: Callable[[str], None]) -> dict[str, dict[str, object]]:
    """Runs stages in order into ``out``; time that one leaves is shared by the next. Writes ``report.json`` after each.

    A stage that fails, or cannot begin here, is an outcome: the others run.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    outcomes: dict[str, dict[str, object]] = {}
    for number, name in enumerate(stages):
        remaining = sum(STAGES[other].share for other in stages[number:])
        seconds = max((end - time.monotonic()) * STAGES[name].share / remaining, 5.0)
        say(f"{name}: up to {seconds:.0f} s")
        try:
            outcomes[name] = run_stage(STAGES[name].commands(out, seconds), out / f"report-{name}.log", seconds)
        except (UserError, OSError) as error:
            outcomes[name] = {"outcome": f"failed: {error}"}
        say(f"{name}: {outcomes[name]['outcome']}")
        (out / "report.json").write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
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
